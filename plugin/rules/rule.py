"""What a layer-wise rule must say of one layer. The step loop and the kernels know rules only through this."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor


class Rule(Protocol):
    """The mathematics of one algorithm. Pure: returns new tensors, writes none.

    A step of any rule is: ``accumulate`` what needs no trust ratio, ``direction`` of every layer from the state so
    gained, its norm and that of the weights, ``trust_ratio`` from the two norms, then ``advance``. Elementwise
    arguments all have one shape and one floating dtype (the compute dtype).
    """

    name: ClassVar[str]
    elementwise_state: ClassVar[tuple[str, ...]]
    """Names of the state tensors that have the shape of the parameter."""
    counts_steps: ClassVar[bool]
    """Whether the equations contain the step number t."""
    accumulates: ClassVar[bool]
    """Whether the state is renewed by ``accumulate``, before the ratio is known; if not, by ``advance``."""

    def accumulate(
        self, weight: Tensor, grad: Tensor, state: tuple[Tensor, ...], *, weight_decay: float
    ) -> tuple[Tensor, ...]:
        """The new state, as far as it does not depend on the trust ratio; the old one if all of it does."""
        ...

    def direction(
        self, weight: Tensor, grad: Tensor, state: tuple[Tensor, ...], *, step, weight_decay: float
    ) -> Tensor:
        """The vector whose norm goes into the denominator of the trust ratio, from the accumulated state."""
        ...

    def trust_ratio(self, weight_norm: Tensor, direction_norm: Tensor, *, lr, weight_decay: Tensor) -> Tensor:
        """[num_layers] fp64 from [num_layers] fp64 norms of whole layers."""
        ...

    def weight_decay_in_force(self, weight_norm: Tensor, direction_norm: Tensor, weight_decay: Tensor) -> Tensor:
        """[num_layers] fp64: the weight decay that ``advance`` gets, once the norms are known."""
        ...

    def advance(
        self, weight: Tensor, grad: Tensor, state: tuple[Tensor, ...], *, lr, ratio: Tensor, step, weight_decay: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(new weight, new state) of one layer, or of any part of it, given the trust ratio of the whole layer."""
        ...
