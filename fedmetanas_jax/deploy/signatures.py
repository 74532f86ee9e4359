"""Who a client is to the other clients: it signs with the key of its certificate, which the federation's CA signed.

The server hands keys and signatures on, and cannot make any: TLS already gave every client such a key. Whoever can
have certificates signed by that CA can be as many clients as it likes, so the CA must not be the server's.
"""

from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmetanas_jax.deploy.credentials import Pair
from fedmetanas_jax.options import UsageError

MOST_CERTIFICATE, MOST_SIGNATURE = 4096, 1024  # bytes that are believed of another client
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


class Unproven(Exception):
    """A certificate or a signature that does not hold. One line."""


class Signer:
    """This client's own key."""

    def __init__(self, pair: Pair):
        """UsageError for a key that others could not check, or a certificate that the CA did not sign itself."""
        self._key = serialization.load_pem_private_key(pair.key, None)
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        self.certificate = certificate.public_bytes(serialization.Encoding.DER)
        if not isinstance(self._key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise UsageError("secure sums need a certificate with an elliptic curve or RSA key, to sign with")
        try:
            self.name = Authority(pair.ca).name(self.certificate)
        except Unproven as error:
            raise UsageError(f"secure sums need a certificate that other clients accept; this one {error}") from None

    def sign(self, text: bytes) -> bytes:
        """By ECDSA or RSA-PSS, both with SHA-256."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(text, PSS, hashes.SHA256())
        return self._key.sign(text, ec.ECDSA(hashes.SHA256()))


class Authority:
    """The federation's CA, by which others' certificates are judged."""

    def __init__(self, ca: bytes):
        self._authorities = x509.load_pem_x509_certificates(ca)

    def name(self, certificate: bytes) -> str:
        """The client's name in a certificate, DER. Unproven: the CA did not sign it, it is not valid now, or it is no
        client's."""
        found, now = _read(certificate), datetime.now(UTC)
        if not any(_issued(found, authority) for authority in self._authorities):
            raise Unproven("is not signed by the federation's CA itself")
        if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
            raise Unproven("is not valid now")
        try:
            uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except Exception:  # there is none, or one that the library cannot read
            uses = ()
        if ExtendedKeyUsageOID.CLIENT_AUTH not in uses:
            raise Unproven("is not marked as a client's (extended key usage)")
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        if len(names) != 1:
            raise Unproven("has not one common name")
        return str(names[0].value)


def check(certificate: bytes, signature: bytes, text: bytes) -> None:
    """Unproven unless the certificate's key signed this text."""
    try:
        key = _read(certificate).public_key()
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, text, PSS, hashes.SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, text, ec.ECDSA(hashes.SHA256()))
        else:
            raise Unproven("has a key that is neither of an elliptic curve nor RSA")
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        raise Unproven("did not sign this") from None


def _read(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(certificate)
    except Exception:  # damage shows as nearly any exception of the library
        raise Unproven("is no certificate") from None


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # as in `_read`: of what it does not know, too
        return False
    return True
