"""Which layers are left out of adaptation and of weight decay, and why: by module type, or else by name.

The LARS and LAMB papers' text excludes nothing; the code of their authors and of MLPerf excludes biases and
normalisation layers, which is worth about a point of accuracy at large batches. An exclusion is always asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

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

KINDS = ("bias", "norm")


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
        """Whether it looks like the scale of a normalisation, and nothing but a part of its name says so."""
        return "norm" in self.name.lower() and self.num_dimensions == 1 and not kinds_of(self)


def identities(model: nn.Module) -> dict[Tensor, ParameterIdentity]:
    """Name and kinds of every parameter of a model; a tied weight has the name of its first use."""
    found: dict[Tensor, ParameterIdentity] = {}
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, NORM_MODULES) or NORM_CLASS_NAME.search(type(module).__name__) is not None
        # a norm of one's own has no more than a name; a projection in a module that is called norm has a matrix
        is_called_norm = NORM_NAME.search(module_name.rpartition(".")[2]) is not None and all(
            parameter.ndim <= 1 for parameter in module.parameters()
        )
        for short_name, parameter in module.named_parameters(recurse=False):
            kinds = {
                kind
                for kind, holds in (("norm", is_norm or is_called_norm), ("bias", BIAS_NAME.search(short_name)))
                if holds
            }
            name = f"{module_name}.{short_name}" if module_name else short_name
            found.setdefault(parameter, ParameterIdentity(name, frozenset(kinds), parameter.ndim))
    return found


def kinds_of(identity: ParameterIdentity) -> frozenset[str]:
    if identity.kinds is not None:
        return identity.kinds
    matches = (("bias", BIAS_NAME.search(identity.name)), ("norm", NORM_NAME.search(identity.name)))
    return frozenset(kind for kind, match in matches if match)


def is_excluded(identity: ParameterIdentity, exclusions: Sequence[str]) -> bool:
    """Whether a parameter is of an excluded kind or its name matches an excluded pattern (``re.search``)."""
    kinds = kinds_of(identity)
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
