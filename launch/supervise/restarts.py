"""A run that is started again whenever it dies or hangs, from its newest whole checkpoint, until it is complete.

torch.distributed.elastic restarts the ranks of a node inside one launcher. Here it is the launcher of DeepSpeed that is started,
which may die, too, and whose ranks then have to be found and waited for before they can be in the way of the next start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from largebatch.launch.supervise import exits
from largebatch.launch.supervise.launcher import SupervisedJob, adopt_orphans, stop_requests

LONGEST_BACK_OFF = 300.0
SECONDS_BETWEEN_LOOKS = 0.3
SAME_END_LIMIT = 3
"""So often in a row with the same exit code and without a step in between: it will repeat."""


@dataclass(frozen=True)
class Policy:
    """When a run is started again.

    Attributes:
        back_off: seconds before the first restart; doubled for each that brought no step, at most LONGEST_BACK_OFF.
        hang_timeout: seconds without a line in the metrics file after which the run is taken for dead; None: never.
        grace: seconds that the ranks get to save and end.
    """

    max_restarts: int
    back_off: float
    hang_timeout: float | None
    grace: float


def supervise(command: list[str], output: str, policy: Policy, progress: Callable[[], Any]) -> int:
    """Starts the command until the run is complete, is asked to stop, or has no restart left.

    Args:
        output: the run's folder. progress: how far the run has come; see trainer/run_progress.py.

    Returns:
        The exit code: 0 once the run is complete or has stopped as it was asked to, else the launcher's last.
    """
    adopt_orphans()
    num_restarts = num_same_ends = num_in_vain = 0
    last_code: int | None = None
    with stop_requests() as is_asked_to_stop:
        while True:
            before = progress()
            code, is_hanging = run_once(command, output, policy, is_asked_to_stop)
            now = progress()
            if code == 0 and now.is_complete:
                return 0
            happened = what_happened(code, is_hanging, policy)
            if is_asked_to_stop():
                say(f"stopped as asked: {happened}; {now.text}. The same command continues")
                return 0 if code == 0 else code % 256
            has_moved = now.is_beyond(before)
            num_in_vain = 0 if has_moved else num_in_vain + 1
            num_same_ends = num_same_ends + 1 if not has_moved and code == last_code else 1
            last_code = code
            if code == exits.BAD_REQUEST:
                say(f"{happened}; {now.text}. Not started again: it would end in the same way")
                return code
            if num_same_ends >= SAME_END_LIMIT and 0 < code < 128 and code != exits.LOST_RANK:
                say(f"{happened}, {num_same_ends} times in a row without a step; {now.text}. Not started again")
                return code
            if num_restarts == policy.max_restarts:
                say(f"{happened}; {now.text}. Not started again: --max-restarts {policy.max_restarts} is used up")
                return code % 256 or exits.NOT_SAVED
            num_restarts += 1
            pause = min(policy.back_off * 2 ** max(0, num_in_vain - 1), LONGEST_BACK_OFF)
            say(f"{happened}; {now.text}. Restart {num_restarts} of at most {policy.max_restarts} in {pause:g} s")
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not is_asked_to_stop():
                time.sleep(min(0.2, pause))
            if is_asked_to_stop():
                say(f"stopped as asked; {now.text}. The same command continues")
                return 0


def run_once(command: list[str], output: str, policy: Policy, is_asked_to_stop) -> tuple[int, bool]:
    """(exit code of the launcher, whether the run was hanging), once nothing of it is left on this node."""
    job = SupervisedJob(command)
    hang = Hang(output, policy.hang_timeout)
    is_hanging = False
    while job.exit_code is None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if is_asked_to_stop():
            job.ask_to_stop()
            job.wait(policy.grace)
            break
        if job.exit_code is None and hang.is_there():
            is_hanging = True
            break
    # a launcher that was killed leaves ranks behind, which are told by the kernel and save
    job.end(0.0 if is_hanging else policy.grace)
    return job.launcher.returncode, is_hanging


class Hang:
    """Whether the metrics file has stood still for too long."""

    def __init__(self, output: str, timeout: float | None):
        self.path, self.timeout = os.path.join(output, "metrics.jsonl"), timeout
        self.seen, self.since = self.size(), time.monotonic()

    def size(self) -> int:
        try:
            return os.path.getsize(self.path)
        except OSError:
            return -1

    def is_there(self) -> bool:
        size = self.size()
        if size != self.seen:
            self.seen, self.since = size, time.monotonic()
        return self.timeout is not None and time.monotonic() - self.since > self.timeout


def what_happened(code: int, is_hanging: bool, policy: Policy) -> str:
    """How the run ended, in words."""
    if is_hanging:
        return f"no step for {policy.hang_timeout:g} s (--hang-timeout), and what hung was ended"
    if code < 0:
        return f"the launcher was ended by {signal.Signals(-code).name}"
    if code > 128:
        number = 256 - code if code >= 192 else code - 128
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"a rank was ended by {name}"
    if code == exits.LOST_RANK:
        return "ranks lost one another (exit code 3)"
    if code == 0:
        return "the run was interrupted, or its launcher killed (exit code 0, but no end in metrics.jsonl)"
    return f"the run ended with an error (exit code {code})"


def say(text: str) -> None:
    print(f"largebatch run: {text}", file=sys.stderr, flush=True)
