"""The kubeconfig as kubectl reads it: several files, paths, exec plugins, the service account, and private keys."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingestrun.cli import kubeconfig
from ingestrun.cli.errors import CliError
from ingestrun.cli.kubeconfig import load_access

Json = dict[str, Any]


def document(name: str, *, user: Json | None = None, cluster: Json | None = None, current: str = "") -> Json:
    return {
        "clusters": [{"name": name, "cluster": {"server": f"https://{name}:6443", **(cluster or {})}}],
        "users": [{"name": name, "user": user or {"token": f"token of {name}"}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": f"{name}-runs"}}],
        **({"current-context": current} if current else {}),
    }


def stored(path: Path, body: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(body))
    return path


def config_of(tmp_path: Path, user: Json) -> Path:
    return stored(tmp_path / "a", document("one", user=user, current="one"))


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No kubeconfig of the machine, and no service account."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr(kubeconfig, "SERVICE_ACCOUNT", tmp_path / "serviceaccount")


def plugin(tmp_path: Path, answer: object, **more: Any) -> dict[str, Any]:
    """A user whose exec plugin prints this, and leaves what it was told beside it."""
    script = tmp_path / "plugin.py"
    told = tmp_path / "told"
    script.write_text(
        f"import os, pathlib, json\n"
        f"pathlib.Path({str(told)!r}).write_text(os.environ['KUBERNETES_EXEC_INFO'] + os.environ.get('EXTRA', ''))\n"
        f"print({json.dumps(answer)!r})\n"
    )
    version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": version, "command": sys.executable, "args": [str(script)], **more}}


def credential(**status: str) -> dict[str, Any]:
    return {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}


def test_the_first_file_of_several_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stored(tmp_path / "a", document("one", current="two"))
    second = stored(tmp_path / "b", document("two", current="one"))
    third = stored(tmp_path / "c", document("two", user={"token": "of the third"}))
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join([str(tmp_path / "missing"), str(first), str(second), str(third)]))
    access = load_access()
    assert (access.config.cluster["server"], access.config.user["token"]) == ("https://two:6443", "token of two")
    assert access.namespace == "two-runs"
    assert load_access(context="one").config.cluster["server"] == "https://one:6443"


def test_a_context_without_a_namespace_is_in_default(tmp_path: Path) -> None:
    body = document("one", current="one")
    del body["contexts"][0]["context"]["namespace"]
    assert load_access(kubeconfig=str(stored(tmp_path / "a", body))).namespace == "default"


@pytest.mark.parametrize(
    ("body", "context", "text"),
    [
        ({}, None, "no configuration has been provided"),
        (document("one"), None, "current-context is not set"),
        (document("one"), "two", 'context "two" does not exist'),
        ({**document("one"), "clusters": []}, "one", 'cluster "one" does not exist'),
        (["a"], None, "no kubeconfig"),
    ],
)
def test_a_kubeconfig_that_leads_nowhere(tmp_path: Path, body: object, context: str | None, text: str) -> None:
    with pytest.raises(CliError, match=text):
        load_access(kubeconfig=str(stored(tmp_path / "a", body)), context=context)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="no such file"):
        load_access(kubeconfig=str(tmp_path / "missing"))
    (tmp_path / "broken").write_text("{")
    with pytest.raises(CliError, match="error loading config file"):
        load_access(kubeconfig=str(tmp_path / "broken"))
    with pytest.raises(CliError, match="no configuration"):
        load_access()


def test_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "ca.crt").write_text("ca")
    user = {"tokenFile": "token"}
    body = document("one", user=user, cluster={"certificate-authority": "ca.crt"}, current="one")
    access = load_access(kubeconfig=str(stored(tmp_path / "a", body)))
    assert access.config.user["token"] == "secret"
    assert access.config.cluster["certificate-authority"].filename() == str(tmp_path / "ca.crt")


def test_keys_are_where_no_other_user_reads_them_and_for_no_longer_than_needed(tmp_path: Path) -> None:
    data = {f"client-{part}-data": base64.b64encode(part.encode()).decode() for part in ("certificate", "key")}
    body = document("one", user=data, current="one")
    access = load_access(kubeconfig=str(stored(tmp_path / "a", body)))
    key = Path(access.config.user["client-key"].filename())
    assert key.read_text() == "key"
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    del access
    assert not key.exists()


def test_an_exec_plugin_gives_a_token_and_is_told_what_it_asks_for(tmp_path: Path) -> None:
    user = plugin(
        tmp_path, credential(token="fresh"), provideClusterInfo=True, env=[{"name": "EXTRA", "value": "extra"}]
    )
    path = config_of(tmp_path, user)
    access = load_access(kubeconfig=str(path))
    assert access.config.user == {"token": "fresh"}
    told = (tmp_path / "told").read_text()
    assert told.endswith("extra")
    info = json.loads(told.removesuffix("extra"))
    assert info["spec"] == {"interactive": False, "cluster": {"server": "https://one:6443"}}


def test_an_exec_plugin_is_run_again_for_new_credentials(tmp_path: Path) -> None:
    user = plugin(tmp_path, credential(token="fresh"))
    access = load_access(kubeconfig=str(stored(tmp_path / "a", document("one", user=user, current="one"))))
    (tmp_path / "told").unlink()
    assert access.renew is not None
    assert access.renew().config.user == {"token": "fresh"}
    assert (tmp_path / "told").exists()


def test_an_exec_plugin_gives_a_certificate(tmp_path: Path) -> None:
    user = plugin(tmp_path, credential(clientCertificateData="cert", clientKeyData="key"))
    access = load_access(kubeconfig=str(stored(tmp_path / "a", document("one", user=user, current="one"))))
    assert Path(access.config.user["client-certificate"].filename()).read_text() == "cert"
    assert Path(access.config.user["client-key"].filename()).read_text() == "key"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"command": "no-such-plugin", "installHint": "install it"},
            "executable no-such-plugin not found\n\ninstall it",
        ),
        ({"args": ["-c", "raise SystemExit(3)"]}, "failed with exit code 3"),
        ({"args": ["-c", "print('{}')"]}, "decoding stdout"),
        ({"args": ["-c", "print('no json')"]}, "decoding stdout"),
        ({"apiVersion": "client.authentication.k8s.io/v9"}, "invalid apiVersion"),
        ({"apiVersion": "client.authentication.k8s.io/v1beta1"}, "plugin returned another"),
    ],
)
def test_an_exec_plugin_that_fails(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    user = plugin(tmp_path, credential(token="fresh"), **change)
    path = config_of(tmp_path, user)
    with pytest.raises(CliError) as failed:
        load_access(kubeconfig=str(path))
    assert text in str(failed.value)


def test_an_exec_plugin_that_answers_nothing(tmp_path: Path) -> None:
    path = config_of(tmp_path, plugin(tmp_path, credential()))
    with pytest.raises(CliError, match="didn't return a token"):
        load_access(kubeconfig=str(path))


def test_inside_a_cluster_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = tmp_path / "serviceaccount"
    account.mkdir()
    for name, text in (("token", "in-cluster"), ("namespace", "ingest"), ("ca.crt", "ca")):
        (account / name).write_text(text)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    access = load_access()
    assert (access.namespace, access.config.user["token"]) == ("ingest", "in-cluster")
    assert access.config.cluster["server"] == "https://10.0.0.1:443"
    monkeypatch.setenv("KUBECONFIG", str(stored(tmp_path / "a", document("one", current="one"))))
    assert load_access().namespace == "one-runs"
