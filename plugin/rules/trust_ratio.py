"""Trust ratio of each layer, from two norms: the one formula that LARS and LAMB share.

Both papers scale a layer's step by ``numerator / denominator`` where the numerator holds the norm of the weights
and the denominator the norm of what is about to be subtracted from them. They differ in what goes into the two
(arXiv:1708.03888 Algorithm 1; arXiv:1904.00962 Algorithms 1 and 2); the zero and clip cases are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def phi(weight_norm: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """phi(||w||) of arXiv:1904.00962, section 3: the identity, or min(max(z, lower), upper).

    Args:
        weight_norm: [num_layers] fp64, read. L2 norms of whole layers.
        bounds: (lower, upper), both >= 0, in the unit of the weights; None for the identity.
    """
    return weight_norm if bounds is None else weight_norm.clamp(*bounds)


def guarded_ratio(
    numerator: Tensor,
    denominator: Tensor,
    *,
    weight_norm: Tensor,
    step_norm: Tensor,
    bounds: tuple[float, float] | None,
) -> Tensor:
    """numerator / denominator of each layer; exactly 1 where a norm is zero.

    A layer whose weights are all zero (a fresh bias) could never leave zero under a ratio of 0, and one whose
    gradient is zero has no direction to scale; every implementation known to us returns 1 for both.

    Args:
        numerator, denominator: [num_layers] fp64, read.
        weight_norm, step_norm: [num_layers] fp64, read. The two norms whose zeros are looked for.
        bounds: clamp of the result, (lower, upper), no unit; None for no clamp (both papers).

    Returns:
        [num_layers] fp64, no unit.
    """
    is_defined = (weight_norm > 0) & (step_norm > 0)
    ratio = numerator / torch.where(is_defined, denominator, 1.0)
    if bounds is not None:
        ratio = ratio.clamp(*bounds)
    return torch.where(is_defined, ratio, 1.0)
