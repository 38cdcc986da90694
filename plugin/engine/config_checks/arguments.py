"""What ``deepspeed.initialize`` is called with, checked before it runs, and its errors in one line where they are its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from largebatch.config import UnknownOptionError, nearest_hint, reject
from largebatch.engine.config_checks import MISSPELT, check_engine_config
from largebatch.engine.config_checks.combinations import check_optimizer_type
from largebatch.engine.config_checks.json_files import read_json
from largebatch.engine.config_checks.known_entries import section
from largebatch.engine.config_checks.section_models import sentence
from largebatch.engine.internals import internal
from largebatch.optim.registry import OPTIMIZERS

LIBRARIES = (
    "deepspeed",
    "torch",
    "pydantic",
    "pydantic_core",
    "hjson",
    "json",
    "typing",
    "enum",
    "pathlib",
    "os",
    "posixpath",
)
"""Where errors come from that say nothing of the ds_config."""


def check_arguments(arguments: Mapping[str, Any]) -> bool:
    """Checks the ds_config of a call if one of our optimizers is asked for, and returns whether; leaves others to DeepSpeed.

    Args:
        arguments: of deepspeed.initialize, by name.

    Raises:
        ValueError, TypeError: naming the file or the entry, its value and what is allowed.
    """
    config = config_of(arguments)
    if config is None:
        return False
    client = arguments.get("optimizer")
    if client is None and "optimizer" not in config:
        for key in config:
            if nearest_hint(key, ["optimizer"], nearness=MISSPELT):
                raise UnknownOptionError(f"{key!r} is not a key of a ds_config (did you mean 'optimizer'?)")
        return False
    if client is None:
        section("optimizer", config["optimizer"])
        name = config["optimizer"].get("type")
        check_optimizer_type(name)
        is_ours = name.lower() in OPTIMIZERS
    else:
        is_ours = isinstance(client, tuple(OPTIMIZERS.values()))
    if is_ours:
        num_ranks = ranks_of_the_job()
        check_engine_config(
            config, world_size=None if has_other_parallelism(arguments, config) else num_ranks, num_ranks=num_ranks
        )
    return is_ours


def config_of(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ds_config, read from its file if need be; None where DeepSpeed has to make out what it is."""
    given = [
        arguments.get("config"),
        arguments.get("config_params"),
        getattr(arguments.get("args"), "deepspeed_config", None),
    ]
    config = next((value for value in given if value is not None), None)
    if config is None or isinstance(config, dict):
        return config
    if not isinstance(config, (str, os.PathLike)):
        reject("config", config, "a dict or the path of a JSON file", TypeError)
    path = os.fspath(config)
    if os.path.exists(path):
        import hjson

        return read_json(path, f"the ds_config {path!r}", hjson.loads)
    if path.endswith(".json"):
        raise ValueError(f"the ds_config {path!r} does not exist")
    return None  # DeepSpeed also takes base64


def has_other_parallelism(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the ranks are, or may be, not all of data parallelism."""
    is_given = arguments.get("mpu") is not None or arguments.get("mesh_param") is not None
    is_given |= isinstance(arguments.get("model"), internal("PipelineModule"))
    return is_given or any(
        key in config for key in ("sequence_parallel_size", "data_parallel_size", "tensor_parallel", "expert_parallel")
    )


def ranks_of_the_job() -> int | None:
    """None if that is not known yet."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if os.environ.get("WORLD_SIZE", "").isdigit() else None


def is_answer(error: Exception) -> bool:
    """Whether DeepSpeed or what it calls has raised an error over an entry, and not we, the caller's code or the machine."""
    if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, NotImplementedError):
        return False
    return is_raised_by(error, LIBRARIES)


def is_raised_by(error: BaseException, packages: Sequence[str]) -> bool:
    """Whether the line that raised an error is in one of these packages."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_globals.get("__name__", "").partition(".")[0] in packages


def as_user_error(error: Exception) -> ValueError:
    return ValueError(f"DeepSpeed makes no engine of this ds_config: {type(error).__name__}: {sentence(str(error))}")
