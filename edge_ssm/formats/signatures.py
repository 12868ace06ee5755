"""Verification of signed models: MODEL.sig must sign exactly the model that was loaded, with a trusted key.

docs/signing.md is the specification: a DSSE envelope (https://github.com/secure-systems-lab/dsse, version 1.0) with an
in-toto Statement (https://github.com/in-toto/attestation, version 1), signed with Ed25519. The package ``cryptography``
is imported only when a signature is verified.

Nothing in the envelope is read before its signature has been verified, and no byte of the model is parsed before its
SHA-256 has been compared. The file could be replaced between that comparison and the loading, so the digest of the
loaded model, which covers document and tensors, is compared as well.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from edge_ssm import files
from edge_ssm.errors import SignatureRefused
from edge_ssm.formats import loading

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SUFFIX = ".sig"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://edge_ssm/signature/v1"
"""Identifies the meaning of the predicate, like OpenSSF's https://model_signing/signature/v1.0; it is not a page."""
MAX_BYTES = 1 << 16
"""Size of the largest signature or key file. One signature takes about 900 bytes."""
MAX_SIGNATURES = 16
"""Most signatures in an envelope, which limits the time that a hostile one costs: 0.1 ms per signature and key."""

_DAMAGED = "the signature file is damaged or not a DSSE envelope, copy it again or sign the model again"

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Signature(msgspec.Struct, frozen=True):
    """A signature in an envelope."""

    sig: str
    """The signature, 64 bytes in base64."""
    keyid: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    """Identifier of the key to try, which is not signed itself; empty for any key."""


class Envelope(msgspec.Struct, frozen=True, rename={"payload_type": "payloadType"}):
    """A DSSE envelope. Unknown members are ignored, as DSSE requires; they are not signed."""

    payload: str
    """The bytes of the statement in base64."""
    payload_type: str
    signatures: Annotated[list[Signature], msgspec.Meta(min_length=1, max_length=MAX_SIGNATURES)]


class Digests(msgspec.Struct, frozen=True):
    """The digests of a subject."""

    sha256: Hex


class Subject(msgspec.Struct, frozen=True):
    """The file that was signed."""

    name: str
    """Name of the file without folders when it was signed; it is informative, since a file may be renamed."""
    digest: Digests
    """Digest of the file's bytes."""


class Predicate(msgspec.Struct, frozen=True):
    """What is stated about the subject."""

    artifact_digest: Hex
    """``Model.digest``, for an artifact the SHA-256 over document and tensors (docs/artifact.md)."""


class Statement(msgspec.Struct, frozen=True, rename={"type_": "_type", "predicate_type": "predicateType"}):
    """The in-toto statement that is signed."""

    type_: str
    subject: Annotated[list[Subject], msgspec.Meta(min_length=1, max_length=1)]
    predicate_type: str
    predicate: Predicate


@dataclass(frozen=True)
class Key:
    """A trusted public key."""

    id: str
    """SHA-256 of the key as DER SubjectPublicKeyInfo, 64 hexadecimal digits."""
    public: Ed25519PublicKey


def signature_path(model: str | os.PathLike[str]) -> Path:
    """Return the path of a model's signature file, MODEL.sig."""
    return Path(os.fspath(model) + SUFFIX)


def find_signature(model: str | os.PathLike[str]) -> str | None:
    """Return the name of a model's signature file without reading it; None if there is none."""
    path = signature_path(model)
    return path.name if path.is_file() else None


def require_cryptography() -> None:
    """Raise SignatureRefused, naming the extra to install, unless ``cryptography`` can be imported."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise SignatureRefused(
            "signatures need the package cryptography, which is missing; pip install 'edge-ssm[signing]'"
        ) from None


def key_id(public: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a key as DER SubjectPublicKeyInfo, 64 hexadecimal digits."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return the bytes that are signed: type and payload with their lengths, which makes the encoding unambiguous.

    See "Pre-Authentication Encoding" in the DSSE protocol.
    """
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def read_small(path: Path, expected: str) -> bytes:
    """Return a regular file of at most MAX_BYTES. Raises SignatureRefused, whose text ends in ``expected``."""
    return files.read_regular_file(path, MAX_BYTES, error=SignatureRefused, remedy=expected)


def parse_key(content: bytes) -> Key:
    """Decode an Ed25519 public key in PEM. Raises SignatureRefused, without the file's name, for anything else."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    expected = "expected an Ed25519 public key, the NAME.pub.pem of edge-ssm-build keygen"
    if b"PRIVATE KEY" in content:
        raise SignatureRefused(f"contains a private key, which must not be on a device; {expected}")
    try:
        public = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureRefused(f"not a public key in PEM; {expected}") from None
    if not isinstance(public, Ed25519PublicKey):
        kind = type(public).__name__.lstrip("_")  # private in old versions of cryptography
        raise SignatureRefused(f"a key of another kind ({kind}); {expected}")
    return Key(key_id(public), public)


def load_key(path: Path) -> Key:
    """Load a trusted public key. Raises SignatureRefused, naming the file, if it contains none."""
    require_cryptography()
    content = read_small(path, "expected an Ed25519 public key in PEM")
    try:
        return parse_key(content)
    except SignatureRefused as error:
        raise SignatureRefused(f"{path}: {error}") from None


def _decode(text: str, field: str) -> bytes:
    """Decode base64 of either alphabet, as DSSE requires of a reader. Padding is required."""
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise SignatureRefused(f"{field}: not base64; {_DAMAGED}") from None


def verify_envelope(content: bytes, keys: Sequence[Key]) -> tuple[Statement, Key]:
    """Return the statement in an envelope, and the one of ``keys`` that signed it.

    Raises SignatureRefused, without the file's name, unless one of the signatures is valid for one of the keys.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        envelope = msgspec.json.decode(content, type=Envelope)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SignatureRefused(f"{error}; {_DAMAGED}") from None
    if envelope.payload_type != PAYLOAD_TYPE:
        raise SignatureRefused(f"payloadType {envelope.payload_type[:80]!r}, expected {PAYLOAD_TYPE}; {_DAMAGED}")
    payload = _decode(envelope.payload, "payload")
    signed = pre_authentication_encoding(payload)
    has_trusted_id = False
    for i, signature in enumerate(envelope.signatures):
        value = _decode(signature.sig, f"signatures[{i}].sig")
        for key in keys:
            if signature.keyid and signature.keyid != key.id:
                continue
            has_trusted_id = has_trusted_id or bool(signature.keyid)
            try:
                key.public.verify(value, signed)
            except InvalidSignature:
                continue
            return _statement(payload), key
    if has_trusted_id:
        raise SignatureRefused(f"the signature is not valid for the key that it names; {_DAMAGED}")
    ids = ", ".join(s.keyid[:16] + "..." if s.keyid else "a key without an id" for s in envelope.signatures)
    trusted = ", ".join(key.id[:16] + "..." for key in keys)
    raise SignatureRefused(
        f"signed by {ids!r}, expected one of {trusted}; sign with a trusted key, or give the signer's public key"
    )


def _statement(payload: bytes) -> Statement:
    """Decode the signed bytes, which need not be a statement about a model although the key is trusted."""
    remedy = "the key signed something other than a model, sign the model with edge-ssm-build sign"
    try:
        statement = msgspec.json.decode(payload, type=Statement)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SignatureRefused(f"statement: {error}; {remedy}") from None
    if (statement.type_, statement.predicate_type) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise SignatureRefused(
            f"statement: types {statement.type_[:80]!r} and {statement.predicate_type[:80]!r}, "
            f"expected {STATEMENT_TYPE} and {PREDICATE_TYPE}; {remedy}"
        )
    return statement


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file, 64 hexadecimal digits. Raises SignatureRefused if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with files.open_regular_file(path) as file:
            left = os.fstat(file.fileno()).st_size  # no further: a file that grows while it is read would have no end
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                digest.update(part)
                left -= len(part)
    except OSError as error:
        raise SignatureRefused(f"{path}: {files.read_problem(error)}; expected a .safetensors artifact") from None
    return digest.hexdigest()


def _verify_file(model: Path, keys: Sequence[Path]) -> tuple[Statement, Key]:
    """Return the statement about a model's file, whose SHA-256 is the signed one, and the key that signed it."""
    if not keys:
        raise SignatureRefused("no key given; expected the file of a trusted Ed25519 public key")
    trusted = [load_key(key) for key in keys]
    path = signature_path(model)
    content = read_small(
        path, f"expected the signature of {model}; copy it beside the model, or create it with edge-ssm-build sign"
    )
    try:
        statement, key = verify_envelope(content, trusted)
    except SignatureRefused as error:
        raise SignatureRefused(f"{path}: {error}") from None
    actual, signed = file_digest(model), statement.subject[0].digest.sha256
    if actual != signed:
        raise SignatureRefused(
            f"{path}: signs {statement.subject[0].name[:80]!r} with SHA-256 {signed[:16]}..., {model} has "
            f"{actual[:16]}...; the model is damaged or not the one that was signed, copy both again"
        )
    return statement, key


def _check_digest(model: Path, statement: Statement, artifact_digest: str) -> None:
    """Raise SignatureRefused unless the loaded model has the signed digest."""
    if statement.predicate.artifact_digest != artifact_digest:
        raise SignatureRefused(
            f"{signature_path(model)}: signs artifact digest {statement.predicate.artifact_digest[:16]}..., the "
            f"loaded model has {artifact_digest[:16]}...; the file was replaced meanwhile, or signed by another tool"
        )


def verify(model_path: str | os.PathLike[str], artifact_digest: str, keys: Sequence[Path]) -> str:
    """Verify the signature of a model that has been loaded.

    Parameters
    ----------
    model_path
        The model's file, beside which MODEL.sig lies.
    artifact_digest
        ``Model.digest`` of the loaded model.
    keys
        Files of the trusted public keys, any one of which is sufficient.

    Returns
    -------
    The identifier of the key that signed the model.

    Raises SignatureRefused if there is no signature, or none by a trusted key, or if it belongs to another model.
    """
    model = Path(model_path)
    statement, key = _verify_file(model, keys)
    _check_digest(model, statement, artifact_digest)
    return key.id


def load(model_path: str | os.PathLike[str], keys: Sequence[Path]) -> loading.Model:
    """Load a model that one of the trusted ``keys`` signed. Unsigned bytes are not parsed.

    Raises SignatureRefused as ``verify`` does, and ArtifactError for a signed model that is invalid.
    """
    return load_with_key(model_path, keys)[0]


def load_with_key(model_path: str | os.PathLike[str], keys: Sequence[Path]) -> tuple[loading.Model, str]:
    """Do the same as ``load``, and return the identifier of the key that signed the model as well."""
    path = Path(model_path)
    statement, key = _verify_file(path, keys)
    model = loading.load(path)
    _check_digest(path, statement, model.digest)
    return model, key.id
