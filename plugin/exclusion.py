"""Which layers are left out of adaptation and of weight decay, and why: by module type, or else by name.

The LARS and LAMB papers' text excludes nothing; the code of their authors and of MLPerf excludes biases and
normalisation layers, which is worth about a point of accuracy at large batches. An exclusion is always asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

NORM_MODULES = (
    nn.modules.batchnorm._NormBase,  # BatchNorm*, SyncBatchNorm, InstanceNorm*
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
NORM_CLASS_NAME = re.compile(r"(?<!weight)(?<!spectral)(?<!pre)(?<!post)norm(?!ed|al(?!ization))", re.IGNORECASE)
"""Classes outside torch.nn, such as LlamaRMSNorm, MambaRMSNormGated or FrozenBatchNorm2d; no reparametrisations, no wrappers."""

NORM_NAME = re.compile(
    r"(^|[._])(bn|norm|ln|layer_?norm|batch_?norm|group_?norm|instance_?norm|rms_?norm)(_?\d+|_[a-z]+)?(\.|$)",
    re.IGNORECASE,
)
"""Parameter names that say normalisation where the module is not known, such as layer1.0.bn2.weight or ln_f.bias."""

BIAS_NAME = re.compile(r"(^|[._])bias(_[a-z0-9]+)*$")
"""Also matches the bias_ih_l0 of recurrent layers."""

FEW_DIMENSIONS = {"ndim<=1": lambda n: n <= 1, "ndim==1": lambda n: n == 1}
"""By the number of dimensions, as most self-supervised training codes do it; they differ in parameters without any, such as a
learned temperature."""

KINDS = ("bias", "norm", *FEW_DIMENSIONS)


@dataclass(frozen=True)
class LayerPolicy:
    """How one layer is treated.

    Attributes:
        name: of the parameter, as in ``model.named_parameters()``; "group0.param3" where unknown.
        is_adapted: whether the trust ratio is computed; it is 1 otherwise.
        is_decayed: whether weight decay applies.
    """

    name: str
    is_adapted: bool = True
    is_decayed: bool = True


@dataclass(frozen=True)
class ParameterIdentity:
    """What is known of a parameter: its name, its kinds if its module was seen (None: judge by the name), its dimensions."""

    name: str
    kinds: frozenset[str] | None = None
    num_dimensions: int | None = None

    @property
    def may_be_norm(self) -> bool:
        """Whether a part of its name is all that says that it is of a normalisation, or its name says so and it is a matrix."""
        is_vector = "norm" in self.name.lower() and self.num_dimensions == 1
        is_called_so = self.kinds is None and NORM_NAME.search(self.name) is not None
        return (is_vector or is_called_so) and not kinds_of(self)


def dimensions_of(parameter: Tensor) -> int | None:
    """Of the layer, also where ZeRO 3 has cut the parameter already (``zero.Init``); None of a lazy one that has no shape yet."""
    if hasattr(parameter, "ds_shape"):
        return len(parameter.ds_shape)
    return None if is_lazy(parameter) else parameter.ndim


def identities(model: nn.Module) -> dict[Tensor, ParameterIdentity]:
    """Name and kinds of every parameter of a model; a tied weight has the name of its first use."""
    found: dict[Tensor, ParameterIdentity] = {}
    modules = dict(model.named_modules())
    for module_name, module in modules.items():
        owner_name, is_original = module_name, isinstance(module, ParametrizationList)
        if is_original:  # MODULE.parametrizations.weight holds what is MODULE's weight
            owner_name, _, parametrized = f".{module_name}".rpartition(".parametrizations.")
            owner_name = owner_name.removeprefix(".")
        owner = modules.get(owner_name, module)
        is_of_torch = isinstance(owner, NORM_MODULES)
        # a norm of one's own has no more than a name; what has a matrix besides is a layer with a norm in it
        is_class_norm = NORM_CLASS_NAME.search(type(owner).__name__) is not None
        is_called_norm = is_class_norm or NORM_NAME.search(owner_name.rpartition(".")[2]) is not None
        has_vectors_only = all((dimensions_of(p) or 0) <= 1 for p in owner.parameters(recurse=not is_class_norm))
        for short_name, parameter in module.named_parameters(recurse=False):
            own_name = parametrized if is_original else short_name
            is_norm = is_of_torch or (
                is_called_norm
                and (dimensions_of(parameter) or 0) <= 1
                and (has_vectors_only or NORM_NAME.search(own_name) is not None)
            )
            kinds = {kind for kind, holds in (("norm", is_norm), ("bias", BIAS_NAME.search(own_name))) if holds}
            name = f"{module_name}.{short_name}" if module_name else short_name
            found.setdefault(parameter, ParameterIdentity(name, frozenset(kinds), dimensions_of(parameter)))
    return found


def kinds_of(identity: ParameterIdentity) -> frozenset[str]:
    if identity.kinds is not None:
        return identity.kinds
    found = {"bias"} if BIAS_NAME.search(identity.name) else set()
    if NORM_NAME.search(identity.name) and (identity.num_dimensions is None or identity.num_dimensions <= 1):
        found.add("norm")  # a matrix whose name says norm is most often a projection behind one
    return frozenset(found)


def is_excluded(identity: ParameterIdentity, exclusions: Sequence[str]) -> bool:
    """Whether a parameter is of an excluded kind or its name matches an excluded pattern (``re.search``).

    Raises:
        ValueError: the number of dimensions is asked for and not known.
    """
    kinds = set(kinds_of(identity))
    if any(e in FEW_DIMENSIONS for e in exclusions):
        if identity.num_dimensions is None:
            raise ValueError(
                f"{identity.name} has no shape yet, so {list(exclusions)} cannot be matched; build the optimizer after the first "
                "forward, or name the layers by regular expressions"
            )
        kinds |= {kind for kind, holds in FEW_DIMENSIONS.items() if holds(identity.num_dimensions)}
    return any(e in kinds if e in KINDS else re.search(e, identity.name) is not None for e in exclusions)


def policy_of(
    identity: ParameterIdentity | None,
    placeholder: str,
    *,
    exclude_from_adaptation: Sequence[str],
    exclude_from_weight_decay: Sequence[str],
) -> LayerPolicy:
    """The treatment of one parameter.

    Raises:
        ValueError: an exclusion was asked for and nothing is known of the parameter.
    """
    if identity is None:
        if exclude_from_adaptation or exclude_from_weight_decay:
            raise ValueError(
                f"{placeholder} has no name, so exclude_from_adaptation={list(exclude_from_adaptation)} and "
                f"exclude_from_weight_decay={list(exclude_from_weight_decay)} cannot be matched; pass model=, or "
                "model.named_parameters() in place of model.parameters()"
            )
        return LayerPolicy(placeholder)
    return LayerPolicy(
        identity.name,
        is_adapted=not is_excluded(identity, exclude_from_adaptation),
        is_decayed=not is_excluded(identity, exclude_from_weight_decay),
    )
