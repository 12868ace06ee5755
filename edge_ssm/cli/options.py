"""Types of option values for both command lines, and the options of settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from edge_ssm.service.declaration import Setting


class Finite(click.FloatRange):
    """A number within a range.

    ``click.FloatRange`` accepts "nan", which is neither below nor above any bound, and "inf" where there is no bound.
    """

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or fail with a usage error."""
        try:
            finite = math.isfinite(float(value))
        except (TypeError, ValueError):
            finite = True  # not a number: click reports it
        if not finite:
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return super().convert(value, param, ctx)


class NotEmpty(click.types.StringParamType):
    """A text of at least one character: ``--json ''``, from an unset variable in a script, is a mistake."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text, or fail with a usage error."""
        if not str(value).strip():
            self.fail("an empty text.", param, ctx)
        return super().convert(value, param, ctx)


class OptionWithAliases(click.Option):
    """An option with earlier spellings, which work but do not appear in the help."""

    def __init__(self, declarations: list[str], hidden_flags: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__([*declarations, *hidden_flags], **attributes)
        self._hidden_flags = hidden_flags

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the line of the help, without the hidden spellings."""
        every, self.opts = self.opts, [flag for flag in self.opts if flag not in self._hidden_flags]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = every


def setting_option(setting: Setting) -> click.Option:
    """Return the option of ``edge-ssm run`` for a setting."""
    is_flag = setting.value_type is bool
    choices = click.Choice(setting.choices) if setting.choices else None
    repeated = " May be repeated." if setting.is_list else ""
    default = f"  [default: {setting.default_text}]" if setting.default_text else ""
    return OptionWithAliases(
        [setting.flag, setting.name],
        setting.hidden_flags,
        type=None if is_flag else choices or setting.value_type,
        is_flag=is_flag or None,  # False would make the value optional
        multiple=setting.is_list,
        metavar=setting.metavar or None,
        help=f"{setting.description}{repeated}{default}",
    )


def explicit_parameters(context: click.Context) -> set[str]:
    """Return the names of the parameters that the user gave, as opposed to those with their defaults."""
    defaults = (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return {name for name in context.params if context.get_parameter_source(name) not in defaults}
