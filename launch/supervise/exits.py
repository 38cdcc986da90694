"""How a rank ends: its exit codes, its one line if something is wrong, and what it says of ranks that are gone."""

from __future__ import annotations

import datetime
import os
import re
import sys

import torch.distributed as dist

from largebatch.launch.supervise import run_lock

DONE = 0
"""To the end, or to a checkpoint after Ctrl-C or SIGTERM."""

NOT_SAVED = 1
"""The last checkpoint could not be written. Also Python's own for an error that nobody expected."""

BAD_REQUEST = 2
"""Something is wrong with the request and will be the next time; one line says what."""

LOST_RANK = 3
"""Another rank, or the network to it, is gone; or an earlier run is still at work in the folder. May pass by itself."""


DEFAULT_MINUTES = 10
"""DeepSpeed's for the group of all ranks, unless DEEPSPEED_TIMEOUT says otherwise."""

CONNECTION_WORDS = re.compile(
    r"gloo|connection (closed|reset|refused)|broken pipe|socket|timed? ?out|address already in use|EADDRINUSE|TCPStore"
    r"|nccl.*(abort|error|remote)|process group.*(abort|watchdog)",
    re.IGNORECASE,
)


def timeout_of(section: dict) -> datetime.timedelta:
    """How long a collective may take before it is an error."""
    seconds = section["collective_timeout_seconds"]
    if seconds is None:
        return datetime.timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", DEFAULT_MINUTES)))
    return datetime.timedelta(seconds=seconds)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank, or the way to it, is gone. gloo's are plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, (RuntimeError, ConnectionError)) and bool(CONNECTION_WORDS.search(str(error)))


def explanation(
    error: BaseException, *, rank: int, world_size: int, step: int | None, timeout: datetime.timedelta
) -> str:
    """One line for the user."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "timed out" in reason.lower():
        what = (
            f"has waited {f'{timeout.total_seconds():g} s' if timeout else 'too long'} for the other ranks (largebatch.collective_timeout_seconds); one of them "
            "hangs, or is off the network"
        )
    else:
        what = "has lost the connection to another rank, which ended or is off the network"
    where = "while the run was being set up" if step is None else f"after step {step}"
    return (
        f"rank {rank} of {world_size} {what}, {where} ({reason[:200]}). Checkpoints written before are whole; continue with "
        "--resume, or start with `largebatch run`, which does so by itself"
    )


def refuse(error: Exception, *, is_of_one_rank: bool = False) -> int:
    """One line, from one rank if all have the same to say."""
    if os.environ.get("LARGEBATCH_TRACEBACK") == "1":
        raise error
    if isinstance(error, run_lock.FolderInUseError):
        print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
        return leave(LOST_RANK)
    if is_lost_rank(error):
        return give_up(error, step=None, timeout=None)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or is_of_one_rank or isinstance(error, RuntimeError):
        print(f"largebatch: error: {error}", file=sys.stderr, flush=True)
    return leave(BAD_REQUEST)


def give_up(error: Exception, *, step: int | None, timeout: datetime.timedelta | None) -> int:
    """One line on a rank that is gone. The process ends at once: taking the groups down would wait for the others."""
    if os.environ.get("LARGEBATCH_TRACEBACK") == "1":
        raise error
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    line = explanation(error, rank=rank, world_size=world_size, step=step, timeout=timeout)
    print(f"largebatch: error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST_RANK)


def leave(exit_code: int) -> int:
    """Takes the process group down; without it some runs abort while the interpreter ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    return exit_code
