"""The three kernels of a step in Triton, and the sums of squares of any tensors; launched by largebatch.kernels.triton_gpu.

One program works on one chunk of one layer. It finds its tensors through a table of addresses, so that whole parameters
and the segments of a flat partition are the same to it.
"""

import triton
import triton.language as tl

LARS2017_, LARS2019_, LAMB_, NLAMB_, NNLAMB_ = (tl.constexpr(i) for i in range(5))
NO_CORRECTION, CORRECTION, CORRECTION_IN_LR = (tl.constexpr(i) for i in range(3))

CHUNK_NUMEL = 8192
BLOCK_NUMEL = 1024
ROW_BLOCK = 128

# rows of the fp64 table of a rule's options; see triton_gpu.option_table
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
