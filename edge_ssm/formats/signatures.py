"""Signed artifacts: whether MODEL.sig signs exactly the model that was loaded, with a key that is trusted.

docs/signing.md is the specification: a DSSE envelope (https://github.com/secure-systems-lab/dsse, v1.0) over an in-toto
Statement (https://github.com/in-toto/attestation, v1), signed with Ed25519 by the library ``cryptography``, which is
imported only here and only when a signature is asked for.

Nothing inside the envelope is read before its signature holds, and no byte of the model is parsed before its SHA-256 is
the signed one. The file could still be exchanged between that look and the loading; so the digest of what was loaded,
which covers document and tensors, is compared as well, and that one decides.
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
"""Says what a predicate means, as OpenSSF's https://model_signing/signature/v1.0 does; no page is there."""
MAX_BYTES = 1 << 16
"""Of a signature or a key file. One signature takes about 900 bytes."""
MAX_SIGNATURES = 16
"""In one envelope: what a hostile one may cost is this many times the number of keys, 0.1 ms each."""

_DAMAGED = "the signature file is damaged or no DSSE envelope, copy it again or sign again"

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Signature(msgspec.Struct, frozen=True):
    sig: str
    """Base64 of 64 bytes."""
    keyid: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    """Not signed: it only says which key to try. Empty: any."""


class Envelope(msgspec.Struct, frozen=True, rename={"payload_type": "payloadType"}):
    """Members that are not known are skipped, as DSSE says: they mean nothing and are not signed."""

    payload: str
    """Base64 of the statement's bytes."""
    payload_type: str
    signatures: Annotated[list[Signature], msgspec.Meta(min_length=1, max_length=MAX_SIGNATURES)]


class Digests(msgspec.Struct, frozen=True):
    sha256: Hex


class Subject(msgspec.Struct, frozen=True):
    name: str
    """Of the model's file when it was signed, without folders. For people: a file may be renamed."""
    digest: Digests
    """Of the file's bytes."""


class Predicate(msgspec.Struct, frozen=True):
    artifact_digest: Hex
    """``Artifact.digest``: over document and tensors (docs/artifact.md)."""


class Statement(msgspec.Struct, frozen=True, rename={"type_": "_type", "predicate_type": "predicateType"}):
    type_: str
    subject: Annotated[list[Subject], msgspec.Meta(min_length=1, max_length=1)]
    predicate_type: str
    predicate: Predicate


@dataclass(frozen=True)
class Key:
    """A public key that is trusted."""

    id: str
    """SHA-256, 64 hex digits, of the key as DER SubjectPublicKeyInfo."""
    public: Ed25519PublicKey


def signature_path(model: str | os.PathLike[str]) -> Path:
    """Where the signature of a model lies: MODEL.sig, beside it."""
    return Path(os.fspath(model) + SUFFIX)


def beside(model: str | os.PathLike[str]) -> str | None:
    """The name of the signature file that lies beside a model, unread and unchecked; None where there is none."""
    path = signature_path(model)
    return path.name if path.is_file() else None


def need_library() -> None:
    """Raise SignatureRefused, naming the extra, unless ``cryptography`` can be imported."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise SignatureRefused(
            "signatures need the package cryptography, which is missing here; pip install 'edge-ssm[signing]'"
        ) from None


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the key as DER SubjectPublicKeyInfo."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def pre_authentication(payload: bytes) -> bytes:
    """What is signed: DSSE's PAE, type and payload with their lengths, so that no other pair gives the same bytes."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def read_small(path: Path, expected: str) -> bytes:
    """Return a regular file of at most MAX_BYTES. Raises SignatureRefused, whose text ends in ``expected``."""
    return files.read_regular_file(path, MAX_BYTES, error=SignatureRefused, remedy=expected)


def parse_key(content: bytes) -> Key:
    """A PEM public key. Raises SignatureRefused, without the file's name, for whatever is none of Ed25519."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    expected = "expected an Ed25519 public key, the NAME.pub.pem of edge-ssm-build keygen"
    if b"PRIVATE KEY" in content:
        raise SignatureRefused(f"holds a private key, which belongs on no device; {expected}")
    try:
        public = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureRefused(f"no public key in PEM; {expected}") from None
    if not isinstance(public, Ed25519PublicKey):
        raise SignatureRefused(f"a key of another kind ({type(public).__name__}); {expected}")
    return Key(key_id(public), public)


def load_key(path: Path) -> Key:
    """The trusted key in a file. Raises SignatureRefused, naming it, where there is none."""
    need_library()
    content = read_small(path, "expected an Ed25519 public key in PEM")
    try:
        return parse_key(content)
    except SignatureRefused as error:
        raise SignatureRefused(f"{path}: {error}") from None


def _decode(text: str, field: str) -> bytes:
    """Base64 of either alphabet, as DSSE asks of a reader; padding is required."""
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise SignatureRefused(f"{field}: not base64; {_DAMAGED}") from None


def open_envelope(content: bytes, keys: Sequence[Key]) -> tuple[Statement, Key]:
    """The statement in an envelope's bytes, and the key of ``keys`` that signed it.

    Raises SignatureRefused, without the file's name, unless one of the signatures is right for one of the keys.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        envelope = msgspec.json.decode(content, type=Envelope)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SignatureRefused(f"{error}; {_DAMAGED}") from None
    if envelope.payload_type != PAYLOAD_TYPE:
        raise SignatureRefused(f"payloadType {envelope.payload_type[:80]!r}, expected {PAYLOAD_TYPE}; {_DAMAGED}")
    payload = _decode(envelope.payload, "payload")
    signed = pre_authentication(payload)
    named = False
    for i, signature in enumerate(envelope.signatures):
        value = _decode(signature.sig, f"signatures[{i}].sig")
        for key in keys:
            if signature.keyid and signature.keyid != key.id:
                continue
            named = named or bool(signature.keyid)
            try:
                key.public.verify(value, signed)
            except InvalidSignature:
                continue
            return _statement(payload), key
    if named:
        raise SignatureRefused(f"the signature is wrong for the key that it names; {_DAMAGED}")
    names = ", ".join(s.keyid[:16] + "..." if s.keyid else "a key without name" for s in envelope.signatures)
    trusted = ", ".join(key.id[:16] + "..." for key in keys)
    raise SignatureRefused(
        f"signed by {names!r}, expected one of {trusted}; sign with a key that is trusted here, or give its public key"
    )


def _statement(payload: bytes) -> Statement:
    """The signed bytes as a statement of ours: a trusted key may have signed something else."""
    again = "the key signed something else than a model, sign it with edge-ssm-build sign"
    try:
        statement = msgspec.json.decode(payload, type=Statement)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SignatureRefused(f"statement: {error}; {again}") from None
    if (statement.type_, statement.predicate_type) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise SignatureRefused(
            f"statement: types {statement.type_[:80]!r} and {statement.predicate_type[:80]!r}, "
            f"expected {STATEMENT_TYPE} and {PREDICATE_TYPE}; {again}"
        )
    return statement


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a plain file's bytes. Raises SignatureRefused where it can't be read."""
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


def _signed(model: Path, keys: Sequence[Path]) -> tuple[Statement, Key]:
    """What a trusted key says of the file as it lies there: its SHA-256 is the signed one."""
    if not keys:
        raise SignatureRefused("no key given; expected the file of an Ed25519 public key that is trusted")
    trusted = [load_key(key) for key in keys]
    path = signature_path(model)
    content = read_small(
        path, f"expected the signature of {model}; copy it beside the model, or edge-ssm-build sign it"
    )
    try:
        statement, key = open_envelope(content, trusted)
    except SignatureRefused as error:
        raise SignatureRefused(f"{path}: {error}") from None
    found, expected = file_digest(model), statement.subject[0].digest.sha256
    if found != expected:
        raise SignatureRefused(
            f"{path}: signs {statement.subject[0].name[:80]!r} with SHA-256 {expected[:16]}..., {model} has "
            f"{found[:16]}...; the model is damaged or not the one that was signed, copy both again"
        )
    return statement, key


def _compare(model: Path, statement: Statement, artifact_digest: str) -> None:
    if statement.predicate.artifact_digest != artifact_digest:
        raise SignatureRefused(
            f"{signature_path(model)}: signs artifact digest {statement.predicate.artifact_digest[:16]}..., what was "
            f"loaded has {artifact_digest[:16]}...; the file was exchanged meanwhile, or signed by another tool"
        )


def verify(model_path: str | os.PathLike[str], artifact_digest: str, keys: Sequence[Path]) -> str:
    """The id of the key, one of the files ``keys``, that signed the artifact with this digest.

    ``artifact_digest`` is ``Artifact.digest`` of what was loaded from ``model_path``, whose MODEL.sig is read. Raises
    SignatureRefused where there is no signature, where it is not by one of the keys, or where it is of another model.
    """
    model = Path(model_path)
    statement, key = _signed(model, keys)
    _compare(model, statement, artifact_digest)
    return key.id


def load(model_path: str | os.PathLike[str], keys: Sequence[Path]) -> loading.Model:
    """The model, if one of the keys signed it. Bytes that nobody signed are not parsed.

    Raises SignatureRefused as ``verify`` does, and ArtifactError for a model that is signed but not right.
    """
    return load_and_tell(model_path, keys)[0]


def load_and_tell(model_path: str | os.PathLike[str], keys: Sequence[Path]) -> tuple[loading.Model, str]:
    """As ``load``, with the id of the key that signed it."""
    model = Path(model_path)
    statement, key = _signed(model, keys)
    loaded = loading.load(model)
    _compare(model, statement, loaded.digest)
    return loaded, key.id
