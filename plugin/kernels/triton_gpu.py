"""The kernels for CUDA tensors in Triton: three launches a step, whatever the number of layers, and no wait for the device.

The kernels themselves are in triton_kernels; here are the tables in which they look things up, and their launches.
Learning rate, step counts, gradient scale and what is not finite stay on the device; a step can be captured in a CUDA graph
once two steps have been taken with the same tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from largebatch.kernels.interface import ALGORITHMS, LayerFigures, Segments
from largebatch.kernels.triton_kernels import (
    BLOCK_NUMEL,
    CHUNK_NUMEL,
    ROW_BLOCK,
    first_kernel,
    layer_kernel,
    second_kernel,
    square_kernel,
)
from largebatch.rules.rule import Rule

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def option_table(rule: Rule) -> list[float]:
    """A rule's numbers in the order of the constants in triton_rules."""
    beta1, beta2 = getattr(rule, "betas", (0.0, 0.0))
    low, high = rule.weight_norm_bounds or (0.0, 0.0)
    ratio_low, ratio_high = rule.trust_ratio_bounds or (0.0, 0.0)
    return [
        beta1,
        beta2,
        math.log(beta1) if beta1 > 0 else 0.0,
        math.log(beta2) if beta2 > 0 else 0.0,
        rule.eps,
        getattr(rule, "momentum", 0.0),
        getattr(rule, "trust_coefficient", 1.0),
        low,
        high,
        ratio_low,
        ratio_high,
    ]


def cut_into_chunks(numels: list[int]) -> tuple[list[int], list[int]]:
    """(owner, first element) of each chunk."""
    owners, starts = [], []
    for owner, numel in enumerate(numels):
        for start in range(0, numel, CHUNK_NUMEL):
            owners.append(owner)
            starts.append(start)
    return owners, starts


def lies_flat(tensor: Tensor, like: Tensor | None = None) -> bool:
    """Whether a tensor is dense in memory, and laid out like another."""
    is_dense = tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return is_dense and (like is None or tensor.stride() == like.stride())


@dataclass
class Tables:
    """What the programs of a call look up, on the device."""

    chunks: Tensor
    spans: Tensor
    row_chunks: Tensor
    rows: Tensor
    options: Tensor
    steps: Tensor
    sums: Tensor
    one: Tensor
    addresses: Tensor
    host_addresses: Tensor
    known: list[int]
    """Addresses that the device has."""
    lr: Tensor

    @property
    def num_chunks(self) -> int:
        return self.chunks.shape[1]


class TritonKernels:
    """See :class:`largebatch.kernels.interface.FusedKernels`."""

    name = "triton"
    is_fused = True
    objects = None

    def is_current(self, segments: Segments) -> bool:
        return segments.have_same_layout()

    def count_(self, segments: Segments) -> None:
        if segments.steps:
            torch._foreach_add_(segments.steps, 1.0)

    def square_sums(self, tensors: list[Tensor]) -> Tensor:
        sums = torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].device)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype and t.numel()]
            flat = [tensors[i] if lies_flat(tensors[i]) else tensors[i].contiguous() for i in places]
            if not flat:
                continue
            owners, starts = cut_into_chunks([t.numel() for t in flat])
            device = sums.device
            chunks = uploaded([owners, starts], device)
            parts = torch.empty(len(owners), dtype=torch.float64, device=device)
            numels = uploaded([t.numel() for t in flat], device)
            addresses = uploaded([t.data_ptr() for t in flat], device)
            square_kernel[(len(owners),)](
                chunks, len(owners), numels, addresses, parts, D=DTYPES[dtype], CHUNK=CHUNK_NUMEL, BLOCK=BLOCK_NUMEL
            )
            # a fixed order: one row a tensor, its chunks padded with zeros
            counts = [-(-t.numel() // CHUNK_NUMEL) for t in flat]
            lengths = uploaded(counts, device)
            ends = lengths.cumsum(0)
            index = torch.arange(max(counts), device=device)[None, :]
            inside = index < lengths[:, None]
            grid = torch.where(inside, (ends - lengths)[:, None] + index, 0)
            sums[uploaded(places, device)] = torch.where(inside, parts[grid], 0.0).sum(1)
        return sums

    def accumulate_(self, segments: Segments, *, grad_scale: Tensor | None) -> Tensor:
        with FlatTensors(segments) as flat:
            tables = self.tables(segments, flat)
            self.first(segments, flat, tables, grad_scale)
            sums = torch.zeros(5, segments.num_layers, dtype=torch.float64, device=segments.device)
            self.reduce(segments, tables, sums, None, decides=False)
        return sums[:2].t().contiguous()

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
        with FlatTensors(segments) as flat:
            tables = self.tables(segments, flat)
            shrinkage = torch.ones_like(weight_decays) if shrinkage is None else shrinkage
            decisions = torch.stack([ratios.double(), weight_decays, shrinkage])
            self.second(segments, flat, tables, grad_scale, decisions, is_finite.to(torch.int8))

    def step_(self, segments: Segments, *, grad_scale: Tensor | None) -> LayerFigures:
        figures = torch.empty(5, segments.num_layers, dtype=torch.float64, device=segments.device)
        moved = torch.empty(segments.num_layers, dtype=torch.int8, device=segments.device)
        with FlatTensors(segments) as flat:
            tables = self.tables(segments, flat)
            self.first(segments, flat, tables, grad_scale)
            self.reduce(segments, tables, figures, moved, decides=True)
            self.second(segments, flat, tables, grad_scale, figures[2:], moved)
        weight_norm, direction_norm, ratio, weight_decay, _ = figures.unbind()
        ratio = ratio.to(segments.dtype)
        return LayerFigures.of(weight_norm, direction_norm, ratio, weight_decay, moved.bool(), lr=segments.lr)

    # --- launches -------------------------------------------------------------------------------------------------------

    def common(
        self, segments: Segments, flat: FlatTensors, tables: Tables, grad_scale: Tensor | None
    ) -> dict[str, Any]:
        return {
            "chunks": tables.chunks,
            "num_chunks": tables.num_chunks,
            "spans": tables.spans,
            "num_spans": tables.spans.shape[1],
            "addresses": tables.addresses,
            "steps": tables.steps,
            "rows": tables.rows,
            "num_layers": segments.num_layers,
            "options": tables.options,
            "grad_scale": tables.one if grad_scale is None else grad_scale.double(),
            "ALGORITHM": ALGORITHMS[type(segments.rule)],
            "CORRECTS": {False: 0, True: 1, "lr": 2}[getattr(segments.rule, "bias_correction", True)],
            "T": DTYPES[segments.dtype],
            "W": DTYPES[flat.weights[0].dtype],
            "G": DTYPES[flat.grads[0].dtype],
            "S": DTYPES[flat.states[0][0].dtype],
            "HAS_STEPS": bool(segments.steps),
            "CHUNK": CHUNK_NUMEL,
            "BLOCK": BLOCK_NUMEL,
        }

    def first(self, segments: Segments, flat: FlatTensors, tables: Tables, grad_scale: Tensor | None) -> None:
        if tables.num_chunks:
            first_kernel[(tables.num_chunks,)](sums=tables.sums, **self.common(segments, flat, tables, grad_scale))

    def reduce(
        self, segments: Segments, tables: Tables, figures: Tensor, moved: Tensor | None, *, decides: bool
    ) -> None:
        rule = segments.rule
        layer_kernel[(segments.num_layers,)](
            tables.sums,
            tables.num_chunks,
            tables.row_chunks,
            tables.rows,
            segments.num_layers,
            tables.options,
            tables.lr,
            figures,
            figures if moved is None else moved,
            DECIDES=decides,
            ALGORITHM=ALGORITHMS[type(rule)],
            HAS_NORM_BOUNDS=rule.weight_norm_bounds is not None,
            HAS_RATIO_BOUNDS=rule.trust_ratio_bounds is not None,
            LARC_CLIP=getattr(rule, "larc_clip", False),
            DECAY_IN_RATIO=getattr(rule, "decay_in_ratio", True),
            DAMPS=getattr(rule, "damp_ratio_by_momentum", False),
            SKIPS_ZERO_NORMS=getattr(rule, "skip_zero_norm_layers", False),
            T=DTYPES[segments.dtype],
            BLOCK=ROW_BLOCK,
        )

    def second(
        self,
        segments: Segments,
        flat: FlatTensors,
        tables: Tables,
        grad_scale: Tensor | None,
        decisions: Tensor,
        moved: Tensor,
    ) -> None:
        if tables.num_chunks:
            second_kernel[(tables.num_chunks,)](
                lr_pointer=tables.lr,
                decisions=decisions,
                moved=moved,
                IS_NESTEROV=getattr(segments.rule, "nesterov", False),
                LR_IN_MOMENTUM=getattr(segments.rule, "lr_in_momentum", True),
                **self.common(segments, flat, tables, grad_scale),
            )

    # --- tables ---------------------------------------------------------------------------------------------------------

    def tables(self, segments: Segments, flat: FlatTensors) -> Tables:
        """The tables of a call: made at its first step, with new addresses and learning rate where these have changed."""
        tables = segments.prepared.get("triton")
        if tables is None:
            tables = segments.prepared["triton"] = self.made(segments)
        tensors = [flat.weights, flat.grads, *zip(*flat.states, strict=True)]
        starts = [(span.tensor, span.start) for span in segments.spans]
        addresses = [[t.data_ptr() for t in column] for column in tensors]
        sizes = [column[0].element_size() for column in tensors]
        known = [c[i] + start * size for c, size in zip(addresses, sizes, strict=True) for i, start in starts]
        if known != tables.known:
            tables.known = known
            tables.host_addresses.view(-1)[: len(known)].copy_(torch.tensor(known, dtype=torch.int64))
            tables.addresses.copy_(tables.host_addresses, non_blocking=True)
            if segments.steps:
                tables.steps.copy_(uploaded([s.data_ptr() for s in segments.steps], segments.device))
        if isinstance(segments.lr, Tensor):
            tables.lr.copy_(segments.lr.reshape(()), non_blocking=True)
        else:
            tables.lr.fill_(segments.lr)
        return tables

    def made(self, segments: Segments) -> Tables:
        device = segments.device
        spans = segments.spans
        owners, starts = cut_into_chunks([span.numel for span in spans])
        first_chunks, ends = [0] * segments.num_layers, [0] * segments.num_layers
        for chunk, owner in enumerate(owners):
            row = spans[owner].row
            first_chunks[row] = chunk if ends[row] == 0 else first_chunks[row]
            ends[row] = chunk + 1
        columns = [
            [s.numel for s in spans],
            [s.row for s in spans],
            [s.layer_start for s in spans],
            [s.tensor for s in spans],
        ]
        rows = [segments.weight_decays, segments.seeds, segments.decoupled_weight_decays, segments.are_adapted]
        shape = (4, max(len(spans), 1))
        return Tables(
            chunks=uploaded([owners, starts], device).reshape(2, -1),
            spans=uploaded(columns, device).reshape(4, -1),
            row_chunks=uploaded([first_chunks, ends], device),
            rows=torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64, device=device),
            options=torch.tensor(option_table(segments.rule), dtype=torch.float64, device=device),
            steps=torch.zeros(max(len(segments.steps), 1), dtype=torch.int64, device=device),
            sums=torch.zeros(2, max(len(owners), 1), dtype=torch.float64, device=device),
            one=torch.ones((), dtype=torch.float64, device=device),
            addresses=torch.zeros(shape, dtype=torch.int64, device=device),
            host_addresses=torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda"),
            known=[],
            lr=torch.zeros((), dtype=torch.float64, device=device),
        )


def uploaded(numbers: list, device: torch.device) -> Tensor:
    """An int64 tensor on the device, copied without waiting."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class FlatTensors:
    """The tensors of a call as flat arrays, as a context; irregular ones are copied in at its start and back at its end."""

    def __init__(self, segments: Segments):
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.weights = [self.flat(w.detach()) for w in segments.weights]
        pairs = list(zip(self.weights, segments.weights, strict=True))
        self.states = [
            tuple(self.flat(s, w if w.stride() == original.stride() else None) for s in state)
            for (w, original), state in zip(pairs, segments.states, strict=True)
        ]
        self.grads = [
            g if lies_flat(g, w) else torch.empty_like(w, dtype=g.dtype).copy_(g)
            for g, w in zip(segments.grads, self.weights, strict=True)
        ]

    def flat(self, tensor: Tensor, like: Tensor | None = None) -> Tensor:
        if lies_flat(tensor, like):
            return tensor
        copy = tensor.contiguous() if like is None else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        self.copies.append((tensor, copy))
        return copy

    def __enter__(self) -> FlatTensors:
        return self

    def __exit__(self, *_: Any) -> None:
        for tensor, copy in self.copies:
            tensor.copy_(copy)
