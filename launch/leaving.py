"""How a rank ends: with one line if something is wrong, and with the process group taken down where that can be."""

from __future__ import annotations

import datetime
import os
import sys

import torch.distributed as dist

from largebatch.launch import exit_codes, lost_ranks, run_lock


def refuse(error: Exception, *, is_of_one_rank: bool = False) -> int:
    """One line, from one rank if all have the same to say."""
    if os.environ.get("LARGEBATCH_TRACEBACK") == "1":
        raise error
    if isinstance(error, run_lock.FolderInUseError):
        print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
        return leave(exit_codes.LOST_RANK)
    if lost_ranks.is_lost_rank(error):
        return give_up(error, step=None, timeout=None)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or is_of_one_rank or isinstance(error, RuntimeError):
        print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
    return leave(exit_codes.BAD_REQUEST)


def give_up(error: Exception, *, step: int | None, timeout: datetime.timedelta | None) -> int:
    """One line on a rank that is gone. The process ends at once: taking the groups down would wait for the others."""
    if os.environ.get("LARGEBATCH_TRACEBACK") == "1":
        raise error
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    line = lost_ranks.explanation(error, rank=rank, world_size=world_size, step=step, timeout=timeout)
    print(f"largebatch: error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(exit_codes.LOST_RANK)


def leave(exit_code: int) -> int:
    """Takes the process group down; without it some runs abort while the interpreter ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    return exit_code
