"""LARS and LAMB for DeepSpeed, exact under ZeRO: training with very large batches.

Importing compiles nothing, patches nothing and touches no GPU; :func:`register` teaches DeepSpeed the JSON types.
"""

from largebatch.config import option
from largebatch.engine import checkpoint
from largebatch.engine.lr_schedulers import WarmupCosineDecayLR, WarmupPolyLR, WarmupStepLR
from largebatch.engine.register import register
from largebatch.exclusion import LayerPolicy
from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lans import LANS
from largebatch.optim.lars import LARS
from largebatch.optim.registry import register_rule
from largebatch.rules.rule import Layers, Part, Rule

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LANS",
    "LARS",
    "NLAMB",
    "NNLAMB",
    "LayerPolicy",
    "Layers",
    "Part",
    "Rule",
    "WarmupCosineDecayLR",
    "WarmupPolyLR",
    "WarmupStepLR",
    "checkpoint",
    "option",
    "register",
    "register_rule",
    "__version__",
]
