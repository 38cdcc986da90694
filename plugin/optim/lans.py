"""LANS as a torch.optim.Optimizer. The formula is in largebatch.rules.lans."""

from largebatch.optim.registry import register_rule
from largebatch.rules import lans as rules

LANS = register_rule("LANS", lr=1e-3)(rules.LANS)
LANS.__module__ = __name__
