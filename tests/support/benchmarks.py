"""A benchmark as a module: several are called run.py, so each gets a name of its own."""

import importlib.util
import sys

from support import ROOT

BENCHMARKS = ROOT / "benchmarks"


def load(path):
    """``load("faults/run.py")``"""
    name = "benchmark_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
