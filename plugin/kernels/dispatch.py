"""Chooses the kernel backend. A request that cannot be met is an error; an automatic choice is logged once."""

from __future__ import annotations

import functools
import logging

from largebatch.kernels.interface import Kernels
from largebatch.kernels.reference import ReferenceKernels

logger = logging.getLogger("largebatch")

CHOICES = ("auto", "reference")
"""Legal values of the optimizers' ``kernels`` argument."""


@functools.cache
def choose(device_type: str, requested: str) -> Kernels:
    """The backend for tensors on ``device_type`` ("cpu", "cuda", ...).

    Args:
        requested: one of :data:`CHOICES`, already checked.
    """
    if requested == "auto":
        logger.info("kernels: auto took 'reference' for %s tensors (plain torch; no other backend yet)", device_type)
    assert requested in CHOICES
    return ReferenceKernels()
