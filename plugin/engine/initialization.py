"""How the trainer gets DeepSpeed and its engines: registered, without chatter, and with gloo alone on CPUs."""

from __future__ import annotations

import contextlib
import copy
import datetime
import logging
import os
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from largebatch.engine.config_checks.arguments import as_user_error, is_answer
from largebatch.engine.internals import internal
from largebatch.engine.register import register


def prepare_deepspeed() -> None:
    """Imports DeepSpeed and registers our types with it. On CPUs ranks then talk over gloo only."""
    # torch 2.15 deprecates collectives under the names by which DeepSpeed 0.19.8 calls them
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\..*")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    internal("logger").setLevel(logging.WARNING)
    register()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # see largebatch.engine.patches
        internal("compatible_ops")["deepspeed_shm_comm"] = False


def init_distributed(backend: str | None = None, timeout: datetime.timedelta | None = None) -> None:
    """Makes the group of all ranks. A collective.

    Args:
        backend: None: the device's own.
        timeout: of its collectives; None: DeepSpeed's.
    """
    import deepspeed

    deepspeed.init_distributed(backend, verbose=False, **({} if timeout is None else {"timeout": timeout}))


def initialize(model: nn.Module, param_groups: list[dict[str, Any]], config: dict[str, Any]) -> tuple[Any, Any]:
    """An engine of the trainer's. A collective.

    Returns:
        The engine, and the monitor that the ds_config asks for. The engine itself gets a silent one: its own figures repeat the
        trainer's, and it would write to the disk at every step.

    Raises:
        ValueError: DeepSpeed makes no engine of this ds_config.
    """
    import deepspeed

    # BF16_Optimizer prints memory figures whatever the log level; compiling an operator flushes what it prints to
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups, config=copy.deepcopy(config))
        except Exception as error:  # of a baseline's: register() does the same for our own optimizers
            if not is_answer(error):
                raise
            raise as_user_error(error) from error
    monitor, engine.monitor = engine.monitor, types.SimpleNamespace(enabled=False)
    return engine, monitor


def set_timeout_of_all_groups(timeout: datetime.timedelta) -> None:
    """Of the groups that exist: DeepSpeed makes its own with torch's 30 minutes whatever the first one has."""
    c10d = dist.distributed_c10d
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # before torch 2.14
    for group in list(c10d._world.pg_map):
        if not c10d._rank_not_in_group(group):
            set_timeout(timeout, group)
