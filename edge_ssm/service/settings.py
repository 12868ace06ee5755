"""What a run is told: the keys of a service's TOML file, each of which is also a flag of ``edge-ssm run``.

``Settings`` has a field a flag; ``SECTIONS`` says where the field stands in the file. docs/service.md lists them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.io.sinks.queue import Overflow
from edge_ssm.runtime.gaps import GapPolicy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # its older name, with the same content

LARGEST = 1 << 20

Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e12)]
Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Format = Literal["csv", "ndjson", "f32le", "i16le", "framed"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds unless a field says otherwise; None: what the model, the profile or the source suggest."""

    model: Text
    reload: bool = False
    input: Text = "-"
    format: Format | None = None
    scale: Text = "1"
    follow: bool = False
    strict: bool = False
    pace: bool = False
    stale_after: Positive | None = None
    time_gaps: bool = False
    hop: int | None = None
    carry: bool = False
    sample_rate: float | None = None
    gap: GapPolicy = "hold"
    max_gap: CountOrNone | None = None
    engine: Text = "auto"
    threads: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    profile: Text = "auto"
    chunk: Text | Count | None = None
    latency_budget: Positive | None = None
    """Milliseconds."""
    deadline: Positive | None = None
    """Sample periods."""
    fifo: Annotated[int, msgspec.Meta(ge=1, le=98)] | None = None
    affinity: list[CountOrNone] | None = None
    output: Text = "-"
    output_format: Literal["ndjson", "csv", "text"] | None = None
    logits: bool = False
    truth: bool = False
    append: bool = False
    rotate_bytes: CountOrNone = 0
    rotate_keep: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 5
    queue: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 1024
    overflow: Overflow | None = None
    state: Text | None = None
    snapshot_interval: Positive = 10.0
    member: list[Text] = []
    max_misses: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    max_power: Positive | None = None
    max_temperature: Positive | None = None
    settle: Positive = 30.0
    listen: Text | None = None
    prometheus: bool = False
    require_signature: list[Text] = []


SECTIONS: dict[str, dict[str, str]] = {
    "model": {"path": "model", "reload": "reload"},
    "source": {
        "input": "input",
        "format": "format",
        "scale": "scale",
        "follow": "follow",
        "strict": "strict",
        "pace": "pace",
        "stale_after": "stale_after",
        "time_gaps": "time_gaps",
    },
    "window": {"hop": "hop", "carry": "carry", "sample_rate": "sample_rate"},
    "gap": {"policy": "gap", "max": "max_gap"},
    "engine": {
        "name": "engine",
        "threads": "threads",
        "profile": "profile",
        "chunk": "chunk",
        "latency_budget": "latency_budget",
        "deadline": "deadline",
        "fifo": "fifo",
        "affinity": "affinity",
    },
    "sink": {
        "output": "output",
        "format": "output_format",
        "logits": "logits",
        "truth": "truth",
        "append": "append",
        "rotate_bytes": "rotate_bytes",
        "rotate_keep": "rotate_keep",
        "queue": "queue",
        "overflow": "overflow",
    },
    "state": {"folder": "state", "interval": "snapshot_interval"},
    "adaptive": {
        "members": "member",
        "max_misses": "max_misses",
        "max_power": "max_power",
        "max_temperature": "max_temperature",
        "settle": "settle",
    },
    "metrics": {"listen": "listen", "prometheus": "prometheus"},
    "security": {"require_signature": "require_signature"},
}
FILES = ("model", "member", "require_signature")
"""Fields whose relative paths start at the configuration file's folder."""
_TYPES = get_type_hints(Settings, include_extras=True)


def flag(field: str) -> str:
    return "MODEL" if field == "model" else f"--{field.replace('_', '-')}"


@dataclass(frozen=True)
class _File:
    path: str
    text: str

    def line(self, section: str, key: str | None = None) -> str:
        """``path, line n`` of a section's header, or of a key in it; the path alone where it is written otherwise."""
        here, inside = "", ""
        for number, line in enumerate(self.text.split("\n"), 1):
            # What stands within a string of several lines is neither header nor key.
            begun = inside
            for quotes in re.findall(r"\"\"\"|\'\'\'", line):
                inside = "" if inside == quotes else inside or quotes
            if begun:
                continue
            if header := re.match(r"\s*\[\s*\"?([^\]\"]*?)\"?\s*\]", line):
                here = header[1]
                if key is None and here == section:
                    return f"{self.path}, line {number}"
                continue
            # A key of the section, or, before any header, the section written as section.key or as a table in a line.
            name = key if key is not None and here == section else section if not here else None
            if name is not None and re.match(rf"\s*\"?{re.escape(name)}\"?\s*[.=]", line):
                return f"{self.path}, line {number}"
        return self.path


def where(path: str, field: str) -> str:
    """``path, line n: section.key`` of a field, for messages; the section's line where the key is not given."""
    section, key = next((s, k) for s, keys in SECTIONS.items() for k, name in keys.items() if name == field)
    try:
        file = _File(path, files.read_regular_file(path, LARGEST).decode(errors="replace"))
    except InputRefused:
        return f"{path}: {section}.{key}"
    place = file.line(section, key)
    return f"{place if place != path else file.line(section)}: {section}.{key}"


def read(path: str) -> dict[str, Any]:
    """A configuration file's values by field. Raises UsageError, naming file, line and key."""
    content = files.read_regular_file(path, LARGEST, error=UsageError, remedy="expected a configuration file")
    return parse(content, path)


def parse(content: bytes, path: str) -> dict[str, Any]:
    """The same from the file's bytes."""
    if len(content) > LARGEST:
        raise UsageError(f"{path}: longer than {LARGEST} bytes; expected a configuration file")
    try:
        text = content.decode()
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, byte {error.start}: not UTF-8 text; expected TOML") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        where = f"{path}, line {found[1]}" if found else path
        reason = re.sub(r" \(at .*", "", str(error))
        raise UsageError(f"{where}: not TOML ({' '.join(reason.split())[:120]})") from None
    file, values = _File(path, text), {}
    for section, keys in document.items():
        if section not in SECTIONS:
            raise UsageError(f"{file.line(section)}: {section!r} is unknown; expected a section {_listed(SECTIONS)}")
        if not isinstance(keys, dict):
            raise UsageError(f"{file.line(section)}: {section!r} is a section; expected [{section}]")
        for key, value in keys.items():
            if key not in SECTIONS[section]:
                raise UsageError(
                    f"{file.line(section, key)}: {section}.{key} is unknown; expected {_listed(SECTIONS[section])}"
                )
            field = SECTIONS[section][key]
            values[field] = _converted(field, value, f"{file.line(section, key)}: {section}.{key}")
    if "model" not in values:
        raise UsageError(f'{file.line("model")}: model.path is missing; expected [model] with path = "FILE"')
    folder = Path(path).parent
    for field in FILES:
        if field in values:
            found_paths = values[field]
            values[field] = (
                str(folder / found_paths) if isinstance(found_paths, str) else [str(folder / p) for p in found_paths]
            )
    return values


def _listed(names: Any) -> str:
    return ", ".join(names)


def _converted(field: str, value: Any, where: str) -> Any:
    if isinstance(value, float) and value != value:
        raise UsageError(f"{where}: nan; expected a number")
    try:
        converted = msgspec.convert(value, _TYPES[field], strict=True)
    except msgspec.ValidationError as error:
        allowed = _choices(_TYPES[field])
        said = " ".join(str(error).split()).replace("Expected", "expected").replace("`", "")
        expected = f"expected {', '.join(allowed)}" if allowed else said
        raise UsageError(f"{where}: {str(value)[:60]!r}, {expected}") from None
    # TOML can write one, and the system would end a path there.
    for text in converted if isinstance(converted, list) else [converted]:
        if isinstance(text, str) and "\0" in text:
            raise UsageError(f"{where}: {text[:60]!r}: has a zero byte; expected a text without one")
    return converted


def _choices(kind: Any) -> list[str]:
    """The words that a field may be, where it may only be one of some words."""
    found = [part for inner in get_args(kind) for part in ([inner] if isinstance(inner, str) else _choices(inner))]
    return found if get_origin(kind) is Literal or type(None) in get_args(kind) else []


def settings(config: str | None, flags: dict[str, Any]) -> Settings:
    """Of a configuration file, if there is one, and the flags that were given, which come first. Raises UsageError."""
    values = read(config) if config is not None else {}
    for field, value in flags.items():
        values[field] = _converted(field, value, flag(field))
    if "model" not in values:
        raise UsageError("MODEL: missing; give an artifact, or --config FILE")
    made = Settings(**values)
    check(made)
    return made


def check(made: Settings) -> None:
    """What no key says alone. Raises UsageError."""
    if made.prometheus and made.listen is None:
        raise UsageError("metrics.prometheus (--prometheus): needs metrics.listen (--listen HOST:PORT)")
    if made.follow and made.pace:
        raise UsageError("source.follow and source.pace (--follow, --pace): a file that grows sets the pace itself")
    if made.pace and "://" in made.input:
        raise UsageError(
            f"source.pace (--pace): only for a recording, {made.input.partition('://')[0]}:// sets its own"
        )
    if made.rotate_bytes and made.output == "-":
        raise UsageError("sink.rotate_bytes (--rotate-bytes): only for a file, see --output")
