"""edge-ssm: pruned S4 and S4D sequence models on small devices, one sensor sample at a time.

Importing this package is cheap: no NumPy, no Numba, no CUDA, no torch; what is asked for is loaded then.

    from edge_ssm import load, create_engine
    artifact = load("model.safetensors")
    engine = create_engine("auto", artifact.network)
    logits = engine.step(sample)
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

_FROM = {
    "Artifact": ("edge_ssm.formats.artifact", "Artifact"),
    "EdgeSSMError": ("edge_ssm.errors", "EdgeSSMError"),
    "Engine": ("edge_ssm.engines.registry", "Engine"),
    "Network": ("edge_ssm.model.network", "Network"),
    "Snapshot": ("edge_ssm.engines.registry", "Snapshot"),
    "create_engine": ("edge_ssm.engines.registry", "create"),
    "load": ("edge_ssm.formats.artifact", "load"),
    "save": ("edge_ssm.formats.artifact", "save"),
}


def __getattr__(name: str) -> Any:
    """Loads late (PEP 562): the command line can take charge of Ctrl-C before a tenth of a second of imports."""
    try:
        module, attribute = _FROM[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    found = globals()[name] = getattr(import_module(module), attribute)
    return found
