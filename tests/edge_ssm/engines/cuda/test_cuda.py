"""The CUDA engine without a GPU: its kernels in Numba's simulator and compiled for Orin, and its error messages.

If there is a GPU, the engine is tested on it too.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from support import ROOT, benchmarks, commands
from support.networks import random_network, samples_for

from edge_ssm.engines.cuda import cache as cuda_cache
from edge_ssm.engines.cuda.driver import Device, Memory
from edge_ssm.engines.cuda.engine import THREADS
from edge_ssm.engines.registry import create
from edge_ssm.errors import EngineUnavailable, InputRefused, UsageError
from edge_ssm.formats import artifact

SIMULATED = ROOT / "tests/edge_ssm/engines/cuda/simulated_cuda.py"
CLI = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()"]
TABLE = ROOT / "benchmarks" / "gpu" / "sm_87.json"
needs_numba_cuda = pytest.mark.skipif(
    find_spec("numba_cuda") is None, reason="numba-cuda is missing: pip install 'edge-ssm[dev]'"
)


def gpu():
    try:
        create("cuda", random_network())
    except EngineUnavailable as error:
        return str(error)
    return ""


NO_GPU = gpu()
needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)


@needs_numba_cuda
@pytest.mark.slow
def test_the_kernels_in_the_simulator():
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SIMULATED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture(scope="session")
def orin(tmp_path_factory):
    """Folder with the kernels for Orin, made as a user would make it."""
    folder = tmp_path_factory.mktemp("orin")
    command = [*CLI, "compile", "--target", "sm_87", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}: CUDA kernels for sm_87: ")
    return folder


@needs_numba_cuda
@pytest.mark.slow
def test_orins_kernels_are_kept_and_trusted_only_whole(orin, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_SSM_CACHE", str(tmp_path))
    assert cuda_cache.kept("sm_87") == {}
    for path in orin.iterdir():
        shutil.copy(path, tmp_path)
    assert set(cuda_cache.kept("sm_87")) == {"run-1", "run-8", "serve"}
    assert cuda_cache.kept("sm_90") == {}
    path = min(tmp_path.iterdir())
    whole = path.read_bytes()
    for damaged, said in (
        (b"", "not a CUDA kernel"),
        (whole[:1000], "damaged"),
        (whole.replace(b"fma.rn", b"sub.rn", 1), "its digest does not fit"),
        (whole.replace(b'"sources":"', b'"sources":"0', 1), "another version"),
    ):
        with pytest.raises(InputRefused, match=said):
            cuda_cache.decode(damaged)
        path.write_bytes(damaged)
        assert len(cuda_cache.kept("sm_87")) == 2
    path.write_bytes(whole)
    path.chmod(0o666)  # anyone could have written it
    assert len(cuda_cache.kept("sm_87")) == 2


@needs_numba_cuda
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is missing: it is part of the CUDA toolkit")
def test_the_kernels_spill_nothing_and_fit(orin):
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    from resources import resources

    rows = resources("sm_87", folder=orin)
    assert {row["kernel"] for row in rows} == {row["kernel"] for row in json.loads(TABLE.read_text())["rows"]}
    for row in rows + resources("sm_90"):
        assert row["spill_bytes"] == 0
        assert row["registers"] * THREADS <= 65536
        assert row["shared_bytes"] == 0  # all of it is asked for at launch


@needs_numba_cuda
@pytest.mark.slow
def test_a_launch_has_the_arguments_that_the_kernel_takes(orin):
    some = Memory(0, 4, np.dtype(np.float32))
    for path in orin.iterdir():
        buffers = 9 if "serve" in path.name else 7
        packed, kinds = Device.__new__(Device).arguments([some] * buffers + [1, 1, 1, 1] + [some, some])
        assert len(packed) == len(kinds)
        taken = re.findall(r"^\t\.param \.u(\d+) ", path.read_text(), re.MULTILINE)
        assert [8 * ctypes.sizeof(kind) for kind in kinds] == [int(bits) for bits in taken]


@needs_numba_cuda
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            "UNSUPPORTED_PTX_VERSION",
            "the driver (CUDA 12.6) does not accept the kernel (unsupported ptx version)",
        ),
        ("OUT_OF_MEMORY", "the GPU is out of memory; use fewer lanes"),
        ("ILLEGAL_ADDRESS", "cuLaunchKernel failed (illegal address)"),
    ],
)
def test_what_a_driver_refuses_is_explained(status, said):
    from cuda.bindings import driver

    device = Device.__new__(Device)
    device.driver_version = 12060
    assert device.explain("cuLaunchKernel", getattr(driver.CUresult, f"CUDA_ERROR_{status}")).startswith(said)


@pytest.fixture(scope="session")
def stub(orin, tmp_path_factory):
    """Function that runs Python code with a driver that accepts every call and computes nothing."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is missing")
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests/support/driver_stub.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source, "-ldl"], check=True)

    def run(code, **variables):
        places = {"LD_LIBRARY_PATH": str(folder), "EDGE_SSM_CACHE": str(orin), "PYTHONPATH": str(ROOT / "tests")}
        head = (
            "from support.networks import random_network, samples_for\n"
            "from edge_ssm.engines.registry import EngineOptions, create\n"
            "network = random_network(h=16, pairs=4, layers=2); samples = samples_for(network, 0, 3)\n"
        )
        command = [sys.executable, "-c", head + code]
        environment = os.environ | places | {name: str(value) for name, value in variables.items()}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return run


@needs_numba_cuda
@pytest.mark.slow
@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_the_drivers_interface_takes_every_call(stub):
    done = stub(
        "engine = create('cuda', network, EngineOptions(synchronization='block'))\n"
        "engine.step(samples[0]); engine.chunk(samples)\n"
        "engine.restore(engine.snapshot()); engine.reset(); engine.reset(0); engine.skip(2)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "flags 4",
        "function run",
        "launch 1 x 256: 1 1 32 1",
        "launch 1 x 256: 3 1 32 1",
    ]
    done = stub("create('cuda-persistent', network).step(samples[0])", STUB_POINTERS=9)
    assert "edge_ssm.errors.RunFailed: engine 'cuda-persistent': the kernel ended by itself" in done.stderr
    assert done.stdout.splitlines() == ["flags 1", "function serve", "launch 1 x 256: 64 1 32 1"]


@needs_numba_cuda
@pytest.mark.slow
@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.parametrize(
    ("fail", "said"),
    [
        ("cuInit:100", "EngineUnavailable: engine 'cuda': cuInit failed (no device)"),
        ("cuModuleLoadData:222", "EngineUnavailable: engine 'cuda': the driver (CUDA 12.6) does not accept the kernel"),
        ("cuMemAlloc:2", "EngineUnavailable: engine 'cuda': the GPU is out of memory; use fewer lanes"),
        ("cuLaunchKernel:700", "RunFailed: engine 'cuda': a launch failed (illegal address)"),
        ("cuStreamSynchronize:719", "RunFailed: engine 'cuda': a launch failed (launch failed)"),
    ],
)
def test_a_driver_that_fails_is_told_apart(stub, fail, said):
    done = stub("create('cuda', network).step(samples[0])", STUB_FAIL=fail)
    assert said in done.stderr.splitlines()[-1]


def test_an_unknown_gpu_is_refused():
    with pytest.raises(UsageError, match="--target 'sm_1': unknown, expected sm_72"):
        cuda_cache.compile_and_keep("sm_1", None)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_is_missing(tmp_path):
    artifact.save(tmp_path / "m.safetensors", random_network(), {})
    arguments = ["run", str(tmp_path / "m.safetensors"), "--stream", "--engine", "cuda", "--input", "/dev/null"]
    done = commands.run([*CLI, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"edge-ssm: error: engine 'cuda': [^\n]+\n", done.stderr)


@needs_gpu
@pytest.mark.parametrize("lanes", [1, 2, 16, 256, 4096])
def test_on_a_gpu_it_is_the_reference(lanes):
    network = random_network(h=128, pairs=32, layers=4, active=[128, 64, 64, 40], columns=100)
    few = min(lanes, 16)
    samples = samples_for(network, 0, 20, lanes)
    expected = create("reference", network, lanes=few).chunk(samples[:, :few])
    found = create("cuda", network, lanes=lanes)
    chunk = found.chunk(samples if lanes > 1 else samples[:, 0]).reshape(20, lanes, -1)
    assert np.abs(chunk[:, :few] - expected.reshape(20, few, -1)).max() <= 1e-4
    found.reset()
    steps = np.stack([found.step(sample if lanes > 1 else sample[0]) for sample in samples]).reshape(20, lanes, -1)
    assert np.array_equal(steps, chunk)


@needs_gpu
def test_on_a_gpu_a_lane_is_shared_out_among_multiprocessors():
    network = random_network(h=256, pairs=32, layers=6)
    engine = create("cuda", network)
    assert engine._plan.blocks > 1
    samples = samples_for(network, 0, 100)
    assert np.abs(engine.chunk(samples) - create("reference", network).chunk(samples)).max() <= 1e-4


@needs_gpu
@pytest.mark.parametrize("h", [32, 256])
def test_on_a_gpu_a_kernel_that_stays_is_the_reference(h):
    network = random_network(h=h, pairs=8, layers=3)
    engine = create("cuda-persistent", network)
    samples = samples_for(network, 0, 300)
    expected = create("reference", network).chunk(samples)
    found = np.concatenate(
        [np.stack([engine.step(sample) for sample in samples[:100]]), engine.chunk(samples[100:200])]
    )
    engine.restore(engine.snapshot())
    assert np.abs(np.concatenate([found, engine.chunk(samples[200:])]) - expected).max() <= 1e-4


@needs_gpu
@pytest.mark.slow
def test_on_a_gpu_a_million_steps_do_not_drift():
    network = random_network(h=16, pairs=4, layers=2)
    engine, cpu = create("cuda", network), create("cpu", network)
    samples = samples_for(network, 0, 10_000)
    worst = max(float(np.abs(engine.chunk(samples) - cpu.chunk(samples)).max()) for _ in range(100))
    assert worst <= 1e-4


@needs_gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is missing")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_on_a_gpu_the_sanitizer_finds_nothing(tool):
    """One block per lane, several blocks per lane, and several lanes per block."""
    code = (
        "from support.networks import random_network, samples_for\n"
        "from edge_ssm.engines.registry import EngineOptions, create\n"
        "for h, lanes in ((32, 1), (256, 1), (64, 64)):\n"
        "    network = random_network(h=h, pairs=8, layers=2)\n"
        "    create('cuda', network, lanes=lanes).chunk(samples_for(network, 0, 5, *([lanes] if lanes > 1 else [])))\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_benchmarks_page_shows_what_was_measured(tmp_path):
    page = benchmarks.load("gpu/page.py")
    row = {"us_a_sample": 10.5, "ratio": 1.0, "gpu_us_a_sample": 5.25, "read_us_a_sample": 1.25, "max_error": None}
    rows = [{"shape": "small", "entry": "step", **row}, {"shape": "ecg", "entry": "PyTorch eager", **row}]
    results = {"gpu": "a GPU", "driver": 13000, "memory_gb_s": 68.0, "rows": rows}
    assert "| step | 10.5 (5.25), 1x [1.2] |  |" in page.table(results)
    pytest.importorskip("matplotlib", reason="draws the chart")
    page.draw(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
