"""The declaration of a setting, and what follows from it: its option, its key, its type and its default in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import NODEFAULT
from msgspec.structs import fields

from edge_ssm.errors import UsageError


def _alternatives(kind: Any) -> Iterator[Any]:
    """Yield the types of which a value may be, without their annotations: of ``Positive | None`` float and None."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (None, Literal, list):
        yield kind
    else:
        for part in get_args(kind):
            yield from _alternatives(part)


def _list_of(kind: Any) -> Any:
    return next(part for part in _alternatives(kind) if get_origin(part) is list)


def _choices(kind: Any) -> list[str]:
    """Return the words of a ``Literal``, or nothing."""
    return [word for part in _alternatives(kind) if get_origin(part) is Literal for word in get_args(part)]


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting; ``name``, ``type`` and ``default`` are those of the field that it annotates."""

    key: str
    """Section and key in the TOML file: "source.stale_after"."""
    help: str
    """Complete sentences for the command line, the example file and the documentation; {unit} stands for ``unit``."""
    details: str = ""
    """Further sentences, for the example file and the documentation only."""
    unit: str = ""
    """The unit of the value: "seconds", "hertz", "bytes"."""
    unset: str = ""
    """What applies where the default is None."""
    example: Any = None
    """Value shown in the example file where the default is None or required."""
    metavar: str = ""
    """Placeholder for the value in the help of the command line."""
    choices: tuple[str, ...] = ()
    """Every allowed value; follows from the type where that is a ``Literal``."""
    hidden_flags: tuple[str, ...] = ()
    """Earlier spellings of the option, which still work but are no longer documented."""
    is_path: bool = False
    """True if relative paths in a configuration file start at that file's folder."""
    requires: tuple[str, ...] = ()
    """Names of the settings without which this one is refused."""
    excludes: tuple[tuple[str, str], ...] = ()
    """(name, reason) of each setting with which this one is refused."""
    link: str = ""
    """Markdown for the documentation: where to read more."""

    name: str = ""
    type: Any = str
    default: Any = None

    @property
    def section(self) -> str:
        """The section of the TOML file."""
        return self.key.partition(".")[0]

    @property
    def flag(self) -> str:
        """The option of the command line: "--stale-after"."""
        return "MODEL" if self.name == "model" else f"--{self.name.replace('_', '-')}"

    @property
    def is_required(self) -> bool:
        """True if there is no default."""
        return self.default is NODEFAULT

    @property
    def is_list(self) -> bool:
        """True if the value is a list: an option that may be repeated."""
        return list in {get_origin(part) for part in _alternatives(self.type)}

    @property
    def value_type(self) -> type:
        """The plain type of the value, or of each element of a list: bool, int, float or str."""
        parts = set(_alternatives(get_args(_list_of(self.type))[0] if self.is_list else self.type))
        for plain in (bool, str, int, float):
            if plain in parts:
                return plain
        return str

    @property
    def description(self) -> str:
        """``help`` with the unit filled in."""
        return self.help.replace("{unit}", self.unit)

    @property
    def default_text(self) -> str:
        """The default in words, as a user would write it; empty where it goes without saying."""
        if self.is_required or self.default is False or self.default == []:
            return ""
        if self.default is None:
            return self.unset
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def convert(self, value: Any, label: str) -> Any:
        """Return ``value`` as the setting's type.

        Raises UsageError, beginning with ``label``, for a value that is not allowed.
        """
        if isinstance(value, float) and value != value:
            raise UsageError(f"{label}: nan; expected a number")
        try:
            converted = msgspec.convert(value, self.type, strict=True)
        except msgspec.ValidationError as error:
            reason = " ".join(str(error).split()).replace("Expected", "expected").replace("`", "")
            raise UsageError(f"{label}: {str(value)[:60]!r}, {self._expected or reason}") from None
        if self.choices and converted is not None and converted not in self.choices:
            raise UsageError(f"{label}: {str(value)[:60]!r}, {self._expected}")
        # TOML can contain a zero byte, at which the system would end a path.
        for text in converted if isinstance(converted, list) else [converted]:
            if isinstance(text, str) and "\0" in text:
                raise UsageError(f"{label}: {text[:60]!r}: has a zero byte; expected a text without one")
        return converted

    @property
    def _expected(self) -> str:
        return f"expected {', '.join(self.choices)}" if self.choices else ""


def declarations(settings: type[msgspec.Struct]) -> dict[str, Setting]:
    """Return the declarations of ``Settings``, or of a subclass, by the names of their fields."""
    by_name = {}
    for field in fields(settings):
        (declared,) = (part for part in get_args(field.type) if isinstance(part, Setting))
        default = field.default_factory() if field.default_factory is not NODEFAULT else field.default
        choices = declared.choices or tuple(_choices(field.type))
        by_name[field.name] = replace(declared, name=field.name, type=field.type, default=default, choices=choices)
    return by_name


def sections(declared: Mapping[str, Setting]) -> dict[str, dict[str, Setting]]:
    """Return the declarations by section and key of the TOML file."""
    by_section: dict[str, dict[str, Setting]] = {}
    for setting in declared.values():
        by_section.setdefault(setting.section, {})[setting.key.partition(".")[2]] = setting
    return by_section
