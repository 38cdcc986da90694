"""DeepSpeed engines: of a phase's model, and those on which micro-batches are tried out."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from largebatch.config import reject
from largebatch.engine.config_checks import check_engine_config
from largebatch.engine.config_checks.combinations import check_optimizer_type
from largebatch.engine.initialization import initialize, prepare_deepspeed
from largebatch.exclusion import KINDS, identities, is_excluded
from largebatch.launch.recipe.baseline_options import check_baseline_options
from largebatch.launch.recipe.batch_division import micro_batch_candidates
from largebatch.launch.recipe.resolved_run import ResolvedRun, resolve
from largebatch.launch.recipe.section import check_section
from largebatch.launch.trainer.cpu_memory import KEPT, NOT_KEPT, keep_freed_memory
from largebatch.launch.trainer.micro_batch import Trial, largest_that_fits
from largebatch.launch.trainer.task import Task
from largebatch.models.batch_norm import MICRO_BATCH, apply_ghost_batches


def set_up_deepspeed() -> None:
    """DeepSpeed with largebatch registered; on CPUs with the threads and the memory that ranks there should take."""
    if torch.cuda.is_available():
        prepare_deepspeed()
        return
    is_memory_kept = keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    prepare_deepspeed()
    logging.getLogger("largebatch").info(KEPT if is_memory_kept else NOT_KEPT)


def check_ds_config(resolved: ResolvedRun, *, world_size: int) -> None:
    """Refuses what DeepSpeed would not take, before anything is built.

    Raises:
        ValueError, TypeError: naming the entry, its value and what is allowed.
    """
    check_optimizer_type(resolved.config["optimizer"]["type"])
    check_engine_config(resolved.config, world_size=world_size, is_closed=True)
    check_baseline_options(resolved.config["optimizer"])
    check_folders(resolved.config)


def check_folders(config: dict[str, Any]) -> None:
    for name in ("tensorboard", "csv_monitor"):
        options = config.get(name, {})
        if not options.get("enabled") or not options.get("output_path"):
            continue
        try:
            os.makedirs(options["output_path"], exist_ok=True)
        except OSError as error:
            reject(f"{name}.output_path", options["output_path"], f"a folder that can be written ({error})")


def build_engine(task: Task, resolved: ResolvedRun, *, world_size: int) -> tuple[Any, str, Any]:
    """A freshly initialised model and its optimizer, sharded and on the device. A collective.

    Returns:
        The engine; one line on batch normalisation, "" without; the monitor that the ds_config asks for.
    """
    torch.manual_seed(resolved.section["seed"])
    model = task.build_model()
    batch_norm = set_ghost_batches(model, resolved, resolved.micro_batch, world_size)
    engine, monitor = initialize(model, parameter_groups(model, resolved.section["no_weight_decay"]), resolved.config)
    return engine, batch_norm, monitor


def set_ghost_batches(model: nn.Module, resolved: ResolvedRun, micro_batch: int, world_size: int) -> str:
    line = apply_ghost_batches(
        model,
        ghost_batch_size=resolved.section["batch_norm"].get("ghost_batch_size", MICRO_BATCH),
        micro_batch=micro_batch,
        accumulation_steps=resolved.global_batch // (micro_batch * world_size),
        world_size=world_size,
        momentum=resolved.section["batch_norm"].get("momentum"),
    )
    return "" if line == "no batch normalisation" else line


def parameter_groups(model: nn.Module, no_weight_decay: Sequence[str]) -> list[dict[str, Any]]:
    """The trainable parameters, those that are not decayed in a second param group with weight decay 0.

    Args:
        no_weight_decay: "bias", "norm" and regular expressions for parameter names; empty for one group.

    Raises:
        ValueError: a regular expression matches no parameter name.
    """
    found = {p: identity for p, identity in identities(model).items() if p.requires_grad}
    names = [identity.name for identity in found.values()]
    for pattern in no_weight_decay:
        if pattern not in KINDS and not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"largebatch.no_weight_decay has {pattern!r}, which matches no parameter name; the names are "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )
    undecayed = [p for p, identity in found.items() if is_excluded(identity, no_weight_decay)]
    if not undecayed:
        return [{"params": list(found)}]
    decayed = [p for p, identity in found.items() if not is_excluded(identity, no_weight_decay)]
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def find_micro_batch(
    recipe: dict[str, Any],
    task: Task,
    *,
    earlier: dict[str, Any] | None,
    world_size: int,
    output: str,
    device: torch.device | None = None,
) -> bool:
    """Puts the largest micro-batch that fits on a GPU in the place of "auto", and returns whether it has. A collective.

    A run that is resumed keeps its micro-batch where that is still possible: batch normalisation may depend on it.

    Args:
        recipe: of one phase, checked; written.
        earlier: the filled-in config of the run that is to be resumed, or None.
        device: where to try; None: the GPU of this rank. Without one nothing is put there.
    """
    recipe["largebatch"] = check_section(recipe)
    candidates = micro_batch_candidates(recipe, world_size)
    kept = (earlier or {}).get("train_micro_batch_size_per_gpu")
    if kept in candidates:
        recipe["train_micro_batch_size_per_gpu"] = kept
        return True
    if device is None:
        if not torch.cuda.is_available():
            return False
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    smallest = recipe | {"train_micro_batch_size_per_gpu": candidates[0]}
    resolved = resolve(smallest, num_samples=task.num_samples, world_size=world_size, output=output)
    resolved.config["optimizer"]["params"]["lr"] = 0.0
    resolved.config["tensorboard"] = {"enabled": False}
    resolved.config.pop("scheduler", None)

    def batch_of(micro_batch: int) -> Any:
        batches = task.micro_batches(
            seed=resolved.section["seed"],
            global_batch=micro_batch,
            micro_batch=micro_batch,
            rank=0,
            world_size=1,
            device=device,
            first_step=0,
        )
        with contextlib.closing(batches):
            return next(batches)

    def loss(engine: Any, batch: Any) -> torch.Tensor:
        return task.loss(engine, batch, dtype=next(engine.module.parameters()).dtype)

    trial = Trial(
        lambda: build_engine(task, resolved, world_size=world_size)[0],
        batch_of,
        loss,
        lambda engine, micro_batch: set_ghost_batches(engine.module, resolved, micro_batch, world_size),
        device,
    )
    try:
        found = largest_that_fits(candidates, trial.fits, world_size=world_size)
    finally:
        trial.release()
    recipe["train_micro_batch_size_per_gpu"] = found
    return True
