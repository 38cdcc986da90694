"""What the C library does with memory that tensors on the CPU let go of."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt (malloc.h)."""

SETTINGS = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
USERS_OWN = ("GLIBC_TUNABLES", "LD_PRELOAD")

KEPT = "memory: freed blocks are kept for the next tensors, which is faster on a CPU; any MALLOC_* variable switches that off"
NOT_KEPT = "memory: freed blocks are left to the C library: it is not glibc, or the environment sets how it allocates"


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed for the next tensor; returns whether it does. For this process and those it forks.

    By default glibc hands large blocks back to the system at once, and gets them anew, page by page and zeroed, for the next
    activation: that took half of AlexNet's time in bf16. Does nothing with another C library, or where the environment
    says how memory is allocated (MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD).
    """
    is_chosen_by_the_user = any(name in USERS_OWN or name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or is_chosen_by_the_user:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in SETTINGS])
