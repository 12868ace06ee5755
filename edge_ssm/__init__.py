"""Run pruned S4 and S4D state space models on small devices, one sensor sample at a time.

This example classifies one window of a stream::

    import numpy as np

    from edge_ssm import create_engine, load

    network = load("model.safetensors").network
    engine = create_engine("auto", network)

    samples = np.zeros((network.window, network.d_input))  # in the sensor's own units
    outputs = np.stack([engine.step(sample) for sample in samples])
    logits = outputs.mean(axis=0) if network.pooling == "mean" else outputs[-1]
    print(network.labels[logits.argmax()])

    engine.reset()  # before the next window

``load(path)``
    Read and check an artifact, and return an ``Artifact``, whose ``network`` is the model. Raises ``ArtifactError``.

``create_engine(name, network, lanes=1)``
    Create an engine for ``lanes`` independent streams, with all states zero. ``name`` is "auto" for the fastest engine
    on this machine, or one of the names that ``edge-ssm doctor`` lists. Raises ``UsageError`` for an unknown name, and
    ``EngineUnavailable`` if a package or the hardware is missing.

``Engine``
    ``step(sample)`` takes one sample, an array of shape (d_input,), or (lanes, d_input) with several lanes, and returns
    the outputs, shape (d_output,) or (lanes, d_output), float32 (the engine "reference": float64). ``chunk(samples)``
    takes T samples at once, with T as the first axis of both arrays, and returns the same values. Both raise
    ``SampleError``, without changing the state, if a value is not finite or far outside the trained range. ``reset()``
    sets the state to zero; ``snapshot()`` and ``restore(snapshot)`` save and continue it, also on another engine.

``save(path, network, provenance)``
    Write an artifact, and return its digest. Raises ``NetworkError`` if the network is inconsistent, and
    ``ArtifactError`` if the file cannot be written.

All exceptions derive from ``EdgeSSMError``; the others are in ``edge_ssm.errors``. Importing this package is cheap:
NumPy, Numba and CUDA are imported when a name that needs them is first used, torch never.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_ssm.engines.registry import Engine, Snapshot
    from edge_ssm.engines.registry import create as create_engine
    from edge_ssm.errors import EdgeSSMError
    from edge_ssm.formats.artifact import Artifact, load, save
    from edge_ssm.model.network import Network

__version__ = "0.1.0"

__all__ = ["Artifact", "EdgeSSMError", "Engine", "Network", "Snapshot", "__version__", "create_engine", "load", "save"]

_LAZY = {
    "Artifact": ("edge_ssm.formats.artifact", "Artifact"),
    "EdgeSSMError": ("edge_ssm.errors", "EdgeSSMError"),
    "Engine": ("edge_ssm.engines.registry", "Engine"),
    "Network": ("edge_ssm.model.network", "Network"),
    "Snapshot": ("edge_ssm.engines.registry", "Snapshot"),
    "create_engine": ("edge_ssm.engines.registry", "create"),
    "load": ("edge_ssm.formats.artifact", "load"),
    "save": ("edge_ssm.formats.artifact", "save"),
}
"""Module and attribute of each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562).

    The command line handles Ctrl-C before the imports, which take a tenth of a second.
    """
    try:
        module, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = globals()[name] = getattr(import_module(module), attribute)
    return value
