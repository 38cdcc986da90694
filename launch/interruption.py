"""Ctrl-C and SIGTERM: the first asks for a checkpoint and a stop, a second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

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
