"""The optimizers' options: checked when built, with errors in the user's terms. No deepspeed, no torch.distributed.

A JSON ``optimizer.params`` and the keyword arguments of a constructor are the same thing and pass the same checks.
"""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from torch import Tensor

KERNELS = ("auto", "reference", "cpp", "triton", "apex", "compiled")
"""Choices of the option ``kernels``."""


class UnknownOptionError(TypeError, ValueError):
    """A name that is not an option; both a TypeError (as Python's own) and a ValueError."""


def nearest_hint(name: str, known: Sequence[str], *, nearness: float = 0.6) -> str:
    """`` (did you mean 'x'?)``, or nothing if no known name is near.

    Args:
        nearness: difflib's ratio, 1 for equal names.
    """
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=nearness)
    return f" (did you mean {near[0]!r}?)" if near else ""


def reject(name: str, value: Any, expected: str, error: type[Exception] = ValueError):
    raise error(f"{name} is {value!r}; expected {expected}")


PLAIN = (float, int, bool, str, type(None))


def as_python(value: Any) -> Any:
    """A number, or nested numbers, of any library as Python's own: numpy's scalars and arrays, tensors, Fraction, sequences.

    Sequences become tuples. What is neither is returned as it is, for a check to refuse. Waits for the device if it is a tensor
    there.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return tuple(map(as_python, value))
    if callable(getattr(value, "tolist", None)):  # numpy's and torch's
        return as_python(value.tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, (numbers.Real, decimal.Decimal)):
        return float(value)
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a number is one that fp64 holds: not NaN, not infinite, no integer beyond 1.8e308."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


Check = Callable[[str, Any], None]


def integer(minimum: int, *, or_auto: bool = False) -> Check:
    """Of at most 64 bits; 2.0 is none."""
    expected = f"an integer >= {minimum}" + (', or "auto"' if or_auto else "")

    def check(name: str, value: Any) -> None:
        if or_auto and value == "auto":
            return
        if value == "auto":
            reject(name, value, f"{expected}; 'auto' is filled in by launch/train.py, elsewhere write the number")
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**63:
            reject(name, value, expected)

    return check


def number(expected: str, allowed: Callable[[float], bool], *, or_tensor: bool = False, or_none: bool = False) -> Check:
    def check(name: str, value: Any) -> None:
        if or_none and value is None:
            return
        if isinstance(value, Tensor):
            if or_tensor and value.numel() == 1:
                return
            reject(name, value, f"{expected}{', or a tensor of one element' if or_tensor else ''}")
        if value == "auto":
            reject(name, value, f"{expected}; 'auto' is filled in by launch/train.py, elsewhere write the number")
        if not is_number(value):
            reject(name, value, expected, TypeError)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            reject(name, value, f"{expected}; torch takes no integer beyond 64 bits, write it as 1e30")
        if not (is_finite(value) and allowed(value)):
            reject(name, value, expected)

    return check


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        reject(name, value, "true or false", TypeError)


def one_of(*choices: Any) -> Check:
    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            hint = nearest_hint(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
            reject(name, value, f"one of {', '.join(map(repr, choices))}{hint}")

    return check


def bounds(name: str, value: Any) -> None:
    expected = "null or [lower, upper] with 0 <= lower <= upper"
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(is_number, value)):
        reject(name, value, expected, TypeError)
    if not 0 <= value[0] <= value[1]:
        reject(name, value, expected)


def betas(name: str, value: Any) -> None:
    expected = "[beta1, beta2], both >= 0 and < 1"
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(is_number, value)):
        reject(name, value, expected, TypeError)
    if not all(0 <= beta < 1 for beta in value):
        reject(name, value, expected)


def patterns(name: str, value: Any) -> None:
    expected = 'a list of "bias", "norm", "ndim<=1", "ndim==1" and regular expressions for parameter names'
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        reject(name, value, expected, TypeError)
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            reject(name, pattern, f"{expected}; this one does not compile: {error}")


NON_NEGATIVE = number("a number >= 0", lambda x: x >= 0)
POSITIVE = number("a number > 0", lambda x: x > 0)
LEARNING_RATE = number("a number >= 0", lambda x: x >= 0, or_tensor=True)
NUMBER = number("a number", lambda x: True)
CLIP = number("null or a number > 0", lambda x: x > 0, or_none=True)


def take_over(options: Any) -> None:
    """Makes Python's own values of the fields of a frozen dataclass, and checks each of them."""
    for field in fields(options):
        value = getattr(options, field.name)
        if not (field.name == "lr" and isinstance(value, Tensor)):  # a learning rate may stay on its device
            value = as_python(value)
            object.__setattr__(options, field.name, value)
        check_of(field)(field.name, value)


def option(default: Any = MISSING, expected: str = "", allowed: Callable[[Any], bool] | None = None) -> Any:
    """An option of a rule of one's own, as a field of its class, with a check of its values.

    Args:
        default: none, and the option has to be given.
        expected: what is allowed, in words: "a number > 0". allowed: whether a value is; of a number if the default is one.
    """
    metadata = {"expected": expected, "allowed": allowed} if allowed is not None else {}
    return dataclasses.field(default=default, metadata=metadata)


def check_of(field: Field) -> Check:
    """The check of an option: its own, or that of all options with its name, or that of its type.

    Raises:
        TypeError: it has none of them.
    """
    if "allowed" in field.metadata:
        expected, allowed = field.metadata["expected"], field.metadata["allowed"]
        if is_number(field.default):
            return number(expected, allowed)
        return lambda name, value: None if allowed(value) else reject(name, value, expected)
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    check = CHECKS.get(field.name) or {"float": NUMBER, "int": integer(-(2**63)), "bool": boolean}.get(kind)
    if check is None:
        raise TypeError(
            f"option {field.name} has type {kind} and no check; expected float, int or bool, the name of an option of ours "
            f"({', '.join(CHECKS)}), or largebatch.option(default, expected, allowed)"
        )
    return check


@dataclass(frozen=True)
class CommonOptions:
    """Options of every layer-wise optimizer. Checked on construction; field names are the JSON's."""

    lr: float | Tensor
    weight_decay: float
    decoupled_weight_decay: bool
    adapt_undecayed: bool

    def __post_init__(self):
        take_over(self)


@dataclass(frozen=True)
class SharedOptions(CommonOptions):
    """Those, and what LARS and LAMB have in common besides."""

    weight_norm_bounds: tuple[float, float] | None
    trust_ratio_bounds: tuple[float, float] | None


@dataclass(frozen=True)
class LARSOptions(SharedOptions):
    """Per-group options of :class:`largebatch.LARS`."""

    momentum: float
    trust_coefficient: float
    eps: float
    formulation: str
    nesterov: bool
    lr_in_momentum: bool
    larc_clip: bool
    decay_in_ratio: bool
    decay_before_norm: bool
    damp_ratio_by_momentum: bool
    skip_zero_norm_layers: bool

    def __post_init__(self):
        super().__post_init__()
        if self.formulation == "2019":
            for name, default in LARS_2017_ONLY.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r} with formulation '2019', which has no such term; "
                        f"leave it at {default!r} or use formulation '2017'"
                    )
        if self.decay_before_norm and not self.decay_in_ratio:
            raise ValueError(
                "decay_before_norm is true with decay_in_ratio false: the first takes weight decay into the norm of the gradient, the "
                "second leaves it out of the ratio; drop one of them"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is true with momentum 0, where it has no effect; set momentum > 0 or drop it")


LARS_2017_ONLY = {
    "nesterov": False,
    "lr_in_momentum": True,
    "larc_clip": False,
    "decay_in_ratio": True,
    "decay_before_norm": False,
    "damp_ratio_by_momentum": False,
    "skip_zero_norm_layers": False,
}


@dataclass(frozen=True)
class LAMBOptions(SharedOptions):
    """Per-group options of :class:`largebatch.LAMB`."""

    betas: tuple[float, float]
    eps: float
    bias_correction: bool | str

    def __post_init__(self):
        super().__post_init__()
        POSITIVE("eps", self.eps)


@dataclass(frozen=True)
class NesterovLAMBOptions(SharedOptions):
    """Per-group options of :class:`largebatch.NLAMB` and :class:`largebatch.NNLAMB`."""

    betas: tuple[float, float]
    eps: float

    def __post_init__(self):
        super().__post_init__()
        POSITIVE("eps", self.eps)


@dataclass(frozen=True)
class GlobalOptions:
    """Options that hold for all param groups together."""

    max_grad_norm: float | None
    exclude_from_adaptation: tuple[str, ...]
    exclude_from_weight_decay: tuple[str, ...]
    kernels: str
    state_dtype: str
    overwrite_grads: bool

    def __post_init__(self):
        take_over(self)


CHECKS: dict[str, Check] = {
    "lr": LEARNING_RATE,
    "weight_decay": NON_NEGATIVE,
    "decoupled_weight_decay": boolean,
    "weight_norm_bounds": bounds,
    "trust_ratio_bounds": bounds,
    "adapt_undecayed": boolean,
    "momentum": number("a number >= 0 and < 1", lambda x: 0 <= x < 1),
    "trust_coefficient": POSITIVE,
    "eps": NON_NEGATIVE,
    "formulation": one_of("2017", "2019"),
    "nesterov": boolean,
    "lr_in_momentum": boolean,
    "larc_clip": boolean,
    "decay_in_ratio": boolean,
    "decay_before_norm": boolean,
    "damp_ratio_by_momentum": boolean,
    "skip_zero_norm_layers": boolean,
    "betas": betas,
    "bias_correction": one_of(True, False, "lr"),
    "max_grad_norm": CLIP,
    "exclude_from_adaptation": patterns,
    "exclude_from_weight_decay": patterns,
    "kernels": one_of(*KERNELS),
    "state_dtype": one_of("fp32", "bf16"),
    "overwrite_grads": boolean,
}


LONGEST_LIST = 30
"""Names that a message lists beside the nearest."""


NO_EFFECT = "delete it: it is of another optimizer and has no counterpart here"
EXCLUSION = "ours is exclude_from_adaptation, a list of regular expressions for the optimizer as a whole"
OTHERS_OPTIONS: dict[str, str] = {
    # DeepSpeed's Lamb and OneBitLamb, and its AdamW section
    "max_coeff": "ours is trust_ratio_bounds: [min_coeff, {value}]",
    "min_coeff": "ours is trust_ratio_bounds: [{value}, max_coeff]",
    "torch_adam": NO_EFFECT, "adam_w_mode": NO_EFFECT, "freeze_step": NO_EFFECT, "cuda_aware": NO_EFFECT,
    "comm_backend_name": NO_EFFECT, "coeff_beta": NO_EFFECT, "factor_max": NO_EFFECT, "factor_min": NO_EFFECT,
    "factor_threshold": NO_EFFECT, "eps_inside_sqrt": NO_EFFECT,
    # torch
    "amsgrad": NO_EFFECT, "foreach": NO_EFFECT, "fused": NO_EFFECT, "capturable": NO_EFFECT, "differentiable": NO_EFFECT,
    "maximize": NO_EFFECT, "dampening": NO_EFFECT,
    # apex
    "use_nvlamb": "ours is adapt_undecayed: {value}", "grad_averaging": NO_EFFECT, "set_grad_none": NO_EFFECT,
    "clip": "ours is larc_clip: {value}",
    # timm and other packages of PyTorch
    "trust_coeff": "ours is trust_coefficient: {value}", "trust_coef": "ours is trust_coefficient: {value}",
    "trust_clip": "ours is trust_ratio_bounds: [0, 1] for LAMB, larc_clip for LARS",
    "always_adapt": "ours is adapt_undecayed: {value}", "decoupled_decay": "ours is decoupled_weight_decay: {value}",
    "clamp_value": "ours is weight_norm_bounds: [0, {value}]", "debias": "ours is bias_correction: {value}",
    "caution": NO_EFFECT, "corrected_weight_decay": NO_EFFECT,
    # TensorFlow and MLPerf
    "learning_rate": "ours is lr: {value}", "base_lr": "ours is lr: {value}", "epsilon": "ours is eps: {value}",
    "weight_decay_rate": "ours is weight_decay: {value}", "beta_1": "ours is betas: [{value}, beta_2]",
    "beta_2": "ours is betas: [beta_1, {value}]", "eeta": "ours is trust_coefficient: {value}",
    "wd": "ours is weight_decay: {value}", "beta1": "ours is betas: [{value}, beta2]",
    "beta2": "ours is betas: [beta1, {value}]",
    # marks of single param groups or parameters
    "lars_exclude": EXCLUSION, "layer_adaptation": EXCLUSION, "use_lars": EXCLUSION, "ignore_adaptation": EXCLUSION,
    "exclude_from_layer_adaptation": EXCLUSION,
    "skip_list": EXCLUSION,
}  # fmt: skip
"""Options of other LAMBs and LARSs, and of sections that were AdamW's -> what to write here."""


def advice_on(name: str, value: Any, known: Sequence[str]) -> str:
    """What to write in place of an option of other packages, or of another optimizer here; "" for any other name."""
    if name in OTHERS_OPTIONS:
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        advice = OTHERS_OPTIONS[name].format(value=shown)
        ours = re.match(r"ours is (\w+)", advice)
        return advice if ours is None or ours[1] in known else NO_EFFECT
    of_rules = {field.name for cls in (LARSOptions, LAMBOptions, NesterovLAMBOptions) for field in fields(cls)}
    return NO_EFFECT if name in of_rules and name not in known else ""


def check_option_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises UnknownOptionError for a name that is not in ``known``, with the nearest, and all known ones if they are not many."""
    for name, value in given.items():
        advice = advice_on(name, value, known) if name not in known and "trust_ratio_bounds" in known else ""
        if advice and name in OTHERS_OPTIONS:
            raise UnknownOptionError(f"{where}.{name} is not known; {advice}")
        if name not in known:
            hint = nearest_hint(name, known)
            are_listed = len(known) <= LONGEST_LIST or not hint
            listed = f"; known: {', '.join(sorted(known))}" if are_listed else f"; {len(known)} others are known"
            raise UnknownOptionError(f"{where}.{name} is not known{hint}{listed}")


def check_preset(name: Any, known: Sequence[str], optimizer: str) -> None:
    if name not in known:
        hint = nearest_hint(name, known) if isinstance(name, str) else ""
        reject("preset", name, f"null or one of {', '.join(map(repr, known))} for {optimizer}{hint}")
