"""The certificate of the HTTP server: made and rotated by the operator itself, or taken from files.

The operator's own certificates are in one Secret that all replicas share. Its CA is no more than a name for its key:
when the CA's certificate is renewed the key stays, so that a pod which was told of the old one goes on verifying.
A new certificate is loaded into the context in use. Connections that are open stay as they are.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NoReturn, Protocol
from urllib.parse import urlsplit

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ingestrun.controller.http.shared_secret import REFRESH_SECONDS, RETRY_SECONDS, Data, SharedSecret
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster

logger = structlog.get_logger("ingestrun.http")

SECRET_NAME: Final = "ingestrun-operator-tls"  # noqa: S105  (the object's name)
CA_CERTIFICATE, CA_KEY, CERTIFICATE, KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"
"""Fields of the Secret, named as cert-manager names them, and its files where it is mounted."""
CA_LIFETIME: Final = timedelta(days=3650)
LIFETIME: Final = timedelta(days=90)
RENEWED_WITH_LEFT: Final = 1 / 3
"""Part of its life that a certificate has left when it is renewed."""
CA_RENEWED_WITH_LEFT: Final = 1 / 2
SKEW: Final = timedelta(days=1)
"""Time by which a certificate begins in the past, for nodes whose clock is late."""


_KEY_USES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class ServerCertificate(Protocol):
    """A certificate as the server uses it."""

    context: ssl.SSLContext
    """The context, in which handshakes fail until the first certificate is loaded."""
    ca_pem: str | None
    """The CA by which clients verify the server; empty: one that they know; None: no certificate yet."""

    async def open(self) -> None:
        """Load the certificate, and keep it up to date until `close`."""

    async def close(self) -> None:
        """Stop."""


class OwnCertificate(SharedSecret):
    """The certificate that the operator makes, for all replicas."""

    what = "the server's certificate"

    def __init__(
        self, cluster: Cluster, *, namespace: str, url: str, clock: Callable[[], datetime], alone: bool
    ) -> None:
        """Start without a certificate. It will be for the host of `url`; `clock` is the API server's."""
        super().__init__(cluster, namespace=namespace, name=SECRET_NAME, alone=alone)
        self.context = _context()
        self.ca_pem: str | None = None
        self._names = names_for(url)
        self._clock = clock
        self._loaded: Data = {}
        self._keeping: asyncio.Task[NoReturn] | None = None

    async def open(self) -> None:
        """Load the certificate, and keep it up to date until `close`."""
        await self.try_refresh()
        self._keeping = asyncio.create_task(self.keep(), name="certificate")

    async def close(self) -> None:
        """Stop."""
        await _end(self._keeping)

    def renewed(self, data: Data) -> Data | None:
        """Return new content if there is none, or if it is time. Raises KubeError if it is not the operator's own."""
        now = self._clock()
        authority = _Authority.read(data) if data else _Authority.make(now)
        served = _certificate(data[CERTIFICATE]) if data.get(CERTIFICATE) and data.get(KEY) else None
        fresh = authority.extended(now)
        if served is not None and fresh is authority and fresh.has_issued(served) and _in_time(served, now):
            if set(self._names) <= _names_in(served):
                return None
            # Another replica has been told of another name: for as long as both run, it is for both.
            return fresh.content(sorted({*self._names, *_names_in(served)}), now)
        return fresh.content(self._names, now)

    def take(self, data: Data) -> None:
        """Serve this certificate from now on."""
        if data == self._loaded:
            return
        _load(self.context, data[CERTIFICATE], data[KEY])
        self.ca_pem = data[CA_CERTIFICATE].decode(errors="replace")
        self._loaded = data
        logger.info("serving with a certificate of the operator's own", until=_until(data[CERTIFICATE]))


class GivenCertificate:
    """The certificate in a folder: a Secret that is mounted, as cert-manager fills it, or any files of these names."""

    def __init__(self, folder: Path) -> None:
        self.context = _context()
        self.ca_pem: str | None = None
        self._folder = folder
        self._loaded: Data = {}
        self._complained = False
        self._keeping: asyncio.Task[NoReturn] | None = None

    async def open(self) -> None:
        """Load the certificate, and keep it up to date until `close`."""
        await self.try_refresh()
        self._keeping = asyncio.create_task(self._keep(), name="certificate")

    async def close(self) -> None:
        """Stop."""
        await _end(self._keeping)

    async def try_refresh(self) -> bool:
        """Read the files; what can't be used is logged, once until it works again, and the last stays in use."""
        try:
            data = await asyncio.to_thread(self._read)
            if data != self._loaded:
                _load(self.context, data[CERTIFICATE], data[KEY])
                self.ca_pem = data[CA_CERTIFICATE].decode()
                self._loaded = data
                logger.info("serving with the given certificate", until=_until(data[CERTIFICATE]))
        except (OSError, ValueError, KubeError) as error:
            if not self._complained:
                logger.warning("the given certificate could not be used", folder=str(self._folder), error=str(error))
            self._complained = True
            return False
        self._complained = False
        return True

    def _read(self) -> Data:
        data = {field: (self._folder / field).read_bytes() for field in (CERTIFICATE, KEY)}
        data[CA_CERTIFICATE] = b""  # without one, the server's CA is one that everybody knows
        with suppress(FileNotFoundError):
            data[CA_CERTIFICATE] = (self._folder / CA_CERTIFICATE).read_bytes()
        return data

    async def _keep(self) -> NoReturn:
        while True:
            done = await self.try_refresh()
            await asyncio.sleep(REFRESH_SECONDS if done else RETRY_SECONDS)


async def _end(task: asyncio.Task[NoReturn] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- contexts


def _context() -> ssl.SSLContext:
    """Make a server's context, without a certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Load the certificate into the context. Raises KubeError if it can't be served; then the context is as it was."""
    with _file_of(certificate + b"\n" + key) as path:
        try:
            # First into one that nobody uses: a key that does not fit would leave half of it in the context.
            _context().load_cert_chain(path)
        except (ssl.SSLError, OSError) as error:
            raise KubeError(f"{CERTIFICATE} and {KEY} are no certificate with its key: {error}") from None
        context.load_cert_chain(path)


@contextmanager
def _file_of(content: bytes) -> Iterator[str]:
    """Give the path of a file with this content, in memory where the system has such: `ssl` takes keys from files."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("tls"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield named.name


# --- certificates


def names_for(url: str) -> list[str]:
    """Return the names for which the certificate of a server at this URL is: its own, and those of port-forwards."""
    host = urlsplit(url).hostname or ""
    names = {host, "localhost", "127.0.0.1", "::1"} - {""}
    if host.endswith(".svc"):
        names |= {host.removesuffix(".svc"), f"{host}.cluster.local"}
    return sorted(names)


@dataclass(frozen=True, slots=True)
class _Authority:
    """The operator's own CA."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, now: datetime) -> _Authority:
        """Make a new one."""
        return cls._signed(ec.generate_private_key(ec.SECP256R1()), now)

    @classmethod
    def read(cls, data: Data) -> _Authority:
        """Read the one in the Secret. Raises KubeError if it has none, or another than this operator makes."""
        with suppress(KeyError, ValueError, TypeError, UnsupportedAlgorithm):
            key = load_pem_private_key(data[CA_KEY], password=None)
            certificate = x509.load_pem_x509_certificate(data[CA_CERTIFICATE])
            if isinstance(key, ec.EllipticCurvePrivateKey):
                return cls(certificate, key)
        raise KubeError(
            f"the Secret's {CA_CERTIFICATE!r} and {CA_KEY!r} are not the operator's own CA: delete its data, and "
            "a new one is made; or have your own certificate served (INGESTRUN_API_TLS=files)"
        )

    @classmethod
    def _signed(cls, key: ec.EllipticCurvePrivateKey, now: datetime) -> _Authority:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ingestrun-operator")])
        usage = {"key_cert_sign", "crl_sign"}
        builder = _builder(name, name, key.public_key(), key.public_key(), usage, now, CA_LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    def extended(self, now: datetime) -> _Authority:
        """Return itself, or, if it is time, itself with a new certificate of the same key."""
        return self if _in_time(self.certificate, now, CA_RENEWED_WITH_LEFT) else self._signed(self.key, now)

    def has_issued(self, certificate: x509.Certificate) -> bool:
        """Tell whether it has signed the certificate."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def content(self, names: Sequence[str], now: datetime) -> Data:
        """Return the Secret's content, with a new certificate for these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self.certificate.subject
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ingestrun-operator-api")])
        usage = {"digital_signature"}
        builder = _builder(subject, issuer, key.public_key(), self.key.public_key(), usage, now, LIFETIME)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        return {
            CA_CERTIFICATE: self.certificate.public_bytes(Encoding.PEM),
            CA_KEY: _pem(self.key),
            CERTIFICATE: builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM),
            KEY: _pem(key),
        }


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    usage: set[str],
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    """Begin a certificate with what OpenSSL's strict verification asks of each."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
        .add_extension(x509.KeyUsage(**{use: use in usage for use in _KEY_USES}), critical=True)
    )


def _certificate(pem: bytes) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None


def _until(pem: bytes) -> str:
    certificate = _certificate(pem)
    return certificate.not_valid_after_utc.isoformat() if certificate else ""


def _in_time(certificate: x509.Certificate, now: datetime, part: float = RENEWED_WITH_LEFT) -> bool:
    """Tell whether the certificate is valid, and more than this part of its life is left."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin <= now < end - (end - begin) * part


def _names_in(certificate: x509.Certificate) -> set[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))}


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
