"""DeepSpeedEngine.save_checkpoint and load_checkpoint, for every layout: what register() puts in the place of DeepSpeed's.

A checkpoint saved here says where its layers lie, in an entry of its model states. Loading one at the layout in which it was
saved is left to DeepSpeed, and gives the same bits; at any other, its layers are cut anew.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from largebatch.engine.checkpoint import resharding
from largebatch.engine.checkpoint.agreement import gathered, raise_together
from largebatch.engine.checkpoint.layout import KEY, EngineLayout, can_be_described, describe, differences
from largebatch.engine.checkpoint.remade_state import SAME_STATE, check_optimizers
from largebatch.engine.checkpoint.saved import SavedCheckpoint, layout_in, mapped, model_files_in
from largebatch.optim.registry import OPTIMIZERS

logger = logging.getLogger("largebatch")


def names_of_ours() -> list[str]:
    return [cls.__name__ for cls in OPTIMIZERS.values()]


def saving_layout(save: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates save_checkpoint."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        if can_be_described(self):
            state = dict(bound.arguments.get("client_state") or {})
            bound.arguments["client_state"] = state | {KEY: describe(self).to_dict()}
        return save(*bound.args, **bound.kwargs)

    return save_checkpoint


def loading_any_layout(load: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates load_checkpoint."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        is_weights_only = bound.arguments["load_module_only"]
        with_optimizer = bound.arguments["load_optimizer_states"] and not is_weights_only
        saved = to_be_resharded(self, bound.arguments["load_dir"], bound.arguments["tag"], with_optimizer)
        is_by_hand = bound.arguments["custom_load_fn"] is not None
        if saved is None or (is_weights_only and is_deepspeeds(self, saved, is_by_hand)):
            path, client_state = load(self, *args, **kwargs)
            if isinstance(client_state, dict):
                client_state.pop(KEY, None)
            return path, client_state
        if is_by_hand:
            raise ValueError(
                "custom_load_fn is given, and it knows one layout only; leave it out, or load at the saved layout"
            )
        client_state = resharding.load(
            self,
            saved,
            with_optimizer=with_optimizer,
            with_scheduler=bound.arguments["load_lr_scheduler_states"] and not is_weights_only,
            with_counters=not is_weights_only,
            is_strict=bound.arguments["load_module_strict"],
        )
        client_state.pop(KEY, None)
        return os.path.join(saved.path, saved.model_file(0)), client_state

    return load_checkpoint


def is_deepspeeds(engine: Any, saved: SavedCheckpoint, is_by_hand: bool) -> bool:
    """Whether weights alone are for DeepSpeed to load: up to stage 2 they lie in one file, as the model's state_dict.

    That is so for a function of the caller's own, and where there is no more than that file. Otherwise the fp32 masters are
    taken, which are more exact, and frozen parameters may be others than they were.
    """
    if max(saved.layout.zero_stage, engine.zero_optimization_stage()) == 3:
        return False
    return is_by_hand or bool(saved.missing_files())


def to_be_resharded(engine: Any, folder: str, tag: Any, with_optimizer: bool = True) -> SavedCheckpoint | None:
    """The checkpoint if its layout is known and not the engine's; None if it is for DeepSpeed itself. A collective.

    Raises:
        ValueError: on all ranks, if some of them do not see the checkpoint's files that they need, or if it was saved
            elsewhere at another layout and does not say at which, or if it holds another optimizer's state.
    """
    if engine.load_universal_checkpoint() or not can_be_described(engine):
        return None
    path = os.path.join(folder, str(latest_in(folder) if tag is None else tag))
    files, current = model_files_in(path), describe(engine)
    with raise_together(f"{path!r} cannot be read"):
        saved = layout_in(path)
    differ = [] if saved is None else differences(saved, current)
    seen = gathered((bool(files), bool(differ)))
    check_all_see(path, [sees_any for sees_any, _ in seen])
    if saved is None:
        if files and with_optimizer:
            check_without_layout(path, files[0], current)
        return None
    if not any(differs for _, differs in seen):
        check_own_files(SavedCheckpoint(path, saved))
        return None
    reason = f"{', '.join(differ)}. Its layers are cut anew from the files of all ranks"
    logger.info("%s was saved at %s and is loaded at %s: %s", path, saved, current, reason)
    return SavedCheckpoint(path, saved)


def check_without_layout(path: str, model_file: str, current: EngineLayout) -> None:
    """Raises ValueError where DeepSpeed would stop deep inside: other files than the engine's layout has."""
    states = mapped(model_file)
    config = states.get("ds_config")
    stage = config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, dict) else None
    if current.optimizer in names_of_ours() and isinstance(config, dict):  # the state has no names of optimizers in it
        check_optimizers(optimizer_named_in(config, current.optimizer, path), current.optimizer, path)
    world_size = states.get("dp_world_size")
    kinds = (0, 1, 1, 3)  # stages 1 and 2 have the same files
    is_other_stage = stage in range(4) and kinds[stage] != kinds[current.zero_stage]
    if is_other_stage or (current.zero_stage and world_size not in (None, current.world_size)):
        raise ValueError(
            f"{path!r} was saved on {world_size} ranks at ZeRO stage {stage} by a version that did not write down its layout; it "
            f"can only be loaded there, not at {current}. Load it there once and save it again"
        )


def optimizer_named_in(config: dict[str, Any], current: str, path: str) -> str:
    """The optimizer of a saved ds_config as our names and DeepSpeed's have it; the present one where it was the client's own."""
    name = (config.get("optimizer") or {}).get("type")
    if not isinstance(name, str):
        logger.warning("%r does not say whose optimizer state it holds; it is taken for that of %s", path, current)
        return current
    known = [*names_of_ours(), *(other for family in SAME_STATE for other in family)]
    return next((other for other in known if other.lower() == name.lower()), name)


def latest_in(folder: str) -> str:
    path = os.path.join(folder, "latest")
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


NODE_LOCAL_HINT = (
    'If each node has a folder of its own, save with "checkpoint": {"use_node_local_storage": true} in the ds_config and keep '
    "each rank on the node where it was; or copy the folders of all nodes into one that all ranks see"
)


def check_all_see(path: str, sees: list[bool]) -> None:
    """Raises ValueError on all ranks if only some see a checkpoint."""
    blind = [str(rank) for rank, sees_any in enumerate(sees) if not sees_any]
    if blind and len(blind) < len(sees):
        raise ValueError(f"{path!r} has no model states for ranks {', '.join(blind)}. {NODE_LOCAL_HINT}")


def check_own_files(saved: SavedCheckpoint) -> None:
    """Raises ValueError on all ranks if one does not see its own files, before DeepSpeed leaves the others waiting for it."""
    mine = []
    if not saved.layout.obstacle:
        rank = dist.get_rank()
        names = [saved.model_file(rank)] + [saved.optimizer_file(rank)] * bool(saved.layout.zero_stage)
        mine = [name for name in names if not os.path.isfile(os.path.join(saved.path, name))]
    missing = [f"{names[0]} for rank {rank}" for rank, names in enumerate(gathered(mine)) if names]
    if missing:
        raise ValueError(f"{saved.path!r} has no {', '.join(missing[:3])}. {NODE_LOCAL_HINT}")
