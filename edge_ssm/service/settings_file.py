"""Read a configuration file: TOML whose keys are the settings. Errors name the file, the line and the key."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.service.declaration import Setting, sections
from edge_ssm.service.settings import SETTINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same module under its earlier name

MAX_BYTES = 1 << 20
"""Largest configuration file that is read."""


def read(path: str) -> dict[str, Any]:
    """Return the values of a configuration file by the names of the settings. Raise UsageError if it is not valid."""
    content = files.read_regular_file(path, MAX_BYTES, error=UsageError, remedy="expected a configuration file")
    return parse(content, path)


def parse(content: bytes, path: str, declared: Mapping[str, Setting] = SETTINGS) -> dict[str, Any]:
    """Return the values in the bytes of a configuration file, as ``read`` does."""
    document, file, values = _document(content, path), _Lines(path, content), {}
    known = sections(declared)
    for section, keys in document.items():
        if section not in known:
            raise UsageError(f"{file.line(section)}: {section!r} is unknown; expected a section {', '.join(known)}")
        if not isinstance(keys, dict):
            raise UsageError(f"{file.line(section)}: {section!r} is a section; expected [{section}]")
        for key, value in keys.items():
            label = f"{file.line(section, key)}: {section}.{key}"
            if key not in known[section]:
                raise UsageError(f"{label} is unknown; expected {', '.join(known[section])}")
            setting = known[section][key]
            values[setting.name] = setting.convert(value, label)
    if "model" not in values:
        raise UsageError(f'{file.line("model")}: model.path is missing; expected [model] with path = "FILE"')
    folder = Path(path).parent
    for name in paths(declared):
        if name in values:
            value = values[name]
            values[name] = str(folder / value) if isinstance(value, str) else [str(folder / part) for part in value]
    return values


def paths(declared: Mapping[str, Setting] = SETTINGS) -> Iterable[str]:
    """Return the names of the settings whose relative paths start at the configuration's folder."""
    return [name for name, setting in declared.items() if setting.is_path]


def locate(path: str, name: str) -> str:
    """Return ``path, line n: section.key`` of a setting; the section's line if the file does not have the key."""
    section, _, key = SETTINGS[name].key.partition(".")
    try:
        file = _Lines(path, files.read_regular_file(path, MAX_BYTES))
    except InputRefused:
        return f"{path}: {section}.{key}"
    place = file.line(section, key)
    return f"{place if place != path else file.line(section)}: {section}.{key}"


def _document(content: bytes, path: str) -> dict[str, Any]:
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}: longer than {MAX_BYTES} bytes; expected a configuration file")
    try:
        document: dict[str, Any] = tomllib.loads(content.decode())
        return document
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, byte {error.start}: not UTF-8 text; expected TOML") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        position = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        place = f"{path}, line {position[1]}" if position else path
        reason = re.sub(r" \(at .*", "", str(error))
        raise UsageError(f"{place}: not TOML ({' '.join(reason.split())[:120]})") from None


class _Lines:
    """The lines of a TOML file, for messages: the parser does not tell where a value was."""

    def __init__(self, path: str, content: bytes) -> None:
        self._path = path
        self._lines = content.decode(errors="replace").split("\n")

    def line(self, section: str, key: str | None = None) -> str:
        """Return ``path, line n`` of a section's header or of a key in it; the path alone if neither is found."""
        current, open_quotes = "", ""
        for number, line in enumerate(self._lines, 1):
            # A line within a string of several lines is neither a header nor a key.
            is_inside = bool(open_quotes)
            for quotes in re.findall(r"\"\"\"|\'\'\'", line):
                open_quotes = "" if open_quotes == quotes else open_quotes or quotes
            if is_inside:
                continue
            if header := re.match(r"\s*\[\s*\"?([^\]\"]*?)\"?\s*\]", line):
                current = header[1]
                if key is None and current == section:
                    return f"{self._path}, line {number}"
                continue
            # A key of the section; or, before any header, the section as section.key or as an inline table.
            name = key if key is not None and current == section else section if not current else None
            if name is not None and re.match(rf"\s*\"?{re.escape(name)}\"?\s*[.=]", line):
                return f"{self._path}, line {number}"
        return self._path
