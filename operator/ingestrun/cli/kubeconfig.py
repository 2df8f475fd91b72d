"""The kubeconfig, read as kubectl reads it: several files, exec plugins, the service account inside a cluster.

pykube's own reader knows one file, and no exec plugin of `client.authentication.k8s.io/v1`; it runs the plugin once a
request, and writes private keys where every user of the machine can read them. So it is given a kubeconfig of one
context in which all of that is resolved: a token or files, in a folder that is this process's own.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pykube import KubeConfig

from ingestrun.cli.errors import CliError

Json = dict[str, Any]

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_EXEC_VERSIONS: Final = tuple(f"client.authentication.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))
_SECTIONS: Final = (("clusters", "cluster"), ("users", "user"), ("contexts", "context"))
_PATHS: Final = {"cluster": ("certificate-authority",), "user": ("client-certificate", "client-key", "tokenFile")}
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Access:
    """The way to the API server: a kubeconfig for pykube, and how to get new credentials when these have expired."""

    config: KubeConfig
    namespace: str
    folder: PrivateFolder
    """The folder of its files, which exists as long as this does."""
    renew: Callable[[], Access] | None = None
    """Gives access with new credentials; None if these come from no plugin."""


class PrivateFolder:
    """A folder for the certificates and keys of this process, removed at its end."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def write(self, name: str, data: bytes) -> str:
        """Write a file that only this user can read, and return its path."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="kubectl-ingestrun-")
        path = Path(self._folder.name) / name
        path.write_bytes(data)
        return str(path)


def load_access(*, kubeconfig: str | None = None, context: str | None = None) -> Access:
    """Find the API server and the credentials: by the options, then $KUBECONFIG, ~/.kube/config, the service account.

    Raises:
        CliError: there is none, or it cannot be used.
    """
    document = _merged(_files(kubeconfig))
    if not document["contexts"] and context is None and kubeconfig is None and (SERVICE_ACCOUNT / "token").exists():
        config = KubeConfig.from_service_account(str(SERVICE_ACCOUNT))
        return Access(config=config, namespace=config.namespace, folder=PrivateFolder())
    return _access(document, context or document["current-context"], PrivateFolder())


def _files(kubeconfig: str | None) -> list[Path]:
    """Return the kubeconfig's files. One that is named by the option has to exist; others may be missing."""
    if kubeconfig is not None:
        path = Path(kubeconfig).expanduser()
        if not path.is_file():
            raise CliError(f"error: stat {kubeconfig}: no such file or directory")
        return [path]
    named = [part for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    paths = [Path(part) for part in named] or [Path.home() / ".kube" / "config"]
    return [path for path in paths if path.is_file()]


def _merged(paths: list[Path]) -> Json:
    """Merge files as kubectl does: of each name the first entry counts, and the first current context."""
    merged: Json = {"current-context": "", "clusters": {}, "users": {}, "contexts": {}}
    for path in paths:
        try:
            document = yaml.load(path.read_bytes(), _LOADER) or {}  # noqa: S506  (the C form of the safe loader)
        except (yaml.YAMLError, OSError) as error:
            raise CliError(f"error: error loading config file {path}: {error}") from None
        if not isinstance(document, dict):
            raise CliError(f"error: error loading config file {path}: it is no kubeconfig")
        merged["current-context"] = merged["current-context"] or document.get("current-context") or ""
        for section, part in _SECTIONS:
            for entry in document.get(section) or ():
                merged[section].setdefault(entry["name"], _absolute(part, entry.get(part) or {}, path.parent))
    return merged


def _absolute(part: str, entry: Json, folder: Path) -> Json:
    """Resolve the paths of an entry, which are relative to the folder of its file."""
    resolved: Json = {key: str(folder / entry[key]) for key in _PATHS.get(part, ()) if entry.get(key)}
    command = (entry.get("exec") or {}).get("command", "")
    if os.sep in command:
        resolved["exec"] = {**entry["exec"], "command": str(folder / command)}
    return {**entry, **resolved}


def _access(document: Json, context: str, folder: PrivateFolder) -> Access:
    if not context or not document["contexts"]:
        raise CliError(
            "error: no configuration has been provided: set KUBECONFIG, or name a file with --kubeconfig"
            if not document["contexts"]
            else "error: current-context is not set: choose one with --context"
        )
    chosen = document["contexts"].get(context)
    if chosen is None:
        raise CliError(f'error: context "{context}" does not exist')
    cluster = document["clusters"].get(chosen.get("cluster"))
    if cluster is None:
        raise CliError(f'error: cluster "{chosen.get("cluster")}" does not exist')
    user = document["users"].get(chosen.get("user"), {})
    plugin = user.get("exec")
    credentials = {**user, **run_exec_plugin(plugin, cluster)} if plugin else user
    resolved = {
        "current-context": context,
        "contexts": [{"name": context, "context": chosen}],
        "clusters": [{"name": chosen["cluster"], "cluster": _with_files(cluster, folder, "certificate-authority")}],
        "users": [{"name": chosen.get("user", ""), "user": _resolved_user(credentials, folder)}],
    }
    return Access(
        config=KubeConfig(resolved),
        namespace=chosen.get("namespace") or "default",
        folder=folder,
        renew=(lambda: _access(document, context, folder)) if plugin else None,
    )


def _resolved_user(user: Json, folder: PrivateFolder) -> Json:
    """Return the user as pykube takes it, without what pykube would do in its own way."""
    resolved = _with_files(user, folder, "client-certificate", "client-key")
    resolved.pop("exec", None)
    token_file = resolved.pop("tokenFile", None)
    if token_file:
        try:
            resolved["token"] = Path(token_file).read_text().strip()
        except OSError as error:
            raise CliError(f"error: unable to read token file: {error}") from None
    return resolved


def _with_files(entry: Json, folder: PrivateFolder, *keys: str) -> Json:
    """Return the entry with a file in place of each data field."""
    resolved = dict(entry)
    for key in keys:
        data = resolved.pop(f"{key}-data", None)
        if data:
            resolved[key] = folder.write(key, base64.b64decode(data))
        elif resolved.get(key) and not Path(resolved[key]).is_file():
            raise CliError(f"error: unable to read {key} {resolved[key]}: no such file or directory")
    return resolved


def run_exec_plugin(plugin: Mapping[str, Any], cluster: Mapping[str, Any]) -> Json:
    """Run a credential plugin, and return the part of a user that its answer is.

    Raises:
        CliError: it fails, or answers what is no ExecCredential of its own version.
    """
    version, command = plugin.get("apiVersion"), str(plugin.get("command", ""))
    if version not in _EXEC_VERSIONS:
        raise CliError(f'error: exec plugin: invalid apiVersion "{version}"')
    environment = {**os.environ, **{item["name"]: item["value"] for item in plugin.get("env") or ()}}
    environment["KUBERNETES_EXEC_INFO"] = json.dumps(_exec_info(plugin, cluster))
    try:
        answer = subprocess.run(  # noqa: S603  (the user's own kubeconfig names it)
            [command, *(plugin.get("args") or ())], env=environment, stdout=subprocess.PIPE, check=False
        )
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        cause = f"executable {command} not found" if missing else f"executable {command}: {error.strerror}"
        hint = f"\n\n{plugin['installHint']}" if plugin.get("installHint") else ""
        raise CliError(f"error: getting credentials: exec: {cause}{hint}") from None
    if answer.returncode:
        cause = f"executable {command} failed with exit code {answer.returncode}"
        raise CliError(f"error: getting credentials: exec: {cause}")
    try:
        credential = json.loads(answer.stdout)
        status = credential["status"]
        if credential.get("apiVersion") != version:
            raise ValueError(f"exec plugin is configured to use API version {version}, plugin returned another")
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"error: getting credentials: decoding stdout: {error}") from None
    found: Json = {}
    if status.get("token"):
        found["token"] = status["token"]
    if status.get("clientCertificateData") and status.get("clientKeyData"):
        found["client-certificate-data"] = base64.b64encode(status["clientCertificateData"].encode()).decode()
        found["client-key-data"] = base64.b64encode(status["clientKeyData"].encode()).decode()
    if not found:
        raise CliError("error: getting credentials: exec plugin didn't return a token or cert/key pair")
    return found


def _exec_info(plugin: Mapping[str, Any], cluster: Mapping[str, Any]) -> Json:
    """Return what a plugin is told: whether it may ask the user and, where it wants that, about the cluster."""
    interactive = plugin.get("interactiveMode") != "Never" and sys.stdin is not None and sys.stdin.isatty()
    spec: Json = {"interactive": interactive}
    if plugin.get("provideClusterInfo"):
        spec["cluster"] = {
            key: cluster[key]
            for key in (
                "server",
                "tls-server-name",
                "insecure-skip-tls-verify",
                "certificate-authority-data",
                "proxy-url",
            )
            if cluster.get(key)
        }
    return {"apiVersion": plugin["apiVersion"], "kind": "ExecCredential", "spec": spec}
