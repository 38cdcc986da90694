"""The Triton kernels through the real compiler, down to machine code for GPUs that this machine need not have."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = pathlib.Path(__file__).parents[1] / "support" / "compile_triton.py"
NUM_READ = {"first": {0: 2, 1: 3, 2: 4, 3: 4, 4: 4, 5: 4}, "second": {0: 3, 1: 2, 2: 3, 3: 4, 4: 4, 5: 4}}
"""Arrays that a pass reads, by algorithm. The second pass of LAMB takes its update from the moments."""
NUM_WRITTEN = {"first": {0: 0, 1: 1, 2: 2, 3: 2, 4: 2, 5: 2}, "second": {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}}


@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
def test_every_kernel_compiles_and_moves_16_bytes_at_a_time(capability, tmp_path):
    """A block is a load of 16 bytes for each thread of the array with the smallest elements."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 6 * 3 * (2 + 2) + 2 * 2
    for name, count in found.items():
        assert count["local memory"] == 0, f"{name} has arrays that do not fit into registers"
        kernel, *case = name.split()
        if kernel in NUM_READ and case[1] == "fp32":
            assert count["wide loads"] == NUM_READ[kernel][int(case[0])], name
            assert count["wide stores"] == NUM_WRITTEN[kernel][int(case[0])], name
        # first its layer, then, where a step is clipped, all layers
        num_arrivals = {"first": 1, "second": 0, "square": 1}[kernel] + (kernel == "square" and case[1] == "fp64")
        assert count["arrivals"] == count["atomics"] == num_arrivals, f"{name}: nothing is atomic but counters"
        assert count["arrivals after a barrier"] == num_arrivals, (
            f"{name} counts itself in before all its threads are done"
        )
        assert (count["loads past the cache"] > 0) == (num_arrivals > 0), name
