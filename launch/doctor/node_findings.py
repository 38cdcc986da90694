"""What is wrong on one node, by its own report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FAILS, WARNS = "fails", "warns"
"""Levels: a run would end in an error or hang; a run would be slow or its numbers or files mislead."""

GIB = 1 << 30
SHARED_MEMORY_PER_RANK = 70 << 20
"""DeepSpeed's all-reduce between CPU ranks of a node maps 66 MB each; NCCL's between GPUs 33 MB."""

DEVICE_IN_USE = 0.9
"""Less of a device's memory free than this: somebody else is on it."""

FEWEST_OPEN_FILES = 1024

Found = tuple[str, str, str]
"""Level, problem, fix."""


def judge(
    report: dict[str, Any], *, num_nodes: int, num_ranks: int, memory_per_rank: float, disk: float
) -> Iterator[Found]:
    """Everything that is wrong with a node that is to run ``num_ranks`` ranks; memory and disk in bytes."""
    yield from software_findings(report)
    yield from device_findings(report, num_ranks)
    yield from space_findings(report, num_ranks, memory_per_rank, disk)
    yield from interface_findings(report, num_nodes)
    data = report["data"]
    if data is not None and data["problem"] is not None:
        fix = "give --data a folder that every node sees under the same path, and that this user may read"
        yield FAILS, f"--data {data['path']!r} {data['problem']}", fix


def software_findings(report: dict[str, Any]) -> Iterator[Found]:
    if report["import_problem"] is not None:
        fix = "install largebatch with what it needs in this Python: pip install -e . in a clone"
        yield FAILS, f"DeepSpeed with largebatch does not start: {report['import_problem']}", fix
    cpp, triton = report["kernels"]["cpp"], report["kernels"]["triton"]
    device = report["devices"]["type"]
    if device == "cpu" and cpp.startswith("no"):
        fix = "install g++ and ninja and put them on the PATH of a login over ssh (PATH=... in .deepspeed_env)"
        yield (
            WARNS,
            f"kernels 'cpp' {cpp.replace('no:', 'cannot be had:', 1)}; 'auto' takes the slower 'reference'",
            fix,
        )
    if device == "cuda" and triton.startswith("no"):
        fix = "pip install triton (it comes with torch for CUDA on Linux)"
        yield (
            WARNS,
            f"kernels 'triton' {triton.replace('no:', 'cannot be had:', 1)}; 'auto' takes the slower 'reference'",
            fix,
        )


def device_findings(report: dict[str, Any], num_ranks: int) -> Iterator[Found]:
    devices = report["devices"]
    if devices["type"] == "cuda" and devices["count"] < num_ranks:
        fix = "correct slots in the hostfile or CUDA_VISIBLE_DEVICES"
        yield FAILS, f"{num_ranks} ranks, but {devices['count']} CUDA devices", fix
    if devices["type"] == "cpu" and devices["count"] < num_ranks:
        fix = "start fewer ranks: slots in the hostfile, --num_accelerators"
        yield WARNS, f"{num_ranks} ranks share {devices['count']} cores", fix
    for index, device in enumerate(devices["cuda_devices"][:num_ranks]):
        if device["free"] < DEVICE_IN_USE * device["total"]:
            free = f"{device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB"
            yield WARNS, f"CUDA device {index} has {free} free", "end the processes that nvidia-smi shows on it"


def space_findings(report: dict[str, Any], num_ranks: int, memory_per_rank: float, disk: float) -> Iterator[Found]:
    available, needed = report["memory"]["available"], num_ranks * memory_per_rank
    if available is not None and available < needed:
        yield (
            FAILS,
            f"{available / GIB:.1f} GiB of memory available, {num_ranks} ranks need about {needed / GIB:.1f}",
            "end other processes, start fewer ranks, or state what a rank needs with --need-memory (`largebatch plan` tells)",
        )
    free = report["disk"]["free"]
    if not report["disk"]["is_writable"]:
        fix = "name a folder that this user may write with --output"
        yield FAILS, f"results go to {report['disk']['path']!r}, which cannot be written", fix
    elif free < disk:
        fix = "make room, or name another folder with --output"
        yield (
            FAILS,
            f"{free / GIB:.1f} GiB free for results in {report['disk']['path']!r}, needed: {disk / GIB:.1f}",
            fix,
        )
    shared = report["shared_memory"]
    if num_ranks > 1 and shared["free"] < num_ranks * SHARED_MEMORY_PER_RANK:
        room = f"{shared['free'] / (1 << 20):.0f} MiB free in /dev/shm; {num_ranks} ranks need {num_ranks * SHARED_MEMORY_PER_RANK >> 20}"
        yield FAILS, room, "remove what is left there, or give the container more (docker run --shm-size=8g)"
    if shared["num_left_over"]:
        left = f"{shared['num_left_over']} files of earlier DeepSpeed runs hold {shared['left_over'] / (1 << 20):.0f} MiB of memory"
        yield WARNS, left, "when no run is on: rm /dev/shm/deepspeed_allreduce_buffer_*"


def interface_findings(report: dict[str, Any], num_nodes: int) -> Iterator[Found]:
    interfaces, environment = report["interfaces"], report["environment"]
    chosen = environment.get("GLOO_SOCKET_IFNAME")
    if chosen and chosen not in interfaces["names"]:
        fix = f"choose one of {', '.join(interfaces['names'])} in .deepspeed_env"
        yield FAILS, f"GLOO_SOCKET_IFNAME is {chosen!r}, which this node does not have", fix
    prefixes = environment.get("NCCL_SOCKET_IFNAME", "")
    if prefixes and prefixes[0] not in "^=":
        if not any(name.startswith(tuple(prefixes.split(","))) for name in interfaces["names"]):
            fix = f"choose among {', '.join(interfaces['names'])} in .deepspeed_env"
            yield FAILS, f"NCCL_SOCKET_IFNAME is {prefixes!r}, which fits no interface of this node", fix
    if num_nodes > 1 and not chosen and (interfaces["address"] or "127.").startswith("127."):
        address = interfaces["address"] or "no address"
        yield (
            FAILS,
            f"its own name {interfaces['host']!r} resolves to {address}, under which other nodes do not find it",
            "put the node's address before that name in /etc/hosts, or GLOO_SOCKET_IFNAME=<interface> in .deepspeed_env",
        )
    limits = report["limits"]
    if 0 <= limits["open_files"] < FEWEST_OPEN_FILES:
        yield WARNS, f"{limits['open_files']} open files allowed", "raise nofile in /etc/security/limits.conf"
    if limits["has_infiniband"] and limits["locked_memory"] is not None:
        fix = "set memlock to unlimited in /etc/security/limits.conf (for sshd or slurmd, too)"
        yield WARNS, f"InfiniBand, but only {limits['locked_memory'] >> 10} KiB of memory may be locked", fix
