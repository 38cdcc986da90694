"""LARS and LAMB for DeepSpeed, exact under ZeRO: training with very large batches.

Importing compiles nothing, patches nothing and touches no GPU; :func:`register` teaches DeepSpeed the JSON types.
"""

from largebatch.exclusion import LayerPolicy
from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lars import LARS
from largebatch.register import register

__version__ = "0.1.0"

__all__ = ["LAMB", "LARS", "NLAMB", "NNLAMB", "LayerPolicy", "register", "__version__"]
