"""edge-ssm: pruned S4 and S4D sequence models on small devices, one sensor sample at a time.

Importing this package is cheap: no Numba, no CUDA, no torch.

    from edge_ssm import load, create_engine
    artifact = load("model.safetensors")
    engine = create_engine("auto", artifact.network)
    logits = engine.step(sample)
"""

from edge_ssm.artifact import Artifact, load, save
from edge_ssm.engines import Engine, Snapshot
from edge_ssm.engines import create as create_engine
from edge_ssm.errors import EdgeSSMError
from edge_ssm.network import Network

__version__ = "0.1.0"

__all__ = ["Artifact", "EdgeSSMError", "Engine", "Network", "Snapshot", "__version__", "create_engine", "load", "save"]
