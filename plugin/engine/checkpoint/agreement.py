"""An error on one rank becomes one on all: alone, the rank would leave the others waiting in the next collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """[world_size] the values of all ranks.

    Args:
        group: of all ranks; None: the one that training uses.
    """
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def raise_together(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Raises ``kind`` on all ranks if the block has raised on any; names the rank unless all have the same to say."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = gathered(None if error is None else str(error) or type(error).__name__)
    found = {message: rank for rank, message in reversed(list(enumerate(messages))) if message is not None}
    if not found:
        return
    if len(found) == 1 and None not in messages:
        raise kind(messages[0]) from error
    text = "; ".join(f"rank {rank}: {message}" for message, rank in found.items())
    raise kind(f"{what}: {text}") from error
