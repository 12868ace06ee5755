"""A setting is declared once, and everything else follows from the declaration."""

import re
import subprocess
import sys
from typing import Annotated

import click
import pytest

from edge_ssm.cli.options import setting_option
from edge_ssm.cli.run import run
from edge_ssm.errors import UsageError
from edge_ssm.io.sinks import registry as sinks
from edge_ssm.io.sources import registry as sources
from edge_ssm.service import settings_file, settings_reference
from edge_ssm.service.declaration import Setting, declarations
from edge_ssm.service.settings import SETTINGS, Settings, merge


class Extended(Settings):
    """The settings with one more."""

    volume: Annotated[
        float | None,
        Setting(
            "alarm.volume", "Loudness in {unit}.", unit="decibels", unset="silent", example=60.0, metavar="DB",
            hidden_flags=("--loudness",),
        ),
    ] = None  # fmt: skip


EXTENDED = declarations(Extended)


def test_a_declaration_alone_makes_an_option():
    seen = []
    option = setting_option(EXTENDED["volume"])
    command = click.Command("x", params=[option], callback=lambda volume: seen.append(volume))
    for flag in ("--volume", "--loudness"):
        command.main([flag, "-3.5"], standalone_mode=False)
    assert seen == [-3.5, -3.5]
    words = " ".join(command.get_help(click.Context(command)).split())
    assert "--volume DB Loudness in decibels. [default: silent]" in words
    assert "--loudness" not in words


def test_a_declaration_alone_makes_a_key():
    content = b"[model]\npath = 'm'\n[alarm]\nvolume = 40.5\n"
    assert settings_file.parse(content, "c.toml", EXTENDED)["volume"] == 40.5
    with pytest.raises(UsageError, match=r"c.toml, line 4: alarm.volume: 'loud', expected"):
        settings_file.parse(content.replace(b"40.5", b"'loud'"), "c.toml", EXTENDED)


def test_a_declaration_alone_makes_the_example_and_the_documentation():
    text = settings_reference.example(EXTENDED)
    assert "[alarm]\n# Loudness in decibels. Unset: silent.\n#volume = 60.0\n" in text
    row = "| `alarm.volume` | `--volume` | silent | Loudness in decibels. |"
    assert row in settings_reference.table(EXTENDED).splitlines()


def test_the_generated_files_are_up_to_date():
    command = [sys.executable, "-m", "edge_ssm.service.settings_reference", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), "run python -m edge_ssm.service.settings_reference"


def test_every_setting_is_an_option():
    assert {param.name for param in run.params} - {"config", "stream"} == set(SETTINGS)


def test_the_example_holds_every_key_with_its_default():
    text = settings_reference.EXAMPLE.read_text()
    assert set(settings_file.parse(text.encode(), "example.toml")) == {"model"}
    every = settings_file.parse(re.sub(r"(?m)^#(\w+ = )", r"\1", text).encode(), "example.toml")
    assert set(every) == set(SETTINGS)
    for name, setting in SETTINGS.items():
        if not setting.is_required and setting.default is not None:
            assert every[name] == setting.default, name


def test_values_of_the_example_are_accepted():
    text = settings_reference.EXAMPLE.read_text()
    every = settings_file.parse(re.sub(r"(?m)^#(\w+ = )", r"\1", text).encode(), "example.toml")
    assert merge(every, {}).listen == "127.0.0.1:9464"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_help_text_is_a_sentence(setting):
    for text in (setting.description, setting.details):
        assert not text or (text[0].isupper() and text.endswith("."))
    assert "{" not in setting.description
    assert setting.default is not None or setting.unset


def test_the_help_names_every_address():
    for name, schemes in (("input", sources.SCHEMES), ("output", sinks.SCHEMES)):
        for scheme in schemes:
            assert f"{scheme}://" in SETTINGS[name].help


def test_the_earlier_spelling_of_the_board_still_works():
    context = run.make_context("run", ["m", "--profile", "none"])
    assert context.params["board"] == "none"
    assert "--profile" not in run.get_help(context)


def test_reading_the_settings_loads_nothing_heavy():
    heavy = {"numba", "onnxruntime", "tomllib", "paho", "serial", "http.server", "cryptography"}
    code = f"import sys, edge_ssm.service.settings; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
