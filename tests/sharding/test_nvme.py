"""ZeRO 3 with optimizer state, or state and parameters, on a disk."""

import pytest

from support import engine_runs

NUM_STEPS = 6


def nvme_is_possible():
    import deepspeed

    return bool(deepspeed.ops.__compatible_ops__.get("async_io", False))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["optimizer", "optimizer and parameters"])
@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
def test_equals_unsharded(rank_pool, tmp_path, algorithm, what, world_size):
    if not all(rank_pool.run(1, nvme_is_possible)):
        pytest.skip("DeepSpeed's async_io cannot be built here: it needs libaio's headers (Debian: libaio-dev)")
    device = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False}
    zero = {"sub_group_size": 700, "offload_optimizer": device}
    if "parameters" in what:
        zero["offload_param"] = device | {"buffer_count": 12, "buffer_size": 10**5}
    options = dict(zero=zero, num_groups=2)
    results = rank_pool.run(world_size, engine_runs.train, algorithm, 3, "bf16", NUM_STEPS, **options)
    expected, ratios = engine_runs.unsharded(algorithm, NUM_STEPS, 2)
    for result in results:
        assert result["ratios"] == ratios
