"""What is fuzzed: a registry from a name to a callable that takes bytes. Each may raise EdgeSSMError and nothing else.

A new reader of untrusted bytes is entered by ``@register("its-name", ...)`` on a function that builds its callable; a
codec of ``edge_ssm.io.codecs.registry.FORMATS`` is entered by itself. Seeds lie in tests/corpus/NAME/, and
tests/campaigns/test_fuzz.py runs them through every target.

Callables are deterministic and keep nothing between inputs, so that a finding can be repeated from its bytes alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_ssm.io import messages
from edge_ssm.io.codecs import lines

try:  # here, so that the parser which msgspec takes is instrumented with this import
    import tomllib  # noqa: F401
except ImportError:
    import tomli  # noqa: F401

from edge_ssm.engines.registry import create
from edge_ssm.errors import UsageError
from edge_ssm.formats import artifact, signatures
from edge_ssm.formats import description as formats_description
from edge_ssm.hardware import boards
from edge_ssm.io import address
from edge_ssm.io.codecs import framed
from edge_ssm.io.codecs import registry as codecs
from edge_ssm.io.sources import registry as sources
from edge_ssm.model.network import InputSpec
from edge_ssm.runtime.pipeline import Pipeline
from edge_ssm.runtime.windows import Windows
from edge_ssm.service import settings, settings_file, snapshot

ROOT = Path(__file__).parent.parent.parent
CORPUS = ROOT / "tests" / "corpus"
SPEC = InputSpec(("ax", "ay"), np.zeros(2), np.ones(2))
Fuzzed = Callable[[bytes], None]
PROGRESS = struct.Struct("<QQQ")
"""A target's progress file: inputs done, those that raised what they must not, and the slowest one's nanoseconds.
Written in place, so that it outlives the process."""


@dataclass(frozen=True)
class Target:
    name: str
    build: Callable[[], Fuzzed]
    inputs: int
    """In a full run. All targets together: more than ten million."""
    max_len: int
    """Bytes of the longest input."""
    words: tuple[str, ...] = ()
    """That the fuzzer may put into an input as a whole: coverage does not lead it through parsers in C."""

    @property
    def seeds(self) -> Path:
        return CORPUS / self.name


TARGETS: dict[str, Target] = {}


def register(
    name: str, inputs: int, max_len: int, words: tuple[str, ...] = ()
) -> Callable[[Callable[[], Fuzzed]], Callable[[], Fuzzed]]:
    """Enter what the decorated function builds. Refuses a name that is taken."""

    def enter(build: Callable[[], Fuzzed]) -> Callable[[], Fuzzed]:
        if name in TARGETS:
            raise ValueError(f"fuzz target {name!r} is there already")
        TARGETS[name] = Target(name, build, inputs, max_len, words)
        return build

    return enter


# --- codecs ----------------------------------------------------------------------------------------------------


def check_item(item: Any) -> None:
    """What a loop and its sinks take for granted of whatever a decoder yields."""
    if isinstance(item, messages.Frame):
        assert item.values.shape == (len(SPEC.channels),), item.values.shape
        assert item.values.dtype == np.float64, item.values.dtype
        assert item.label is None or isinstance(item.label, str), item.label
        assert item.time is None or isinstance(item.time, (int, float, str)), item.time
        msgspec.json.encode((item.time, item.label))  # a sink must be able to write them
    else:
        assert isinstance(item, messages.Malformed), item
        assert (item.where + item.problem).isprintable(), item  # goes to a terminal or a log, as one line
        assert len(item.problem) < 500, item


def decoder_target(codec: str) -> Fuzzed:
    """The first byte says where the rest is cut in two blocks; 255 puts a line that is too long between them."""
    long_line = b"7" * (lines.MAX_LINE + 1) if codec in ("csv", "ndjson") else b""

    def fuzz(data: bytes) -> None:
        if not data:
            return
        cut = data[0]
        blocks = [data[1 : cut + 1], data[cut + 1 :]]
        if cut == 255:
            blocks.insert(1, long_line)
        decoder = codecs.decoder(codec, SPEC)
        for block in blocks:
            for item in decoder.feed(block):
                check_item(item)
        for item in decoder.finish():
            check_item(item)

    return fuzz


_NUMBER_WORDS = ("nan", "NaN", "inf", "-Infinity", "1e999", "-0.0", "5e-324", "1_0", "18446744073709551616")
_WORDS = {
    "csv": ("ax", "ay", "time", "timestamp", "label", ",", '"', '""', "\r\n", "\ufeff", "n/a", *_NUMBER_WORDS),
    "ndjson": (
        '"ax":',
        '"ay":',
        '"time":',
        '"label":',
        '"values":',
        "[",
        "]",
        "{",
        "}",
        "null",
        "true",
        '"\\ud83d"',
        *_NUMBER_WORDS,
    ),
}
_INPUTS = {"csv": 2_000_000, "ndjson": 2_000_000}
for _codec in codecs.FORMATS:
    register(_codec, _INPUTS.get(_codec, 1_200_000), 300, _WORDS.get(_codec, ()))(
        lambda codec=_codec: decoder_target(codec)
    )


# --- artifacts -------------------------------------------------------------------------------------------------


class MemoryFile:
    """A file in memory, with a path: the reader takes paths. Rewritten for each input."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("fuzz")
        self.path = f"/proc/self/fd/{self._descriptor}"

    def write(self, content: bytes) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)


def _load(file: MemoryFile) -> None:
    """Load, and show what was loaded, as ``edge-ssm inspect`` does with a stranger's model."""
    loaded = artifact.load(file.path)
    description = formats_description.describe(loaded)
    text = formats_description.render(description)
    assert text.replace("\n", "").isprintable(), text
    json.dumps(description)


@register("artifact", 1_000_000, 4096)
def artifact_target() -> Fuzzed:
    """The file's bytes as they are."""
    file = MemoryFile()

    def fuzz(data: bytes) -> None:
        file.write(data)
        _load(file)

    return fuzz


class Script:
    """Bytes as a series of choices. At its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "little")

    def pick(self, items: list[Any]) -> Any:
        return items[self.number() % len(items)]

    def take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        self._at += size
        return found


_NUMBERS = [0, 1, -1, 2, 3, 7, 255, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 40, 1 << 62, -(1 << 63), 0.5, 1e-320, 1e308]
_VALUES = [
    *_NUMBERS,
    None,
    True,
    False,
    "",
    "a",
    "\x1b[2J",
    "\x85",
    "zoh",
    "bilinear",
    "int8",
    "float16",
    "glu",
    "none",
]
_BITS = [
    b"\0\0\xc0\x7f",
    b"\0\0\x80\x7f",
    b"\0\0\x80\xff",
    b"\0\0\0\0",
    b"\x01\0\0\0",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
]
_DTYPES = ["F32", "F64", "I64", "F16", "I8", "BF16", "BOOL", "U64", "X"]


def _change_document(script: Script, document: Any) -> None:
    """Walk to a member and put another value there, or take it away, or put one more."""
    holder = document
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = script.pick(keys)
        if isinstance(holder[key], (dict, list)) and script.number() & 1:
            holder = holder[key]
            continue
        match script.number() % 8:
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.append(holder[key])
            case 2 if isinstance(holder, dict):
                holder[str(script.pick(_VALUES))] = holder[key]
            case 3:
                deep: Any = script.pick(_VALUES)
                for _ in range(script.number() % 100):  # json.dumps has a depth of its own
                    deep = [deep] if script.number() & 1 else {"a": deep}
                holder[key] = deep
            case 4:
                holder[key] = script.take(script.number() % 32).decode("latin-1")
            case 5:
                holder[key] = script.number(1 + script.number() % 8)
            case _:
                holder[key] = script.pick(_VALUES)
        return
    if isinstance(holder, dict):
        holder["a"] = script.pick(_VALUES)
    else:
        holder.append(script.pick(_VALUES))


def _change_tensors(script: Script, header: dict[str, Any], data: bytearray) -> None:
    """Another value in the bytes of a tensor, or another dtype, shape, place or name for it."""
    if not header:
        return
    name = script.pick(sorted(header))
    entry = header[name]
    match script.number() % 8:
        case 0:
            del header[name]
        case 1:
            header[f"{name}{script.number()}"] = entry
        case 2:
            header[name] = {**entry, "dtype": script.pick(_DTYPES)}
        case 3:
            shape = [*entry["shape"], 1]
            shape[script.number() % len(shape)] = script.pick(_NUMBERS)
            header[name] = {**entry, "shape": shape if script.number() & 1 else shape[:-1]}
        case 4:
            offsets = list(entry["data_offsets"])
            offsets[script.number() & 1] += script.number() - 128
            header[name] = {**entry, "data_offsets": offsets}
        case _:
            first, last = entry["data_offsets"]
            value = script.pick([*_BITS, script.take(4)])
            at = first + 4 * script.number()
            if at + len(value) <= last <= len(data):
                data[at : at + len(value)] = value


def _sealed(document: dict[str, Any], header: dict[str, Any], data: bytes) -> bytes:
    """The file of these parts, with the digest that docs/artifact.md asks for, so that what is behind it is reached."""
    document = {**document, "digest": "0" * 64} if "digest" in document else document
    text = json.dumps(document)
    sha = hashlib.sha256(struct.pack("<Q", len(text.encode())) + text.encode())
    for name in sorted(header):
        entry = header[name]
        shape = ",".join(map(str, entry["shape"]))
        first, last = entry["data_offsets"]
        sha.update(f"{name}\0{entry['dtype']}\0{shape}\0".encode() + data[max(first, 0) : max(last, 0)])
    text = text.replace("0" * 64, sha.hexdigest(), 1)
    raw = json.dumps({"__metadata__": {"edge_ssm": text}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data


def _parts(content: bytes) -> tuple[str, str, bytes]:
    """Document and header as JSON text, and the tensors' bytes, of a valid artifact."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return header.pop("__metadata__")["edge_ssm"], json.dumps(header), content[8 + length :]


@register("artifact-content", 600_000, 256)
def artifact_content_target() -> Fuzzed:
    """A valid artifact with changes that the input spells, and a right digest: what is behind the digest is reached."""
    bases = [_parts(path.read_bytes()) for path in sorted((CORPUS / "artifact").glob("*.safetensors"))]
    file = MemoryFile()

    def fuzz(data: bytes) -> None:
        script = Script(data)
        text, entries, tensors = script.pick(bases)
        document, header, content = json.loads(text), json.loads(entries), bytearray(tensors)
        for _ in range(8):
            if not script.left:
                break
            if script.number() & 1:
                _change_document(script, document)
            else:
                _change_tensors(script, header, content)
        file.write(_sealed(document, header, bytes(content)))
        _load(file)

    return fuzz


# --- signatures ------------------------------------------------------------------------------------------------


def fuzzing_key() -> Any:
    """A private key that everybody knows."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def _trusted() -> list[signatures.Key]:
    public = fuzzing_key().public_key()
    return [signatures.Key(signatures.key_id(public), public)]


@register("signature", 2_000_000, 2048, ('"payload":', '"payloadType":', '"signatures":', '"sig":', '"keyid":'))
def signature_target() -> Fuzzed:
    """The signature file's bytes as they are."""
    keys = _trusted()

    def fuzz(data: bytes) -> None:
        signatures.verify_envelope(data, keys)

    return fuzz


@register("signature-content", 500_000, 256)
def signature_content_target() -> Fuzzed:
    """A statement with changes that the input spells, signed rightly, in an envelope with changes: if it is taken, it
    says what was signed."""
    from edge_ssm_build.export import signing

    keys, private = _trusted(), fuzzing_key()
    text = (CORPUS / "signature" / "valid").read_bytes()
    payload = base64.b64decode(json.loads(text)["payload"])

    def fuzz(data: bytes) -> None:
        script = Script(data)
        statement = json.loads(payload)
        for _ in range(script.number() % 4):
            _change_document(script, statement)
        signed = json.dumps(statement).encode()
        envelope = json.loads(signing.envelope(signed, [private]))
        for _ in range(script.number() % 4):
            _change_document(script, envelope)
        said, key = signatures.verify_envelope(json.dumps(envelope).encode(), keys)
        assert said == msgspec.json.decode(signed, type=signatures.Statement)
        assert key == keys[0]

    return fuzz


@register("signature-key", 1_500_000, 512, ("-----BEGIN ", "-----END ", "PUBLIC KEY-----", "MCowBQYDK2VwAyEA"))
def signature_key_target() -> Fuzzed:
    """A file that is given as a public key: the input is its bytes, or the DER within its PEM."""

    def fuzz(data: bytes) -> None:
        if not data.startswith(b"--"):
            text = base64.encodebytes(data)
            data = b"-----BEGIN PUBLIC KEY-----\n" + text + b"-----END PUBLIC KEY-----\n"
        signatures.parse_key(data)

    return fuzz


# --- configuration ---------------------------------------------------------------------------------------------


def _field_names(struct: type[msgspec.Struct]) -> list[str]:
    found = []
    for field in msgspec.structs.fields(struct):
        kinds = [field.type, *getattr(field.type, "__args__", ())]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
        found += [field.name, *(name for kind in nested for name in _field_names(kind))]
    return found


@register("profile", 1_000_000, 2048, ("[", "]", '"""', "true", *_NUMBER_WORDS, *_field_names(boards.Profile)))
def profile_target() -> Fuzzed:
    """A firmware profile, TOML."""

    def fuzz(data: bytes) -> None:
        boards.describe(boards.decode(Path("profile.toml"), data))

    return fuzz


@register(
    "configuration",
    600_000,
    1024,
    ("[", "]", "=", "true", *_NUMBER_WORDS, *settings.SECTIONS, *settings.Settings.__struct_fields__),
)
def configuration_target() -> Fuzzed:
    """A service's configuration, TOML: what is taken passes the checks that a run begins with."""

    def fuzz(data: bytes) -> None:
        try:
            settings.merge(settings_file.parse(data, "service.toml"), {})
        except UsageError as error:
            said = str(error)
        else:
            said = ""
        assert "\n" not in said, said

    return fuzz


@register("address", 600_000, 200, ("://", "mqtt", "tcp-listen", "unix", "serial", "?", "baud=", "[::1]", ":65536"))
def address_target() -> Fuzzed:
    """Where samples come from, as text: what is taken has a host and port, or a path, that may be opened."""

    def fuzz(data: bytes) -> None:
        found = address.parse_endpoint(data.decode("utf-8", "surrogateescape"), sources.SCHEMES)
        found.known_options("baud")
        found.positive_int("baud", 1)
        (found.socket_path if found.scheme.startswith("unix") else found.host_and_port)()

    return fuzz


# --- what a service keeps --------------------------------------------------------------------------------------


@register("snapshot", 600_000, 4096)
def snapshot_target() -> Fuzzed:
    """The file's bytes as they are."""

    def fuzz(data: bytes) -> None:
        snapshot.from_bytes(data)

    return fuzz


@register("snapshot-content", 300_000, 256)
def snapshot_content_target() -> Fuzzed:
    """A valid snapshot with changes that the input spells, and a right checksum: what is taken can be gone on with."""
    content = (CORPUS / "snapshot" / "valid").read_bytes()[40:]
    (length,) = struct.unpack_from("<Q", content)
    text, states = content[8 : 8 + length], content[8 + length :]
    network = artifact.load(CORPUS / "artifact" / "linear.safetensors").network
    engine = create("reference", network)
    sample = np.zeros(network.d_input)

    def fuzz(data: bytes) -> None:
        script = Script(data)
        document = json.loads(text)
        for _ in range(script.number() % 4):
            _change_document(script, document)
        head = json.dumps(document).encode()
        body = struct.pack("<Q", len(head)) + head + states
        found, state = snapshot.from_bytes(snapshot.MAGIC + hashlib.sha256(body).digest() + body)
        engine.reset()
        pipeline = Pipeline(engine, Windows(network), Nowhere())
        pipeline.restore(found.loop, state)
        pipeline.process(messages.Frame(sample, sequence=1))
        pipeline.state()

    return fuzz


class Nowhere:
    def decision(self, decision: Any) -> None:
        pass

    def event(self, event: Any) -> None:
        pass


@register("framed-content", 600_000, 400)
def framed_content_target() -> Fuzzed:
    """Frames with a right checksum, whatever they hold, between bytes that are none."""

    def fuzz(data: bytes) -> None:
        script = Script(data)
        decoder = codecs.decoder("framed", SPEC)
        while script.left:
            content = script.take(script.number() % 64)
            packet = framed.cobs_encode(content + struct.pack("<I", zlib.crc32(content)))
            for item in decoder.feed(script.take(script.number() % 4) + b"\0" + packet + b"\0"):
                check_item(item)
        decoder.resume(decoder.state())

    return fuzz
