"""Plain PyTorch's form of a training state: the state_dicts of a model and of an optimizer, in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.engine.checkpoint.consolidated import ConsolidatedState, torch_state_dict

MODEL, OPTIMIZER, KIND, NAMES = "model", "optimizer", "optimizer_class", "names"
"""Keys of a file that is written here."""

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
"""Beginning of the names in the state_dict of a wrapped model -> the wrapper."""


def from_state_dicts(
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    kind: str,
    *,
    names: Sequence[str] | None = None,
    num_steps: int | None = None,
    scheduler: dict[str, Any] | None = None,
) -> ConsolidatedState:
    """A model's and an optimizer's state_dict as one state.

    Args:
        kind: class name of the optimizer, e.g. "LAMB"; see largebatch.engine.checkpoint.peers for those of others.
        names: of the optimizer's parameters in its own order; None to find them by the optimizer's ``param_names`` or, where
            there is one param group, by the order of the model's parameters. See :func:`names_in_optimizer`.
        num_steps: optimizer steps taken; None to take the state's step, where there is one.

    Raises:
        ValueError: it cannot be told which parameter is which, or shapes do not agree.
    """
    ids = [i for group in optimizer["param_groups"] for i in group["params"]]
    known = names or recorded_names(optimizer) or guessed_names(model, optimizer)
    if len(known) != len(ids):
        raise ValueError(
            f"{len(known)} names were given for {len(ids)} parameters of the optimizer; expected one for each"
        )
    by_id = dict(zip(ids, known, strict=True))
    state = {by_id[i]: {k: v for k, v in s.items() if v is not None} for i, s in optimizer["state"].items()}
    for name in known:
        if name not in model:
            prefix = next((p for p in WRAPPERS if f"{p}{name}" in model), None)
            hint = (
                f"; its names begin with {prefix!r} there, from {WRAPPERS[prefix]}: take the inner model's"
                if prefix
                else ""
            )
            raise ValueError(f"the optimizer steps {name!r}, which is not in the model's state_dict{hint}")
        for key, value in state.get(name, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != model[name].shape:
                raise ValueError(
                    f"{key} of {name!r} has shape {tuple(value.shape)} and the parameter {tuple(model[name].shape)}; the names are "
                    "in another order than the optimizer's parameters"
                )
    trained = set(known)
    weights = {n: whole_precision(v.detach()) if n in trained else v.detach() for n, v in model.items()}
    groups = [
        {k: v for k, v in group.items() if k != "param_names"} | {"params": [by_id[i] for i in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    return ConsolidatedState(weights, kind, groups, state, num_steps_of(state, groups, num_steps), scheduler)


def whole_precision(tensor: Tensor) -> Tensor:
    """fp32 in place of a 16-bit type."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def num_steps_of(state: dict[str, dict[str, Any]], groups: list[dict[str, Any]], given: int | None) -> int | None:
    found = [float(s["step"]) for s in (*state.values(), *groups) if s.get("step") is not None]
    return given if given is not None else int(max(found)) if found else None


def recorded_names(optimizer: dict[str, Any]) -> list[str]:
    """That torch keeps where an optimizer was built with model.named_parameters()."""
    groups = optimizer["param_groups"]
    return [n for g in groups for n in g["param_names"]] if all("param_names" in g for g in groups) else []


def guessed_names(model: dict[str, Tensor], optimizer: dict[str, Any]) -> list[str]:
    """The model's parameters in their order, if there is one param group of as many parameters with the same shapes.

    Raises:
        ValueError: otherwise.
    """
    first_names: dict[tuple, str] = {}  # a tied weight has the name of its first use
    for name, tensor in model.items():
        if name.rsplit(".", 1)[-1] not in BUFFERS:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
            first_names.setdefault(place, name)
    names = list(first_names.values())
    groups = optimizer["param_groups"]
    if len(groups) == 1 and len(groups[0]["params"]) == len(names):
        return names
    num_parameters = sum(len(group["params"]) for group in groups)
    raise ValueError(
        f"the optimizer has {len(groups)} param groups with {num_parameters} parameters and the model's state_dict {len(names)}; "
        "which is which cannot be told. Give their names in the optimizer's order (names=, or --names FILE with a JSON list; "
        "largebatch.checkpoint.names_in_optimizer makes one), or build the optimizer with model.named_parameters()"
    )


def names_in_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters in its own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def read_pytorch(
    path: str, kind: str | None = None, *, names: Sequence[str] | None = None, **keys: Any
) -> ConsolidatedState:
    """A file with a model's and an optimizer's state_dict.

    Args:
        kind: class name of the optimizer; None to take the one that the file names.
        keys: ``model`` and ``optimizer``: under which keys of the file they lie; ``num_steps`` as in
            :func:`from_state_dicts`.

    Raises:
        ValueError: the file lacks one of them.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(
            f"{path!r} cannot be read with weights_only=True ({type(error).__name__}: {reason[:200]}); expected a file of torch.save "
            "with tensors, numbers, texts, lists and dicts only. Save the two state_dicts alone"
        ) from error
    model, optimizer = keys.pop("model", MODEL), keys.pop("optimizer", OPTIMIZER)
    for option, key in (("--model-key", model), ("--optimizer-key", optimizer)):
        if not isinstance(content, dict) or key not in content:
            found = f"the keys {', '.join(map(repr, content))}" if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path!r} holds {found}; expected {key!r}. Name the right key with {option}")
    if isinstance(content[optimizer], list) and len(content[optimizer]) == 1:  # Lightning's optimizer_states
        content[optimizer] = content[optimizer][0]
    if not isinstance(content[optimizer], dict) or "param_groups" not in content[optimizer]:
        raise ValueError(
            f"{path!r} has no optimizer's state_dict under {optimizer!r}, but {type(content[optimizer]).__name__}; expected a dict with "
            "state and param_groups. Name the right key with --optimizer-key"
        )
    kind = kind or content.get(KIND)
    if kind is None:
        raise ValueError(f"{path!r} does not say whose state its optimizer's is; name it with --from-optimizer")
    if names is None and isinstance(content.get(NAMES), list):  # a file that was written here
        names = content[NAMES]
    scheduler = content.get("lr_scheduler")
    steps = keys.pop("num_steps", None)
    steps = content.get("num_steps") if steps is None else steps
    return from_state_dicts(content[model], content[optimizer], kind, names=names, num_steps=steps, scheduler=scheduler)


def write_pytorch(consolidated: ConsolidatedState, path: str) -> None:
    """The same file; ``torch.load(path)`` is safe with weights_only=True.

    Raises:
        ValueError: the file exists.
    """
    if os.path.exists(path):
        raise ValueError(f"{path!r} exists; choose another name")
    content = {
        MODEL: consolidated.weights,
        OPTIMIZER: torch_state_dict(consolidated) if consolidated.groups else None,
        KIND: consolidated.optimizer,
        "num_steps": consolidated.num_steps,
        "lr_scheduler": consolidated.scheduler,
        NAMES: consolidated.layers,
    }
    torch.save(content, f"{path}.partial")
    os.replace(f"{path}.partial", path)
