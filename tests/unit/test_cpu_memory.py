"""What is freed is kept: counted in page faults, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

NUM_TENSORS, MEGABYTES = 20, 40

SCRIPT = f"""
import resource, sys, torch
from largebatch.launch.trainer.cpu_memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range({NUM_TENSORS}):  # the heap takes a few rounds to settle
    torch.ones({MEGABYTES} * 2**18)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({NUM_TENSORS}):
    torch.ones({MEGABYTES} * 2**18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def run(mode, **variables):
    """What keep_freed_memory returned, and the page faults of allocating and freeing tensors again and again."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], env=environment | variables, check=True, capture_output=True, text=True
    )
    returned, faults = out.stdout.split()
    return returned, int(faults)


def test_freed_memory_is_used_again():
    pages = NUM_TENSORS * MEGABYTES * 2**20 // os.sysconf("SC_PAGE_SIZE")
    _, without = run("leave")
    assert without > pages / 2, "else there is nothing to be gained, and this test shows nothing"
    returned, kept = run("keep")
    assert returned == "True" and kept < pages / 20


def test_the_users_own_choice_stays():
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        returned, _ = run("keep", **{name: "2" if name.startswith("MALLOC_") else "glibc.malloc.arena_max=2"})
        assert returned == "False"
