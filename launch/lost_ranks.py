"""Ranks that are gone: how long the others wait for them, and what they say."""

from __future__ import annotations

import datetime
import os
import re

import torch.distributed as dist

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
