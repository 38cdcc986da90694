"""Random numbers that are a function of (seed, sample number, stream) and of nothing else.

So the same sample is augmented in the same way whatever the rank, the micro-batch, the worker that reads it, and wherever
a run was resumed. The hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: uint64 to uint64, one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashes(seed: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """[num] uint64, independent for different seeds, samples and streams.

    Args:
        samples: [num] sample numbers, integers >= 0.
        stream: which of several numbers that a sample needs.
    """
    state = mixed(np.asarray([seed], dtype=np.uint64) + GOLDEN_RATIO)
    state = mixed(state + np.asarray([stream + 1], dtype=np.uint64) * GOLDEN_RATIO)
    return mixed(state + (np.asarray(samples).astype(np.uint64) + np.uint64(1)) * GOLDEN_RATIO)


def uniforms(seed: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """[num] float64 in [0, 1)."""
    return (hashes(seed, samples, stream) >> np.uint64(11)) * 2.0**-53


def integers(seed: int, samples: np.ndarray, stream: int, limit: int) -> np.ndarray:
    """[num] int64 in [0, limit)."""
    return (uniforms(seed, samples, stream) * limit).astype(np.int64)
