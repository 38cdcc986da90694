"""Everything that largebatch changes in DeepSpeed, in one table: probed, applied and listed from here.

:func:`largebatch.register` applies the rows that hold for the whole process, all of them or none. The others hold for one engine
or for the time of one call, and are applied where they are needed. ``largebatch doctor --patches`` prints the table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from largebatch.engine import lost_micro_batches, replacements
from largebatch.engine.baselines import Adagrad
from largebatch.engine.checkpoint.engine_methods import loading_any_layout, saving_layout
from largebatch.engine.internals import INTERNALS, MISSING, lacks, missing, owner_of, value_at
from largebatch.engine.lr_schedulers import SCHEDULERS
from largebatch.optim.registry import OPTIMIZERS

UNREACHABLE_NAME = "deepspeed's own lamb, replaced by largebatch"

NEVER = "stays: it is how largebatch comes in"


@dataclass(frozen=True)
class Patch:
    """One name of DeepSpeed's (or torch's) that is given another value.

    Attributes:
        target: "module:attribute" or "module:Class.attribute".
        effect: what is different afterwards.
        reason: why there is no public door for it.
        until: when it can go.
        replace: value that was there -> the one in its place. None: not for the whole process, but as ``scope`` says.
        scope: where and how long it holds.
    """

    target: str
    effect: str
    reason: str
    until: str
    replace: Callable[[Any], Any] | None = None
    scope: str = "the process"


def with_more(find_more: Callable[[], Iterable[Any]]) -> Callable[[list], list]:
    """A list with these at its end, in place: other modules hold the same list."""

    def extend(values: list) -> list:
        values.extend(value for value in find_more() if value not in values)
        return values

    return extend


ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "deepspeed.runtime.config:DEEPSPEED_OPTIMIZERS",
        "optimizer.type may be LARS, LAMB, NLAMB, NNLAMB, LANS or a rule of one's own, in any spelling",
        "the engine takes other names for classes of torch.optim",
        "DeepSpeed has a registry of optimizers",
        with_more(lambda: OPTIMIZERS),
    ),
    Patch(
        "deepspeed.runtime.engine:LAMB_OPTIMIZER",
        '"Lamb" is ours: DeepSpeed\'s own cannot be reached by any JSON',
        "the name switches on FusedLamb, an assertion against static loss scales and a step path without step()",
        "DeepSpeed has a registry of optimizers",
        lambda name: UNREACHABLE_NAME,
    ),
    Patch(
        "deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS",
        "ZeRO takes our classes, torch.optim.SGD and our Adagrad without zero_allow_untested_optimizer",
        "the list is closed; SGD and Adagrad are elementwise, so exact however the parameters are cut",
        "DeepSpeed has a registry of optimizers",
        with_more(lambda: (*OPTIMIZERS.values(), torch.optim.SGD, Adagrad)),
    ),
    *(
        Patch(
            f"deepspeed.runtime.lr_schedules:{name}",
            f"scheduler.type may be {name}",
            "the engine looks names up as attributes of this module",
            "DeepSpeed has a registry of schedulers",
            lambda _, cls=cls: cls,
        )
        for name, cls in SCHEDULERS.items()
    ),
    Patch(
        "deepspeed.runtime.lr_schedules:VALID_LR_SCHEDULES",
        "our schedulers are among the known ones",
        "Accelerate knows by this list which schedulers the engine steps",
        "DeepSpeed has a registry of schedulers",
        with_more(lambda: SCHEDULERS),
    ),
    Patch(
        "deepspeed:initialize",
        "a ds_config that names one of our optimizers is checked first, and DeepSpeed's errors over it are one line",
        "DeepSpeed ignores unknown keys and answers wrong values from deep inside",
        NEVER,
        replacements.checked,
    ),
    Patch(
        "deepspeed.runtime.config:DeepSpeedConfig._do_warning_check",
        '"max_grad_norm": null is no error',
        "DeepSpeed compares the value with 0; null is what switches a preset's own clip off",
        "DeepSpeed reads max_grad_norm for its own optimizers only",
        replacements.allowing_no_max_grad_norm,
    ),
    Patch(
        f"{ENGINE}._configure_basic_optimizer",
        "builds our classes from their names, and for Adagrad one with torch's numbers that keeps its param groups under ZeRO",
        "the method is a chain of names",
        "DeepSpeed has a registry of optimizers",
        replacements.building_ours,
    ),
    Patch(
        f"{ENGINE}._do_optimizer_sanity_check",
        "before ZeRO takes an optimizer of ours: refuses what is not exact, learns the layers' names, waits for the layout",
        "no hook between the optimizer and its wrapper",
        "DeepSpeed has such a hook",
        replacements.preparing_ours,
    ),
    Patch(
        f"{ENGINE}._configure_optimizer",
        "afterwards: attaches the map of the layers, repairs the loss scale, undoes a stray first step of the baselines",
        "no hook after the optimizer is wrapped",
        "DeepSpeed tells an optimizer what its flat tensors hold",
        replacements.attaching_layout,
    ),
    Patch(
        f"{ENGINE}.save_checkpoint",
        "a checkpoint says where its layers lie",
        "client_state is the door; the patch is there so that nobody has to use it",
        NEVER,
        saving_layout,
    ),
    Patch(
        f"{ENGINE}.load_checkpoint",
        "a checkpoint loads at any layout, and the optimizer's options are those of the ds_config again",
        "DeepSpeed loads at the same layout, or through universal checkpoints that have to be converted first",
        NEVER,
        lambda load: replacements.restoring_options(loading_any_layout(load)),
    ),
    Patch(
        f"{ENGINE}.get_mom",
        "LARS's momentum in the log",
        "DeepSpeed looks for betas where the name is not SGD, and writes 0.0",
        "DeepSpeed asks the param groups",
        replacements.showing_momentum,
    ),
    *(
        Patch(
            f"{wrapper}.{name}",
            effect,
            "DeepSpeed raises the scale before it divides the gradients by it (see largebatch.engine.loss_scale)",
            "DeepSpeed grows the scale after the step",
            scope="one fp16 engine that steps one of ours or a baseline",
        )
        for wrapper in (
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
            "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer",
        )
        for name, effect in (
            ("_update_scale", "a growth of the dynamic loss scale is put off; at stage 0 hysteresis is obeyed"),
            ("step", "the loss scale grows when the step is done"),
        )
    ),
    Patch(
        f"{ENGINE}.backward",
        "the loss is multiplied by the loss scale",
        "at stage 0 FP16_UnfusedOptimizer divides by a scale that nobody multiplied (pull request 8393)",
        "pull request 8393 is in the oldest supported version",
        scope="one fp16 engine at stage 0 that steps one of ours or a baseline",
    ),
    *(
        Patch(
            target,
            "adds each micro-batch's gradients to those before",
            f"stage 2 of DeepSpeed {versions} {fault} (mended by pull request {pull})",
            f"pull request {pull} is in the oldest supported version",
            scope=f"one engine at stage 2 of DeepSpeed {versions} that steps one of ours or a baseline",
        )
        for target, versions, fault, pull in (
            (lost_micro_batches.WITHOUT_OFFLOAD, "0.17.6 to 0.18.2", "forgets all micro-batches but the last", 7665),
            (
                lost_micro_batches.WITH_OFFLOAD,
                "before 0.19",
                "forgets all micro-batches but the first and the last",
                7967,
            ),
        )
    ),
    *(
        Patch(
            target,
            "returns at once and leaves its tensors as they are",
            "a rank that runs out of memory would keep the others waiting, and DeepSpeed has no dry run",
            "DeepSpeed finds the largest micro-batch by itself on several ranks",
            scope="while the trainer searches the largest micro-batch",
        )
        for target in (
            "torch.distributed:ProcessGroup.*",
            "torch.distributed:new_group",
            "deepspeed.runtime.zero.utils:assert_lst_len_same_as_other_ranks",
            "deepspeed.runtime.zero.utils:get_lst_from_rank0",
        )
    ),
    *(
        Patch(
            target,
            effect,
            "DeepSpeed writes into the final folder and stops at the first error, while the other ranks wait",
            "DeepSpeed's checkpoint engines can be given in Python",
            scope="while the trainer writes a checkpoint",
        )
        for target, effect in (
            (f"{ENGINE}.checkpoint_engine.save", "files go through the trainer's writer"),
            (f"{ENGINE}.checkpoint_engine.makedirs", "an error is told by all ranks together"),
            (f"{ENGINE}._copy_recovery_script", "an error is told by all ranks together"),
            ("shutil:copytree", "of files that were offloaded to NVMe: an error is told by all ranks together"),
        )
    ),
    Patch(
        f"{ENGINE}.monitor",
        "silent: the trainer reports",
        "its figures repeat the trainer's, and it would write to the disk at every step",
        "the monitor can be switched off while the ds_config has one",
        scope="the trainer's engines",
    ),
    Patch(
        "deepspeed.ops:__compatible_ops__",
        "no shared-memory all-reduce between CPU ranks",
        "it needs a compiler and leaves 66 MB a rank in /dev/shm after each run",
        "DeepSpeed removes what it makes there",
        scope="the trainer's process, on CPUs",
    ),
)
"""In the order in which they are applied."""

FOR_THE_PROCESS = tuple(patch for patch in PATCHES if patch.replace is not None)

NEW_NAMES = tuple(f"deepspeed.runtime.lr_schedules:{name}" for name in SCHEDULERS)
"""Targets that DeepSpeed has not before."""

LATER = tuple(patch.target for patch in PATCHES if patch.scope.startswith("one fp16 engine"))
"""Targets that an engine may need after register()."""


def check_all_there() -> None:
    """Raises RuntimeError if DeepSpeed lacks anything that is changed or read, now or when an engine is built."""
    targets = [patch.target for patch in FOR_THE_PROCESS if patch.target not in NEW_NAMES]
    absent = [target for target in (*targets, *LATER) if value_at(target) is MISSING]
    absent += missing(INTERNALS)
    if absent:
        raise RuntimeError(lacks(list(dict.fromkeys(absent))))
    lists = [value_at(f"deepspeed.runtime.{module}:DEEPSPEED_OPTIMIZERS") for module in ("config", "engine")]
    if lists[0] is not lists[1]:
        raise RuntimeError(lacks(["one DEEPSPEED_OPTIMIZERS list shared by deepspeed.runtime.config and engine"]))


def apply_all() -> Callable[[], None]:
    """Applies all rows that hold for the process.

    Returns:
        A function that takes them back.

    Raises:
        RuntimeError: DeepSpeed lacks something; nothing has been changed.
    """
    check_all_there()
    originals = []
    for patch in FOR_THE_PROCESS:
        owner, name = owner_of(patch.target)
        original = vars(owner).get(name, MISSING)
        originals.append((owner, name, list(original) if isinstance(original, list) else original))
        setattr(owner, name, patch.replace(None if original is MISSING else original))

    def take_back() -> None:
        for owner, name, original in reversed(originals):
            if original is MISSING:
                delattr(owner, name)
            elif isinstance(original, list):
                getattr(owner, name)[:] = original
            else:
                setattr(owner, name, original)

    return take_back


def add_optimizer(cls: type) -> None:
    """Makes a class known that was registered after :func:`apply_all`."""
    for patch in PATCHES:
        if patch.target in (
            "deepspeed.runtime.config:DEEPSPEED_OPTIMIZERS",
            "deepspeed.runtime.zero.utils:ZERO_SUPPORTED_OPTIMIZERS",
        ):
            patch.replace(value_at(patch.target))


@contextlib.contextmanager
def temporarily(values: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside, attributes have other values.

    Args:
        values: (object, class or module; name; value).
    """
    given = list(values)
    before = [(owner, name, vars(owner).get(name, MISSING)) for owner, name, _ in given]
    try:
        for owner, name, value in given:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, original in reversed(before):
            if original is not MISSING:
                setattr(owner, name, original)
            elif name in vars(owner):
                delattr(owner, name)


def listing() -> str:
    """The table as text, one block for each scope."""
    lines = []
    for scope in dict.fromkeys(patch.scope for patch in PATCHES):
        lines.append(f"{scope}:")
        for patch in PATCHES:
            if patch.scope == scope:
                lines += [
                    f"  {patch.target.replace(':', '.')}",
                    f"    effect  {patch.effect}",
                    f"    because {patch.reason}",
                    f"    until   {patch.until}",
                ]
    return "\n".join(lines)
