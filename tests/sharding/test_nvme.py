"""ZeRO 3 with optimizer state, or state and parameters, on a disk."""

import subprocess
import sys

import pytest

from support import engine_runs

NUM_STEPS = 6


BUILD = """
import deepspeed
from deepspeed.accelerator import get_accelerator
if not deepspeed.ops.__compatible_ops__.get("async_io"):
    raise SystemExit("it needs libaio's headers (Debian: libaio-dev) and a compiler")
get_accelerator().create_op_builder("AsyncIOBuilder").load()
"""


@pytest.fixture(scope="module")
def async_io():
    """DeepSpeed compiles its disk access on first use, which takes minutes; here, and not inside a rank."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if result.returncode != 0:
        pytest.skip(f"DeepSpeed's async_io cannot be built here: {result.stderr.strip().splitlines()[-1]}")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["optimizer", "optimizer and parameters"])
@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
def test_equals_unsharded(rank_pool, async_io, tmp_path, algorithm, what, world_size):
    device = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False}
    zero = {"sub_group_size": 700, "offload_optimizer": device}
    if "parameters" in what:
        zero["offload_param"] = device | {"buffer_count": 12, "buffer_size": 10**5}
    options = dict(zero=zero, num_groups=2)
    results = rank_pool.run(world_size, engine_runs.train, algorithm, 3, "bf16", NUM_STEPS, **options)
    _, ratios = engine_runs.unsharded(algorithm, NUM_STEPS, 2)
    for result in results:
        assert result["ratios"] == ratios
