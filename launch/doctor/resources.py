"""What a node has to give: devices, memory, disk, shared memory, interfaces, limits, and the data it can read."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib
import platform
import resource
import shutil
import socket
from typing import Any

MOST_ENTRIES = 10_000
"""Names of a data folder that go into its digest."""


def devices() -> dict[str, Any]:
    """Type, count, and of each CUDA device name, total and free bytes."""
    import torch

    num_cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return {"type": "cpu", "count": num_cores, "cpu": cpu_model(), "cuda_devices": []}
    cuda_devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        cuda_devices.append({"name": torch.cuda.get_device_name(index), "total": total, "free": free})
    return {"type": "cuda", "count": len(cuda_devices), "cpu": cpu_model(), "cuda_devices": cuda_devices}


def cpu_model() -> str:
    for line in read_text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory() -> dict[str, int | None]:
    """Total and available bytes, as the kernel and the control group allow; None where neither tells."""
    fields = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    limit, used = read_text("/sys/fs/cgroup/memory.max").strip(), read_text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total or int(limit), int(limit))
        available = min(total if available is None else available, int(limit) - int(used))
    return {"total": total, "available": available}


def space(folder: str) -> dict[str, Any]:
    """Free and total bytes where ``folder`` is or would be made, and whether this user may write there."""
    existing = existing_parent(folder)
    usage = shutil.disk_usage(existing)
    is_writable = existing.is_dir() and os.access(existing, os.W_OK)
    return {
        "path": str(pathlib.Path(folder).absolute()),
        "free": usage.free,
        "total": usage.total,
        "is_writable": is_writable,
    }


def existing_parent(folder: str) -> pathlib.Path:
    """``folder``, or the nearest above it that is there."""
    existing = pathlib.Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def shared_memory() -> dict[str, Any]:
    """Of /dev/shm: free and total bytes, and what earlier DeepSpeed runs on CPUs have left there."""
    if not os.path.isdir("/dev/shm"):
        return {"free": 0, "total": 0, "num_left_over": 0, "left_over": 0}
    usage = shutil.disk_usage("/dev/shm")
    sizes = []
    for path in glob.glob("/dev/shm/deepspeed_allreduce_buffer_*"):
        try:
            sizes.append(os.path.getsize(path))
        except FileNotFoundError:  # its run has just ended
            pass
    return {"free": usage.free, "total": usage.total, "num_left_over": len(sizes), "left_over": sum(sizes)}


def interfaces() -> dict[str, Any]:
    """Network interfaces by name, the host's name and the address that it resolves to here."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = None
    return {"host": name, "address": address, "names": [interface for _, interface in socket.if_nameindex()]}


def limits() -> dict[str, Any]:
    """Open files (soft limit), locked memory in bytes (None: unlimited), and whether there is InfiniBand."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": None if locked == resource.RLIM_INFINITY else locked,
        "has_infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
    }


def data(folder: str) -> dict[str, Any]:
    """Whether the data set's folder can be read, and a digest of names and sizes down to its second level.

    ``problem`` is None, or says why not. Equal digests on all nodes: the same data set, as far as its folders tell.
    """
    found: dict[str, Any] = {"path": os.path.abspath(folder), "problem": None, "num_entries": 0, "digest": None}
    digest = hashlib.sha256()
    first_file = None
    try:
        for path in walk(pathlib.Path(folder)):
            if path.is_symlink() and not path.exists():
                found["problem"] = f"holds a broken link ({path})"
                break
            is_file = path.is_file()
            size = path.stat().st_size if is_file else 0
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            found["num_entries"] += 1
            first_file = first_file or (path if is_file else None)
        if not found["num_entries"] and found["problem"] is None:
            found["problem"] = "is empty"
        elif first_file is not None:
            with open(first_file, "rb") as file:
                file.read(1)
    except FileNotFoundError:
        found["problem"] = "does not exist"
    except NotADirectoryError:
        found["problem"] = "is not a folder"
    except OSError as error:
        found["problem"] = f"cannot be read ({error.strerror}: {error.filename})"
    found["digest"] = digest.hexdigest()[:16]
    return found


def walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """The entries of two levels, sorted, at most :data:`MOST_ENTRIES`."""
    entries = []
    for path in sorted(folder.iterdir()):
        entries.append(path)
        if path.is_dir():
            entries.extend(sorted(path.iterdir()))
        if len(entries) >= MOST_ENTRIES:
            break
    return entries[:MOST_ENTRIES]


def read_text(path: str) -> str:
    """The file's text; empty where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
