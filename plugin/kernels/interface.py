"""What a kernel backend offers to the step loop.

A step is ``direction_square_sums`` (reads only), one all-reduce by the caller, then ``advance_``. Nothing is written
before the sums of all layers on all ranks are known, so a step with a NaN anywhere can be dropped as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from largebatch.rules.rule import Rule


@dataclass
class Segments:
    """The pieces of layers that one kernel call works on: parallel lists, one entry per segment.

    ``weights``, ``grads`` and each list in ``states`` hold tensors of equal shape per entry: a whole parameter (any
    shape and strides) or a 1-D view of a flat partition. Weights and gradients are fp64, fp32, bf16 or fp16; states
    have the compute dtype, which is fp64 for fp64 weights and fp32 for all others. An entry may have no element.
    """

    rule: Rule
    lr: float | Tensor
    """Learning rate of this step: Python float, or 0-dim tensor where it lives on the device."""
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[tuple[Tensor, ...]] = field(default_factory=list)
    steps: list[float | Tensor] = field(default_factory=list)
    """Number of the step that is being taken, 1 at the first; ignored by rules without a count."""
    weight_decays: list[float] = field(default_factory=list)
    """Coupled weight decay of the segment's layer."""
    rows: list[int] = field(default_factory=list)
    """Row of the segment's layer in the [num_layers, ...] tensors of this call."""


class Kernels(Protocol):
    """One backend. All functions are deterministic: same input, same bits; no atomics; sums in a fixed order."""

    name: str

    def square_sums(self, tensors: list[Tensor]) -> Tensor:
        """Sum of the squares of each tensor.

        Args:
            tensors: any float dtype and strides, read.

        Returns:
            [len(tensors)] fp64, accumulated in fp64, on the device of the tensors.
        """
        ...

    def direction_square_sums(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        """Sums of squares of the weights and of the rule's direction, segment by segment.

        Args:
            segments: read, nothing is written.
            grad_scale: 0-dim, what gradients are multiplied by before use (unscaling, clipping); None for 1.

        Returns:
            [num_segments, 2] fp64: column 0 the weights, column 1 the direction; NaN or inf in column 1 where the
            step would put a value that is not finite into the state.
        """
        ...

    def advance_(
        self,
        segments: Segments,
        *,
        grad_scale: Tensor | None,
        ratios: Tensor,
        weight_decays: Tensor,
        shrinkage: Tensor | None,
        is_finite: Tensor,
    ) -> None:
        """Writes the new weights and states in place.

        Args:
            segments: ``weights`` and ``states`` written in place, ``grads`` read. ``segments.rows`` indexes the
                layer tensors below.
            ratios: [num_layers] compute dtype or fp64, read. Trust ratios, 1 for layers that are not adapted.
            weight_decays: [num_layers] fp64, read. Coupled weight decay in force.
            shrinkage: [num_layers] fp64, read. 1 - lr * decoupled weight decay; None if there is none.
            is_finite: 0-dim bool, read, on the segments' device. Where False nothing may change.
        """
        ...
