"""What both command lines ask of their options' values."""

from __future__ import annotations

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """A number within a range. ``click.FloatRange`` lets "nan" through, which is no less and no more
    than any bound, and "inf" where there is none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            finite = math.isfinite(float(value))
        except (TypeError, ValueError):
            finite = True  # no number at all: said by click
        if not finite:
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return super().convert(value, param, ctx)


class NotEmpty(click.types.StringParamType):
    """A text of at least one character: ``--json ''``, as of an unset variable in a script, is a mistake."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("an empty text.", param, ctx)
        return super().convert(value, param, ctx)


def given(ctx: click.Context) -> set[str]:
    """The parameters that the user set, by their names in the function."""
    default = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
    return {name for name in ctx.params if ctx.get_parameter_source(name) not in (None, *default)}
