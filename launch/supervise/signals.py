"""Requests to stop: Ctrl-C, SIGTERM, and the launcher's own end, after which an orphan would train on. Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import psutil

SECONDS_OF_ONE_REQUEST = 3.0
"""A terminal, a launcher and a batch system may each pass the same request on."""


class Interruption:
    """The loop asks here whether this rank was asked to stop."""

    def __init__(self):
        self.is_requested = False
        self.requested_at = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        now = time.monotonic()
        if self.is_requested and now - self.requested_at > SECONDS_OF_ONE_REQUEST:
            line = f"largebatch: asked to stop a second time ({signal.Signals(number).name}): leaving without a checkpoint\n"
            os.write(sys.stderr.fileno(), line.encode())
            os._exit(128 + number)
        if not self.is_requested:
            self.is_requested, self.requested_at = True, now


PR_SET_PDEATHSIG = 1
SECONDS_BETWEEN_LOOKS = 1.0
LAUNCHER = "deepspeed.launcher.launch"


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks the kernel for a signal once the process that started this one is gone."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def end_with_launcher() -> None:
    """From here on SIGTERM comes, as in a preemption, when the launcher is gone. Without a launcher nothing happens.

    `deepspeed` on one node is two processes: one that parses, and one that starts the ranks. Either may be killed alone, and
    neither tells the other.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    starter = psutil.Process().parent()
    die_with_parent()
    if starter is None or os.getppid() != starter.pid:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    try:
        parser = starter.parent() if LAUNCHER in starter.cmdline() else None
        if parser is None or not any(os.path.basename(word) in ("deepspeed", "ds") for word in parser.cmdline()[:2]):
            return
    except psutil.Error:
        return
    threading.Thread(target=watch, args=(parser,), name="launcher watch", daemon=True).start()


def watch(process: psutil.Process) -> None:
    """Sends SIGTERM to this process once another is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
