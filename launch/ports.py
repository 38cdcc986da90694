"""What the deepspeed launcher is told: a free port, so that runs on one machine do not meet, and to be quiet."""

from __future__ import annotations

import importlib.metadata
import socket

from packaging.version import Version


def free_port() -> int:
    """A TCP port that nothing listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def launcher_options(num_ranks: int, port: int | None = None) -> list[str]:
    """For so many processes on this machine, with a port of their own, and without the launcher's own log.

    DeepSpeed's launcher knows --log_level from 0.17.6 on.
    """
    is_quiet = Version(importlib.metadata.version("deepspeed")).release >= (0, 17, 6)
    quietly = ["--log_level", "error"] if is_quiet else []
    return ["--num_accelerators", str(num_ranks), "--master_port", str(port or free_port()), *quietly]


if __name__ == "__main__":
    print(free_port())
