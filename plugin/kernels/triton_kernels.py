"""The two passes of a step in Triton, and the sums of squares of any tensors; launched by largebatch.kernels.triton_gpu.

One program works on one chunk of one layer. It finds its tensors through a table of addresses, so that whole parameters
and the segments of a flat partition are the same to it. Programs that finish the chunks of a layer count themselves in by an
atomic counter; the last of them adds up what all have stored, in the order of the chunks. Sums are never atomic, so that which
program comes last makes no difference to any bit.
"""

import triton
import triton.language as tl

from largebatch.kernels.triton_rules import (
    BETA1,
    BETA2,
    CORRECTION_IN_LR,
    EPS,
    LANS_,
    LARS2017_,
    LARS2019_,
    LOG_BETA1,
    LOG_BETA2,
    MOMENTUM,
    NLAMB_,
    NNLAMB_,
    NORM_HIGH,
    NORM_LOW,
    RATIO_HIGH,
    RATIO_LOW,
    TRUST_COEFFICIENT,
    coefficients,
    direction,
    gradient_direction,
    is_finite,
    one_minus_power,
    stochastically_rounded,
)

CHUNK_NUMEL = 8192
BLOCK_BYTES = 2048
"""Of a block, in the array with the smallest elements: a load of 16 bytes for each of 128 threads. Twice as much takes twice the
registers, see benchmarks/binaries.py."""
ROW_BLOCK = 128
COUNTS = ("num_chunks", "num_spans", "num_layers", "num_calls")
"""Arguments for which no value is special: 1, 16 and 17 layers run the same binary."""

# --- chunks and memory ---------------------------------------------------------------------------------------------------


@triton.jit
def is_wide(start, numel, w, g, state0, state1, CHUNK: tl.constexpr):
    """Whether a chunk is whole and everything in it lies at multiples of 16 bytes, so that it can be moved 16 bytes at a time."""
    return (start + CHUNK <= numel) & ((w | g | state0 | state1) % 16 == 0)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, IS_WIDE: tl.constexpr):
    there = address.to(tl.pointer_type(DTYPE))
    if IS_WIDE:
        there = tl.multiple_of(there, 16)
    return there


@triton.jit
def loaded(array, index, mask, T: tl.constexpr, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        return tl.load(array + index).to(T)
    else:
        return tl.load(array + index, mask=mask, other=0.0).to(T)


@triton.jit
def stored(array, index, mask, values, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        tl.store(array + index, values)
    else:
        tl.store(array + index, values, mask=mask)


# --- layers that are finished ---------------------------------------------------------------------------------------------


@triton.jit
def arrives_last(counter, num_arrivals):
    """Counts this program in; whether it is the last of so many, which sees what each of them had stored before it was counted in.

    The last one sets the counter to 0 again, so that the next launch, or a replay of a CUDA graph, finds it as this one did.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_arrivals - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def added_up(sums, first, end, BLOCK: tl.constexpr):
    """The sum of what other programs have stored there, past the cache that is this multiprocessor's own."""
    parts = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        parts += tl.load(sums + index, mask=index < end, other=0.0, cache_modifier=".cg")
    return tl.sum(parts, axis=0)


# --- the passes ---------------------------------------------------------------------------------------------------------


@triton.jit
def looked_up(
    chunk,
    chunks,  # [2, num_chunks] int64: span, first element in the span
    num_chunks,
    spans,  # [4, num_spans] int64: numel, row, layer_start, tensor
    num_spans,
    addresses,  # [4, num_spans] int64: weight, grad, state 0, state 1; then [num_tensors]: the fp32 step counts
    CHUNK: tl.constexpr,
):
    """Of a chunk: row of its layer, first element in the span, the span's elements and where it begins in the layer, addresses of
    weight, gradient and state."""
    span = tl.load(chunks + chunk)
    start = tl.multiple_of(tl.load(chunks + num_chunks + chunk), CHUNK)
    numel = tl.load(spans + span)
    row = tl.load(spans + num_spans + span)
    layer_start = tl.load(spans + 2 * num_spans + span)
    w = tl.load(addresses + span)
    g = tl.load(addresses + num_spans + span)
    state0 = tl.load(addresses + 2 * num_spans + span)
    state1 = tl.load(addresses + 3 * num_spans + span)
    return row, start, numel, layer_start, w, g, state0, state1


@triton.jit
def first_chunk(
    w_address,
    g_address,
    state0_address,
    state1_address,
    start,
    numel,
    layer_start,
    step,
    seed,
    scale,
    grad_norm,
    decay,
    rule_options,
    ALGORITHM: tl.constexpr,
    CORRECTS: tl.constexpr,
    DECAY_BEFORE_NORM: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    IS_WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Renews the state of a chunk if the rule accumulates; the sums of squares of its weights and its directions: the first, and of
    LANS the second."""
    weights = pointer(w_address, W, IS_WIDE)
    grads = pointer(g_address, G, IS_WIDE)
    state0 = pointer(state0_address, S, IS_WIDE)
    state1 = pointer(state1_address, S, IS_WIDE)
    weight_sums = tl.zeros((BLOCK,), tl.float64)
    direction_sums = tl.zeros((BLOCK,), tl.float64)
    second_sums = tl.zeros((BLOCK,), tl.float64)
    of_m, of_g, of_v, of_g2, eps = coefficients(rule_options, step, ALGORITHM, CORRECTS, T)
    momentum = tl.load(rule_options + MOMENTUM)
    beta1 = tl.load(rule_options + BETA1)
    beta2 = tl.load(rule_options + BETA2)
    for offset in range(0, CHUNK if IS_WIDE else tl.minimum(numel - start, CHUNK), BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        mask = index < numel
        w = loaded(weights, index, mask, T, IS_WIDE)
        g = loaded(grads, index, mask, T, IS_WIDE) * scale
        if ALGORITHM == LANS_:
            g = g / grad_norm
        u = g
        if DECAY_BEFORE_NORM:
            u = g + decay * w
        if ALGORITHM != LARS2017_:
            old_m = loaded(state0, index, mask, T, IS_WIDE)
            if ALGORITHM == LARS2019_:
                m = momentum.to(T) * old_m + (1.0 - momentum).to(T) * (g + decay * w)
                v = m
                is_good = is_finite(m)
                m = tl.where(is_good, m, old_m)
                if S == tl.bfloat16:
                    m = stochastically_rounded(m, layer_start + index, seed, step, 0)
                stored(state0, index, mask, m.to(S), IS_WIDE)
            else:
                old_v = loaded(state1, index, mask, T, IS_WIDE)
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
                stored(state0, index, mask, m.to(S), IS_WIDE)
                stored(state1, index, mask, v.to(S), IS_WIDE)
            u = direction(w, g, m, v, of_m, of_g, of_v, of_g2, eps, decay, ALGORITHM, CORRECTS, T)
            u = tl.where(is_good, u, float("nan"))
            if ALGORITHM == LANS_:
                c = tl.where(is_good, gradient_direction(w, g, v, of_v, eps, decay, T), float("nan"))
                c64 = (c if IS_WIDE else tl.where(mask, c, 0.0)).to(tl.float64)
                second_sums += c64 * c64
        w64 = w.to(tl.float64)
        u64 = (u if IS_WIDE else tl.where(mask, u, 0.0)).to(tl.float64)
        weight_sums += w64 * w64
        direction_sums += u64 * u64
    return tl.sum(weight_sums, axis=0), tl.sum(direction_sums, axis=0), tl.sum(second_sums, axis=0)


@triton.jit
def decide(
    row,
    weight_sum,
    direction_sum,
    second_sum,
    rows,
    num_layers,
    rule_options,
    lr_pointer,
    before,
    decisions,  # [3, num_layers] fp64, written: trust ratio, weight decay in force, shrinkage; of LANS [4, num_layers]: the second ratio
    moved,  # [num_layers] int8, written
    stats,  # [5, num_layers] fp64, of LANS [8, num_layers], written where the layer moves: see LayerStats
    ALGORITHM: tl.constexpr,
    HAS_NORM_BOUNDS: tl.constexpr,
    HAS_RATIO_BOUNDS: tl.constexpr,
    LARC_CLIP: tl.constexpr,
    DECAY_IN_RATIO: tl.constexpr,
    DAMPS: tl.constexpr,
    SKIPS_ZERO_NORMS: tl.constexpr,
    T: tl.constexpr,
):
    """What the sums of squares over a whole layer say of it: its trust ratio, and whether it moves."""
    lr = tl.load(lr_pointer)
    decay = tl.load(rows + row)
    shrinkage = 1.0 - lr * tl.load(rows + 2 * num_layers + row)
    weight_norm = tl.sqrt(weight_sum) * tl.abs(shrinkage)
    direction_norm = tl.sqrt(direction_sum)
    is_adapted = tl.load(rows + 3 * num_layers + row) > 0
    is_defined = (weight_norm > 0) & (direction_norm > 0)
    numerator = weight_norm
    denominator = direction_norm
    if HAS_NORM_BOUNDS:
        high = tl.load(rule_options + NORM_HIGH)
        numerator = tl.minimum(tl.maximum(numerator, tl.load(rule_options + NORM_LOW)), high)
    if ALGORITHM == LARS2017_:
        coefficient = tl.load(rule_options + TRUST_COEFFICIENT)
        if DAMPS:
            coefficient = coefficient * (1.0 - tl.load(rule_options + MOMENTUM))
        numerator = coefficient * numerator
        if DECAY_IN_RATIO:
            denominator = denominator + decay * weight_norm
        denominator = denominator + tl.load(rule_options + EPS)
    if ALGORITHM == LARS2019_:
        denominator = denominator + tl.load(rule_options + EPS)
    ratio = numerator / tl.where(is_defined, denominator, 1.0)
    if HAS_RATIO_BOUNDS:
        ratio = tl.minimum(tl.maximum(ratio, tl.load(rule_options + RATIO_LOW)), tl.load(rule_options + RATIO_HIGH))
    ratio = tl.where(is_defined, ratio, 1.0)
    if LARC_CLIP:
        ratio = tl.where(ratio < lr, ratio / lr, 1.0)
    if SKIPS_ZERO_NORMS:
        if LARC_CLIP:
            ratio = tl.where(is_defined, ratio, 1.0)
        decay = tl.where(is_defined, decay, 0.0)
    rounded_ratio = tl.where(is_adapted, ratio, 1.0).to(T)
    ratio = rounded_ratio.to(tl.float64)
    does_move = is_finite(weight_sum) & is_finite(direction_sum)
    if ALGORITHM == LANS_:
        second_norm = tl.sqrt(second_sum)
        is_second_defined = (weight_norm > 0) & (second_norm > 0)
        second_ratio = numerator / tl.where(is_second_defined, second_norm, 1.0)
        if HAS_RATIO_BOUNDS:
            low = tl.load(rule_options + RATIO_LOW)
            second_ratio = tl.minimum(tl.maximum(second_ratio, low), tl.load(rule_options + RATIO_HIGH))
        second_ratio = tl.where(is_adapted & is_second_defined, second_ratio, 1.0).to(T).to(tl.float64)
        tl.store(decisions + 3 * num_layers + row, second_ratio)
        does_move = does_move & is_finite(second_sum)
    tl.store(decisions + row, ratio)
    tl.store(decisions + num_layers + row, decay)
    tl.store(decisions + 2 * num_layers + row, shrinkage)
    tl.store(moved + row, does_move.to(tl.int8))
    # a layer that has never moved has NaN there, and shows what was found
    earlier = tl.load(stats + row)
    is_shown = does_move | (earlier != earlier)
    local_lr = (lr.to(T) * rounded_ratio).to(tl.float64)
    tl.store(stats + row, weight_norm, mask=is_shown)
    tl.store(stats + num_layers + row, direction_norm, mask=is_shown)
    if ALGORITHM == LANS_:
        tl.store(stats + 2 * num_layers + row, second_norm, mask=is_shown)
        tl.store(stats + 3 * num_layers + row, ratio, mask=is_shown)
        tl.store(stats + 4 * num_layers + row, second_ratio, mask=is_shown)
        tl.store(stats + 5 * num_layers + row, local_lr, mask=is_shown)
        tl.store(stats + 6 * num_layers + row, decay, mask=is_shown)
        tl.store(stats + 7 * num_layers + row, tl.load(before + num_layers + row), mask=is_shown)
    else:
        tl.store(stats + 2 * num_layers + row, ratio, mask=is_shown)
        tl.store(stats + 3 * num_layers + row, local_lr, mask=is_shown)
        tl.store(stats + 4 * num_layers + row, decay, mask=is_shown)


@triton.jit(do_not_specialize=COUNTS)
def first_kernel(
    chunks,  # this and the next four: see looked_up
    num_chunks,
    spans,
    num_spans,
    addresses,
    row_chunks,  # [2, num_layers] int64: first chunk, end
    rows,  # [4, num_layers] fp64: coupled weight decay, seed of the rounding, decoupled weight decay, whether adapted
    num_layers,
    rule_options,
    grad_scale,  # 0-dim fp64
    lr_pointer,  # 0-dim fp64
    before,  # of LANS, see square_kernel
    arrivals,  # [num_layers + 1] int32, zeros
    sums,  # [2, num_chunks] fp64, of LANS [3, num_chunks], written
    step_numbers,  # [num_layers] fp64, written
    decisions,  # see decide; or, unless DECIDES, [num_layers, 2] fp64, of LANS [num_layers, 3], written: the sums
    moved,  # this and the next: see decide
    stats,
    DECIDES: tl.constexpr,
    ALGORITHM: tl.constexpr,
    CORRECTS: tl.constexpr,
    DECAY_BEFORE_NORM: tl.constexpr,
    HAS_NORM_BOUNDS: tl.constexpr,
    HAS_RATIO_BOUNDS: tl.constexpr,
    LARC_CLIP: tl.constexpr,
    DECAY_IN_RATIO: tl.constexpr,
    DAMPS: tl.constexpr,
    SKIPS_ZERO_NORMS: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row, start, numel, layer_start, w, g, state0, state1 = looked_up(
        chunk, chunks, num_chunks, spans, num_spans, addresses, CHUNK
    )
    step = tl.zeros((), tl.float64)
    if HAS_STEPS:
        tensor = tl.load(spans + 3 * num_spans + tl.load(chunks + chunk))
        counter = tl.load(addresses + 4 * num_spans + tensor).to(tl.pointer_type(tl.float32))
        step = tl.load(counter).to(tl.float64) + 1.0
    scale = tl.load(grad_scale).to(T)
    decay = tl.load(rows + row).to(T)
    seed = tl.load(rows + num_layers + row).to(tl.int64)
    grad_norm = scale
    if ALGORITHM == LANS_:
        grad_norm = tl.load(before + row).to(T)
    if is_wide(start, numel, w, g, state0, state1, CHUNK):
        weight_sum, direction_sum, second_sum = first_chunk(
            w, g, state0, state1, start, numel, layer_start, step, seed, scale, grad_norm, decay, rule_options,
            ALGORITHM, CORRECTS, DECAY_BEFORE_NORM, T, W, G, S, True, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        weight_sum, direction_sum, second_sum = first_chunk(
            w, g, state0, state1, start, numel, layer_start, step, seed, scale, grad_norm, decay, rule_options,
            ALGORITHM, CORRECTS, DECAY_BEFORE_NORM, T, W, G, S, False, CHUNK, BLOCK,
        )  # fmt: skip
    tl.store(sums + chunk, weight_sum)
    tl.store(sums + num_chunks + chunk, direction_sum)
    if ALGORITHM == LANS_:
        tl.store(sums + 2 * num_chunks + chunk, second_sum)
    first = tl.load(row_chunks + row)
    end = tl.load(row_chunks + num_layers + row)
    if arrives_last(arrivals + row, end - first):
        weight_sum = added_up(sums, first, end, ROW_BLOCK)
        direction_sum = added_up(sums + num_chunks, first, end, ROW_BLOCK)
        second_sum = direction_sum
        if ALGORITHM == LANS_:
            second_sum = added_up(sums + 2 * num_chunks, first, end, ROW_BLOCK)
        tl.store(step_numbers + row, step)
        if DECIDES:
            decide(
                row, weight_sum, direction_sum, second_sum,
                rows, num_layers, rule_options, lr_pointer, before, decisions, moved, stats,
                ALGORITHM, HAS_NORM_BOUNDS, HAS_RATIO_BOUNDS, LARC_CLIP, DECAY_IN_RATIO, DAMPS, SKIPS_ZERO_NORMS, T,
            )  # fmt: skip
        elif ALGORITHM == LANS_:
            tl.store(decisions + 3 * row, weight_sum)
            tl.store(decisions + 3 * row + 1, direction_sum)
            tl.store(decisions + 3 * row + 2, second_sum)
        else:
            tl.store(decisions + 2 * row, weight_sum)
            tl.store(decisions + 2 * row + 1, direction_sum)


@triton.jit
def second_chunk(
    w_address,
    g_address,
    state0_address,
    state1_address,
    start,
    numel,
    layer_start,
    step,
    seed,
    scale,
    lr,
    ratio,
    second_ratio,
    grad_norm,
    decay,
    shrinkage,
    rule_options,
    ALGORITHM: tl.constexpr,
    CORRECTS: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    IS_WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the new weights of a chunk, and the state of a rule that does not accumulate."""
    weights = pointer(w_address, W, IS_WIDE)
    grads = pointer(g_address, G, IS_WIDE)
    state0 = pointer(state0_address, S, IS_WIDE)
    state1 = pointer(state1_address, S, IS_WIDE)
    of_m, of_g, of_v, of_g2, eps = coefficients(rule_options, step, ALGORITHM, CORRECTS, T)
    momentum = tl.load(rule_options + MOMENTUM).to(T)
    inside = ratio
    outside = lr.to(T)
    if LR_IN_MOMENTUM:
        inside = lr.to(T) * ratio
        outside = tl.full((), 1.0, T)
    step_size = lr
    if CORRECTS == CORRECTION_IN_LR:
        corrected = tl.sqrt(one_minus_power(rule_options, BETA2, LOG_BETA2, step))
        step_size = lr * corrected / one_minus_power(rule_options, BETA1, LOG_BETA1, step)
    beta1 = tl.load(rule_options + BETA1)
    from_momentum = lr.to(T) * (beta1.to(T) * ratio)
    from_gradient = lr.to(T) * ((1.0 - beta1).to(T) * second_ratio)
    for offset in range(0, CHUNK if IS_WIDE else tl.minimum(numel - start, CHUNK), BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        mask = index < numel
        old_w = loaded(weights, index, mask, T, IS_WIDE)
        w = old_w * shrinkage
        m = loaded(state0, index, mask, T, IS_WIDE)
        if ALGORITHM == LARS2017_:
            g = loaded(grads, index, mask, T, IS_WIDE) * scale
            fresh = inside * (g + decay * w)
            velocity = momentum * m + fresh
            update = velocity
            if IS_NESTEROV:
                update = fresh + momentum * velocity
            new_w = w - outside * update
            is_good = is_finite(new_w) & is_finite(velocity)
            if S == tl.bfloat16:
                velocity = stochastically_rounded(velocity, layer_start + index, seed, step, 0)
            stored(state0, index, mask, tl.where(is_good, velocity, m).to(S), IS_WIDE)
        else:
            g = w
            v = m
            if ALGORITHM != LARS2019_:
                v = loaded(state1, index, mask, T, IS_WIDE)
            if (ALGORITHM == NLAMB_) | (ALGORITHM == NNLAMB_) | (ALGORITHM == LANS_):
                g = loaded(grads, index, mask, T, IS_WIDE) * scale
            u = direction(w, g, m, v, of_m, of_g, of_v, of_g2, eps, decay, ALGORITHM, CORRECTS, T)
            if ALGORITHM == LANS_:
                c = gradient_direction(w, g / grad_norm, v, of_v, eps, decay, T)
                new_w = w - from_momentum * u - from_gradient * c
            else:
                new_w = w - step_size.to(T) * ratio * u
            is_good = is_finite(new_w)
        stored(weights, index, mask, tl.where(is_good, new_w, old_w).to(W), IS_WIDE)


@triton.jit
def count(
    calls,
    num_calls,
    num_skipped,
    num_skipped_layers,
    BLOCK: tl.constexpr,
):
    """Counts a step of several calls in the state of their tensors unless no layer has moved, and what was left alone."""
    num_moved = tl.zeros((BLOCK,), tl.int64)
    num_layers = tl.zeros((), tl.int64)
    for call in range(num_calls):
        moved = tl.load(calls + call).to(tl.pointer_type(tl.int8))
        num_rows = tl.load(calls + num_calls + call)
        for start in range(0, num_rows, BLOCK):
            index = start + tl.arange(0, BLOCK)
            num_moved += tl.load(moved + index, mask=index < num_rows, other=0).to(tl.int64)
        num_layers += num_rows
    num_all_moved = tl.sum(num_moved, axis=0)
    tl.store(num_skipped_layers, tl.load(num_skipped_layers) + num_layers - num_all_moved)
    if num_all_moved == 0:
        tl.store(num_skipped, tl.load(num_skipped) + 1)
    else:
        for call in range(num_calls):
            counters = tl.load(calls + 3 * num_calls + call).to(tl.pointer_type(tl.int64))
            num_steps = tl.load(calls + 4 * num_calls + call)
            for start in range(0, num_steps, BLOCK):
                index = start + tl.arange(0, BLOCK)
                counter = tl.load(counters + index, mask=index < num_steps, other=0).to(tl.pointer_type(tl.float32))
                taken = tl.load(counter, mask=index < num_steps, other=0.0)
                tl.store(counter, taken + 1.0, mask=index < num_steps)


@triton.jit(do_not_specialize=COUNTS)
def second_kernel(
    chunks,  # this and the next four: see looked_up
    num_chunks,
    spans,
    num_spans,
    addresses,
    rows,
    num_layers,
    rule_options,
    grad_scale,
    lr_pointer,  # 0-dim fp64
    before,  # of LANS, see square_kernel
    step_numbers,  # [num_layers] fp64
    decisions,  # see decide
    moved,  # [num_layers] int8
    calls,  # [5, num_calls] int64: addresses of moved, num_layers, of the gradients' sums, of the step counts' addresses; num_steps
    num_calls,
    num_skipped,  # 0-dim int64 each, written if COUNTS: steps, layers
    num_skipped_layers,
    COUNTS: tl.constexpr,
    ALGORITHM: tl.constexpr,
    CORRECTS: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    LR_IN_MOMENTUM: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    # from the last chunk to the first, because the last are still in the cache
    chunk = num_chunks - 1 - tl.program_id(0).to(tl.int64)
    if chunk < 0:  # one program more, in the last call's launch
        if COUNTS:
            count(calls, num_calls, num_skipped, num_skipped_layers, ROW_BLOCK)
        return
    row, start, numel, layer_start, w, g, state0, state1 = looked_up(
        chunk, chunks, num_chunks, spans, num_spans, addresses, CHUNK
    )
    if tl.load(moved + row) == 0:
        return
    step = tl.zeros((), tl.float64)
    if HAS_STEPS:
        step = tl.load(step_numbers + row)
    scale = tl.load(grad_scale).to(T)
    seed = tl.load(rows + num_layers + row).to(tl.int64)
    lr = tl.load(lr_pointer)
    ratio = tl.load(decisions + row).to(T)
    decay = tl.load(decisions + num_layers + row).to(T)
    shrinkage = tl.load(decisions + 2 * num_layers + row).to(T)
    second_ratio = ratio
    grad_norm = scale
    if ALGORITHM == LANS_:
        second_ratio = tl.load(decisions + 3 * num_layers + row).to(T)
        grad_norm = tl.load(before + row).to(T)
    if is_wide(start, numel, w, g, state0, state1, CHUNK):
        second_chunk(
            w, g, state0, state1, start, numel, layer_start, step, seed, scale, lr, ratio, second_ratio, grad_norm, decay, shrinkage,
            rule_options,
            ALGORITHM, CORRECTS, IS_NESTEROV, LR_IN_MOMENTUM, T, W, G, S, True, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        second_chunk(
            w, g, state0, state1, start, numel, layer_start, step, seed, scale, lr, ratio, second_ratio, grad_norm, decay, shrinkage,
            rule_options,
            ALGORITHM, CORRECTS, IS_NESTEROV, LR_IN_MOMENTUM, T, W, G, S, False, CHUNK, BLOCK,
        )  # fmt: skip


@triton.jit
def square_chunk(
    address,
    start,
    numel,
    scale,
    T: tl.constexpr,
    D: tl.constexpr,
    IS_WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    values = pointer(address, D, IS_WIDE)
    total = tl.zeros((BLOCK,), tl.float64)
    for offset in range(0, CHUNK if IS_WIDE else tl.minimum(numel - start, CHUNK), BLOCK):
        index = start + offset + tl.arange(0, BLOCK)
        x = (loaded(values, index, index < numel, T, IS_WIDE) * scale).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def clip(
    calls,
    num_calls,
    factor,
    max_norm,
    clipped,
    BLOCK: tl.constexpr,
):
    """What gradients are to be multiplied by so that their norm, over all calls, is at most ``max_norm``."""
    total = tl.zeros((), tl.float64)
    for call in range(num_calls):
        squares = tl.load(calls + 2 * num_calls + call).to(tl.pointer_type(tl.float64))
        total += added_up(squares, 0, tl.load(calls + num_calls + call), BLOCK)
    scale = tl.load(factor)
    bound = tl.load(max_norm)
    norm = tl.sqrt(total) * scale
    tl.store(clipped, bound / tl.where(norm < bound, bound, norm) * scale)  # NaN stays NaN


@triton.jit(do_not_specialize=COUNTS)
def square_kernel(
    chunks,  # this and the next four: see looked_up
    num_chunks,
    spans,
    num_spans,
    addresses,
    row_chunks,  # [2, num_layers] int64: first chunk, end
    num_layers,
    grad_scale,  # 0-dim fp64
    arrivals,  # [num_layers + 1] int32, zeros
    sums,  # [num_chunks] fp64, written: of the squares of the gradients times the scale, rounded to T before they are squared
    before,  # [3, num_layers] fp64, written: what a layer's gradient is divided by, NaN where it is not finite; its norm; the sum
    calls,  # see second_kernel
    num_calls,
    factor,  # this and the next: 0-dim fp64
    max_norm,
    clipped,  # 0-dim fp64, written if CLIPS
    CLIPS: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    span = tl.load(chunks + chunk)
    start = tl.multiple_of(tl.load(chunks + num_chunks + chunk), CHUNK)
    numel = tl.load(spans + span)
    row = tl.load(spans + num_spans + span)
    address = tl.load(addresses + num_spans + span)
    scale = tl.load(grad_scale).to(T)
    if is_wide(start, numel, address, address, address, address, CHUNK):
        total = square_chunk(address, start, numel, scale, T, G, True, CHUNK, BLOCK)
    else:
        total = square_chunk(address, start, numel, scale, T, G, False, CHUNK, BLOCK)
    tl.store(sums + chunk, total)
    first = tl.load(row_chunks + row)
    end = tl.load(row_chunks + num_layers + row)
    if arrives_last(arrivals + row, end - first):
        total = added_up(sums, first, end, ROW_BLOCK)
        norm = tl.sqrt(total)
        divisor = norm.to(T).to(tl.float64)
        divisor = tl.where(divisor > 0, divisor, 1.0)
        tl.store(before + row, tl.where(is_finite(total), divisor, float("nan")))
        tl.store(before + num_layers + row, norm)
        tl.store(before + 2 * num_layers + row, total)
        if CLIPS:
            if arrives_last(arrivals + num_layers, num_layers):
                clip(calls, num_calls, factor, max_norm, clipped, ROW_BLOCK)


@triton.jit
def probe_kernel(x):  # 0-dim fp32, written
    tl.store(x, 1.0)
