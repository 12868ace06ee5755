"""Machine code on disk: loaded if it fits, never trusted if it does not, compiled again if possible."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, commands

from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.cpu import elf, kernel_file
from edge_ssm.engines.cpu.symbols import ENTRY
from edge_ssm.engines.cuda import cache as cuda_cache
from edge_ssm.errors import EdgeSSMError, EngineUnavailable, InputRefused, UsageError

GENERIC = f"{kernel_file.platform.machine()}-generic"
CHECK = """
import sys; sys.path.insert(0, 'tests')
from support.networks import random_network, samples_for
from edge_ssm.engines.cpu import cache
from edge_ssm.engines.registry import create
for dtype in ('float32', 'float16', 'int8'):
    network = random_network(h=19, mixing_dtype=dtype, rank_one=0.5, discretization='bilinear')
    x = samples_for(network, 0, 50)
    print(abs(create('cpu', network).chunk(x) - create('reference', network).chunk(x)).max() < 1e-4)
print(cache.load().header.target, *({'numba', 'llvmlite'} & set(sys.modules)))
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def generic(tmp_path_factory):
    """Kernel for this machine's architecture without any extensions."""
    path = tmp_path_factory.mktemp("kernels") / "generic.kernel"
    kernel_cache.compile_and_keep(GENERIC, path, None)
    return path


@pytest.fixture(scope="module")
def content(generic):
    return generic.read_bytes()


def changed(content, **fields):
    """Return the kernel with other fields in its header."""
    header, code = content.removeprefix(kernel_file.MAGIC).split(b"\n", 1)
    return kernel_file.MAGIC + msgspec.json.encode(msgspec.json.decode(header) | fields) + b"\n" + code


def test_a_processor_without_extensions_will_do_and_numba_stays_outside(generic, tmp_path):
    (tmp_path / "copied-here.kernel").write_bytes(generic.read_bytes())
    done = run(CHECK, EDGE_SSM_CACHE=str(tmp_path))
    assert done.stdout.split() == ["True"] * 3 + [GENERIC], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["copied-here.kernel"]


def test_the_device_needs_no_numba_where_a_kernel_was_copied(generic, tmp_path):
    hidden = "import sys, importlib.util as u; find = u.find_spec\n"
    hidden += "u.find_spec = lambda name: None if name == 'numba' else find(name)\n"
    done = run(hidden + CHECK, EDGE_SSM_CACHE=str(generic.parent))
    assert done.stdout.split() == ["True"] * 3 + [GENERIC], done.stderr
    done = run(hidden + CHECK, EDGE_SSM_CACHE=str(tmp_path))
    assert "no compiled kernel for this processor in" in done.stderr
    assert "edge-ssm compile --target" in done.stderr
    auto = hidden + "sys.path.insert(0, 'tests')\nfrom support.networks import random_network\n"
    auto += "from edge_ssm.engines.registry import create\nprint(create('auto', random_network()).name)"
    assert run(auto, EDGE_SSM_CACHE=str(tmp_path)).stdout.split() == ["reference"]


@pytest.mark.slow
def test_a_damaged_or_stale_image_is_compiled_anew(content, tmp_path):
    (tmp_path / "torn.kernel").write_bytes(content[:-100])
    (tmp_path / "empty.kernel").write_bytes(b"")
    (tmp_path / "stale.kernel").write_bytes(changed(content, sources="0" * 64))
    (tmp_path / "folder.kernel").mkdir()
    done = run(CHECK, EDGE_SSM_CACHE=str(tmp_path))
    assert done.stdout.split()[:3] == ["True"] * 3, done.stderr
    assert GENERIC not in done.stdout
    assert len(list(tmp_path.glob("*.kernel"))) == 5  # the four, and the new one
    done = run(CHECK, EDGE_SSM_CACHE=str(tmp_path))
    assert done.stdout.split()[:3] == ["True"] * 3, done.stderr


def test_what_makes_most_of_the_processor_is_taken(content, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_SSM_CACHE", str(tmp_path))
    every = sorted(kernel_file.processor_features())
    (tmp_path / "a.kernel").write_bytes(changed(content, target="a", features=every[:1]))
    (tmp_path / "b.kernel").write_bytes(changed(content, target="b", features=every[:3]))
    (tmp_path / "c.kernel").write_bytes(changed(content, target="c", features=["no_such_feature"]))
    best = kernel_cache.best()
    assert best is not None
    assert best.header.target == "b"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"machine": "riscv64"}, "made for riscv64, this machine is"),
        ({"features": ["no_such_feature"]}, "this processor lacks no_such_feature"),
        ({"sources": "0" * 64}, "made by another version of edge-ssm"),
        ({"digest": "0" * 64}, "damaged code"),
        ({"entry": 1 << 40}, "damaged code"),
        ({"entry": -1}, "damaged header"),
        ({"unknown": 1}, "damaged header"),
    ],
)
def test_why_an_image_is_refused(content, tmp_path, fields, reason):
    path = tmp_path / "x.kernel"
    path.write_bytes(changed(content, **fields))
    with pytest.raises(InputRefused, match=f"x.kernel: .*{reason}.*; compile it anew"):
        kernel_cache.read(path)


def test_code_that_anyone_may_write_is_not_run(generic, tmp_path):
    path = tmp_path / "open.kernel"
    path.write_bytes(generic.read_bytes())
    path.chmod(0o666)
    with pytest.raises(InputRefused, match="anyone may write it"):
        kernel_cache.read(path)
    if os.geteuid() == 0:
        path.chmod(0o644)
        os.chown(path, 12345, 12345)
        with pytest.raises(InputRefused, match="belongs to another user"):
            kernel_cache.read(path)


@given(at=st.floats(0, 1), flip=st.integers(1, 255))
def test_no_changed_byte_passes(content, at, flip):
    place = min(int(at * len(content)), len(content) - 1)
    damaged = bytearray(content)
    damaged[place] ^= flip
    try:
        found = kernel_file.decode(bytes(damaged))
    except InputRefused:
        return
    # The target's name and the order of features are words, not code.
    assert found.code == kernel_file.decode(content).code
    assert found.header.entry == kernel_file.decode(content).header.entry


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_whole(data):
    for content in (data, kernel_file.MAGIC + data):
        with pytest.raises(EdgeSSMError):
            kernel_file.decode(content)


@pytest.mark.slow
def test_the_other_processor_s_code_is_vectors_and_stands_alone(tmp_path):
    path, listing = tmp_path / "orin.kernel", tmp_path / "orin.s"
    _, made = kernel_cache.compile_and_keep("aarch64-cortex-a78ae", path, listing)
    assert made.header.machine == "aarch64"
    assert len(made.code) < 1 << 16
    text = listing.read_text()
    # Of the recurrence and the mixing: fused vector multiply-adds, four float32 each; nothing is called outside.
    assert text.count("fmla\tv") > 100
    assert [line.split()[1] for line in text.splitlines() if line.startswith("\tbl\t")] == ["body"]
    if kernel_file.platform.machine() != "aarch64":
        with pytest.raises(InputRefused, match="made for aarch64, this machine is"):
            kernel_cache.read(path)


@pytest.mark.slow
def test_what_can_not_be_compiled_or_kept_says_so(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--target 'z80': unknown, expected host, aarch64-cortex-a78ae"):
        kernel_cache.compile_and_keep("z80", tmp_path / "x", None)
    with pytest.raises(EdgeSSMError, match="/proc/nowhere/x: cannot be written"):
        kernel_cache.compile_and_keep(GENERIC, Path("/proc/nowhere/x"), None)
    for program in ("/bin/false", "/proc/nowhere", ""):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(EngineUnavailable, match="the kernel could not be compiled"):
            kernel_cache.compile_and_keep(GENERIC, tmp_path / "x", None)
    assert not (tmp_path / "x").exists()


MAIN = "from edge_ssm.cli.app import main; main()"


def edge_ssm(*arguments, before=""):
    command = [sys.executable, "-c", before + MAIN, "compile", *map(str, arguments)]
    return commands.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("option", "what"), [("--output", "kernel"), ("--assembly", "assembly")])
def test_a_kernel_replaces_no_model(option, what, tmp_path):
    model = tmp_path / "m.safetensors"
    model.write_bytes((ROOT / "examples" / "demo.safetensors").read_bytes())
    places = {"--output": tmp_path / "x.kernel", "--assembly": tmp_path / "x.s"}
    places[option] = model
    arguments = [word for pair in places.items() for word in pair]
    done = edge_ssm("--target", GENERIC, *arguments)
    assert done.returncode == 2
    said = f"{option} {model}: exists and is not an edge-ssm {what}; name another file"
    assert done.stderr == f"edge-ssm: error: {said}\n"
    assert model.read_bytes() == (ROOT / "examples" / "demo.safetensors").read_bytes()


@pytest.mark.slow
def test_a_kernel_replaces_a_kernel(tmp_path):
    for _ in range(2):
        done = edge_ssm("--target", GENERIC, "--output", tmp_path / "x.kernel", "--assembly", tmp_path / "x.s")
        assert done.returncode == 0, done.stderr


def test_all_targets_are_named():
    done = edge_ssm("--target", "bogus")
    assert done.returncode == 2
    shown = edge_ssm("--help").stdout
    for target in (*kernel_file.TARGETS, *cuda_cache.TARGETS):
        assert f"{target}" in done.stderr
        assert target in shown


def test_compiling_for_another_target_says_that_it_needs_numba():
    hidden = "from edge_ssm.engines.cpu import cache; find = cache.find_spec\n"
    hidden += "cache.find_spec = lambda name: None if name == 'numba' else find(name)\n"
    done = edge_ssm("--target", "x86_64-v3", before=hidden)
    assert done.returncode == 1
    said = "--target x86_64-v3: compiling needs numba, which is missing; pip install numba"
    assert done.stderr == f"edge-ssm: error: {said}\n"


def test_an_object_that_needs_a_library_is_refused():
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    text = f"declare i64 @outside(ptr)\ndefine i64 @{ENTRY}(ptr %c) {{\n %r = call i64 @outside(ptr %c)\n"
    module = llvm.parse_assembly(text + " ret i64 %r\n}")
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="small")
    with pytest.raises(EngineUnavailable, match="does not stand alone, it needs 'outside'"):
        elf.link(machine.emit_object(module), ENTRY)


def test_where_kernels_are_kept(monkeypatch):
    for name in ("EDGE_SSM_CACHE", "CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/x")
    assert kernel_cache.folder() == Path("/x/.cache/edge-ssm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert kernel_cache.folder() == Path("/c/edge-ssm")
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/edge-ssm:/var/cache/other")
    assert kernel_cache.folder() == Path("/var/cache/edge-ssm")
    monkeypatch.setenv("EDGE_SSM_CACHE", "/k")
    assert kernel_cache.folder() == Path("/k")
    monkeypatch.setenv("EDGE_SSM_CACHE", "/own:/root's")
    assert kernel_cache.folder() == Path("/own")
    assert kernel_cache.folders() == [Path("/own"), Path("/root's")]


@pytest.mark.slow
def test_a_kernel_of_the_second_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_SSM_CACHE", str(tmp_path / "second"))
    kernel_cache.build()
    monkeypatch.setenv("EDGE_SSM_CACHE", f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    monkeypatch.setattr(kernel_cache, "build", lambda: pytest.fail("compiled anew"))
    monkeypatch.setattr(kernel_cache, "_loaded", None)
    assert kernel_cache.load().header.machine == os.uname().machine


def test_the_floating_point_mode_is_the_caller_s_again():
    from support.networks import random_network, samples_for

    from edge_ssm.engines.registry import create

    network = random_network()
    create("cpu", network).chunk(samples_for(network, 0, 5))
    assert np.float32(1e-40) * np.float32(1.0) != 0
