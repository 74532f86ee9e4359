"""Who may talk to whom: mutual TLS by a CA of the federation's own, and names that are certificates' common names."""

import ipaddress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import grpc

from fedmetanas_jax.options import UsageError

CLIENTS = "clients.txt"  # beside the server's certificate: the names of those that may join, a line each
OPTIONS = [  # of both sides; a peer that is gone without a word is noticed after about 20 s
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]


class Pair(NamedTuple):
    """A certificate with its key, and the CA that the other side's must be signed by; PEM."""

    ca: bytes
    certificate: bytes
    key: bytes


def read(folder: Path, side: str) -> Pair:
    """ca.pem, SIDE.pem and SIDE.key of a folder. UsageError where they are not there, or have expired."""
    found = []
    for name in ("ca.pem", f"{side}.pem", f"{side}.key"):
        try:
            found.append((folder / name).read_bytes())
        except OSError as error:
            raise UsageError(f"certs is '{folder}', where {name} cannot be read: {error.strerror}") from None
    _check_date(folder / f"{side}.pem", found[1])
    return Pair(*found)


def _check_date(path: Path, certificate: bytes) -> None:
    from cryptography import x509

    try:
        until = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    except ValueError:
        raise UsageError(f"{path} holds no certificate") from None
    if until < datetime.now(UTC):
        raise UsageError(f"the certificate {path} expired on {until:%Y-%m-%d %H:%M} UTC; have a new one made")


def of_server(pair: Pair) -> grpc.ServerCredentials:
    """Only peers with a certificate of the CA get through."""
    return grpc.ssl_server_credentials([(pair.key, pair.certificate)], pair.ca, require_client_auth=True)


def of_client(pair: Pair) -> grpc.ChannelCredentials:
    """The server's certificate must be of the CA, and name the host that was asked for."""
    return grpc.ssl_channel_credentials(pair.ca, pair.key, pair.certificate)


def name_of(context: grpc.ServicerContext) -> str | None:
    """The common name of the peer's certificate; None without TLS."""
    names = context.auth_context().get("x509_common_name", [])
    return names[0].decode(errors="replace") if names else None


def check_loopback(host: str) -> None:
    """UsageError unless it is this machine: nothing protects a connection without TLS."""
    try:
        good = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--insecure is for trials on one machine: the host must be localhost, not {host}")
