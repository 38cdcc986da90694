"""LARS and LAMB for DeepSpeed, exact under ZeRO: training with very large batches.

Importing compiles nothing, patches nothing and touches no GPU; :func:`register` teaches DeepSpeed the JSON types.
"""

from largebatch.engine import checkpoint
from largebatch.engine.lr_schedulers import WarmupCosineDecayLR, WarmupPolyLR, WarmupStepLR
from largebatch.engine.register import register
from largebatch.exclusion import LayerPolicy
from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lars import LARS

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LARS",
    "NLAMB",
    "NNLAMB",
    "LayerPolicy",
    "WarmupCosineDecayLR",
    "WarmupPolyLR",
    "WarmupStepLR",
    "checkpoint",
    "register",
    "__version__",
]
