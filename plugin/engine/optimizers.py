"""The optimizers that a ds_config can name."""

from __future__ import annotations

from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lars import LARS
from largebatch.optim.layerwise import LayerwiseOptimizer

OPTIMIZERS: dict[str, type[LayerwiseOptimizer]] = {cls.__name__.lower(): cls for cls in (LARS, LAMB, NLAMB, NNLAMB)}
"""JSON ``optimizer.type``, lower-cased -> class."""
