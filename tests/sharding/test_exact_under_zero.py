"""The real engine on gloo ranks against plain PyTorch: same masters, and the same trust ratios on every rank."""

import functools

import pytest

from support import engine_runs
from support.problems import relative_error

NUM_STEPS = 50
BOUND = 3e-6


@functools.cache
def reference(algorithm, num_groups):
    return engine_runs.unsharded(algorithm, NUM_STEPS, num_groups)


WRAPPERS = {
    "stage0-fp32": (dict(stage=0, dtype="fp32"), "LARS|LAMB|NLAMB|NNLAMB"),
    "stage0-bf16": (dict(stage=0, dtype="bf16"), "FP16_UnfusedOptimizer"),
    "stage0-fp16": (dict(stage=0, dtype="fp16"), "FP16_UnfusedOptimizer"),
    "stage1-fp32": (dict(stage=1, dtype="fp32"), "DeepSpeedZeroOptimizer"),
    "stage1-bf16": (dict(stage=1, dtype="bf16"), "DeepSpeedZeroOptimizer"),
    "stage1-bf16-fp32acc": (dict(stage=1, dtype="bf16", grad_accum="fp32"), "BF16_Optimizer"),
    "stage1-fp16": (dict(stage=1, dtype="fp16"), "DeepSpeedZeroOptimizer"),
    "stage2-fp32": (dict(stage=2, dtype="fp32"), "DeepSpeedZeroOptimizer"),
}


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("algorithm", engine_runs.ALGORITHMS)
@pytest.mark.parametrize("layout", WRAPPERS)
def test_equals_unsharded(rank_pool, layout, algorithm, world_size, num_groups):
    options, wrapper = WRAPPERS[layout]
    results = rank_pool.run(
        world_size, engine_runs.train, algorithm, num_steps=NUM_STEPS, num_groups=num_groups, **options
    )
    assert results[0]["wrapper"] in wrapper.split("|")
    expected, expected_ratios = reference(algorithm, num_groups)
    assert relative_error(engine_runs.assemble([r["pieces"] for r in results]), expected) < BOUND
    for result in results:
        assert result["ratios"] == results[0]["ratios"], "trust ratios differ between ranks"
    for found, exact in zip(results[0]["ratios"], expected_ratios, strict=True):
        assert found.keys() == exact.keys()
        assert found == pytest.approx(exact, rel=1e-5)
    # first step: same weights, same gradients, so the very same bits in every layout
    assert results[0]["ratios"][0] == expected_ratios[0]
