"""fp32 -> bf16 with stochastic rounding from a counter: the same bits however a layer is cut, whichever the backend.

A value between two neighbouring bf16 numbers goes to the upper with the probability of its distance from the lower,
so that updates smaller than half a unit of the last place are not lost on average. The 16 random bits of an element
come from a hash of (layer, step, element, state), not from a stream: they need no memory and no order.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mixed(x: int) -> int:
    """The 32-bit finaliser of MurmurHash3 (Appleby, public domain): every input bit reaches every output bit."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & MASK
    x ^= x >> 13
    x = x * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def mixed_tensor(x: Tensor) -> Tensor:
    """:func:`mixed` of every element of an int64 tensor with values below 2**32."""
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & MASK
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def random_bits(numel: int, *, first: int, seed: int, step: Tensor, device: torch.device) -> Tensor:
    """[numel] int64 with 32 random bits each, for elements ``first`` .. ``first + numel`` of a layer.

    Args:
        seed: of the layer, 32 bits.
        step: 0-dim, number of the step being taken.
    """
    index = torch.arange(first, first + numel, dtype=torch.int64, device=device)
    key = mixed_tensor((step.to(device, torch.int64) + seed) & MASK)
    key = mixed_tensor(key ^ index >> 32)
    return mixed_tensor((index & MASK) ^ key)


def rounded_to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """``values`` in bf16, rounded up with the probability that ``bits`` stand for.

    Args:
        values: fp32, finite.
        bits: int64 of the same shape, 16 random bits each.
    """
    as_int = values.view(torch.int32).to(torch.int64) & MASK
    raised = as_int + bits
    # never up to infinity: the largest bf16 stays
    raised = torch.where((raised & 0x7F800000) == 0x7F800000, as_int, raised) & 0xFFFF0000
    signed = torch.where(raised >= 1 << 31, raised - (1 << 32), raised)
    return signed.to(torch.int32).view(torch.float32).to(torch.bfloat16)
