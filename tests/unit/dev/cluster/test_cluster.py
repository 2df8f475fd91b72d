"""The cluster's configuration, its image's names, and the commands."""

import json
import re
import tarfile
from pathlib import Path

import pytest
import yaml
from dev.cluster import cli, kindcluster
from dev.cluster.archive import write_archive
from dev.cluster.host import UserError, read_settings
from dev.cluster.kindcluster import LIMITS, Options, render_config, static_pod_edits
from dev.cluster.nodeimage import HERE, storage_images
from dev.cluster.simulated import LABEL, account, node

VERSIONS = read_settings(HERE / "versions.env")


def test_versions_agree_with_go_mod() -> None:
    module = (HERE / "node/go.mod").read_text()
    assert f"k8s.io/kubernetes {VERSIONS['KUBERNETES']}\n" in module
    assert set(re.findall(r"=> k8s\.io/\S+ (\S+)", module)) == {VERSIONS["KUBERNETES_STAGING"]}
    assert VERSIONS["KUBERNETES_STAGING"] == VERSIONS["KUBERNETES"].replace("v1.", "v0.")
    minor = VERSIONS["KUBERNETES"].rsplit(".", 1)[0]
    assert all(tag.startswith(f"{minor}.") for tag in VERSIONS["NODE_IMAGE_TAGS"].split())


def test_options() -> None:
    assert Options.from_environment({}) == Options("real", 4, "raised", 0)
    chosen = {"NODES": "both", "SIMULATED_NODES": "2", "LIMITS": "default", "API_PORT": "6443"}
    assert Options.from_environment(chosen) == Options("both", 2, "default", 6443)
    assert Options.from_environment({"NODES": "", "API_PORT": ""}) == Options()


def test_options_not_chosen_stay_as_they_are() -> None:
    """A plain `make cluster-up` beside someone's tests must not take their simulated nodes away."""
    running = {"nodes": "both", "simulated_nodes": 6, "limits": "default", "api_port": 0, "engine": "podman"}
    assert Options.from_environment({}, running) == Options("both", 6, "default", 0)
    assert Options.from_environment({"NODES": "real"}, running) == Options("real", 6, "default", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NODES", "virtual"), ("LIMITS", "high"), ("SIMULATED_NODES", "0"), ("API_PORT", "65536"), ("API_PORT", "x")],
)
def test_options_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name} is '{value}': set it to"):
        Options.from_environment({name: value})


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("limits", sorted(LIMITS))
def test_kind_config(public: bool, limits: str, tmp_path: Path) -> None:
    text = render_config((HERE / "kind.yaml").read_text(), Options(limits=limits), "img:1", public, tmp_path)
    config = yaml.safe_load(text)
    assert config["name"] == kindcluster.CLUSTER
    assert config["networking"]["disableDefaultCNI"] is not public
    assert config["networking"]["apiServerAddress"] == "127.0.0.1"
    (only,) = config["nodes"]
    assert only["image"] == "img:1"
    assert only["extraMounts"][0]["hostPath"] == f"{tmp_path}/audit"
    cluster = yaml.safe_load(config["kubeadmConfigPatches"][1])
    flags = {a["name"]: a["value"] for a in cluster["controllerManager"]["extraArgs"]}
    assert flags["concurrent-job-syncs"] == LIMITS[limits]["job_syncs"]


def test_limits_of_a_running_node() -> None:
    manager, scheduler = static_pod_edits("raised")
    assert "s/--kube-api-qps=.*/--kube-api-qps=500/" in manager
    assert manager.endswith("/kube-controller-manager.yaml")
    assert "job-syncs" not in scheduler


def test_audit_policy_is_strict_enough_for_the_judge() -> None:
    rules = yaml.safe_load((HERE / "audit-policy.yaml").read_text())["rules"]
    runs, jobs, others, operator, rest = rules
    assert runs["level"] == "RequestResponse"
    assert runs["resources"] == [{"group": "ingestrun.dev", "resources": ["*", "*/status"]}]
    assert (jobs["level"], jobs["verbs"]) == ("Request", ["create"])
    assert {"pods", "events"} <= set(others["resources"][1]["resources"])
    assert operator["users"] == ["system:serviceaccount:ingestrun-system:ingestrun-operator"]
    assert "verbs" not in operator
    assert rest == {"level": "None"}


def test_simulated_node_is_tainted_and_labelled() -> None:
    made = json.loads(json.dumps(node(3)))
    assert made["metadata"]["name"] == "simulated-3"
    assert made["metadata"]["labels"][LABEL] == "true"
    assert made["spec"]["taints"] == [{"key": LABEL, "value": "true", "effect": "NoSchedule"}]
    assert [item["kind"] for item in account()] == ["ServiceAccount", "ClusterRoleBinding"]


def test_stages_are_stages() -> None:
    stages = list(yaml.safe_load_all((HERE / "kwok/stages.yaml").read_text()))
    assert {s["kind"] for s in stages} == {"Stage"}
    names = [s["metadata"]["name"] for s in stages]
    assert len(names) == len(set(names))
    known = set(re.findall(r"simulate\.ingestrun\.dev/([a-z-]+)|print \$s \"([a-z-]+)\"", yaml.safe_dump_all(stages)))
    flat = {a or b for a, b in known}
    readme = (HERE / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in flat), "README.md lists every annotation"


def test_storage_images() -> None:
    text = 'const storageProvisionerImage = "a/b:1"\nconst storageHelperImage = "a/c:2"\n'
    assert storage_images(text) == ["a/b:1", "a/c:2"]
    with pytest.raises(UserError, match="storage_images"):
        storage_images("")


def test_archive_is_a_docker_archive(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "hello").write_text("hi")
    image_id = write_archive(
        root, tmp_path / "out.tar", ["localhost/x:1", "localhost/y:1"], "amd64", {"Cmd": ["/hello"]}
    )
    with tarfile.open(tmp_path / "out.tar") as archive:
        names = archive.getnames()
        (manifest,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile(manifest["Config"]))  # type: ignore[arg-type]
    assert manifest["RepoTags"] == ["localhost/x:1", "localhost/y:1"]
    assert manifest["Config"] == f"{image_id}.json"
    assert manifest["Layers"][0] in names
    assert config["rootfs"]["diff_ids"] == [f"sha256:{manifest['Layers'][0].removesuffix('.tar')}"]
    assert not list(tmp_path.glob("*.layer"))


def test_a_link_to_the_state_of_another_checkout_is_that_state(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "state")
    assert kindcluster.DevCluster(state=tmp_path / "link").kubeconfig == tmp_path / "state" / "kubeconfig"


def test_unknown_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLUSTER", "prod")
    assert cli.main(["status"]) == 1
    assert "set it to kind or current" in capsys.readouterr().err


def test_current_context_is_named_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLUSTER", "current")
    monkeypatch.setenv("KUBECONFIG", "/home/me/config")
    monkeypatch.setattr(cli, "current_context", lambda: "my cluster")
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "export KUBECONFIG=/home/me/config",
        "export INGESTRUN_CONTEXT='my cluster'",
    ]
    assert cli.main(["up"]) == 0
    assert cli.main(["down"]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert cli.main(["load", "x"]) == 1
