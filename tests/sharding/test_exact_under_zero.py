"""The real engine on gloo ranks against plain PyTorch: same masters, and the same trust ratios on every rank."""

import functools

import pytest

from support import engine_runs
from support.problems import relative_error

NUM_STEPS = {1: 20, 2: 50, 3: 20, 4: 20}
"""By world size."""
BOUND = 3e-6


@functools.cache
def reference(algorithm, num_groups, num_steps):
    return engine_runs.unsharded(algorithm, num_steps, num_groups)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

LAYOUTS = {
    f"stage{stage}-{dtype}{'-offload' if is_offloaded else ''}": {
        "stage": stage,
        "dtype": dtype,
        # sub-groups of a few layers each, every one gathered for itself
        "zero": ({"sub_group_size": 700, "stage3_param_persistence_threshold": 0} if stage == 3 else {})
        | (OFFLOAD if is_offloaded else {}),
    }
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16", "fp16")
    for is_offloaded in (False, True)
    if stage > 0 or not is_offloaded  # DeepSpeed offloads nothing in stage 0
}


def wrapper_of(stage, dtype):
    if stage == 0:
        bf16 = "FP16_UnfusedOptimizer|BF16_Optimizer"  # the second in DeepSpeed 0.16
        return {"fp32": "LARS|LAMB|NLAMB|NNLAMB|LANS", "fp16": "FP16_UnfusedOptimizer", "bf16": bf16}[dtype]
    return "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer"


VARIANTS = [(algorithm, 2) for algorithm in engine_runs.ALGORITHMS] + [("LARS", 1), ("LAMB", 1)]


IN_SHORT = {("LARS", 2, 2), ("LARS", 2, 3), ("LAMB", 2, 2), ("LAMB", 2, 3)}
CASES = [
    pytest.param(
        layout,
        algorithm,
        num_groups,
        world_size,
        id=f"{layout}-{algorithm}-{num_groups}-{world_size}",
        marks=() if (algorithm, num_groups, world_size) in IN_SHORT else pytest.mark.full,
    )
    for layout in LAYOUTS
    for algorithm, num_groups in VARIANTS
    for world_size in (1, 2, 3, 4)
]


@pytest.mark.parametrize("layout, algorithm, num_groups, world_size", CASES)
def test_equals_unsharded(rank_pool, layout, algorithm, num_groups, world_size):
    options = LAYOUTS[layout]
    results = rank_pool.run(
        world_size, engine_runs.train, algorithm, num_steps=NUM_STEPS[world_size], num_groups=num_groups, **options
    )
    assert results[0]["wrapper"] in wrapper_of(options["stage"], options["dtype"]).split("|")
    expected, expected_ratios = reference(algorithm, num_groups, NUM_STEPS[world_size])
    assert relative_error(engine_runs.assemble([r["pieces"] for r in results]), expected) < BOUND
    for result in results:
        assert result["ratios"] == results[0]["ratios"], "trust ratios differ between ranks"
    # same weights, same gradients: the very same bits in every layout and world, at every step
    assert results[0]["ratios"] == expected_ratios
