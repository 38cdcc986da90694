"""Which optimizers there are, and how a rule of one's own becomes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any

from largebatch.config import CommonOptions, check_of, check_option_names, reject
from largebatch.optim.lamb import LAMB, NLAMB, NNLAMB
from largebatch.optim.lars import LARS
from largebatch.optim.layerwise import LayerwiseOptimizer, fills_from_preset
from largebatch.optim.rule_check import check_rule
from largebatch.optim.state import LAYER_STATE
from largebatch.rules.rule import Rule

OPTIMIZERS: dict[str, type[LayerwiseOptimizer]] = {cls.__name__.lower(): cls for cls in (LARS, LAMB, NLAMB, NNLAMB)}
"""JSON ``optimizer.type``, lower-cased -> class."""

followers: list[Callable[[type[LayerwiseOptimizer]], None]] = []
"""Called with each class that is registered later on."""

COMMON = {"weight_decay": 0.0, "decoupled_weight_decay": False, "adapt_undecayed": True}
FOR_ALL_GROUPS = {
    "max_grad_norm": None,
    "exclude_from_adaptation": (),
    "exclude_from_weight_decay": (),
    "preset": None,
    "kernels": "auto",
    "state_dtype": "fp32",
    "overwrite_grads": False,
    "model": None,
}
"""Arguments that every optimizer has beside those of its rule -> default."""

OF_DEEPSPEED = ("adam", "adamw", "sgd", "adagrad", "lion", "muon", "onebitadam", "onebitlamb", "zerooneadam")

EXPLANATION = """

    Arguments beside those of the rule, as for :class:`largebatch.LAMB`: params, lr, weight_decay, decoupled_weight_decay,
    adapt_undecayed, max_grad_norm, exclude_from_adaptation, exclude_from_weight_decay, preset, kernels, state_dtype,
    overwrite_grads, model.
"""


def register_rule(
    name: str, *, lr: float | None = None, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[type[Rule]], type[LayerwiseOptimizer]]:
    """Decorates a :class:`largebatch.Rule`, whose fields are its options, and makes an optimizer class of it.

    The class takes the place of the rule: it is an optimizer for plain PyTorch, FSDP2 and DeepSpeed, where ``"type": name`` selects
    it in a ds_config. The rule is its ``rule_class``.

    Args:
        name: JSON ``optimizer.type``, in any spelling.
        lr: default learning rate; None: it has to be given.
        presets: name -> options that it fills in.

    Raises:
        ValueError, TypeError: the name is taken, or the rule declares something that cannot be; when an optimizer is built also for
            a rule that does not treat every element and every layer by itself.
    """

    def make(rule_class: type[Rule]) -> type[LayerwiseOptimizer]:
        if not is_dataclass(rule_class) or "__dataclass_fields__" not in vars(rule_class):
            rule_class = dataclass(frozen=True)(rule_class)
        rule_class.name = name.lower()
        check_presets(rule_class, presets)
        cls = optimizer_of(rule_class, lr, dict(presets or {}))
        taken = OPTIMIZERS.get(name.lower())
        if name.lower() in OF_DEEPSPEED or (taken is not None and not is_made_anew(taken, cls)):
            raise ValueError(f"the name {name!r} is taken by {taken or 'DeepSpeed'}; give the rule another")
        OPTIMIZERS[name.lower()] = cls
        for follow in followers:
            follow(cls)
        return cls

    if not isinstance(name, str) or not name.isidentifier():
        reject("the name of a rule", name, "letters, digits and _")
    return make


def is_made_anew(old: type, new: type) -> bool:
    """Whether a module was imported twice, or a cell of a notebook run again."""
    return hasattr(old, "rule_class") and old.__qualname__ == new.__qualname__ and source_of(old) == source_of(new)


def source_of(cls: type) -> str:
    """The file that an optimizer's rule was written in, under whatever name that is imported; its module where there is none."""
    try:
        return inspect.getfile(cls.rule_class)
    except (OSError, TypeError):
        return cls.rule_class.__module__


def check_presets(rule_class: type[Rule], presets: Any) -> None:
    """
    Raises:
        TypeError: it is no mapping of mappings, or names an option that the rule does not have.
    """
    title = rule_class.__name__
    if not isinstance(presets or {}, Mapping):
        reject(f"{title}'s presets", presets, "a mapping of names to mappings of options", TypeError)
    known = [*(f.name for f in fields(rule_class)), *COMMON, *FOR_ALL_GROUPS]
    for name, options in (presets or {}).items():
        if not isinstance(options, Mapping):
            reject(f"{title}'s preset {name!r}", options, "a mapping of options", TypeError)
        check_option_names(options, known, f"{title}'s preset {name!r}")


def optimizer_of(rule_class: type[Rule], lr: float | None, presets: dict[str, Mapping[str, Any]]) -> type:
    """The optimizer class of a rule."""
    check_declarations(rule_class)
    own = fields(rule_class)
    arguments = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("self", "params")]
    arguments.append(parameter("lr", inspect.Parameter.empty if lr is None else lr, keyword_only=False))
    arguments += [parameter(f.name, inspect.Parameter.empty if f.default is MISSING else f.default) for f in own]
    arguments += [parameter(name, default) for name, default in (COMMON | FOR_ALL_GROUPS).items()]
    signature = inspect.Signature(arguments)

    def init(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        options = {n: v for n, v in bound.arguments.items() if n not in ("self", "params", "model", "preset")}
        LayerwiseOptimizer.__init__(self, bound.arguments["params"], options, bound.arguments["model"])

    init.__signature__ = signature
    init.__name__ = init.__qualname__ = "__init__"
    copies = [(f.name, f.type, field(metadata=f.metadata)) for f in own]
    members = {
        "__doc__": (inspect.getdoc(rule_class) or rule_class.__name__) + EXPLANATION,
        "__module__": rule_class.__module__,
        "__qualname__": rule_class.__qualname__,
        "__init__": fills_from_preset(init),
        "rule_class": rule_class,
        "options_class": make_dataclass(f"{rule_class.__name__}Options", copies, bases=(CommonOptions,), frozen=True),
        "checkpoint_names": names_in_checkpoints(rule_class),
        "presets": {"paper": {}} | presets,
        "check_rule": staticmethod(check_rule),
    }
    return type(LayerwiseOptimizer)(rule_class.__name__, (LayerwiseOptimizer,), members)


def parameter(name: str, default: Any, *, keyword_only: bool = True) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=default)


def check_declarations(rule_class: type[Rule]) -> None:
    """
    Raises:
        TypeError, ValueError: naming what is declared wrongly.
    """
    title = rule_class.__name__
    if not (isinstance(rule_class, type) and issubclass(rule_class, Rule)):
        raise TypeError(f"{title} is no largebatch.Rule; expected a subclass")
    for method in ("directions", "trust_ratio", "advance"):
        if getattr(rule_class, method) is getattr(Rule, method):
            raise TypeError(f"{title} has no {method}(); every rule defines directions, trust_ratio and advance")
    for declaration in ("elementwise_state", "layer_state", "norms_before", "norms", "ratios"):
        names = getattr(rule_class, declaration)
        if not isinstance(names, tuple) or not all(isinstance(n, str) and n.isidentifier() for n in names):
            reject(f"{title}.{declaration}", names, "a tuple of names, such as ('exp_avg',)", TypeError)
    for declaration in ("norms", "ratios"):
        if not getattr(rule_class, declaration):
            raise ValueError(
                f"{title}.{declaration} is empty; expected at least one name: by the norm of a direction a NaN in a layer is noticed, and "
                "a rule without a trust ratio returns ones"
            )
    named = [*rule_class.figures(), *rule_class.elementwise_state, "step", LAYER_STATE]
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"{title} declares {name!r} twice, or it is a name of ours; expected another")
    reserved = {f.name for f in fields(CommonOptions)} | set(FOR_ALL_GROUPS) | {"params", "param_names"}
    for option in fields(rule_class):
        if option.name in reserved:
            raise ValueError(f"{title} has an option {option.name!r}, which every optimizer has; leave it out")
        check_of(option)


STANDARD_NAMES = ("exp_avg", "exp_avg_sq")
"""Of state in the checkpoints that DeepSpeed's converter to universal ones knows."""


def names_in_checkpoints(rule_class: type[Rule]) -> dict[str, str]:
    """State name -> name in the checkpoints of a sharded engine; {} where they are the same, or too many for the converter."""
    own = rule_class.elementwise_state
    if len(own) > len(STANDARD_NAMES) or set(own) <= set(STANDARD_NAMES):
        return {}
    return dict(zip(own, STANDARD_NAMES, strict=False))
