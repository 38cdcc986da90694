"""What a layer-wise rule declares and computes. The step loop and the kernels know rules only through this.

A step of a rule is, for all layers:

1. if it declares ``norms_before``: ``vectors_before`` of every part; their norms over whole layers; ``layer_state_before``.
2. ``accumulate`` renews the state; ``directions`` from it; the norms of these and of the weights over whole layers.
3. ``trust_ratio`` of each layer from the norms; ``advance`` writes the weights; ``layer_state_after``.

Each norm over whole layers that lie on several ranks is part of one all-reduce for each of 1 and 2. Rules are pure: they return
new tensors and write none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """What lies of one layer in one place: all of it, or any cut of it. Elementwise tensors have one shape and dtype.

    Attributes:
        weight, grad: elementwise, in the compute dtype (fp64 for fp64 parameters, fp32 for all others). In ``advance`` the
            weight is the one that decoupled decay has shrunk.
        state: elementwise, in the order of ``Rule.elementwise_state``.
        step: t, 1 at the first step; float, or a 0-dim tensor where it lives on a device. 0 unless ``Rule.counts_steps``.
        weight_decay: coupled; 0 where decay is decoupled or the layer is excluded. In ``advance`` the one in force.
        norms_before: of the whole layer, 0-dim in the compute dtype, in the order of ``Rule.norms_before``.
        layer_state: 0-dim in the compute dtype, in the order of ``Rule.layer_state``, as ``layer_state_before`` has left it.
    """

    weight: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    step: float | Tensor
    weight_decay: float | Tensor
    norms_before: tuple[Tensor, ...] = ()
    layer_state: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Layers:
    """All layers of a step. Tensors are [num_layers] fp64.

    Attributes:
        weight_norm: L2 norms of whole layers, after decoupled decay; zeros before ``accumulate``, when they are not known.
        norms: L2 norms of the directions, in the order of ``Rule.norms``; empty before ``accumulate``.
        norms_before: in the order of ``Rule.norms_before``.
        layer_state: in the order of ``Rule.layer_state``; zeros at first.
        lr: learning rate; float or 0-dim tensor.
        weight_decay: coupled.
        find_step: makes :attr:`step`.
    """

    weight_norm: Tensor
    norms: tuple[Tensor, ...]
    norms_before: tuple[Tensor, ...]
    layer_state: tuple[Tensor, ...]
    lr: float | Tensor
    weight_decay: Tensor
    find_step: Callable[[], Tensor]

    @functools.cached_property
    def step(self) -> Tensor:
        """t of each layer, 1 at the first step; 0 unless ``Rule.counts_steps``."""
        return self.find_step()


class Rule:
    """Base of all rules: the mathematics of one algorithm. Subclasses are frozen dataclasses whose fields are its options.

    All declarations have defaults, and so have all methods but ``directions``, ``trust_ratio`` and ``advance``.
    """

    name: ClassVar[str]
    elementwise_state: ClassVar[tuple[str, ...]] = ()
    """Names of the state tensors that have the shape of the parameter."""
    layer_state: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that are kept of each layer, in fp64."""
    counts_steps: ClassVar[bool] = False
    """Whether the equations contain the step number t."""
    norms_before: ClassVar[tuple[str, ...]] = ()
    """What the norms are called that ``accumulate`` needs, e.g. "grad_norm"."""
    norms: ClassVar[tuple[str, ...]] = ("direction_norm",)
    """What the norms are called that the trust ratios need beside that of the weights."""
    ratios: ClassVar[tuple[str, ...]] = ("trust_ratio",)
    """What the trust ratios are called."""

    def vectors_before(self, part: Part) -> tuple[Tensor, ...]:
        """Elementwise, in the order of ``norms_before``: what to take the norms of before anything is renewed."""
        return ()

    def layer_state_before(self, layers: Layers) -> tuple[Tensor, ...]:
        """The layer state that ``accumulate`` and all that follows shall see."""
        return layers.layer_state

    def accumulate(self, part: Part) -> tuple[Tensor, ...]:
        """The new state, as far as it does not depend on the trust ratios."""
        return part.state

    def directions(self, part: Part) -> tuple[Tensor, ...]:
        """Elementwise, in the order of ``norms``, from the accumulated state: what to take the norms of."""
        raise NotImplementedError

    def trust_ratio(self, layers: Layers) -> tuple[Tensor, ...]:
        """[num_layers] fp64 each, in the order of ``ratios``. Replaced by 1 for layers that are not adapted."""
        raise NotImplementedError

    def weight_decay_in_force(self, layers: Layers) -> Tensor:
        """[num_layers] fp64: the weight decay that ``advance`` gets, once the norms are known."""
        return layers.weight_decay

    def layer_state_after(self, layers: Layers) -> tuple[Tensor, ...]:
        """The layer state that is kept for the next step."""
        return layers.layer_state

    def advance(
        self, part: Part, *, lr: float | Tensor, ratios: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(new weight, new state): ``part.state`` itself if nothing in it depends on the ratios.

        Args:
            ratios: 0-dim in the compute dtype, in the order of ``Rule.ratios``; of the whole layer.
        """
        raise NotImplementedError

    # --- what follows from the declarations -----------------------------------------------------------------------------

    @classmethod
    def accumulates(cls) -> bool:
        """Whether ``accumulate`` renews the state."""
        return cls.accumulate is not Rule.accumulate

    @classmethod
    def figures(cls) -> tuple[str, ...]:
        """Names of the rows of largebatch.telemetry.LayerStats."""
        return ("weight_norm", *cls.norms, *cls.ratios, "local_lr", "weight_decay", *cls.norms_before, *cls.layer_state)
