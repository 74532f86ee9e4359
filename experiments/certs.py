"""Certificates for a trial: a CA, a server's, and one for every client, whose name is in it.

    python experiments/certs.py --to=certs --clients=10                      # client-0 to client-9
    python experiments/certs.py --to=certs --names=clinic-a,clinic-b --host=fl.example.org

Run again with more names it makes theirs beside the ones that are there. certs/clients/NAME is for that client alone,
and is all that it needs; ca.key and server.key stay where they were made. For a federation that matters use your
own CA. Exit status as main.py's.
"""

import ipaddress
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_bytes
from fedmetanas_jax.options import UsageError, parse_path

FLAGS = {
    "to": Flag(str, None, "the folder"),
    "clients": Flag(int, 0, "make client-0, client-1, ..., so many", least=0),
    "names": Flag(tuple[str, ...], (), "of further clients, with commas between"),
    "host": Flag(tuple[str, ...], (), "names or addresses of the server, beside localhost and 127.0.0.1"),
    "days": Flag(float, 365.0, "that new certificates are valid; a negative number makes expired ones"),
    "help": command.HELP,
}
MOST_NAME = 60  # of the 64 characters of a common name


def make(folder: Path, names: list[str], hosts: list[str], days: float) -> list[str]:
    """Makes what is missing -> the names that are new. OSError. UsageError for a name that can be none."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    for name in names:
        if not name or len(name) > MOST_NAME or not all(letter.isalnum() or letter in "-_." for letter in name):
            raise UsageError(f"'{name}' is no client's name: letters, digits, '-', '_' and '.', at most {MOST_NAME}")
    ca, ca_key = _authority(folder, days)
    if not (folder / "server.pem").exists():
        alternatives = [_alternative(host) for host in ("localhost", "127.0.0.1", *hosts)]
        server = [x509.SubjectAlternativeName(alternatives), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])]
        _issue(folder, "server", "server", ca, ca_key, days, server)
    listed = folder / "clients.txt"
    there = listed.read_text().split() if listed.exists() else []
    new = [name for name in dict.fromkeys(names) if name not in there]
    for name in new:
        mine = folder / "clients" / name
        _issue(mine, "client", name, ca, ca_key, days, [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])])
        write_bytes(mine / "ca.pem", (folder / "ca.pem").read_bytes())
    write_bytes(listed, "".join(f"{name}\n" for name in [*there, *new]).encode())
    return new


def _authority(folder: Path, days: float):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not (folder / "ca.pem").exists():
        extensions = [x509.BasicConstraints(ca=True, path_length=0)]
        _issue(folder, "ca", "federation", None, None, max(days, 365.0), extensions)
    pem, key = (folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes()
    return x509.load_pem_x509_certificate(pem), load_pem_private_key(key, None)


def _issue(folder: Path, file: str, name: str, ca, ca_key, days: float, extensions: list) -> None:
    """FILE.pem and FILE.key, signed by the CA, or by itself where there is none."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    until = now + timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if ca is None else ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, until) - timedelta(days=1))
        .not_valid_after(until)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    certificate = builder.sign(key if ca_key is None else ca_key, hashes.SHA256())
    write_bytes(folder / f"{file}.pem", certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_bytes(folder / f"{file}.key", private)
    (folder / f"{file}.key").chmod(0o600)


def _alternative(host: str):
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def parse(argv: list[str]) -> dict:
    """argv[0] is the program. UsageError for what makes no sense."""
    values = command.read(argv, FLAGS)
    if not values["help"] and not (values["to"] and (values["clients"] or values["names"])):
        raise UsageError("which folder, and how many clients? certs.py --to=FOLDER --clients=N, or --names=A,B")
    return values


def act(values: dict, argv: list[str]) -> None:
    """Makes them."""
    del argv
    folder = parse_path("to", values["to"])
    names = [f"client-{number}" for number in range(values["clients"])] + list(values["names"])
    try:
        new = make(folder, names, list(values["host"]), values["days"])
    except ModuleNotFoundError as error:
        from serve import NEEDS

        raise UsageError(f"{NEEDS} ({error})") from None
    command.show(f"{len(new)} new clients; the server needs --certs={folder}, a client --certs={folder}/clients/NAME")


if __name__ == "__main__":
    sys.exit(command.run(sys.argv, parse, act, __doc__, FLAGS, lambda: (OSError,)))
