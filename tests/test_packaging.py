"""Statements about versions agree wherever they are made: in pyproject.toml, in CI's files and in the lock file."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import ROOT

from edge_ssm.cli import doctor

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEVICE_EXTRAS = ("serial", "mqtt", "metrics", "signing", "onnx", "tflite", "export")


def pins(path: Path) -> dict[str, set[str]]:
    """Return the versions that a requirements file pins, by the name of the package."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^\s;\\]+)", path.read_text(), re.M):
        versions.setdefault(name, set()).add(version)
    return versions


def lower_bound(requirement: Requirement) -> str:
    [bound] = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
    return bound


def test_ci_installs_exactly_the_lower_bounds_of_what_a_device_installs():
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    requirements += [Requirement(text) for extra in DEVICE_EXTRAS for text in EXTRAS[extra]]
    assert pins(ROOT / ".ci/oldest.txt") == {
        name: {lower_bound(requirement) for requirement in requirements if requirement.name == name}
        for name in {requirement.name for requirement in requirements}
    }


def test_a_dependency_has_one_lower_bound_in_all_extras():
    bounds: dict[str, set[str]] = {}
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]:
        requirement = Requirement(text)
        bounds.setdefault(requirement.name, set()).add(lower_bound(requirement))
    assert {name: versions for name, versions in bounds.items() if len(versions) > 1} == {}


def test_no_upper_bound_locks_out_a_newer_python():
    assert re.fullmatch(r">=3\.\d+", PROJECT["requires-python"])


def test_doctor_accepts_each_python_that_the_classifiers_name():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    versions = [tuple(map(int, version.split("."))) for version in named]
    assert (min(versions), max(versions)) == (doctor.OLDEST, doctor.NEWEST)


def test_ci_runs_each_python_that_the_classifiers_name():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert named[0] == PROJECT["requires-python"].removeprefix(">=")
    assert re.search(r'^other_pythons="(.*)"$', (ROOT / ".ci/run").read_text(), re.M)[1].split() == named
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert set(re.findall(r"^ +(3\.\d+)$", workflow, re.M)) == set(named)


@pytest.mark.parametrize("extra", ["dev", "host"])
def test_the_lock_file_satisfies_pyproject(extra):
    locked = pins(ROOT / "requirements-dev.lock")
    for text in [*PROJECT["dependencies"], *EXTRAS[extra]]:
        requirement = Requirement(text)
        if requirement.name == "torch":  # installed first, from the build that suits the machine
            assert "torch" not in locked
            continue
        assert locked.get(requirement.name), f"{text}: not in the lock file; run .ci/lock"
        assert all(version in requirement.specifier for version in locked[requirement.name]), text


def test_the_lock_file_names_no_index_and_hashes_everything():
    text = (ROOT / "requirements-dev.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.M)
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#"))
