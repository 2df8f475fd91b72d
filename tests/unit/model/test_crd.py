"""The CRD and the models say the same: paths, types, required fields, enums, bounds and defaults, both ways.

The CRD is handwritten, because what pydantic generates is no structural schema; so this test is what keeps the
two together. It walks both as JSON schemas. Where they differ on purpose, `CRD_ALONE` and the other tables below
say so, and an entry that is of no use any more is a failure too.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from ingestrun.model import names
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import MAX_FAILED_BATCHES
from ingestrun.model.spec import MAX_PARTITIONS

CRD: Final = Path(__file__).parents[3] / "crds" / "ingestruns.yaml"

Schema = dict[str, Any]

CRD_ALONE: Final[tuple[tuple[str, str], ...]] = (
    # The API server needs sizes to prove a rule cheap; a model that reads what it accepted does not.
    ("*.http.params", "maxProperties"),
    ("*.http.params.*", "maxLength"),
    ("*.command", "maxItems"),
    ("*.command.*", "maxLength"),
    ("*.args", "maxItems"),
    ("*.args.*", "maxLength"),
    ("*.env", "maxItems"),
    ("*.envFrom", "maxItems"),
    ("*.resources.requests", "maxProperties"),
    ("*.resources.limits", "maxProperties"),
    ("spec.podTemplate.labels", "maxProperties"),
    ("spec.podTemplate.annotations", "maxProperties"),
    ("spec.podTemplate.annotations.*", "maxLength"),
    ("spec.podTemplate.nodeSelector", "maxProperties"),
    ("spec.podTemplate.tolerations", "maxItems"),
    ("spec.podTemplate.imagePullSecrets", "maxItems"),
    ("spec.podTemplate.volumes", "maxItems"),
    ("spec.podTemplate.volumeMounts", "maxItems"),
    # What Kubernetes would refuse later, in the Job, is better refused at once.
    ("*.resources.*.*", "maxLength"),
    ("*.resources.*.*", "pattern"),
    ("spec.outOfMemory.maxMemory", "maxLength"),
    ("spec.outOfMemory.maxMemory", "pattern"),
    ("*.authorization.name", "pattern"),
    ("*.authorization.key", "pattern"),
    ("*.secretKeyRef.name", "pattern"),
    ("*.secretKeyRef.key", "pattern"),
    ("*.configMapKeyRef.key", "pattern"),
    ("spec.podTemplate.labels.*", "maxLength"),
    ("spec.podTemplate.labels.*", "pattern"),
    ("spec.podTemplate.nodeSelector.*", "maxLength"),
    ("spec.podTemplate.nodeSelector.*", "pattern"),
    # As every metav1.Condition has it.
    ("status.conditions", "maxItems"),
    ("status.conditions.*.type", "maxLength"),
    ("status.conditions.*.type", "pattern"),
    ("status.conditions.*.reason", "minLength"),
    ("status.conditions.*.reason", "maxLength"),
    ("status.conditions.*.reason", "pattern"),
    ("status.conditions.*.message", "maxLength"),
    # The form that IndexRanges.parse takes.
    ("status.batches.claimed", "pattern"),
    ("status.batches.fetched", "pattern"),
    ("status.batches.published", "pattern"),
    ("status.batches.failed", "pattern"),
    ("status.images.*.steps", "pattern"),
    ("status.batches.replay", "pattern"),
    ("status.batches.publishing", "pattern"),
    ("status.workers", "maxItems"),
    ("status.afterEnd.published", "pattern"),
    # What is wrong with these is told by the run, in a sentence, rather than by a spec that can't be read.
    ("spec.resumeFrom.savedState.batches.fetched", "pattern"),
    ("spec.resumeFrom.savedState.batches.published", "pattern"),
    ("spec.resumeFrom.savedState.afterEnd.published", "pattern"),
    ("status.cancellation.published", "pattern"),
    ("status.cancellation.notPublished", "pattern"),
    ("status.cancellation.unknown", "pattern"),
)
"""Where the CRD is stricter than the models: (path, keyword). Never the other way round: the operator must be
able to read whatever the API server accepts."""

MODEL_ALONE: Final = (
    # A rule refuses it beside partitions, and a default would look like a value that was set.
    ("spec.batches.size", "default"),
    # A rule of the CRD says it, in a sentence.
    ("spec.source.http.url", "pattern"),
)
"""Where only the model has a keyword, because the CRD has a rule in its place (tested in tests/api)."""

OPAQUE: Final = (
    "spec.podTemplate.tolerations.*",
    "spec.podTemplate.volumes.*",
    "spec.podTemplate.volumeMounts.*",
)
"""What the model hands on to the pods as it stands, and the CRD alone spells out."""

BOUNDS: Final = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "pattern")


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, for models that hold index ranges: text, as far as JSON goes."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        if schema["cls"] is IndexRanges:
            return {"type": "string"}
        return super().is_instance_schema(schema)

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, IndexRanges) else super().encode_default(dft)


def model_schema() -> Schema:
    """The models' JSON schema, spec and status only; the caller may change it."""
    return copy.deepcopy(_model_schema())


@functools.cache
def _model_schema() -> Schema:
    schema = IngestRun.model_json_schema(by_alias=True, schema_generator=_Generator)
    del schema["properties"]["metadata"]
    schema["required"].remove("metadata")
    return schema


def crd_document() -> Schema:
    """The CRD with its anchors written out, so that a change in one place stays in that place."""
    document: Schema = json.loads(_crd_json())
    return document


@functools.cache
def _crd_json() -> str:
    return json.dumps(yaml.safe_load(CRD.read_text()))


def crd_schema() -> Schema:
    """The CRD's schema, spec and status only."""
    (version,) = crd_document()["spec"]["versions"]
    schema: Schema = version["schema"]["openAPIV3Schema"]
    for name in ("apiVersion", "kind", "metadata"):
        del schema["properties"][name]
    return schema


Facts = dict[str, Any]
Nodes = dict[str, Facts]


def facts_of_model(schema: Schema) -> Nodes:
    """Path to facts for the models' schema; a list's or a map's members have the path `<parent>.*`."""
    nodes: Nodes = {}

    def walk(path: str, part: Schema, default: Any = None) -> None:
        default = part.get("default", default)
        while "$ref" in part or "anyOf" in part:
            if "$ref" in part:
                part = schema["$defs"][part["$ref"].rpartition("/")[2]]
                continue
            choices = [choice for choice in part["anyOf"] if choice.get("type") != "null"]
            if {choice.get("type") for choice in choices} == {"string", "integer"}:
                part = {"type": "int-or-string"}
            else:
                (part,) = choices
        facts = {"type": part.get("type"), **_bounds(part), **_default(default)}
        if "const" in part:
            facts["enum"] = [part["const"]]
        one_of = re.fullmatch(r"\^\((\w+(?:\|\w+)*)\)\$", part.get("pattern", ""))
        if one_of:
            del facts["pattern"]
            facts["enum"] = sorted(one_of[1].split("|"))
        nodes[path] = facts
        members = part.get("additionalProperties")
        if part.get("type") == "object" and members is True:
            facts["opaque"] = True
        elif isinstance(members, dict):
            walk(f"{path}.*", members)
        if "items" in part:
            walk(f"{path}.*", part["items"])
        if "properties" in part:
            facts["required"] = sorted(part.get("required", ()))
            for name, child in part["properties"].items():
                walk(f"{path}.{name}" if path else name, child)

    walk("", schema)
    return nodes


def facts_of_crd(schema: Schema) -> Nodes:
    """The same for the CRD's schema."""
    nodes: Nodes = {}

    def walk(path: str, part: Schema) -> None:
        kind = "int-or-string" if part.get("x-kubernetes-int-or-string") else part["type"]
        facts = {"type": kind, **_bounds(part), **_default(part.get("default"))}
        nodes[path] = facts
        if "additionalProperties" in part:
            walk(f"{path}.*", part["additionalProperties"])
        if "items" in part:
            walk(f"{path}.*", part["items"])
        if "properties" in part:
            facts["required"] = sorted(part.get("required", ()))
            for name, child in part["properties"].items():
                walk(f"{path}.{name}" if path else name, child)

    walk("", schema)
    return nodes


def _bounds(part: Schema) -> Facts:
    facts: Facts = {keyword: part[keyword] for keyword in BOUNDS if keyword in part}
    if "enum" in part:
        facts["enum"] = sorted(part["enum"])
    if part.get("format") == "date-time":
        facts["format"] = "date-time"
    return facts


def _default(value: Any) -> Facts:
    """A default that says something: unset means the same as none, false, zero and empty in the CRD."""
    pruned = _pruned(value)
    return {} if pruned is None else {"default": pruned}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        value = {name: kept for name, item in value.items() if (kept := _pruned(item)) is not None}
    return value if value not in (None, False, 0, "", [], {}) else None


def differences(model: Schema, crd: Schema) -> list[str]:
    """All that the two do not agree about, each as a line for people."""
    left, right = facts_of_model(model), facts_of_crd(crd)
    found: list[str] = []
    used: set[tuple[str, str]] = set()
    opaque = [path for path in left if left[path].pop("opaque", False)]
    found += [f"{path}: opaque in the model, but not listed in OPAQUE" for path in opaque if path not in OPAQUE]
    found += [f"{path}: listed in OPAQUE, but the model knows its fields" for path in OPAQUE if path not in opaque]
    for path in sorted(left.keys() | right.keys()):
        if any(path.startswith(f"{prefix}.") for prefix in opaque):
            continue
        if path not in left or path not in right:
            found.append(f"{path}: only in the {'model' if path in left else 'CRD'}")
            continue
        for keyword in sorted(left[path].keys() | right[path].keys()):
            if keyword == "required" and path in opaque:
                continue
            ours, theirs = left[path].get(keyword), right[path].get(keyword)
            allowed = CRD_ALONE if ours is None else MODEL_ALONE if theirs is None else ()
            entry = next((e for e in allowed if e[1] == keyword and fnmatch.fnmatchcase(path, e[0])), None)
            if entry is not None:
                used.add(entry)
            elif ours != theirs:
                found.append(f"{path}: {keyword} is {ours!r} in the model, {theirs!r} in the CRD")
    found += [
        f"{path}: its exception for {keyword} is of no use" for path, keyword in {*CRD_ALONE, *MODEL_ALONE} - used
    ]
    return found


def test_models_and_crd_agree() -> None:
    assert differences(model_schema(), crd_schema()) == []


def test_the_walk_sees_every_field() -> None:
    paths = facts_of_model(model_schema())

    assert len(paths) > 200
    assert "spec.hooks.*.container.env.*.valueFrom.secretKeyRef.key" in paths
    assert "status.cancellation.notPublished" in paths


MUTATIONS: Final = {
    "type": "banana",
    "enum": ["banana"],
    "pattern": "^banana$",
    "format": None,
    "default": "banana",
    "required": ["banana"],
}


def _places(schema: Schema, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place in a schema where a keyword stands that the comparison must watch."""
    for keyword, value in schema.items():
        # `x-kubernetes-int-or-string` decides the type where it stands.
        typed_elsewhere = keyword == "type" and ("anyOf" in schema or schema.get("x-kubernetes-int-or-string"))
        if keyword == "format" and value != "date-time":
            continue
        if keyword == "default" and _pruned(value) is None:
            continue
        if keyword in (*BOUNDS, *MUTATIONS) and not typed_elsewhere:
            yield (*keys, keyword)
        if keyword == "properties":
            for name, child in value.items():
                yield from _places(child, (*keys, "properties", name))
                yield (*keys, "properties", name)
        if keyword in ("items", "additionalProperties") and isinstance(value, dict):
            yield from _places(value, (*keys, keyword))


def _at(schema: Schema, keys: tuple[str, ...]) -> Any:
    for key in keys:
        schema = schema[key]
    return schema


def _dotted(keys: tuple[str, ...]) -> str:
    return ".".join("*" if key in ("items", "additionalProperties") else key for key in keys if key != "properties")


def _changed_places() -> list[tuple[str, ...]]:
    """Outside of what the CRD alone spells out, and of the table of exceptions (tested by its own entries)."""

    def compared(keys: tuple[str, ...]) -> bool:
        *parents, keyword = keys
        path = _dotted(tuple(parents))
        inside = any(_dotted(keys).startswith(f"{prefix}.") for prefix in OPAQUE)
        excepted = any(fnmatch.fnmatchcase(path, entry[0]) and keyword == entry[1] for entry in CRD_ALONE)
        return not inside and not excepted

    return [keys for keys in _places(crd_schema()) if compared(keys)]


@pytest.mark.parametrize("keys", _changed_places(), ids=lambda keys: "/".join(keys))
def test_every_change_of_the_crd_is_reported(keys: tuple[str, ...]) -> None:
    """The comparison is seen to fail for every single field, bound, enum and default of the CRD."""
    changed = copy.deepcopy(crd_schema())
    *parents, last = keys
    parent = _at(changed, tuple(parents))
    if parents and parents[-1] == "properties":
        parent["renamed"] = parent.pop(last)
    elif last in MUTATIONS:
        parent[last] = MUTATIONS[last]
    else:
        parent[last] += 1

    assert set(differences(_model_schema(), changed)) - _known_differences()


@functools.cache
def _known_differences() -> frozenset[str]:
    """None, unless `test_models_and_crd_agree` fails; then these don't count as the report of a mutation."""
    return frozenset(differences(_model_schema(), crd_schema()))


@pytest.mark.parametrize(
    ("model", "field", "change"),
    [
        ("IngestRunSpec", "parallelism", {"maximum": 5}),
        ("IngestRunSpec", "retries", {"default": 1}),
        ("Container", "image", {"maxLength": 1}),
        ("Hook", "name", {"pattern": "^x$"}),
        ("ColumnRule", "name", {"type": "integer"}),
        ("OnBatchFailure", None, {"enum": ["FailRun"]}),
        ("Batches", None, {"required": ["size"]}),
        ("Partitions", "added", {"type": "string"}),
        ("Condition", "status", {"enum": ["True"]}),
    ],
)
def test_a_change_of_a_model_is_reported(model: str, field: str | None, change: Schema) -> None:
    changed = model_schema()
    part = changed["$defs"][model]
    if field is not None:
        part = part["properties"].setdefault(field, {})
    part.update(change)

    assert set(differences(changed, crd_schema())) - _known_differences()


def test_a_useless_exception_is_reported() -> None:
    changed = crd_schema()
    del changed["properties"]["spec"]["properties"]["fetch"]["properties"]["image"]["maxLength"]
    command = changed["properties"]["spec"]["properties"]
    del command["fetch"]["properties"]["command"]["maxItems"]
    del command["publish"]["properties"]["command"]["maxItems"]
    del command["hooks"]["items"]["properties"]["container"]["properties"]["command"]["maxItems"]
    del command["onCancel"]["properties"]["command"]["maxItems"]

    found = differences(model_schema(), changed)

    assert "spec.fetch.image: maxLength is 512 in the model, None in the CRD" in found
    assert "*.command: its exception for maxItems is of no use" in found


def test_names_agree() -> None:
    document = crd_document()["spec"]

    assert document["group"] == names.GROUP
    assert document["names"]["kind"] == names.KIND
    assert document["names"]["plural"] == names.PLURAL
    assert [version["name"] for version in document["versions"]] == [names.VERSION]


def test_limits_that_sentences_name_are_the_models() -> None:
    properties = crd_schema()["properties"]["spec"]["properties"]

    assert f"Unset: {MAX_FAILED_BATCHES}," in properties["maxFailedBatches"]["description"]
    assert properties["batches"]["properties"]["partitions"]["properties"]["count"]["maximum"] == MAX_PARTITIONS


def _parts(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _parts(child, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from _parts(schema[keyword], f"{path}.*")


def test_every_field_is_described() -> None:
    bare = [path for path, part in _parts(crd_schema()) if not path.endswith("*") and "description" not in part]

    assert bare == []


def test_the_spec_is_bounded_everywhere() -> None:
    spec = crd_schema()["properties"]["spec"]
    unbounded = [
        path
        for path, part in _parts(spec)
        if (part.get("type") == "array" and "maxItems" not in part)
        or ("additionalProperties" in part and "maxProperties" not in part)
        or (part.get("type") == "string" and "maxLength" not in part and "enum" not in part)
        or (part.get("type") == "integer" and "minimum" not in part)
    ]

    assert unbounded == []


def test_every_rule_says_what_to_do() -> None:
    for path, part in _parts(crd_schema()):
        for rule in part.get("x-kubernetes-validations", ()):
            message = rule["message"]
            assert message[0].islower(), f"{path}: the server puts the field before it: {message}"
            assert not re.search(r"\w[.!]$", message), f"{path}: the server goes on after it: {message}"
            assert len(message.split()) >= 5, f"{path}: no sentence: {message}"
            assert rule["reason"] in ("FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired"), path


def test_only_what_may_change_is_not_fixed() -> None:
    """A new field of the spec has to be put on one of the two sides."""
    spec = crd_schema()["properties"]["spec"]
    transitions = [rule for rule in spec["x-kubernetes-validations"] if "oldSelf" in rule["rule"]]
    rules = [rule for rule in transitions if rule["fieldPath"].count(".") == 1]
    fixed = {rule["fieldPath"].removeprefix(".") for rule in rules}

    assert spec["properties"].keys() - fixed == {
        "cancel", "cancellation", "suspend", "parallelism", "activeDeadlineSeconds", "staleAfterSeconds",
        "jobRetention", "ttlSecondsAfterFinished",
    }  # fmt: skip
    for name in spec["properties"].keys() - fixed:
        assert all(name in rule["message"] for rule in rules)
