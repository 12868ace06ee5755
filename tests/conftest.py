"""Fixtures build the real thing; hypothesis is derandomised, so that a failure here fails everywhere."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import ROOT

settings.register_profile(
    "edge", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("edge")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Compile each kernel once: all tests, and the processes that they start, keep compiled kernels in one folder."""
    if "EDGE_SSM_CACHE" not in os.environ:
        os.environ["EDGE_SSM_CACHE"] = folder = tempfile.mkdtemp(prefix="edge-ssm-kernels-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("EDGE_SSM_CACHE"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return ROOT / "examples" / "demo.safetensors"


@pytest.fixture(scope="session")
def demo_stream() -> Path:
    return ROOT / "examples" / "demo.csv"
