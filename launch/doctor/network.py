"""What lies between the ranks: all-reduce by size, and of each node's line to rank 0 latency, bandwidth and clock."""

from __future__ import annotations

import datetime
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

ALL_REDUCE_REPEATS = {"cpu": {4: 20, 1 << 20: 10, 1 << 24: 5}, "cuda": {4: 50, 1 << 20: 20, 1 << 24: 20, 1 << 28: 5}}
"""Bytes -> repeats. Fixed, since all ranks must agree."""

PING_REPEATS = 20
LINE_BYTES = 1 << 22


def measure(
    rank: int, world_size: int, local_rank: int, *, folder: pathlib.Path, timeout: float, on_timeout: Callable[[], None]
) -> dict[str, Any]:
    """Joins the process group, measures, and leaves it. Collective.

    Args:
        folder: where results will go, or the nearest folder above that is there.
        timeout: seconds for the ranks to meet.
        on_timeout: called from another thread when they have not; must end the process, since gloo tries on for five
            times its own timeout and cannot be told to stop.

    Returns:
        On rank 0: ``backend``, ``world_size``, ``is_folder_shared`` (None if it cannot be written), ``all_reduce`` (list of bytes, seconds and bus bandwidth in bytes/s) and
        ``lines`` (of each other node's first rank: rank, host, one-way latency in s, bandwidth in bytes/s, clock offset in s).

    Raises:
        RuntimeError: the ranks do not meet, a collective fails, or it adds up wrongly.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    watch = threading.Timer(timeout, on_timeout)
    watch.daemon = True
    watch.start()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        places: list[Any] = [None] * world_size
        dist.all_gather_object(places, (local_rank, os.uname().nodename))
        watch.cancel()
        figures = {
            "backend": "nccl" if has_cuda else "gloo",
            "world_size": world_size,
            "is_folder_shared": is_shared(folder, rank),
            "all_reduce": [
                all_reduce(size, repeats, device) for size, repeats in ALL_REDUCE_REPEATS[device.type].items()
            ],
            "lines": [
                {"rank": other, "host": host, **line(rank, other)}
                for other, (other_local, host) in enumerate(places)
                if other > 0 and other_local == 0
            ],
        }
        dist.barrier()
        return figures
    finally:
        watch.cancel()
        if dist.is_initialized():
            dist.destroy_process_group()


def is_shared(folder: pathlib.Path, rank: int) -> bool | None:
    """Whether all ranks see a file that rank 0 puts there for a moment."""
    token: list[Any] = [None]
    if rank == 0:
        try:
            descriptor, token[0] = tempfile.mkstemp(prefix=".largebatch-doctor-", dir=folder)
            os.close(descriptor)
        except OSError:  # the node's own report says so
            pass
    dist.broadcast_object_list(token, src=0)
    if token[0] is None:
        return None
    are_seeing: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(are_seeing, os.path.exists(token[0]))
    if rank == 0:
        os.remove(token[0])
    return all(are_seeing)


def all_reduce(num_bytes: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of the slowest rank. Bus bandwidth as NCCL's tests define it: bytes / s * 2 (n - 1) / n."""
    world_size = dist.get_world_size()
    tensor = torch.empty(num_bytes // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(repeats + 1):  # the first sets up connections
        tensor.fill_(dist.get_rank() + 1)
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        expected = world_size * (world_size + 1) / 2
        if not bool((tensor == expected).all()):
            raise RuntimeError(f"an all-reduce of {num_bytes} bytes gave wrong sums (expected {expected} everywhere)")
    median = torch.tensor([statistics.median(seconds[1:])], dtype=torch.float64)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    slowest = median.item()
    return {
        "bytes": num_bytes,
        "seconds": slowest,
        "bandwidth": num_bytes / slowest * 2 * (world_size - 1) / world_size,
    }


def line(rank: int, other: int) -> dict[str, float]:
    """Between rank 0 and ``other``, through gloo; the other ranks do nothing.

    The clock offset is ``other``'s clock less rank 0's in the exchange with the shortest round trip, half of which bounds
    its error.
    """
    if rank not in (0, other):
        return {}
    clock, block = torch.zeros(1, dtype=torch.float64), torch.zeros(LINE_BYTES, dtype=torch.uint8)
    round_trips, block_seconds = [], []
    for _ in range(PING_REPEATS):
        if rank == 0:
            start = time.time()
            dist.send(clock, other)
            dist.recv(clock, other)
            end = time.time()
            round_trips.append((end - start, clock.item() - (start + end) / 2))
        else:
            dist.recv(clock, 0)
            clock[0] = time.time()
            dist.send(clock, 0)
    for _ in range(3):
        start = time.perf_counter()
        if rank == 0:
            dist.send(block, other)
            dist.recv(clock, other)
        else:
            dist.recv(block, 0)
            dist.send(clock, 0)
        block_seconds.append(time.perf_counter() - start)
    if rank != 0:
        return {}
    shortest, offset = min(round_trips)
    bandwidth = LINE_BYTES / max(1e-9, min(block_seconds) - shortest / 2)
    return {"latency": statistics.median(r for r, _ in round_trips) / 2, "bandwidth": bandwidth, "clock_offset": offset}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
