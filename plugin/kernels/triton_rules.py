"""What the rules compute for each element, and for all elements of a layer, in Triton; see largebatch.rules for the formulas."""

import triton
import triton.language as tl

LARS2017_, LARS2019_, LAMB_, NLAMB_, NNLAMB_, LANS_ = (tl.constexpr(i) for i in range(6))
NO_CORRECTION, CORRECTION, CORRECTION_IN_LR = (tl.constexpr(i) for i in range(3))

NUMBERS = (
    "beta1", "beta2", "log_beta1", "log_beta2", "eps", "momentum", "trust_coefficient", "norm_low", "norm_high", "ratio_low",
    "ratio_high",
)  # fmt: skip
"""Rows of the fp64 table of a rule's numbers; see triton_gpu.numbers_of."""

(BETA1, BETA2, LOG_BETA1, LOG_BETA2, EPS, MOMENTUM, TRUST_COEFFICIENT, NORM_LOW, NORM_HIGH, RATIO_LOW, RATIO_HIGH) = (
    tl.constexpr(i) for i in range(len(NUMBERS))
)


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
def one_minus_power(rule_options, beta, log_beta, exponent):
    """1 - beta ** exponent in fp64, for beta >= 0."""
    value = tl.load(rule_options + beta)
    power = tl.exp(exponent * tl.load(rule_options + log_beta))
    return 1.0 - tl.where(value > 0, power, 0.0)


@triton.jit
def coefficients(rule_options, step, ALGORITHM: tl.constexpr, CORRECTS: tl.constexpr, T: tl.constexpr):
    """Of m and g in m_hat, of v and g^2 in v_hat, and eps; the same for all elements of a layer."""
    of_m = tl.full((), 1.0, T)
    of_g = tl.full((), 0.0, T)
    of_v = tl.full((), 1.0, T)
    of_g2 = tl.full((), 0.0, T)
    if (ALGORITHM == LAMB_) | (ALGORITHM == LANS_):
        if CORRECTS == CORRECTION:
            of_m = (1.0 / one_minus_power(rule_options, BETA1, LOG_BETA1, step)).to(T)
            of_v = (1.0 / one_minus_power(rule_options, BETA2, LOG_BETA2, step)).to(T)
    elif (ALGORITHM == NLAMB_) | (ALGORITHM == NNLAMB_):
        beta1 = tl.load(rule_options + BETA1)
        beta2 = tl.load(rule_options + BETA2)
        of_m = (beta1 / one_minus_power(rule_options, BETA1, LOG_BETA1, step + 1)).to(T)
        of_g = ((1.0 - beta1) / one_minus_power(rule_options, BETA1, LOG_BETA1, step)).to(T)
        if ALGORITHM == NLAMB_:
            of_v = (beta2 / one_minus_power(rule_options, BETA2, LOG_BETA2, step)).to(T)
        else:
            of_v = (beta2 / one_minus_power(rule_options, BETA2, LOG_BETA2, step + 1)).to(T)
            of_g2 = ((1.0 - beta2) / one_minus_power(rule_options, BETA2, LOG_BETA2, step)).to(T)
    return of_m, of_g, of_v, of_g2, tl.load(rule_options + EPS).to(T)


@triton.jit
def direction(
    w, g, m, v, of_m, of_g, of_v, of_g2, eps, decay,
    ALGORITHM: tl.constexpr, CORRECTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Rule.direction of rules that accumulate."""
    if ALGORITHM == LARS2019_:
        return m
    else:
        m_hat = m
        v_hat = v
        if (ALGORITHM == LAMB_) | (ALGORITHM == LANS_):
            if CORRECTS == CORRECTION:
                m_hat = m * of_m
                v_hat = v * of_v
        else:
            m_hat = of_m * m + of_g * g
            v_hat = of_v * v
            if ALGORITHM == NNLAMB_:
                v_hat = v_hat + of_g2 * (g * g)
        return m_hat / (root(v_hat, T) + eps) + decay * w


@triton.jit
def gradient_direction(w, g, v, of_v, eps, decay, T: tl.constexpr):
    """The second direction of LANS."""
    return g / (root(v * of_v, T) + eps) + decay * w


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
