"""Signing of models: keys, and the MODEL.sig that ``edge_ssm.formats.signatures`` reads (docs/signing.md)."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edge_ssm import files, outputs
from edge_ssm.errors import RunFailed, SignatureRefused, UsageError
from edge_ssm.formats import loading, signatures


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a new file. An existing key is never replaced: what it signed could not be signed again."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except FileExistsError:
        raise UsageError(f"{path}: already exists; give another --output, or remove it if nothing needs it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)  # independent of the umask
        file.write(content)


def keygen(output: Path) -> tuple[Path, Path, str]:
    """Write a new Ed25519 key pair: OUTPUT.pem (private, PKCS8 PEM, mode 0600) and OUTPUT.pub.pem (public, PEM).

    Returns
    -------
    tuple
        The two paths and the key's id.

    Raises
    ------
    UsageError
        If one of the files exists or cannot be written.
    """
    private, public = Path(f"{output}.pem"), Path(f"{output}.pub.pem")
    if public.exists():
        raise UsageError(f"{public}: already exists; give another --output, or remove it if nothing needs it")
    key = Ed25519PrivateKey.generate()
    _write_new(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write_new(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return private, public, signatures.key_id(key.public_key())


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 private key in a PEM file. Raise SignatureRefused, naming the file, if it holds none."""
    expected = "expected an Ed25519 private key, the NAME.pem of edge-ssm-build keygen"
    content = signatures.read_small(path, expected)
    try:
        key = load_pem_private_key(content, None)
    except TypeError:
        raise SignatureRefused(f"{path}: the key is encrypted; decrypt it first, {expected}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureRefused(f"{path}: no private key in PEM; {expected}") from None
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.lstrip("_")  # private in old versions of cryptography
        raise SignatureRefused(f"{path}: a key of another kind ({kind}); {expected}")
    return key


def statement(model: Path) -> signatures.Statement:
    """Return the statement about a model: the SHA-256 of its file and the digest of the artifact in it.

    Raises
    ------
    ArtifactError
        If a device would refuse the model.
    RunFailed
        If the file changes while it is read.
    """
    before = signatures.file_digest(model)
    loaded = loading.load(model)
    if signatures.file_digest(model) != before:
        raise RunFailed(f"{model}: changed while it was read; sign it when it is complete")
    return signatures.Statement(
        type_=signatures.STATEMENT_TYPE,
        subject=[signatures.Subject(model.name, signatures.Digests(before))],
        predicate_type=signatures.PREDICATE_TYPE,
        predicate=signatures.Predicate(loaded.digest),
    )


def envelope(payload: bytes, keys: Sequence[Ed25519PrivateKey]) -> bytes:
    """Return the DSSE envelope of a payload, with one signature per key, as JSON. The bytes are reproducible."""
    signed = signatures.pre_authentication_encoding(payload)
    content = signatures.Envelope(
        payload=base64.b64encode(payload).decode(),
        payload_type=signatures.PAYLOAD_TYPE,
        signatures=[
            signatures.Signature(base64.b64encode(key.sign(signed)).decode(), signatures.key_id(key.public_key()))
            for key in keys
        ],
    )
    return msgspec.json.encode(content) + b"\n"


def sign(model: Path, keys: Sequence[Path]) -> tuple[Path, list[str]]:
    """Write MODEL.sig atomically, with one signature per key file.

    Returns
    -------
    tuple
        The path of MODEL.sig and the ids of the keys.

    Raises
    ------
    UsageError
        If there are no keys or too many, or if MODEL.sig cannot be written.
    SignatureRefused
        If a key file holds no private key.
    InputRefused
        If MODEL.sig would overwrite the model or a key.
    ArtifactError
        If a device would refuse the model.
    """
    if not 1 <= len(keys) <= signatures.MAX_SIGNATURES:
        raise UsageError(f"--key: {len(keys)} given, expected 1 to {signatures.MAX_SIGNATURES}")
    private = [load_private_key(key) for key in keys]
    target = signatures.signature_path(model)
    outputs.check_places({"signature": target}, {"MODEL": model} | {f"--key {key}": key for key in keys})
    content = envelope(msgspec.json.encode(statement(model)), private)
    try:
        files.write(target, content)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror})") from None
    return target, [signatures.key_id(key.public_key()) for key in private]
