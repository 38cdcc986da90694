"""What a kernel backend offers to the step loop.

A step is ``accumulate_``, one all-reduce of its sums by the caller, trust ratios, ``advance_``; or ``step_``, which is
all of it where no layer is shared with other ranks. For rules with norms before, ``sums_before`` and another all-reduce come first.
Values that are not finite are never written: an element whose
new state would not be finite keeps the old one, and a layer that holds such an element keeps its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from largebatch.rules.lamb import LAMB, NLAMB, NNLAMB
from largebatch.rules.lans import LANS
from largebatch.rules.lars import LARS2017, LARS2019
from largebatch.rules.rule import Layers, Rule

DEVICE, DTYPE, SHAPE = map(attrgetter, ("device", "dtype", "shape"))

ALGORITHMS: dict[type, int] = {LARS2017: 0, LARS2019: 1, LAMB: 2, NLAMB: 3, NNLAMB: 4, LANS: 5}
"""Number of each rule in the compiled kernels (csrc/passes.h, triton_rules.py)."""


def on_host(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values in the host's memory, such that they can be copied to the device without waiting for it.

    For CUDA the memory is pinned and new at every call. torch's allocator gives it to nobody else until the device has copied
    it; a buffer that is used again could be overwritten while a copy still waits for its turn.

    Raises:
        RuntimeError: a CUDA graph is being captured; each replay would read the memory again.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"this step cannot be captured in a CUDA graph: a table on {device} has to be renewed, because it is the first step "
            "with these tensors, or one of them lies elsewhere than in the last step, or an option has changed. Take a step "
            "before the capture, and let every gradient stay where it is (zero_grad(set_to_none=False))"
        )
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


def uploaded(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with these (nested) numbers on the device, without waiting for it."""
    return on_host(values, dtype, device).to(device, non_blocking=True)


def upload_(target: Tensor, values: Sequence[Any]) -> None:
    """Writes as many (nested) numbers into a tensor on its device, without waiting for that."""
    target.copy_(on_host(values, target.dtype, target.device).reshape(target.shape), non_blocking=True)


def step_of_layers(steps: Sequence[Tensor], rows: Sequence[int], device: torch.device) -> Tensor:
    """[num_layers] fp64: t of the step being taken; zeros if nobody counts.

    Args:
        steps: 0-dim each, of every tensor, or empty.
        rows: [num_tensors] how many layers each tensor has.
    """
    if not steps:
        return torch.zeros(sum(rows), dtype=torch.float64, device=device)
    counts = torch.stack([step.to(device, torch.float64) for step in steps]) + 1
    return counts.repeat_interleave(uploaded(rows, torch.int64, device), output_size=sum(rows))


class Span(NamedTuple):
    """A segment: the part of a layer that lies in a tensor.

    Attributes:
        tensor: index in :attr:`Segments.weights`.
        start, numel: elements of the tensor, counted in storage order.
        row: row of the layer in the [num_layers, ...] tensors of this call. No two spans of a call share it.
        layer_start: offset of the first element in the flattened layer.
    """

    tensor: int
    start: int
    numel: int
    row: int
    layer_start: int


@dataclass
class Segments:
    """What one kernel call works on: tensors, and the layers in them. Kept from step to step.

    ``weights[i]``, ``grads[i]`` and each tensor of ``states[i]`` have equal shapes: a whole parameter of any shape and
    strides, or a flat partition. Weights and gradients are fp64, fp32, bf16 or fp16; states have the compute dtype
    (fp64 for fp64 weights, fp32 for all others), or bf16. ``grads`` and ``lr`` are replaced before every step.
    """

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    """The compute dtype."""
    lr: float | Tensor = 0.0
    """Learning rate of this step: Python float, or 0-dim tensor where it lives on the device."""
    weights: list[Tensor] = field(default_factory=list)
    grads: Sequence[Tensor] = field(default_factory=list)
    states: list[tuple[Tensor, ...]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    """0-dim fp32 each, number of steps taken; empty if neither the rule nor the rounding counts steps."""
    layer_states: list[Tensor] = field(default_factory=list)
    """[layers of the tensor, len(rule.layer_state)] fp64 each, for the rows of :attr:`rows` in their order; empty if there are none."""
    rows: list[int] = field(default_factory=list)
    """[num_tensors] how many rows of the [num_layers, ...] tensors are each tensor's: the first ones, the next ones, ..."""
    spans: list[Span] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    """[num_layers] 32-bit, of the stochastic rounding; the same for a layer wherever its parts lie."""
    weight_decays: list[float] = field(default_factory=list)
    """[num_layers] coupled weight decay of each layer."""
    decoupled_weight_decays: list[float] = field(default_factory=list)
    """[num_layers] decoupled weight decay of each layer."""
    are_adapted: list[bool] = field(default_factory=list)
    """[num_layers] False where the trust ratio is 1 whatever the norms."""
    may_overwrite_grads: bool = False
    """Whether ``accumulate_`` may leave what it likes in the gradients, for ``advance_`` to find it there."""
    num_changes: int = 0
    """How often the rule's options, the decays or who is adapted have changed: what is derived from them is out of date then."""
    stats: Tensor | None = None
    """[len(rule.figures()), num_layers] fp64 on the device, of the last step in which each layer moved; None before the
    first. Where a step may be captured in a CUDA graph, written in place."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a backend has derived from the above and wants to find again in the next step."""

    @property
    def num_layers(self) -> int:
        return len(self.weight_decays)

    def have_same_layout(self) -> bool:
        """Whether the weights have the device, dtype and shape that they had at the first call of this method."""
        layouts = [list(map(attribute, self.weights)) for attribute in (DEVICE, DTYPE, SHAPE)]
        return self.prepared.setdefault("layouts", layouts) == layouts

    def is_whole(self, span: Span) -> bool:
        return span.start == 0 and span.numel == self.weights[span.tensor].numel()

    def pieces(self) -> Iterator[tuple[Span, Tensor, Tensor, tuple[Tensor, ...]]]:
        """(span, weight, grad, states) of each span, as views."""
        for span in self.spans:
            i = span.tensor
            tensors = (self.weights[i].detach(), self.grads[i], *self.states[i])
            if not self.is_whole(span):
                tensors = tuple(t.narrow(0, span.start, span.numel) for t in tensors)
            yield span, tensors[0], tensors[1], tensors[2:]


class Before(NamedTuple):
    """What is known of whole layers before the state is renewed, for rules that declare it.

    Attributes:
        norms: [len(rule.norms_before), num_layers] compute dtype.
        layer_state: [len(rule.layer_state), num_layers] compute dtype.
        is_finite: [num_layers] bool; where it is False the layer's state stays as it is and its sums are NaN.
    """

    norms: Tensor
    layer_state: Tensor
    is_finite: Tensor


class Decisions(NamedTuple):
    """What the norms of whole layers have decided.

    Attributes:
        ratios: [len(rule.ratios), num_layers] compute dtype. Trust ratios, 1 for layers that are not adapted.
        weight_decays: [num_layers] fp64. Coupled weight decay in force.
        shrinkage: [num_layers] fp64. 1 - lr * decoupled weight decay; None if there is none.
        is_finite: [num_layers] bool. Layers where it is False stay as they are.
        before: None if the rule has neither norms before nor layer state.
    """

    ratios: Tensor
    weight_decays: Tensor
    shrinkage: Tensor | None
    is_finite: Tensor
    before: Before | None = None


class LayerFigures(NamedTuple):
    """What a step found of its layers and did with them, on the segments' device.

    Attributes:
        stats: [len(rule.figures()), num_layers] fp64, the rows of largebatch.telemetry.LayerStats; or the segments' own
            ``stats``, if the backend has written there itself.
        is_finite: [num_layers] bool; where False the layer's weights were left alone.
        have_all_moved: that is_finite is True everywhere; None where it is not known without waiting for the device.
    """

    stats: Tensor
    is_finite: Tensor
    have_all_moved: bool | None = None

    @classmethod
    def of(cls, layers: Layers, decisions: Decisions) -> LayerFigures:
        """The figures of a step that was taken with these; of the layer state its new values are in ``layers``."""
        local_lr = (layers.lr * decisions.ratios[0]).double()  # rounded as in the step
        rows = (layers.weight_norm, *layers.norms, *decisions.ratios.double(), local_lr, decisions.weight_decays)
        return cls(torch.stack((*rows, *layers.norms_before, *layers.layer_state)), decisions.is_finite)


class Kernels(Protocol):
    """One backend. All functions are deterministic: same input, same bits; sums in a fixed order, never atomic.

    ``grad_scale``: 0-dim, what gradients are multiplied by before use (unscaling, clipping); None for 1.
    """

    name: str
    is_fused: bool
    """Whether it is one of FusedKernels, whose ``step_`` reads the memory fewer times than ``accumulate_`` and ``advance_``."""
    takes_whole_steps: bool
    """Whether it is one of WholeStepKernels."""

    def is_current(self, segments: Segments) -> bool:
        """Whether the weights still have the device, dtype and shape that they had at the first call.

        Called once before a step, when its gradients are there: a backend may look up where everything lies.
        """
        ...

    def grad_square_sum(self, segments: Segments) -> Tensor:
        """Sum of the squares of all gradients, read as they are.

        Returns:
            0-dim fp64, accumulated in fp64, on the segments' device.
        """
        ...

    def sums_before(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        """Sums the squares of what the rule wants the norms of before its state is renewed.

        Args:
            segments: read.

        Returns:
            [num_layers, len(rule.norms_before)] fp64, over what lies in these tensors.
        """
        ...

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None, before: Before | None = None) -> Tensor:
        """Renews the state if the rule accumulates, and sums the squares of the weights and of the directions.

        Args:
            segments: ``states`` written in place, ``grads`` perhaps, if they may be overwritten; the rest read.

        Returns:
            [num_layers, 1 + len(rule.norms)] fp64: column 0 the weights, then the directions, over what lies in these tensors;
            NaN or inf in the directions' columns of layers with an element that is not finite.
        """
        ...

    def advance_(self, segments: Segments, *, grad_scale: Tensor | None, decisions: Decisions) -> None:
        """Writes the new weights, and the state that depends on the ratios, in place.

        Args:
            segments: ``weights`` and ``states`` written in place, ``grads`` read.
        """
        ...

    def count_(self, segments: Segments) -> None:
        """Adds 1 to each of the segments' step counts, in place; after the step that they count."""
        ...


class FusedKernels(Kernels, Protocol):
    """A backend that can do a whole step at once, trust ratios included."""

    def step_(self, segments: Segments, *, grad_scale: Tensor | None) -> LayerFigures:
        """``accumulate_``, trust ratios and ``advance_``, for layers that lie in these tensors as a whole."""
        ...


class WholeStepKernels(Kernels, Protocol):
    """A backend that takes a step of all calls on a device by itself, so that the host has nothing to compute between its launches."""

    def whole_step_(
        self,
        calls: Sequence[Segments],
        *,
        grad_scale: Tensor | None,
        max_grad_norm: float | None,
        num_skipped: Tensor,
        num_skipped_layers: Tensor,
    ) -> list[LayerFigures]:
        """Clips the gradients, steps, and counts, for layers that lie in these tensors as a whole.

        Args:
            calls: all on one device. Their ``steps`` are counted unless no layer of any of them moved; ``stats`` is written.
            grad_scale: see Kernels.
            max_grad_norm: bound of the norm of all calls' gradients together; None for no bound.
            num_skipped, num_skipped_layers: 0-dim int64, added to: steps in which no layer moved, and layers left alone.

        Returns:
            What each of the calls has found.
        """
        ...
