"""What the API server takes and refuses by the CRD alone.

An operator may be at work in the cluster all the same. So the runs here are made by dry-run where that will do, and
where a status has to stay as it was written it is that of an ended run, which no operator changes any more.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml
from kubernetes.client import ApiException
from pydantic import ValidationError

from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import MAX_FAILED_BATCHES
from ingestrun.model.spec import IngestRunSpec

if TYPE_CHECKING:
    from tests.api.conftest import Cluster, Json

pytestmark = [pytest.mark.api, pytest.mark.usefixtures("crd")]

CRD: Final = Path(__file__).parents[2] / "crds" / "ingestruns.yaml"
SAMPLES: Final = Path(__file__).parents[2] / "manifests" / "samples"

OWN: Final[dict[str, Any]] = {
    "fetch": {"image": "registry.example/fetch:1"},
    "publish": {"image": "registry.example/publish:1"},
    "batches": {"cursor": {}},
}
HTTP: Final[dict[str, Any]] = {
    "source": {"http": {"url": "https://example.org/items", "pagination": {"page": {}}}},
    "sink": {"parquet": {"path": "items"}},
    "workspace": {"persistentVolumeClaim": {"claimName": "ingest"}},
    "batches": {"cursor": {}},
}
FILES: Final[dict[str, Any]] = {
    "source": {"files": {"path": "landing/*.csv"}},
    "sink": {"parquet": {"path": "items"}},
    "workspace": {"persistentVolumeClaim": {"claimName": "ingest"}},
    "batches": {"cursor": {}},
}
VALIDATE: Final = {"columns": [{"name": "id", "required": True}]}


def merged(base: Any, patch: Any) -> Any:
    """RFC 7386: what a merge patch makes of a document."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(base) if isinstance(base, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def sentence(error: ApiException) -> str:
    return str(json.loads(error.body or "{}")["message"])


def refused(act: Callable[[], object], fragment: str, status: int = 422) -> str:
    with pytest.raises(ApiException) as caught:
        act()
    told = sentence(caught.value)
    assert caught.value.status == status, told
    assert fragment in told
    return told


def env(**variable: Any) -> dict[str, Any]:
    return {"fetch": {"env": [variable]}}


def volume(**fields: Any) -> dict[str, Any]:
    return {"podTemplate": {"volumes": [{"name": "data", **fields}]}}


def mount(path: str, **fields: Any) -> dict[str, Any]:
    return {
        "podTemplate": {
            "volumes": [{"name": "data", "emptyDir": {}}],
            "volumeMounts": [{"name": "data", "mountPath": path, **fields}],
        }
    }


def security(**fields: Any) -> dict[str, Any]:
    return {"podTemplate": {"securityContext": fields}}


def toleration(**fields: Any) -> dict[str, Any]:
    return {"podTemplate": {"tolerations": [fields]}}


def column(**fields: Any) -> dict[str, Any]:
    return {"hooks": [{"name": "check", "validate": {"columns": [{"name": "a", **fields}]}}]}


COUNT: Final = {"batches": {"cursor": None, "partitions": {"count": 3}}}
LIST: Final = {"batches": {"cursor": None, "partitions": {"count": 3, "file": "lists/stations.txt"}}}
VALUES: Final = {"batches": {"cursor": None, "partitions": {"values": ["a", "b"]}}}

RULES: Final[dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    "source and fetch": (HTTP, {"fetch": {"image": "a"}}, "spec.source: Invalid value: set exactly one of source"),
    "neither source nor fetch": (
        HTTP,
        {"source": None},
        "set exactly one of source (the built-in worker reads) and fetch",
    ),
    "sink and publish": (HTTP, {"publish": {"image": "a"}}, "spec.sink: Invalid value: set exactly one of sink"),
    "neither sink nor publish": (OWN, {"publish": None}, "set exactly one of sink"),
    "two kinds of source": (HTTP, {"source": {"files": {"path": "a.csv"}}}, "set exactly one of files and http"),
    "no kind of source": (HTTP, {"source": {"http": None}}, "set exactly one of files and http"),
    "source without workspace": (HTTP, {"workspace": None}, "spec.workspace: Required value: set workspace, because"),
    "sink without workspace": (
        HTTP,
        {"workspace": None, "source": None, "fetch": {"image": "a"}},
        "spec.workspace: Required value: set workspace",
    ),
    "validate without workspace": (
        OWN,
        {"hooks": [{"name": "check", "validate": VALIDATE}]},
        "spec.workspace: Required value: set workspace",
    ),
    "a container of one's own in a pool": (
        OWN,
        {"execution": {"mode": "Pool"}},
        "spec.execution.mode: Forbidden: set execution.mode to JobPerStage, or leave the containers of your own out",
    ),
    "workers without a pool": (
        HTTP,
        {"execution": {"workers": 2}},
        "spec.execution: Forbidden: leave workers, maxBatchesPerWorker and resources out, or set mode to Pool",
    ),
    "resources of a stage in a pool": (
        HTTP,
        {"execution": {"mode": "Pool"}, "sink": {"resources": {"limits": {"memory": "1Gi"}}}},
        "spec.execution.resources: Forbidden: set execution.resources in place of the stages' own",
    ),
    "maxFailedBatches with FailRun": (
        OWN,
        {"maxFailedBatches": 3},
        "spec.maxFailedBatches: Forbidden: set maxFailedBatches only together with onBatchFailure Continue",
    ),
    "a clean-up that is retried": (
        OWN,
        {"onCancel": {"image": "clean:1", "retries": 1}},
        "spec.onCancel.retries: Forbidden: leave retries out, because the clean-up is tried once",
    ),
    "cursor and partitions": (OWN, {"batches": {"partitions": {"count": 1}}}, "set exactly one of cursor"),
    "neither cursor nor partitions": (OWN, {"batches": {"cursor": None}}, "set exactly one of cursor"),
    "limit with partitions": (
        OWN,
        {"batches": {"cursor": None, "partitions": {"count": 1}, "limit": 9}},
        "spec.batches.limit: Forbidden: set limit only together with cursor",
    ),
    "size with partitions": (
        OWN,
        {"batches": {"cursor": None, "partitions": {"count": 1}, "size": 10_000}},
        "spec.batches.size: Forbidden: set size only together with cursor",
    ),
    "count and values": (
        OWN,
        {"batches": {"cursor": None, "partitions": {"count": 1, "values": ["a"]}}},
        "set exactly one of count and values",
    ),
    "neither count nor values": (
        OWN,
        {"batches": {"cursor": None, "partitions": {}}},
        "set exactly one of count and values",
    ),
    "a partition twice": (
        OWN,
        {"batches": {"cursor": None, "partitions": {"values": ["a", "b", "a"]}}},
        'spec.batches.partitions.values[2]: Duplicate value: "a"',
    ),
    "a partition of two lines": (
        OWN,
        {"batches": {"cursor": None, "partitions": {"values": ["a", "b\nc"]}}},
        'spec.batches.partitions.values[1]: Invalid value: "b\\nc": write the partition without control characters',
    ),
    "a list without its length": (
        OWN,
        LIST | {"batches": {"cursor": None, "partitions": {"values": ["a"], "file": "a.txt"}}},
        "spec.batches.partitions.file: Forbidden: set file only together with count",
    ),
    "a list without workspace": (
        OWN,
        LIST,
        "spec.workspace: Required value: set workspace, because batches.partitions.file is a file in it",
    ),
    "a list outside of the workspace": (
        FILES,
        {"batches": {"cursor": None, "partitions": {"count": 1, "file": "lists/../../etc/passwd"}}},
        'spec.batches.partitions.file: Invalid value: "lists/../../etc/passwd": give a path inside the workspace',
    ),
    "a list with an absolute path": (
        FILES,
        {"batches": {"cursor": None, "partitions": {"count": 1, "file": "/workspace/a.txt"}}},
        'spec.batches.partitions.file: Invalid value: "/workspace/a.txt": give a path inside the workspace',
    ),
    "files by a list without a place": (
        FILES,
        LIST,
        "spec.source.files.path: Invalid value: write {partition} into the path",
    ),
    "a cursor with a line break": (
        OWN,
        {"batches": {"cursor": {"start": "a\nb"}}},
        'spec.batches.cursor.start: Invalid value: "a\\nb": write the cursor without control characters',
    ),
    "a cursor of 10 KiB": (
        OWN,
        {"batches": {"cursor": {"start": "c" * 10_240}}},
        "spec.batches.cursor.start: Too long: may not be more than 512",
    ),
    "a limit of 0": (
        OWN,
        {"batches": {"limit": 0}},
        "spec.batches.limit: Invalid value: 0: spec.batches.limit in body should be greater than or equal to 1",
    ),
    "more parameters than a container can be given": (
        HTTP,
        {"source": {"http": {"params": {f"p{n}": "x" * 2000 for n in range(16)}}}},
        "spec.source.http.params: Invalid value: shorten the parameters to 32000 characters together, names included, "
        "because a container's environment has no room for more",
    ),
    "longer names of columns than a container can be given": (
        HTTP,
        {"hooks": [{"name": "check", "validate": {"columns": [{"name": f"{n:03d}" + "c" * 125} for n in range(251)]}}]},
        "spec.hooks[0].validate.columns: Invalid value: shorten the columns' names to 32000 characters together, "
        "because a container's environment has no room for more",
    ),
    "http partitions without a place": (HTTP, COUNT, "spec.source.http: Invalid value: write {partition} into the url"),
    "files with named partitions without a place": (
        FILES,
        VALUES,
        "spec.source.files.path: Invalid value: write {partition} into the path",
    ),
    "two ways of pagination": (
        HTTP,
        {"source": {"http": {"pagination": {"link": {}}}}},
        "spec.source.http.pagination: Invalid value: set exactly one of page, offset, cursor and link",
    ),
    "no way of pagination": (
        HTTP,
        {"source": {"http": {"pagination": {"page": None}}}},
        "set exactly one of page, offset",
    ),
    "a url of another kind": (
        HTTP,
        {"source": {"http": {"url": "ftp://example.org"}}},
        "begin the url with http:// or https://",
    ),
    "a url without a scheme": (
        HTTP,
        {"source": {"http": {"url": "example.org"}}},
        "begin the url with http:// or https://",
    ),
    "a url of two lines": (HTTP, {"source": {"http": {"url": "http://a\nb"}}}, "write it without blanks"),
    "a password in the url": (
        HTTP,
        {"source": {"http": {"url": "https://ada:secret@example.org/"}}},
        "put them into a Secret named by authorization",
    ),
    "a user in the url": (HTTP, {"source": {"http": {"url": "https://ada@example.org"}}}, "put them into a Secret"),
    "a delimiter for parquet": (
        FILES,
        {"source": {"files": {"format": "parquet", "delimiter": ";"}}},
        "spec.source.files.delimiter: Forbidden: set delimiter only for csv files",
    ),
    "null values for jsonl": (
        FILES,
        {"source": {"files": {"format": "jsonl", "nullValues": ["NA"]}}},
        "spec.source.files.nullValues: Forbidden: set nullValues only for csv files",
    ),
    "an absolute sink": (HTTP, {"sink": {"parquet": {"path": "/out"}}}, "give a path inside the workspace"),
    "a sink outside": (HTTP, {"sink": {"parquet": {"path": "a/../../out"}}}, "give a path inside the workspace"),
    "a sink by url": (HTTP, {"sink": {"parquet": {"path": "s3://bucket"}}}, "give a path inside the workspace"),
    "a hidden sink": (HTTP, {"sink": {"parquet": {"path": "a/_out"}}}, "give a path inside the workspace"),
    "a sink among the rejects": (HTTP, {"sink": {"parquet": {"path": "rejects/a"}}}, "choose another directory"),
    "a long sink": (HTTP, {"sink": {"parquet": {"path": "x" * 201}}}, "give a path of at most 200 characters"),
    "hook with nothing": (OWN, {"hooks": [{"name": "a"}]}, "spec.hooks[0]: Invalid value: set exactly one of validate"),
    "hook with both": (
        HTTP,
        {"hooks": [{"name": "a", "validate": VALIDATE, "container": {"image": "a"}}]},
        "set exactly one of validate",
    ),
    "two hooks of a name": (
        OWN,
        {"hooks": [{"name": "a", "container": {"image": "a"}}, {"name": "a", "container": {"image": "b"}}]},
        "spec.hooks[1]: Duplicate value",
    ),
    "retries twice": (
        OWN,
        {"hooks": [{"name": "a", "retries": 1, "container": {"image": "a", "retries": 2}}]},
        "spec.hooks[0].container: Forbidden: set resources, activeDeadlineSeconds and retries once each",
    ),
    "minimum above maximum": (HTTP, column(minimum=2, maximum=1), "set minimum to no more than maximum"),
    "a range of text": (HTTP, column(type="string", minimum=1), "only for columns of type integer or number"),
    "two rules for a column": (
        HTTP,
        {"hooks": [{"name": "a", "validate": {"columns": [{"name": "x"}, {"name": "x"}]}}]},
        "columns[1]: Duplicate value",
    ),
    "env of the contract": (OWN, env(name="INGEST_BATCH", value="1"), "INGEST_ belongs to the container contract"),
    "env of the contract in a hook": (
        OWN,
        {"hooks": [{"name": "a", "container": {"image": "a", "env": [{"name": "INGEST_", "value": ""}]}}]},
        "spec.hooks[0].container.env[0].name: Invalid value",
    ),
    "env with two values": (
        OWN,
        env(name="A", value="1", valueFrom={"secretKeyRef": {"name": "a", "key": "b"}}),
        "set exactly one of value and valueFrom",
    ),
    "env without a value": (OWN, env(name="A"), "set exactly one of value and valueFrom"),
    "env from nowhere": (OWN, env(name="A", valueFrom={}), "set exactly one of secretKeyRef and configMapKeyRef"),
    "env twice": (
        OWN,
        {"fetch": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
        "spec.fetch.env[1]: Duplicate value",
    ),
    "envFrom nowhere": (OWN, {"fetch": {"envFrom": [{}]}}, "set exactly one of secretRef and configMapRef"),
    "more requested than allowed": (
        OWN,
        {"fetch": {"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1025Mi"}}}},
        "spec.fetch.resources.requests: Invalid value: ask for no more in requests than limits allows",
    ),
    "more requested than allowed, as numbers": (
        OWN,
        {"fetch": {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "500m"}}}},
        "ask for no more in requests",
    ),
    "label of the operator": (
        OWN,
        {"podTemplate": {"labels": {"ingestrun.dev/batch": "1"}}},
        "spec.podTemplate.labels: Invalid value: choose other labels, because ingestrun.dev/ belongs to the operator",
    ),
    "label of the Job controller": (
        OWN,
        {"podTemplate": {"labels": {"job-name": "a"}}},
        "belong to the Job controller",
    ),
    "annotation of the operator": (
        OWN,
        {"podTemplate": {"annotations": {"ingestrun.dev/x": "1"}}},
        "choose other annotations",
    ),
    "annotation with a profile": (
        OWN,
        {"podTemplate": {"annotations": {"container.apparmor.security.beta.kubernetes.io/fetch": "unconfined"}}},
        "leave AppArmor profiles out",
    ),
    "user root": (OWN, security(runAsUser=0), "spec.podTemplate.securityContext.runAsUser"),
    "no user": (OWN, security(runAsUser=-1), "should be greater than or equal to 1"),
    "user too large": (OWN, security(runAsUser=2**31), "should be less than or equal to 2147483647"),
    "SELinux type": (OWN, security(seLinuxOptions={"type": "spc_t"}), "Unsupported value"),
    "volume of two kinds": (
        OWN,
        volume(emptyDir={}, secret={"secretName": "a"}),
        "set exactly one of persistentVolumeClaim",
    ),
    "volume of no kind": (OWN, volume(), "set exactly one of persistentVolumeClaim, configMap, secret and emptyDir"),
    "volume of the operator": (
        OWN,
        {"podTemplate": {"volumes": [{"name": "workspace", "emptyDir": {}}]}},
        "choose another name, because the volume workspace is the operator's",
    ),
    "mount over the workspace": (OWN, mount("/workspace"), "mount it elsewhere, because /workspace is the operator's"),
    "mount within the workspace": (OWN, mount("/workspace/in"), "mount it elsewhere"),
    "mount by a detour": (OWN, mount("/data/../workspace"), "give a path without . and .."),
    "mount out of the volume": (OWN, mount("/data", subPath="../up"), "give a path inside the volume"),
    "mount of an unknown volume": (
        OWN,
        {"podTemplate": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}},
        "spec.podTemplate.volumeMounts: Invalid value: mount only volumes that are listed in volumes",
    ),
    "toleration of nothing": (OWN, toleration(effect="NoSchedule"), "set a key, or the operator Exists"),
    "toleration with a value too many": (OWN, toleration(key="a", operator="Exists", value="b"), "set value only with"),
    "toleration for a time": (OWN, toleration(key="a", tolerationSeconds=3), "only with the effect NoExecute"),
    "backoff upside down": (
        OWN,
        {"backoff": {"initialSeconds": 60, "maxSeconds": 30}},
        "spec.backoff.maxSeconds: Invalid value: set maxSeconds to no less than initialSeconds",
    ),
    "more memory without a cap": (
        OWN,
        {"outOfMemory": {"retries": 2}},
        "spec.outOfMemory.maxMemory: Invalid value: set maxMemory, or set retries to 0 and leave maxMemory out, "
        "because without a cap no limit is raised",
    ),
    "no more memory, with a cap": (
        OWN,
        {"outOfMemory": {"retries": 0, "maxMemory": "1Gi"}},
        "set maxMemory, or set retries to 0 and leave maxMemory out",
    ),
    "thousandths of a byte": (
        OWN,
        {"outOfMemory": {"maxMemory": "512m"}},
        "spec.outOfMemory.maxMemory: Invalid value: set maxMemory to 1Mi or more (512Mi; the suffix m means a "
        "thousandth)",
    ),
    "less than nothing": (OWN, {"outOfMemory": {"maxMemory": "-1Gi"}}, "set maxMemory to 1Mi or more"),
    "resumed by nobody": (OWN, {"resumeFrom": {}}, "spec.resumeFrom: Invalid value: set exactly one of name"),
    "a saved state of a chain for partitions": (
        OWN,
        {
            "batches": {"cursor": None, "size": None, "partitions": {"count": 9}},
            "resumeFrom": {"savedState": {"uid": "b", "cursor": "7"}},
        },
        "take cursor and unpublished out, because this run has partitions",
    ),
    "backoff below its default": (OWN, {"backoff": {"maxSeconds": 5}}, "set maxSeconds to no less than initialSeconds"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_says_what_to_do(cluster: Cluster, rule: str) -> None:
    base, patch, fragment = RULES[rule]

    refused(lambda: cluster.create_run("default", merged(base, patch), dry_run=True), fragment)


def test_every_rule_of_the_crd_has_a_case() -> None:
    def messages(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            for rule in part.get("x-kubernetes-validations", ()):
                # The first need an object that is there: see the tests of changes below. The second: test_resume.
                if "oldSelf" not in rule["rule"] and "self.metadata.name" not in rule["rule"]:
                    yield " ".join(rule["message"].split())
            for child in part.values():
                yield from messages(child)

    (version,) = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    told = [
        re.sub(r'^.*(Invalid value|Forbidden|Required value): ("[^"]*": )?', "", case[2]) for case in RULES.values()
    ]
    untested = [message for message in messages(version["schema"]) if not any(piece in message for piece in told)]

    assert untested == []


AGREED: Final[dict[str, tuple[dict[str, Any], dict[str, Any], bool]]] = {
    # What is accepted.
    "own containers": (OWN, {}, True),
    "http": (HTTP, {}, True),
    "files": (FILES, {}, True),
    "offset": (HTTP, {"source": {"http": {"pagination": {"page": None, "offset": {"totalPath": "meta.total"}}}}}, True),
    "cursor": (HTTP, {"source": {"http": {"pagination": {"page": None, "cursor": {"path": "next"}}}}}, True),
    "link": (HTTP, {"source": {"http": {"pagination": {"page": None, "link": {}}}}}, True),
    "a mail address in the query": (
        HTTP,
        {"source": {"http": {"url": "https://example.org/?by=ada@example.org"}}},
        True,
    ),
    "a partition in the url": (HTTP, COUNT | {"source": {"http": {"url": "https://example.org/{partition}"}}}, True),
    "a partition in a parameter": (HTTP, VALUES | {"source": {"http": {"params": {"day": "{partition}"}}}}, True),
    "as many parameters as a container can be given": (
        HTTP,
        {"source": {"http": {"params": {f"p{n:03d}": "x" * 1996 for n in range(16)}}}},
        True,
    ),
    "files by number": (FILES, COUNT, True),
    "files by name": (FILES, VALUES | {"source": {"files": {"path": "landing/{partition}.csv"}}}, True),
    "a csv with its own signs": (FILES, {"source": {"files": {"delimiter": "|", "nullValues": []}}}, True),
    "cancel at creation": (OWN, {"cancel": True, "cancellation": {"reason": "by Git"}}, True),
    "suspended at creation": (OWN, {"suspend": True}, True),
    "nulls": (OWN, {"workspace": {"persistentVolumeClaim": {"claimName": "a"}}}, True),
    "all failure settings": (
        OWN,
        {
            "onBatchFailure": "Continue",
            "maxFailedBatches": MAX_FAILED_BATCHES,
            "retries": 0,
            "backoff": {"initialSeconds": 0, "maxSeconds": 0},
            "backpressure": {"retrySeconds": 1},
            "podStart": {"imagePullSeconds": 1, "refusedSeconds": 31_536_000, "infrastructureSeconds": 1},
            "activeDeadlineSeconds": 31_536_000,
            "staleAfterSeconds": 31_536_000,
            "ttlSecondsAfterFinished": 0,
            "concurrency": {"key": "geo/tiles_2026.11-Z", "policy": "Replace"},
        },
        True,
    ),
    "the largest partitions": (OWN, {"batches": {"cursor": None, "partitions": {"count": 1_000_000}}}, True),
    "a list of partitions": (
        FILES,
        LIST | {"source": {"files": {"path": "landing/{partition}.csv"}}},
        True,
    ),
    "many partitions": (
        OWN,
        {"batches": {"cursor": None, "partitions": {"values": [f"{n:0128}" for n in range(1000)]}}},
        True,
    ),
    "limit and size": (OWN, {"batches": {"size": 1, "limit": 2**53}}, True),
    "sixteen hooks": (OWN, {"hooks": [{"name": f"h{n}", "container": {"image": "a"}} for n in range(16)]}, True),
    "hook settings beside the container": (
        OWN,
        {"hooks": [{"name": "a", "retries": 1, "container": {"image": "a"}}]},
        True,
    ),
    "quantities": (
        OWN,
        {
            "fetch": {
                "resources": {"requests": {"cpu": 1, "memory": "1e3"}, "limits": {"cpu": "1500m", "memory": "1Gi"}}
            }
        },
        True,
    ),
    "an empty variable": (OWN, env(name="A", value=""), True),
    "a variable from a Secret": (OWN, env(name="A", valueFrom={"secretKeyRef": {"name": "a", "key": "B"}}), True),
    "a volume and its mount": (OWN, mount("/data"), True),
    "tolerate all": (OWN, toleration(operator="Exists"), True),
    "a column's range": (HTTP, column(type="number", minimum=-1.5, maximum=10), True),
    "a range of one": (HTTP, column(minimum=1, maximum=1), True),
    # What is refused.
    "no batches": (OWN, {"batches": None}, False),
    "no image": (OWN, {"fetch": {"image": None}}, False),
    "an empty image": (OWN, {"fetch": {"image": ""}}, False),
    "an unknown pull policy": (OWN, {"fetch": {"imagePullPolicy": "Sometimes"}}, False),
    "a bad variable's name": (OWN, env(name="A-B", value=""), False),
    "no parallelism": (OWN, {"parallelism": 0}, False),
    "too much parallelism": (OWN, {"parallelism": 1001}, False),
    "parallelism as text": (OWN, {"parallelism": "many"}, False),
    "too many failed batches": (OWN, {"onBatchFailure": "Continue", "maxFailedBatches": MAX_FAILED_BATCHES + 1}, False),
    "too many partitions": (OWN, {"batches": {"cursor": None, "partitions": {"count": 1_000_001}}}, False),
    "an empty partition": (OWN, {"batches": {"cursor": None, "partitions": {"values": [""]}}}, False),
    "no partitions": (OWN, {"batches": {"cursor": None, "partitions": {"values": []}}}, False),
    "seventeen hooks": (OWN, {"hooks": [{"name": f"h{n}", "container": {"image": "a"}} for n in range(17)]}, False),
    "a hook's bad name": (OWN, {"hooks": [{"name": "A_b", "container": {"image": "a"}}]}, False),
    "an unknown format": (FILES, {"source": {"files": {"format": "xml"}}}, False),
    "a long delimiter": (FILES, {"source": {"files": {"delimiter": "::"}}}, False),
    "a quote as delimiter": (FILES, {"source": {"files": {"delimiter": '"'}}}, False),
    "an unknown type": (HTTP, column(type="decimal"), False),
    "no columns": (HTTP, {"hooks": [{"name": "a", "validate": {"columns": []}}]}, False),
    "a page that begins with 2": (HTTP, {"source": {"http": {"pagination": {"page": {"first": 2}}}}}, False),
    "a cursor without a path": (HTTP, {"source": {"http": {"pagination": {"page": None, "cursor": {}}}}}, False),
    "an empty reason": (OWN, {"cancellation": {"reason": ""}}, False),
    "a long reason": (OWN, {"cancellation": {"reason": "x" * 513}}, False),
    "an unknown batch policy": (OWN, {"onBatchFailure": "Ignore"}, False),
    "a claim's bad name": (HTTP, {"workspace": {"persistentVolumeClaim": {"claimName": "A/b"}}}, False),
    "no kept batches": (OWN, {"jobRetention": {"failedBatches": 0, "secondsAfterFinished": 0}}, True),
    "too many kept batches": (OWN, {"jobRetention": {"failedBatches": 21}}, False),
    "a retention of less than nothing": (OWN, {"jobRetention": {"secondsAfterFinished": -1}}, False),
    "no time": (OWN, {"activeDeadlineSeconds": 0}, False),
    "stale at once": (OWN, {"staleAfterSeconds": 0}, False),
    "deleted before its end": (OWN, {"ttlSecondsAfterFinished": -1}, False),
    "a policy without a key": (OWN, {"concurrency": {"policy": "Forbid"}}, False),
    "an unknown policy": (OWN, {"concurrency": {"key": "geo", "policy": "Queue"}}, False),
    "a key that is no name": (OWN, {"concurrency": {"key": "a,b"}}, False),
    "a long key": (OWN, {"concurrency": {"key": "k" * 64}}, False),
    "source and fetch": (HTTP, {"fetch": {"image": "a"}}, False),
    "no source at all": (HTTP, {"source": None}, False),
    "two ways of pagination": (HTTP, {"source": {"http": {"pagination": {"link": {}}}}}, False),
    "cursor and partitions": (OWN, {"batches": {"partitions": {"count": 1}}}, False),
    "hook with nothing": (OWN, {"hooks": [{"name": "a"}]}, False),
    "a range upside down": (HTTP, column(minimum=2, maximum=1), False),
    "a url of another kind": (HTTP, {"source": {"http": {"url": "ftp://example.org"}}}, False),
}


@pytest.mark.parametrize("case", AGREED)
def test_server_and_model_agree(cluster: Cluster, case: str) -> None:
    base, patch, good = AGREED[case]
    spec = merged(base, patch)
    try:
        IngestRunSpec.model_validate(spec)
        ours = True
    except ValidationError:
        ours = False
    try:
        cluster.create_run("default", spec, dry_run=True)
        theirs, said = True, ""
    except ApiException as error:
        theirs, said = False, sentence(error)

    assert (ours, theirs) == (good, good), said


def test_what_the_server_stores_is_what_the_model_reads_without_it(cluster: Cluster) -> None:
    """The defaults of both are the same in effect: with them written out by the server, or filled in here."""
    for base, patch, good in AGREED.values():
        if good:
            spec = merged(base, patch)
            stored = cluster.create_run("default", spec, dry_run=True)["spec"]
            assert IngestRunSpec.model_validate(stored) == IngestRunSpec.model_validate(spec)


@pytest.mark.parametrize(
    "path",
    [
        "cancelled",
        "cancellation.force",
        "batches.cursor.step",
        "fetch.securityContext",
        "podTemplate.securityContext.runAsNonRoot",
        "podTemplate.securityContext.seccompProfile",
        "podTemplate.securityContext.sysctls",
        "podTemplate.securityContext.privileged",
        "podTemplate.securityContext.seLinuxOptions.user",
        "podTemplate.hostNetwork",
        "source.http.method",
        "resumeFrom.savedState.phase",
    ],
)
def test_an_unknown_field_is_refused(cluster: Cluster, path: str) -> None:
    patch: Any = 1
    for name in reversed(path.split(".")):
        patch = {name: patch}
    base = HTTP if path.startswith("source") else OWN

    refused(
        lambda: cluster.create_run("default", merged(base, patch), dry_run=True), f'unknown field "spec.{path}"', 400
    )


# ---------------------------------------------------------------------------------------------- what can change


CHANGES: Final[dict[str, tuple[dict[str, Any], str | None]]] = {
    "cancel": ({"cancel": True}, None),
    "cancellation": ({"cancellation": {"reason": "too slow"}}, None),
    "suspend": ({"suspend": True}, None),
    "parallelism": ({"parallelism": 9}, None),
    "parallelism to its default": ({"parallelism": None}, None),
    "activeDeadlineSeconds": ({"activeDeadlineSeconds": 60}, None),
    "jobRetention": ({"jobRetention": {"failedBatches": 0, "secondsAfterFinished": 60}}, None),
    "staleAfterSeconds": ({"staleAfterSeconds": 600}, None),
    "ttlSecondsAfterFinished": ({"ttlSecondsAfterFinished": 0}, None),
    "a key": ({"concurrency": {"key": "geo"}}, "concurrency"),
    "nothing": ({"retries": 3}, None),
    "another url": ({"source": {"http": {"url": "https://example.com"}}}, "source"),
    "a parameter more": ({"source": {"http": {"params": {"a": "b"}}}}, "source"),
    "source to fetch": ({"source": None, "fetch": {"image": "a"}}, "source"),
    "source to fetch, the other side": ({"source": None, "fetch": {"image": "a"}}, "fetch"),
    "another sink": ({"sink": {"parquet": {"path": "other"}}}, "sink"),
    "sink to publish": ({"sink": None, "publish": {"image": "a"}}, "publish"),
    "no hooks": ({"hooks": None}, "hooks"),
    "a hook less": ({"hooks": [{"name": "first", "validate": VALIDATE}]}, "hooks"),
    "hooks in another order": (
        {"hooks": [{"name": "second", "validate": VALIDATE}, {"name": "first", "validate": VALIDATE}]},
        "hooks",
    ),
    "a pod label": ({"podTemplate": {"labels": {"team": "b"}}}, "podTemplate"),
    "no pod template": ({"podTemplate": None}, "podTemplate"),
    "another workspace": ({"workspace": {"persistentVolumeClaim": {"claimName": "b"}}}, "workspace"),
    "partitions in another order": ({"batches": {"partitions": {"values": ["b", "a"]}}}, "batches"),
    "a list instead": ({"batches": {"partitions": {"values": None, "count": 2, "file": "a"}}}, "batches"),
    "a partition more": ({"batches": {"partitions": {"values": ["a", "b", "c"]}}}, "batches"),
    "a cursor instead": ({"batches": {"partitions": None, "cursor": {}}}, "batches"),
    "retries": ({"retries": 4}, "retries"),
    "backoff": ({"backoff": {"maxSeconds": 601}}, "backoff"),
    "onBatchFailure": ({"onBatchFailure": "Continue"}, "onBatchFailure"),
    "maxFailedBatches": ({"onBatchFailure": "Continue", "maxFailedBatches": 1}, "maxFailedBatches"),
    "outOfMemory": ({"outOfMemory": {"maxMemory": "4Gi"}}, "outOfMemory"),
    "backpressure": ({"backpressure": {"retrySeconds": 61}}, "backpressure"),
    "podStart": ({"podStart": {"imagePullSeconds": 121}}, "podStart"),
    "a grace more": ({"podStart": {"infrastructureSeconds": 600}}, "podStart"),
    "a parent": ({"parentRef": {"name": "above"}}, "parentRef"),
    "a clean-up": ({"onCancel": {"image": "clean:1"}}, "onCancel"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_can_be_changed_after_creation(cluster: Cluster, namespace: str, change: str) -> None:
    patch, field = CHANGES[change]
    spec = merged(
        HTTP,
        {
            "source": {"http": {"params": {"day": "{partition}"}}},
            "batches": {"cursor": None, "partitions": {"values": ["a", "b"]}},
            "hooks": [{"name": "first", "validate": VALIDATE}, {"name": "second", "validate": VALIDATE}],
            "podTemplate": {"labels": {"team": "a"}},
        },
    )
    cluster.create_run(namespace, spec, name="geo")

    if field is None:
        cluster.patch_run(namespace, "geo", {"spec": patch})
        return
    told = refused(
        lambda: cluster.patch_run(namespace, "geo", {"spec": patch}),
        f"spec.{field}: Forbidden: the field is fixed at creation",
    )
    assert "only cancel, cancellation, suspend, parallelism, activeDeadlineSeconds, staleAfterSeconds" in told


# ---------------------------------------------------------------------------------------------- cancel and phases


@pytest.mark.parametrize("phase", [None, "Pending", "Running", "Suspended", "Cancelled"])
def test_cancel_is_accepted(cluster: Cluster, namespace: str, phase: str | None) -> None:
    cluster.create_run(namespace, OWN, name="geo")
    if phase:
        cluster.patch_status(namespace, "geo", {"phase": phase})

    assert cluster.cancel(namespace, "geo", "too slow")["spec"]["cancel"] is True


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
@pytest.mark.parametrize("before", [{}, {"cancel": False}])
def test_cancel_of_an_ended_run_is_refused(cluster: Cluster, namespace: str, phase: str, before: Json) -> None:
    cluster.create_run(namespace, OWN | before, name="geo")
    cluster.patch_status(namespace, "geo", {"phase": phase})

    refused(
        lambda: cluster.cancel(namespace, "geo"),
        f"spec.cancel: Invalid value: the run is already {phase} and cannot be cancelled",
    )
    assert cluster.run(namespace, "geo")["spec"].get("cancel", False) is False


@pytest.mark.parametrize("phase", [None, "Running", "Succeeded", "Cancelled"])
@pytest.mark.parametrize("cleared", [None, False])
def test_clearing_cancel_is_accepted(cluster: Cluster, namespace: str, phase: str | None, cleared: bool | None) -> None:
    """A GitOps tool that puts back what it has in Git must not break its own apply."""
    cluster.create_run(namespace, OWN | {"cancel": True}, name="geo")
    if phase:
        cluster.patch_status(namespace, "geo", {"phase": phase})

    patched = cluster.patch_spec(namespace, "geo", cancel=cleared)

    assert patched["spec"].get("cancel", False) is False


def test_an_ended_run_with_cancel_set_can_still_be_labelled(cluster: Cluster, namespace: str) -> None:
    """Completion may win the race against cancel: the run stands with both, and must stay writable."""
    cluster.create_run(namespace, OWN | {"cancel": True}, name="geo")
    cluster.patch_status(namespace, "geo", {"phase": "Succeeded"})

    cluster.patch_run(namespace, "geo", {"metadata": {"labels": {"team": "a"}}})
    cluster.patch_status(namespace, "geo", {"cursor": "c"})


def test_cancel_has_no_default(cluster: Cluster) -> None:
    """A `cancel: false` that came from the server, copied into Git, would take back the next cancel."""
    stored = cluster.create_run("default", OWN, dry_run=True)["spec"]

    assert "cancel" not in stored
    assert "suspend" not in stored


PHASES: Final = ("Pending", "Running", "Suspended", "Succeeded", "Failed", "Cancelled")


@pytest.mark.parametrize("phase", PHASES)
def test_an_end_is_final(cluster: Cluster, namespace: str, phase: str) -> None:
    """Whoever writes the status, by whatever patch."""
    cluster.create_run(namespace, OWN, name="geo")
    cluster.patch_status(namespace, "geo", {"phase": phase})
    ended = phase in ("Succeeded", "Failed", "Cancelled")
    others: list[Json | None] = [{"phase": other} for other in PHASES if other != phase]

    for status in [{"phase": None}, None, *others]:
        if ended:
            refused(
                functools.partial(cluster.patch_status, namespace, "geo", status),
                f"status.phase: Invalid value: the phase {phase} is final",
            )
    if not ended:
        cluster.patch_status(namespace, "geo", {"phase": "Cancelled"})
    cluster.patch_status(namespace, "geo", {"cursor": "drained"})

    assert cluster.run(namespace, "geo")["status"]["phase"] == (phase if ended else "Cancelled")


def test_the_first_status(cluster: Cluster, namespace: str) -> None:
    """For kstatus an object without a status is done; this one is still to be seen by an operator."""
    made = cluster.create_run(namespace, OWN)

    assert made["status"] == {"observedGeneration": -1}
    assert IngestRun.read(made).status.observed_generation == -1


def test_a_status_given_at_creation_is_dropped(cluster: Cluster, namespace: str) -> None:
    body = {
        "apiVersion": "ingestrun.dev/v1alpha1",
        "kind": "IngestRun",
        "metadata": {"name": "geo"},
        "spec": OWN,
        "status": {"phase": "Succeeded"},
    }
    made = cluster.custom.create_namespaced_custom_object("ingestrun.dev", "v1alpha1", namespace, "ingestruns", body)

    assert made["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize(
    ("status", "fragment"),
    [
        ({"phase": "Done"}, 'status.phase: Unsupported value: "Done"'),
        ({"batches": {"claimed": "0,"}}, "status.batches.claimed"),
        ({"records": {"published": -1}}, "status.records.published"),
    ],
)
def test_a_status_of_another_form_is_refused(cluster: Cluster, namespace: str, status: Json, fragment: str) -> None:
    cluster.create_run(namespace, OWN, name="geo")

    refused(lambda: cluster.patch_status(namespace, "geo", status), fragment)


# ---------------------------------------------------------------------------------------------- what people see


def test_columns(cluster: Cluster, namespace: str) -> None:
    cluster.create_run(namespace, OWN, name="geo")
    cluster.patch_status(
        namespace,
        "geo",
        {
            "phase": "Succeeded",
            "duration": "17m",
            "cursor": "page-4",
            "batches": {"progress": "12/34", "active": 2},
            "records": {"published": 1200, "rejected": 3},
            "conditions": [
                {
                    "type": kind,
                    "status": "True",
                    "reason": f"{kind}Reason",
                    "message": "no room",
                    "lastTransitionTime": "2026-11-23T03:04:05Z",
                }
                for kind in ("Drained", "Finished", "Succeeded")
            ],
        },
    )
    table = cluster.table(namespace)
    columns = table["columnDefinitions"]
    cells = dict(zip((column["name"] for column in columns), table["rows"][0]["cells"], strict=True))

    assert [column["name"] for column in columns if not column["priority"]] == [
        "Name", "Phase", "Progress", "Published", "Rejected", "Reason", "Duration", "Age",
    ]  # fmt: skip
    del cells["Age"]
    assert cells == {
        "Name": "geo",
        "Phase": "Succeeded",
        "Progress": "12/34",
        "Published": 1200,
        "Rejected": 3,
        "Reason": "SucceededReason",
        "Duration": "17m",
        "Active": 2,
        "Cursor": "page-4",
        "Message": "no room",
    }


def test_runs_can_be_selected_by_field(cluster: Cluster, namespace: str) -> None:
    for name, phase in (("a", "Failed"), ("b", "Cancelled"), ("c", "Failed")):
        cluster.create_run(namespace, OWN | ({"cancel": True} if name == "b" else {}), name=name)
        cluster.patch_status(namespace, name, {"phase": phase})

    def names(selector: str) -> list[str]:
        return [run["metadata"]["name"] for run in cluster.runs(namespace, field_selector=selector)]

    assert names("status.phase=Failed") == ["a", "c"]
    assert names("spec.cancel=true") == ["b"]
    assert names("status.phase!=Failed,spec.cancel=true") == ["b"]


def test_the_crd_is_clean(crd: Json) -> None:
    conditions = {item["type"]: item["status"] for item in crd["status"]["conditions"]}

    assert conditions["NamesAccepted"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"
    assert crd["status"]["accepted_names"]["short_names"] == ["ir"]


def test_the_worst_run_of_a_million_batches_stays_below_16_kib(cluster: Cluster, namespace: str) -> None:
    """As stored: with metadata, managed fields and spec. Every failed batch and every one in flight is alone."""
    cluster.create_run(
        namespace, HTTP | {"onBatchFailure": "Continue", "maxFailedBatches": MAX_FAILED_BATCHES}, name="geo"
    )
    holes = [999_998 - 4 * n for n in reversed(range(MAX_FAILED_BATCHES + 4))]
    edges = [-1, *holes, 1_000_000]
    islands = ",".join(f"{low + 1}-{high - 1}" for low, high in itertools.pairwise(edges))
    now = "2026-11-23T03:04:05Z"
    cluster.patch_status(
        namespace,
        "geo",
        {
            "phase": "Running",
            "observedGeneration": 1,
            "conditions": [
                {
                    "type": kind,
                    "status": "Unknown",
                    "reason": "CompletedWithFailedBatches",
                    "message": "m" * 512,
                    "lastTransitionTime": now,
                    "observedGeneration": 1,
                }
                for kind in ("Succeeded", "Finished", "Cancelled", "Drained", "Backpressured", "Reconciling", "Stalled")
            ],
            "batches": {
                "claimed": "0-999999",
                "fetched": islands,
                "published": islands,
                "failed": ",".join(str(hole) for hole in holes[4:]),
                "active": 4,
                "progress": "1000000/1000000",
            },
            "records": {"fetched": 2**53, "rejected": 2**53, "published": 2**53},
            "cursor": "c" * 512,
            "failures": [
                {
                    "batch": 999_999,
                    "stage": "hook " + "h" * 63,
                    "attempt": 9,
                    "reason": "R" * 32,
                    "message": "m" * 256,
                    "time": now,
                    **({"log": "l" * 350} if n >= 3 else {}),
                }
                for n in range(5)
            ],
            "retries": [{"stage": "fetch", "reason": f"R{n}", "count": 2**31} for n in range(8)],
            "startTime": now,
            "completionTime": now,
            "lastProgressTime": now,
        },
    )
    cluster.patch_status(namespace, "geo", {"phase": "Failed"})  # the write that ends a run claims nothing

    stored = cluster.run(namespace, "geo")

    assert len(IngestRun.read(stored).status.batches.failed) == MAX_FAILED_BATCHES
    assert stored["metadata"]["managedFields"]
    assert len(json.dumps(stored, separators=(",", ":")).encode()) < 16 * 1024


# ---------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_sample_is_accepted(cluster: Cluster, sample: Path) -> None:
    documents = [document for document in yaml.safe_load_all(sample.read_text()) if document]

    assert documents
    for document in documents:
        if document["kind"] == "PersistentVolumeClaim":
            cluster.core.create_namespaced_persistent_volume_claim(
                "default", document, dry_run="All", field_validation="Strict"
            )
            continue
        assert document["kind"] == "IngestRun"
        assert "cancel: false" not in sample.read_text()
        cluster.create_run(
            "default",
            document["spec"],
            name=document["metadata"]["name"],
            metadata={name: value for name, value in document["metadata"].items() if name != "name"},
            dry_run=True,
        )


def test_there_are_samples() -> None:
    assert len(list(SAMPLES.glob("*.yaml"))) >= 5
