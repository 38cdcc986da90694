"""Teaches DeepSpeed the JSON types of largebatch. What that changes, and why, is the table in largebatch.engine.patches."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("largebatch")

_is_registered = False


def register() -> None:
    """Makes ``"type": "LARS" | "LAMB" | "NLAMB" | "NNLAMB"``, rules of one's own and our schedulers known to DeepSpeed.

    Call it once before ``deepspeed.initialize``; further calls do nothing. A rule that is registered later is known at once. DeepSpeed's own "Lamb" is taken over: its
    FusedLamb runs on GPUs only, one tensor at a time, folds the bias correction into the learning rate, and takes the
    norms of arbitrary slices under ZeRO.

    Raises:
        RuntimeError: DeepSpeed has no such internals as this was written against; names what is missing. Nothing has been
            changed.
    """
    global _is_registered
    show_log()
    if _is_registered:
        return
    import deepspeed

    from largebatch.engine import patches
    from largebatch.engine.internals import TESTED_DEEPSPEED, is_tested
    from largebatch.engine.lr_schedulers import SCHEDULERS
    from largebatch.optim.registry import OPTIMIZERS, followers

    patches.apply_all()
    _is_registered = True
    followers.append(patches.add_optimizer)
    logger.info(
        "registered optimizers %s (in place of DeepSpeed's own Lamb) and schedulers %s with DeepSpeed %s (%s with %s)",
        ", ".join(cls.__name__ for cls in OPTIMIZERS.values()),
        ", ".join(SCHEDULERS),
        deepspeed.__version__,
        "tested" if is_tested() else "NOT tested; tested",
        ", ".join(TESTED_DEEPSPEED),
    )


def show_log() -> None:
    """Gives the package's logger an output on rank 0, unless the program has set up logging itself."""
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[largebatch] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
