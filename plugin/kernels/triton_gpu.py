"""The kernels for CUDA tensors in Triton: three launches a step, whatever the number of layers, and no wait for the device.

One program works on one chunk of one layer. It finds its tensors through a table of addresses, so that whole parameters
and the segments of a flat partition are the same to it. Learning rate, step counts, gradient scale and what is not
finite stay on the device; a step can be captured in a CUDA graph once two steps have been taken with the same tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from largebatch.kernels.interface import ALGORITHMS, LayerFigures, Segments
from largebatch.rules.rule import Rule

LARS2017_, LARS2019_, LAMB_, NLAMB_, NNLAMB_ = (tl.constexpr(i) for i in range(5))
NO_CORRECTION, CORRECTION, CORRECTION_IN_LR = (tl.constexpr(i) for i in range(3))

CHUNK_NUMEL = 8192
BLOCK_NUMEL = 1024
ROW_BLOCK = 128

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# rows of the fp64 table of a rule's options; see option_table
(BETA1, BETA2, LOG_BETA1, LOG_BETA2, EPS, MOMENTUM, TRUST_COEFFICIENT, NORM_LOW, NORM_HIGH, RATIO_LOW, RATIO_HIGH) = (
    tl.constexpr(i) for i in range(11)
)


# --- what both passes need ----------------------------------------------------------------------------------------------


@triton.jit
def address(addresses, index, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + index).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def root(x, T: tl.constexpr):
    if T == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def one_minus_power(options, beta, log_beta, exponent):
    """1 - beta ** exponent in fp64, for beta >= 0."""
    value = tl.load(options + beta)
    power = tl.exp(exponent * tl.load(options + log_beta))
    return 1.0 - tl.where(value > 0, power, 0.0)


@triton.jit
def direction(w, g, m, v, options, step, decay, ALGORITHM: tl.constexpr, CORRECTS: tl.constexpr, T: tl.constexpr):
    """Rule.direction of rules that accumulate."""
    if ALGORITHM == LARS2019_:
        return m
    else:
        m_hat = m
        v_hat = v
        if ALGORITHM == LAMB_:
            if CORRECTS == CORRECTION:
                m_hat = m * (1.0 / one_minus_power(options, BETA1, LOG_BETA1, step)).to(T)
                v_hat = v * (1.0 / one_minus_power(options, BETA2, LOG_BETA2, step)).to(T)
        else:
            beta1 = tl.load(options + BETA1)
            beta2 = tl.load(options + BETA2)
            of_m = (beta1 / one_minus_power(options, BETA1, LOG_BETA1, step + 1)).to(T)
            of_g = ((1.0 - beta1) / one_minus_power(options, BETA1, LOG_BETA1, step)).to(T)
            m_hat = of_m * m + of_g * g
            if ALGORITHM == NLAMB_:
                v_hat = (beta2 / one_minus_power(options, BETA2, LOG_BETA2, step)).to(T) * v
            else:
                of_v = (beta2 / one_minus_power(options, BETA2, LOG_BETA2, step + 1)).to(T)
                of_g2 = ((1.0 - beta2) / one_minus_power(options, BETA2, LOG_BETA2, step)).to(T)
                v_hat = of_v * v + of_g2 * (g * g)
        return m_hat / (root(v_hat, T) + tl.load(options + EPS).to(T)) + decay * w


@triton.jit
def mixed(x):
    x = x ^ (x >> 16)
    x = x * tl.full((1,), 0x85EBCA6B, tl.uint32)
    x = x ^ (x >> 13)
    x = x * tl.full((1,), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def stochastically_rounded(x, element, seed, step, STATE: tl.constexpr):
    """fp32 that is representable in bf16; see largebatch.kernels.rounding."""
    key = mixed(((seed + step.to(tl.int64)) & 0xFFFFFFFF).to(tl.uint32) + tl.zeros((1,), tl.uint32))
    key = mixed(key ^ (element >> 32).to(tl.uint32))
    random = (mixed((element & 0xFFFFFFFF).to(tl.uint32) ^ key) >> (16 * STATE)) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    raised = bits + random
    rounded = tl.where((raised & 0x7F800000) == 0x7F800000, bits, raised) & tl.full((1,), 0xFFFF0000, tl.uint32)
    return rounded.to(tl.float32, bitcast=True)


# --- the passes ---------------------------------------------------------------------------------------------------------


@triton.jit
def first_kernel(
    chunks,  # [2, num_chunks] int64: span, first element in the span
    num_chunks,
    spans,  # [4, num_spans] int64: numel, row, layer_start, tensor
    num_spans,
    addresses,  # [4, num_spans] int64: weight, grad, state 0, state 1
    steps,  # [num_tensors] int64: addresses of the fp32 counters
    rows,  # [2, num_layers] fp64: coupled weight decay, seed of the rounding
    num_layers,
    options,
    grad_scale,  # 0-dim fp64
    sums,  # [2, num_chunks] fp64, written
    ALGORITHM: tl.constexpr,
    CORRECTS: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    span = tl.load(chunks + chunk)
    start = tl.load(chunks + num_chunks + chunk)
    numel = tl.load(spans + span)
    row = tl.load(spans + num_spans + span)
    layer_start = tl.load(spans + 2 * num_spans + span)
    step = tl.zeros((), tl.float64)
    if HAS_STEPS:
        counter = tl.load(steps + tl.load(spans + 3 * num_spans + span)).to(tl.pointer_type(tl.float32))
        step = tl.load(counter).to(tl.float64) + 1.0
    weights = address(addresses, span, W, IS_ALIGNED)
    grads = address(addresses, num_spans + span, G, IS_ALIGNED)
    state0 = address(addresses, 2 * num_spans + span, S, IS_ALIGNED)
    state1 = address(addresses, 3 * num_spans + span, S, IS_ALIGNED)
    scale = tl.load(grad_scale).to(T)
    decay = tl.load(rows + row).to(T)
    seed = tl.load(rows + num_layers + row).to(tl.int64)
    weight_sums = tl.zeros((BLOCK,), tl.float64)
    direction_sums = tl.zeros((BLOCK,), tl.float64)
    for offset in range(0, CHUNK, BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        mask = index < numel
        w = tl.load(weights + index, mask=mask, other=0.0).to(T)
        g = tl.load(grads + index, mask=mask, other=0.0).to(T) * scale
        u = g
        if ALGORITHM != LARS2017_:
            old_m = tl.load(state0 + index, mask=mask, other=0.0).to(T)
            if ALGORITHM == LARS2019_:
                momentum = tl.load(options + MOMENTUM)
                m = momentum.to(T) * old_m + (1.0 - momentum).to(T) * (g + decay * w)
                v = m
                is_good = is_finite(m)
                m = tl.where(is_good, m, old_m)
                if S == tl.bfloat16:
                    m = stochastically_rounded(m, layer_start + index, seed, step, 0)
                tl.store(state0 + index, m.to(S), mask=mask)
            else:
                beta1 = tl.load(options + BETA1)
                beta2 = tl.load(options + BETA2)
                old_v = tl.load(state1 + index, mask=mask, other=0.0).to(T)
                m = beta1.to(T) * old_m + (1.0 - beta1).to(T) * g
                v = beta2.to(T) * old_v + (1.0 - beta2).to(T) * (g * g)
                is_good = is_finite(m) & is_finite(v)
                # an old value of bf16 state has no bits to round away
                m = tl.where(is_good, m, old_m)
                v = tl.where(is_good, v, old_v)
                if S == tl.bfloat16:
                    m = stochastically_rounded(m, layer_start + index, seed, step, 0)
                    v = stochastically_rounded(v, layer_start + index, seed, step, 1)
                    m = tl.where(is_good, m, old_m)
                    v = tl.where(is_good, v, old_v)
                tl.store(state0 + index, m.to(S), mask=mask)
                tl.store(state1 + index, v.to(S), mask=mask)
            u = direction(w, g, m, v, options, step, decay, ALGORITHM, CORRECTS, T)
            u = tl.where(is_good, u, float("nan"))
        w64 = w.to(tl.float64)
        u64 = tl.where(mask, u, 0.0).to(tl.float64)
        weight_sums += w64 * w64
        direction_sums += u64 * u64
    tl.store(sums + chunk, tl.sum(weight_sums, axis=0))
    tl.store(sums + num_chunks + chunk, tl.sum(direction_sums, axis=0))


@triton.jit
def layer_kernel(
    sums,  # [2, num_chunks] fp64
    num_chunks,
    row_chunks,  # [2, num_layers] int64: first chunk, end
    rows,  # [4, num_layers] fp64: coupled weight decay, seed, decoupled weight decay, whether adapted
    num_layers,
    options,
    lr_pointer,  # 0-dim fp64
    figures,  # [5, num_layers] fp64, written: norms (or sums), trust ratio, weight decay in force, shrinkage
    moved,  # [num_layers] int8, written
    DECIDES: tl.constexpr,
    ALGORITHM: tl.constexpr,
    HAS_NORM_BOUNDS: tl.constexpr,
    HAS_RATIO_BOUNDS: tl.constexpr,
    LARC_CLIP: tl.constexpr,
    DECAY_IN_RATIO: tl.constexpr,
    DAMPS: tl.constexpr,
    SKIPS_ZERO_NORMS: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(row_chunks + row)
    end = tl.load(row_chunks + num_layers + row)
    weight_sums = tl.zeros((BLOCK,), tl.float64)
    direction_sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < end
        weight_sums += tl.load(sums + index, mask=mask, other=0.0)
        direction_sums += tl.load(sums + num_chunks + index, mask=mask, other=0.0)
    weight_sum = tl.sum(weight_sums, axis=0)
    direction_sum = tl.sum(direction_sums, axis=0)
    if DECIDES:
        lr = tl.load(lr_pointer)
        decay = tl.load(rows + row)
        shrinkage = 1.0 - lr * tl.load(rows + 2 * num_layers + row)
        weight_norm = tl.sqrt(weight_sum) * tl.abs(shrinkage)
        direction_norm = tl.sqrt(direction_sum)
        is_defined = (weight_norm > 0) & (direction_norm > 0)
        numerator = weight_norm
        denominator = direction_norm
        if HAS_NORM_BOUNDS:
            high = tl.load(options + NORM_HIGH)
            numerator = tl.minimum(tl.maximum(numerator, tl.load(options + NORM_LOW)), high)
        if ALGORITHM == LARS2017_:
            coefficient = tl.load(options + TRUST_COEFFICIENT)
            if DAMPS:
                coefficient = coefficient * (1.0 - tl.load(options + MOMENTUM))
            numerator = coefficient * numerator
            if DECAY_IN_RATIO:
                denominator = denominator + decay * weight_norm
            denominator = denominator + tl.load(options + EPS)
        if ALGORITHM == LARS2019_:
            denominator = denominator + tl.load(options + EPS)
        ratio = numerator / tl.where(is_defined, denominator, 1.0)
        if HAS_RATIO_BOUNDS:
            ratio = tl.minimum(tl.maximum(ratio, tl.load(options + RATIO_LOW)), tl.load(options + RATIO_HIGH))
        ratio = tl.where(is_defined, ratio, 1.0)
        if LARC_CLIP:
            ratio = tl.where(ratio < lr, ratio / lr, 1.0)
        if SKIPS_ZERO_NORMS:
            if LARC_CLIP:
                ratio = tl.where(is_defined, ratio, 1.0)
            decay = tl.where(is_defined, decay, 0.0)
        ratio = tl.where(tl.load(rows + 3 * num_layers + row) > 0, ratio, 1.0).to(T).to(tl.float64)
        tl.store(figures + row, weight_norm)
        tl.store(figures + num_layers + row, direction_norm)
        tl.store(figures + 2 * num_layers + row, ratio)
        tl.store(figures + 3 * num_layers + row, decay)
        tl.store(figures + 4 * num_layers + row, shrinkage)
        tl.store(moved + row, (is_finite(weight_sum) & is_finite(direction_sum)).to(tl.int8))
    else:
        tl.store(figures + row, weight_sum)
        tl.store(figures + num_layers + row, direction_sum)


@triton.jit
def second_kernel(
    chunks,
    num_chunks,
    spans,
    num_spans,
    addresses,
    steps,
    rows,
    num_layers,
    options,
    grad_scale,
    lr_pointer,  # 0-dim fp64
    decisions,  # [3, num_layers] fp64: trust ratio, weight decay in force, shrinkage
    moved,  # [num_layers] int8
    ALGORITHM: tl.constexpr,
    CORRECTS: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # from the last chunk to the first, because the last are still in the cache
    chunk = num_chunks - 1 - tl.program_id(0).to(tl.int64)
    span = tl.load(chunks + chunk)
    row = tl.load(spans + num_spans + span)
    if tl.load(moved + row) == 0:
        return
    start = tl.load(chunks + num_chunks + chunk)
    numel = tl.load(spans + span)
    layer_start = tl.load(spans + 2 * num_spans + span)
    step = tl.zeros((), tl.float64)
    if HAS_STEPS:
        counter = tl.load(steps + tl.load(spans + 3 * num_spans + span)).to(tl.pointer_type(tl.float32))
        step = tl.load(counter).to(tl.float64) + 1.0
    weights = address(addresses, span, W, IS_ALIGNED)
    grads = address(addresses, num_spans + span, G, IS_ALIGNED)
    state0 = address(addresses, 2 * num_spans + span, S, IS_ALIGNED)
    state1 = address(addresses, 3 * num_spans + span, S, IS_ALIGNED)
    scale = tl.load(grad_scale).to(T)
    seed = tl.load(rows + num_layers + row).to(tl.int64)
    lr = tl.load(lr_pointer)
    ratio = tl.load(decisions + row).to(T)
    decay = tl.load(decisions + num_layers + row).to(T)
    shrinkage = tl.load(decisions + 2 * num_layers + row).to(T)
    for offset in range(0, CHUNK, BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        mask = index < numel
        old_w = tl.load(weights + index, mask=mask, other=0.0).to(T)
        w = old_w * shrinkage
        m = tl.load(state0 + index, mask=mask, other=0.0).to(T)
        if ALGORITHM == LARS2017_:
            g = tl.load(grads + index, mask=mask, other=0.0).to(T) * scale
            momentum = tl.load(options + MOMENTUM).to(T)
            inside = ratio
            outside = lr.to(T)
            if LR_IN_MOMENTUM:
                inside = lr.to(T) * ratio
                outside = tl.full((), 1.0, T)
            fresh = inside * (g + decay * w)
            velocity = momentum * m + fresh
            update = velocity
            if IS_NESTEROV:
                update = fresh + momentum * velocity
            new_w = w - outside * update
            is_good = is_finite(new_w) & is_finite(velocity)
            if S == tl.bfloat16:
                velocity = stochastically_rounded(velocity, layer_start + index, seed, step, 0)
            tl.store(state0 + index, tl.where(is_good, velocity, m).to(S), mask=mask)
        else:
            step_size = lr
            if CORRECTS == CORRECTION_IN_LR:
                corrected = tl.sqrt(one_minus_power(options, BETA2, LOG_BETA2, step))
                step_size = lr * corrected / one_minus_power(options, BETA1, LOG_BETA1, step)
            g = w
            v = m
            if ALGORITHM != LARS2019_:
                v = tl.load(state1 + index, mask=mask, other=0.0).to(T)
            if (ALGORITHM == NLAMB_) | (ALGORITHM == NNLAMB_):
                g = tl.load(grads + index, mask=mask, other=0.0).to(T) * scale
            u = direction(w, g, m, v, options, step, decay, ALGORITHM, CORRECTS, T)
            new_w = w - step_size.to(T) * ratio * u
            is_good = is_finite(new_w)
        tl.store(weights + index, tl.where(is_good, new_w, old_w).to(W), mask=mask)


@triton.jit
def square_kernel(
    chunks, num_chunks, numels, addresses, sums, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + chunk)
    start = tl.load(chunks + num_chunks + chunk)
    numel = tl.load(numels + tensor)
    values = address(addresses, tensor, D, False)
    total = tl.zeros((BLOCK,), tl.float64)
    for offset in range(0, CHUNK, BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        x = tl.load(values + index, mask=index < numel, other=0.0).to(tl.float64)
        total += x * x
    tl.store(sums + chunk, tl.sum(total, axis=0))


# --- tables -------------------------------------------------------------------------------------------------------------


def option_table(rule: Rule) -> list[float]:
    """A rule's numbers in the order of the constants above."""
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
    is_aligned: bool
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

    def count_(self, steps: list[Tensor]) -> None:
        torch._foreach_add_(steps, 1.0)

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
            "IS_ALIGNED": tables.is_aligned,
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
            tables.is_aligned = all(a % 16 == 0 for a in known)
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
            is_aligned=False,
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
