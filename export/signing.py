"""Signatures of bundles: Ed25519 over SHA256SUMS, which covers every other file.

Keys are PEM files as OpenSSL writes them: `openssl genpkey -algorithm ed25519 -out key.pem` makes one,
`openssl pkey -in key.pem -pubout -out key.pub.pem` its public half. Checksums alone authenticate nothing: whoever
changes a file can change them too.
"""

import hashlib
from pathlib import Path
from typing import Any

from slmrec.errors import CheckError, ConfigError

SIGNED_FILE = "SHA256SUMS.sig"
SUMS_FILE = "SHA256SUMS"
INSTALL = "pip install 'slmcompress[sign]'"


def sign(folder: Path, key: Path) -> None:
    """Write `SHA256SUMS.sig`, 64 bytes.

    Raises:
        ConfigError: no private Ed25519 key, or the library is not installed.
    """
    (folder / SIGNED_FILE).write_bytes(_private(key).sign((folder / SUMS_FILE).read_bytes()))


def check_signature(folder: Path, key: Path) -> None:
    """Refuse a bundle that the key's owner did not sign as it is.

    Raises:
        CheckError: no signature, or one of another key or of another content.
        ConfigError: no public Ed25519 key, or the library is not installed.
    """
    public = _public(key)
    from cryptography.exceptions import InvalidSignature

    path = folder / SIGNED_FILE
    if not path.is_file() or path.is_symlink():
        raise CheckError(f"{folder} is not signed", remedy="fetch the signed bundle; do not serve this one")
    try:
        public.verify(path.read_bytes(), (folder / SUMS_FILE).read_bytes())
    except InvalidSignature:
        raise CheckError(
            f"{folder} was not signed by the owner of {key.name} as it is", remedy="do not serve it; fetch it again"
        ) from None


def fingerprint(key: Path) -> str:
    """sha256 of the public half of a private key, by which a manifest names who signed."""
    raw = _library()[0]
    public = _private(key).public_key().public_bytes(raw.Encoding.Raw, raw.PublicFormat.Raw)
    return hashlib.sha256(public).hexdigest()


def _private(key: Path) -> Any:
    serialization, ed25519 = _library()
    found = _loaded(key, lambda content: serialization.load_pem_private_key(content, password=None), "private")
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise _no_key(key, "private")
    return found


def _public(key: Path) -> Any:
    serialization, ed25519 = _library()
    found = _loaded(key, serialization.load_pem_public_key, "public")
    if not isinstance(found, ed25519.Ed25519PublicKey):
        raise _no_key(key, "public")
    return found


def _loaded(key: Path, load: Any, half: str) -> Any:
    try:
        return load(key.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key} cannot be read: {error.strerror}", remedy="the path of a PEM file") from None
    except (ValueError, TypeError):  # no PEM, or one with a password
        raise _no_key(key, half) from None


def _no_key(key: Path, half: str) -> ConfigError:
    remedy = "openssl genpkey -algorithm ed25519 -out key.pem"
    if half == "public":
        remedy = "openssl pkey -in key.pem -pubout -out key.pub.pem"
    return ConfigError(f"{key} is no {half} Ed25519 key in PEM without a password", remedy=remedy)


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signatures need the package cryptography", remedy=INSTALL) from None
    return serialization, ed25519
