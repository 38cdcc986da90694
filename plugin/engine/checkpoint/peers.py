"""Optimizer state of other implementations <-> ours: names, where the step is kept, what the buffers mean.

| kind                | step is in     | first moment, momentum                                   | source                         |
|---------------------|----------------|----------------------------------------------------------|--------------------------------|
| LAMB NLAMB NNLAMB   | state, tensor  | exp_avg = b1 exp_avg + (1 - b1) g                        | largebatch.rules.lamb          |
| apex.FusedLAMB      | group, int     | the same; without grad_averaging g in place of (1 - b1) g | apex/optimizers/fused_lamb.py  |
| deepspeed.FusedLamb | state, int     | the same                                                 | deepspeed/ops/lamb             |
| timm.Lamb           | group, tensor  | as apex                                                  | timm/optim/lamb.py             |
| torch.AdamW         | state, tensor  | the same                                                 | torch/optim/adamw.py           |
| torch.Adam          | state, tensor  | the same; with weight_decay, wd w is in it: refused      | torch/optim/adam.py            |
| LARS                | none           | momentum_buffer, with the learning rate inside or, under lr_in_momentum=False, outside | largebatch.rules.lars |
| timm.Lars           | none           | momentum_buffer, ratio inside, learning rate outside     | timm/optim/lars.py             |
| apex.LARC           | none           | that of the torch.optim.SGD inside, ratio inside, learning rate outside | apex/parallel/LARC.py |
| torch.SGD           | none           | momentum_buffer, no ratio, learning rate outside         | torch/optim/sgd.py             |

The second moment, exp_avg_sq, means the same in all. A momentum with the learning rate inside becomes one without by a division by
the group's present learning rate, and back by a multiplication: what the next step moves the weights by goes on as it was. That
is exact while the learning rate stays, and the best there is where it has changed since the gradients came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from largebatch.config import nearest_hint
from largebatch.engine.checkpoint.consolidated import ConsolidatedState
from largebatch.engine.checkpoint.groups import is_same
from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lars import LARS
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.presets import LAMB_PRESETS, LARS_PRESETS

OURS: dict[str, type[LayerwiseOptimizer]] = {cls.__name__: cls for cls in (LARS, LAMB, NLAMB, NNLAMB)}


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Attributes:
        ours: which of ours has the same state: "LAMB" or "LARS".
        step: "state", "group" or "" for none. is_step_tensor: or else an int.
        defaults: options of its param groups.
        preset: what ours need to compute the same.
        renamed: its option -> ours of the same meaning.
        refused: option -> (whether its value changes what the buffers mean, why).
    """

    ours: str
    step: str
    is_step_tensor: bool
    defaults: Mapping[str, Any]
    preset: Mapping[str, Any]
    renamed: Mapping[str, str]
    refused: Mapping[str, tuple[Callable[[Any], bool], str]]


LAMB_NAMES = {name: name for name in ("lr", "betas", "eps", "weight_decay")}
LARS_NAMES = {name: name for name in ("lr", "momentum", "weight_decay", "nesterov")}
DAMPING = {"dampening": (bool, "its first gradient enters the momentum undamped")}
AMSGRAD = {
    "amsgrad": (bool, "largest second moments mean nothing to LAMB"),
    "maximize": (bool, "gradients have the other sign"),
}

PEERS: dict[str, Peer] = {
    "apex.FusedLAMB": Peer(
        "LAMB", "group", False,
        {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01,
         "grad_averaging": True, "max_grad_norm": 1.0},
        LAMB_PRESETS["apex"], LAMB_NAMES | {"bias_correction": "bias_correction"}, {},
    ),
    "deepspeed.FusedLamb": Peer(
        "LAMB", "state", False,
        {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0,
         "max_grad_norm": 0.0, "max_coeff": 10.0, "min_coeff": 0.01},
        LAMB_PRESETS["deepspeed"], LAMB_NAMES, {},
    ),
    "timm.Lamb": Peer(
        "LAMB", "group", True,
        {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01,
         "grad_averaging": True, "max_grad_norm": 1.0, "trust_clip": False, "always_adapt": False, "caution": False,
         "decoupled_decay": False, "corrected_weight_decay": False, "max_lr_snapshot": None, "foreach": None},
        LAMB_PRESETS["timm"],
        LAMB_NAMES | {"bias_correction": "bias_correction", "always_adapt": "adapt_undecayed",
                      "decoupled_decay": "decoupled_weight_decay"}, {},
    ),
    "torch.AdamW": Peer(
        "LAMB", "state", True,
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False, "maximize": False,
         "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True},
        {}, LAMB_NAMES, AMSGRAD,
    ),
    "torch.Adam": Peer(
        "LAMB", "state", True,
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False,
         "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": False},
        {}, LAMB_NAMES, AMSGRAD | {"weight_decay": (bool, "the moments hold wd w beside the gradient")},
    ),
    "timm.Lars": Peer(
        "LARS", "", False,
        {"lr": 1.0, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "trust_coeff": 0.001, "eps": 1e-8,
         "trust_clip": False, "always_adapt": False, "foreach": None},
        LARS_PRESETS["timm"],
        LARS_NAMES | {"trust_coeff": "trust_coefficient", "eps": "eps", "trust_clip": "larc_clip",
                      "always_adapt": "adapt_undecayed"}, DAMPING,
    ),
    "apex.LARC": Peer(
        "LARS", "", False,
        {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False,
         "foreach": None, "differentiable": False, "fused": None},
        LARS_PRESETS["apex"], LARS_NAMES, DAMPING,
    ),
    "torch.SGD": Peer(
        "LARS", "", False,
        {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False,
         "foreach": None, "differentiable": False, "fused": None},
        {"lr_in_momentum": False}, LARS_NAMES, DAMPING | {"maximize": (bool, "gradients have the other sign")},
    ),
}  # fmt: skip
"""Kind -> what its state is. Options and defaults are those of the sources above."""

KINDS = (*OURS, *PEERS)


def convert(consolidated: ConsolidatedState, kind: str, **options: Any) -> ConsolidatedState:
    """The same state as another optimizer keeps it.

    Args:
        kind: one of KINDS.
        options: of every param group of the result, e.g. ``lr_in_momentum=False``; they go before what the source says.

    Raises:
        ValueError: the kind is not known, or the buffers mean something that the other has no place for.
    """
    for name, what in ((consolidated.optimizer, "the state is of"), (kind, "the target is")):
        if name not in KINDS:
            hint = nearest_hint(name, KINDS)
            raise ValueError(f"{what} {name!r}; expected one of {', '.join(KINDS)}{hint}")
    if family_of(consolidated.optimizer) != family_of(kind):
        raise ValueError(
            f"{consolidated.optimizer} keeps {described(consolidated.optimizer)} and {kind} {described(kind)}; neither can be made of the other. "
            "Take over the weights alone"
        )
    if consolidated.optimizer == kind and not options:
        return consolidated
    return from_ours(to_ours(consolidated, {} if kind in PEERS else options, kind), kind, options)


def changed_options(before: ConsolidatedState, after: ConsolidatedState) -> list[str]:
    """Options of the formula that the two do not share, in words: the state is the same, the next update will not be."""
    found = []
    for one, other in zip(before.groups, after.groups, strict=True):
        ours = [kind if kind in OURS else PEERS[kind].ours for kind in (before.optimizer, after.optimizer)]
        options = [
            options_from(PEERS.get(w.optimizer), group, default_options(kind))
            for w, group, kind in zip((before, after), (one, other), ours, strict=True)
        ]
        if ours[0] != ours[1]:
            found.append(f"{ours[0]} becomes {ours[1]}")
        found += [
            f"{name} {value!r} becomes {options[1][name]!r}"
            for name, value in options[0].items()
            if name in options[1] and not is_same(value, options[1][name])
        ]
    for consolidated in (before, after):
        if consolidated.optimizer in ("torch.AdamW", "torch.Adam", "torch.SGD") and before.optimizer != after.optimizer:
            found.append(f"{consolidated.optimizer} has no trust ratio")
        clip = PEERS[consolidated.optimizer].preset.get("max_grad_norm") if consolidated.optimizer in PEERS else None
        if clip is not None:
            found.append(
                f"{consolidated.optimizer} clips all gradients at {clip} unless told otherwise; here that is max_grad_norm"
            )
    return list(dict.fromkeys(found))


def family_of(kind: str) -> str:
    ours = PEERS[kind].ours if kind in PEERS else kind
    return "LARS" if ours == "LARS" else "LAMB"


def described(kind: str) -> str:
    return "a momentum" if family_of(kind) == "LARS" else "two moments"


def default_options(kind: str) -> dict[str, Any]:
    """Of a param group of ours; lr is to be overwritten."""
    group = OURS[kind]([torch.zeros(1)], lr=0.0).param_groups[0]
    return {key: value for key, value in group.items() if key != "params"}


def to_ours(consolidated: ConsolidatedState, options: dict[str, Any], target: str) -> ConsolidatedState:
    """A peer's or our state as ours: of the target if that is one of ours, else of what corresponds to the source."""
    peer = PEERS.get(consolidated.optimizer)
    kind = target if target in OURS else peer.ours if peer else consolidated.optimizer
    defaults = default_options(kind)
    unknown = [name for name in options if name not in defaults]
    if unknown:
        raise ValueError(
            f"{kind} has no option {unknown[0]!r} of a param group{nearest_hint(unknown[0], list(defaults))}"
        )
    groups, state = [], {}
    for group in consolidated.groups:
        refuse(consolidated.optimizer, peer, group)
        own = options_from(peer, group, defaults)
        wanted = own | options
        for name in group["params"]:
            if name in consolidated.state:
                values = dict(consolidated.state[name])
                if peer and peer.step == "group":
                    values["step"] = group["step"]
                if "step" in values:
                    values["step"] = torch.tensor(float(values["step"]))
                state[name] = remeant(values, own, wanted, averaging_of(group))
        groups.append(checked(kind, wanted) | {"params": group["params"]})
    return replaced(consolidated, kind, groups, state)


def from_ours(consolidated: ConsolidatedState, kind: str, options: dict[str, Any]) -> ConsolidatedState:
    """Our state as that of another kind, which may be ours again."""
    if kind in OURS:
        return consolidated
    peer = PEERS[kind]
    unknown = [name for name in options if name not in peer.defaults]
    if unknown:
        raise ValueError(f"{kind} has no option {unknown[0]!r}{nearest_hint(unknown[0], list(peer.defaults))}")
    groups, state = [], {}
    for group in consolidated.groups:
        refuse_formulation(group)
        theirs = dict(peer.defaults) | {name: group[own] for name, own in peer.renamed.items() if own in group}
        if "bias_correction" in theirs:
            theirs["bias_correction"] = bool(group["bias_correction"])
        if "max_coeff" in theirs and group.get("trust_ratio_bounds"):
            theirs["min_coeff"], theirs["max_coeff"] = group["trust_ratio_bounds"]
        theirs |= options
        refuse(kind, peer, theirs)
        if "max_lr_snapshot" in theirs:
            theirs["max_lr_snapshot"] = float(theirs["lr"])
        steps = [
            float(consolidated.state[n]["step"]) for n in group["params"] if "step" in consolidated.state.get(n, {})
        ]
        if peer.step == "group" and steps:
            if len(set(steps)) > 1:
                raise ValueError(
                    f"{kind} counts one step for each param group, and the layers have {sorted(set(steps))}"
                )
            theirs["step"] = as_step(peer, steps[0])
        outside = {**group, "lr_in_momentum": False}
        for name in group["params"]:
            if name in consolidated.state:
                values = remeant(consolidated.state[name], group, outside, 1.0 / averaging_of(theirs))
                if "step" in values:
                    step = values.pop("step")
                    if peer.step == "state":
                        values["step"] = as_step(peer, step)
                state[name] = values
        groups.append(theirs | {"params": group["params"]})
    return replaced(consolidated, kind, groups, state)


def replaced(
    consolidated: ConsolidatedState, kind: str, groups: list[dict[str, Any]], state: dict[str, dict[str, Any]]
) -> ConsolidatedState:
    return ConsolidatedState(
        consolidated.weights,
        kind,
        groups,
        state,
        consolidated.num_steps,
        consolidated.scheduler,
        dict(consolidated.counts),
        dict(consolidated.client_state),
    )


def as_step(peer: Peer, step: Any) -> Any:
    return torch.tensor(float(step)) if peer.is_step_tensor else int(step)


def averaging_of(group: Mapping[str, Any]) -> float:
    """What a first moment is to be multiplied by to be an average: (1 - beta1) where gradients enter it whole."""
    return 1.0 - group["betas"][0] if group.get("grad_averaging") is False else 1.0


def remeant(
    values: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], averaging: float
) -> dict[str, Any]:
    """A layer's state under other options of its group.

    Args:
        before, after: options; of their momentum the learning rate is a factor where lr_in_momentum is true.
        averaging: factor of the first moment.

    Raises:
        ValueError: the learning rate is 0 and would have to be divided by; or LARS's two formulations are mixed.
    """
    found = dict(values)
    if before.get("formulation") != after.get("formulation"):
        raise ValueError(
            f"formulation is {before.get('formulation')!r} and is to become {after.get('formulation')!r}: one momentum holds scaled "
            "steps, the other plain gradients. Take over the weights alone"
        )
    if "exp_avg" in found and averaging != 1.0:
        found["exp_avg"] = found["exp_avg"] * averaging
    is_inside, will_be = before.get("lr_in_momentum"), after.get("lr_in_momentum")
    if "momentum_buffer" in found and is_inside != will_be and before.get("formulation") == "2017":
        lr = float(before["lr"])
        if is_inside and lr == 0:
            raise ValueError(
                "the learning rate is 0 and lies inside the momentum, from which it cannot be taken out again; convert a "
                "checkpoint of an earlier step, or keep lr_in_momentum=True"
            )
        found["momentum_buffer"] = found["momentum_buffer"] / lr if is_inside else found["momentum_buffer"] * lr
    return found


def options_from(peer: Peer | None, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A source's options in our words; what it does not say is our default."""
    if peer is None:
        return {name: group.get(name, default) for name, default in defaults.items()}
    own = dict(defaults) | {name: value for name, value in peer.preset.items() if name in defaults}
    own |= {ours: group[theirs] for theirs, ours in peer.renamed.items() if theirs in group and ours in defaults}
    own["lr"] = group["lr"]
    if "betas" in own:
        own["betas"] = tuple(own["betas"])
    if "max_coeff" in group:
        own["trust_ratio_bounds"] = (group["min_coeff"], group["max_coeff"])
        own["bias_correction"] = "lr" if group["bias_correction"] else False
    elif "bias_correction" in own and "bias_correction" in group:
        own["bias_correction"] = bool(group["bias_correction"])
    if peer.ours == "LAMB" and group.get("trust_clip"):
        own["trust_ratio_bounds"] = (0.0, 1.0)
    return own


def checked(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, once the optimizer's own checks have seen them."""
    cls = OURS[kind].options_class
    cls(**{field.name: options[field.name] for field in fields(cls)})
    return dict(options)


def refuse(kind: str, peer: Peer | None, group: Mapping[str, Any]) -> None:
    """Raises ValueError for an option under which the buffers mean something else."""
    for name, (is_refused, reason) in (peer.refused if peer else {}).items():
        if is_refused(group.get(name)):
            raise ValueError(f"{kind} has {name}={group[name]!r}: {reason}. Take over the weights alone")


def refuse_formulation(group: Mapping[str, Any]) -> None:
    if group.get("formulation") == "2019":
        raise ValueError('formulation is "2019", whose momentum holds plain gradients; no other package has that LARS')
