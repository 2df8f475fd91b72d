"""Calls to the API server, by pykube's HTTP client: about runs, their Jobs and pods. Each answer tells its time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

import pykube
import requests

from ingestrun import __version__
from ingestrun.cli.errors import CliError, ExitCode, ServerError
from ingestrun.cli.kubeconfig import Access, Json
from ingestrun.model.names import GROUP, PLURAL, VERSION

RUNS: Final = f"{GROUP}/{VERSION}"
PAGE: Final = 500
"""Objects in one page of a list, as kubectl has it."""
CONNECT_SECONDS: Final = 10.0
CHUNK_BYTES: Final = 64 * 1024
"""Most bytes that are read of a stream at once; what has come is never waited on for more."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A list of objects, with its version and the server's time."""

    items: list[Json]
    resource_version: str
    at: datetime


class WatchExpired(Exception):  # noqa: N818  (no error: a list begins anew)
    """The version from which is watched, or that is listed, is too old."""


class Api:
    """The API server, as this user sees it."""

    def __init__(
        self,
        access: Access,
        *,
        user: str | None = None,
        group: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """`user` and `group` are impersonated; `timeout` is that of one request in seconds, None for no limit."""
        self._user, self._group = user, group
        self._timeout = timeout
        self._warned: set[str] = set()
        self._connect(access)

    def _connect(self, access: Access) -> None:
        self._access = access
        cluster, config = access.config.cluster, access.config.user
        self._http = pykube.HTTPClient(access.config, timeout=self._timeout)
        session = self._http.session
        # requests would send a password of ~/.netrc in place of the kubeconfig's credentials.
        session.trust_env = False
        session.proxies = _proxies(cluster)
        # The API server takes what stands before the slash as the field manager.
        session.headers["User-Agent"] = f"kubectl-ingestrun/{__version__}"
        session.headers.update(_impersonation(config, self._user, self._group))
        if cluster.get("insecure-skip-tls-verify"):
            import urllib3

            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    @property
    def namespace(self) -> str:
        """The namespace of the context."""
        return self._access.namespace

    # ---------------------------------------------------------------------------------------------------- runs

    def run(self, namespace: str, name: str) -> tuple[Json, datetime]:
        """Return a run and the server's time. Raises CliError."""
        response = self._request("GET", namespace=namespace, url=f"{PLURAL}/{name}")
        return response.json(), _server_time(response)

    def runs(self, namespace: str | None, *, selector: str | None = None, field_selector: str | None = None) -> Listed:
        """List runs, of all namespaces if it is None. Raises CliError."""
        return self._list(RUNS, PLURAL, namespace, labelSelector=selector, fieldSelector=field_selector)

    def patch(self, namespace: str, name: str, patch: Mapping[str, Any], *, dry_run: bool = False) -> Json:
        """Send a merge patch of a run, and return the run as it is then. Raises CliError."""
        response = self._request(
            "PATCH",
            namespace=namespace,
            url=f"{PLURAL}/{name}",
            params=_dry_run(dry_run) | {"fieldValidation": "Strict"},
            headers={"Content-Type": "application/merge-patch+json"},
            data=json.dumps(patch),
        )
        patched: Json = response.json()
        return patched

    def create(self, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False) -> Json:
        """Create a run. Raises CliError."""
        response = self._request(
            "POST",
            namespace=namespace,
            url=PLURAL,
            params=_dry_run(dry_run) | {"fieldValidation": "Strict"},
            headers={"Content-Type": "application/json"},
            data=json.dumps(body),
        )
        created: Json = response.json()
        return created

    def watch_runs(
        self,
        namespace: str | None,
        resource_version: str,
        *,
        seconds: float,
        selector: str | None = None,
        field_selector: str | None = None,
    ) -> Iterator[tuple[str, Json]]:
        """Yield the changes of runs from that version on, with their kind, for so many seconds at most.

        Raises:
            WatchExpired: the version is too old.
            CliError: the server refuses.
        """
        yield from self._watch(
            RUNS,
            PLURAL,
            namespace,
            resource_version,
            seconds,
            labelSelector=selector,
            fieldSelector=field_selector,
        )

    # ------------------------------------------------------------------------------------------------- children

    def jobs(self, namespace: str, selector: str) -> list[Json]:
        """List Jobs. Raises CliError."""
        return self._list("batch/v1", "jobs", namespace, labelSelector=selector).items

    def pods(self, namespace: str, selector: str) -> Listed:
        """List pods. Raises CliError."""
        return self._list("v1", "pods", namespace, labelSelector=selector)

    def watch_pods(
        self, namespace: str, resource_version: str, *, seconds: float, selector: str
    ) -> Iterator[tuple[str, Json]]:
        """Yield the changes of pods; see `watch_runs`."""
        yield from self._watch("v1", "pods", namespace, resource_version, seconds, labelSelector=selector)

    def log(self, namespace: str, pod: str, **params: str) -> Iterator[bytes]:
        """Yield the lines of a pod's log. Raises CliError."""
        response = self._request(
            "GET",
            version="v1",
            namespace=namespace,
            url=f"pods/{pod}/log",
            params=params,
            stream=True,
            timeout=(CONNECT_SECONDS, None),
        )
        try:
            yield from response.iter_lines(CHUNK_BYTES)
        except requests.RequestException as error:
            raise _connection_error(error, self._http.url) from None

    # ------------------------------------------------------------------------------------------------- requests

    def _list(self, version: str, url: str, namespace: str | None, **params: str | None) -> Listed:
        wanted = {key: value for key, value in params.items() if value} | {"limit": str(PAGE)}
        items: list[Json] = []
        following: Json = {}
        while True:
            try:
                response = self._request(
                    "GET", version=version, namespace=namespace, url=url, params=wanted | following
                )
            except WatchExpired:
                # The list took too long, and its version is gone: only from the beginning it is of one moment.
                items, following = [], {}
                continue
            body = response.json()
            items += body.get("items") or ()
            meta = body["metadata"]
            if not meta.get("continue"):
                return Listed(items=items, resource_version=meta["resourceVersion"], at=_server_time(response))
            following = {"continue": meta["continue"]}

    def _watch(
        self,
        version: str,
        url: str,
        namespace: str | None,
        resource_version: str,
        seconds: float,
        **params: str | None,
    ) -> Iterator[tuple[str, Json]]:
        whole = max(1, int(seconds + 0.999))
        wanted = {key: value for key, value in params.items() if value}
        response = self._request(
            "GET",
            version=version,
            namespace=namespace,
            url=url,
            params=wanted | {"watch": "true", "resourceVersion": resource_version, "timeoutSeconds": str(whole)},
            stream=True,
            timeout=(CONNECT_SECONDS, max(seconds, 0.1)),
        )
        try:
            for line in response.iter_lines(CHUNK_BYTES):
                change = json.loads(line)
                if change["type"] == "ERROR":
                    status = change["object"]
                    if status.get("code") == 410:
                        raise WatchExpired
                    raise ServerError(status, int(status.get("code") or 0))
                yield change["type"], change["object"]
        except requests.RequestException:
            # Nothing happened for so long, or the connection is gone: the caller lists or watches anew.
            return
        finally:
            response.close()

    def _request(self, method: str, *, version: str = RUNS, renewed: bool = False, **kwargs: Any) -> requests.Response:
        try:
            response: requests.Response = self._http.request(method, version=version, **kwargs)
        except requests.RequestException as error:
            raise _connection_error(error, self._http.url) from None
        if response.status_code == 401 and self._access.renew is not None and not renewed:
            self._connect(self._access.renew())
            return self._request(method, version=version, renewed=True, **kwargs)
        self._show_warnings(response)
        if not response.ok:
            if response.status_code == 410:
                raise WatchExpired
            raise ServerError(_status_of(response), response.status_code)
        return response

    def _show_warnings(self, response: requests.Response) -> None:
        """Print the server's warnings, each once, as kubectl does."""
        for warning in response.headers.get("Warning", "").split(", 299 "):
            text = warning.partition('"')[2].rpartition('"')[0].replace('\\"', '"')
            if text and text not in self._warned:
                self._warned.add(text)
                sys.stderr.write(f"Warning: {text}\n")


def _impersonation(config: Mapping[str, Any], user: str | None, group: str | None) -> dict[str, str]:
    """Return the headers by which another user is impersonated: that of the options, or of the kubeconfig."""
    groups = [group] if group else list(config.get("as-groups") or ())
    if len(groups) > 1:
        # requests sends no header twice, and the API server splits none.
        raise CliError("error: the kubeconfig's as-groups has several groups, and this plugin can impersonate one")
    found = {"Impersonate-User": user or config.get("as") or "", "Impersonate-Group": "".join(groups)}
    return {name: value for name, value in found.items() if value}


def _proxies(cluster: Mapping[str, Any]) -> dict[str, str]:
    proxy = cluster.get("proxy-url")
    if proxy:
        return {"http": proxy, "https": proxy}
    found: dict[str, str] = requests.utils.get_environ_proxies(str(cluster["server"]))
    return found


def _dry_run(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}


def _status_of(response: requests.Response) -> Json:
    """Return the Status of a refusal; what is no Status comes from something before the API server."""
    try:
        status = response.json()
    except ValueError:
        status = None
    if isinstance(status, dict) and status.get("kind") == "Status":
        return status
    return {"message": response.text.strip()[:500] or f"HTTP {response.status_code} {response.reason}"}


def _server_time(response: requests.Response) -> datetime:
    """Return the server's time of an answer: this machine's own clock may be wrong, and is not asked."""
    try:
        return parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        raise CliError("error: the server's answer has no time (Date), so no age can be told") from None


def _connection_error(error: requests.RequestException, url: str) -> CliError:
    """Return the error as kubectl phrases it."""
    host = urlsplit(url).netloc
    if isinstance(error, requests.Timeout):
        return CliError(f"Unable to connect to the server: {host} did not answer in time", ExitCode.TIMED_OUT)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            text = f"The connection to the server {host} was refused - did you specify the right host or port?"
            return CliError(text)
        reason = getattr(cause, "reason", None) or next((a for a in cause.args if isinstance(a, BaseException)), None)
        cause = cause.__cause__ or cause.__context__ or (reason if isinstance(reason, BaseException) else None)
    return CliError(f"Unable to connect to the server: {error}")
