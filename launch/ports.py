"""A free port for the rendezvous of a launcher run, so that runs on one machine do not meet."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that nothing listened on a moment ago."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    print(free_port())
