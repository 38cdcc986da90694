"""``largebatch run``: starts the deepspeed launcher, and again from the newest whole checkpoint whenever the run dies."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass

from largebatch.launch.recipe.flags import SECONDS, ZERO_OR_MORE, Parser
from largebatch.launch.supervise import exits
from largebatch.launch.supervise.launcher import SupervisedJob, adopt_orphans, stop_requests
from largebatch.launch.trainer.run_progress import progress_of

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


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="largebatch run",
        description="Starts the deepspeed launcher and, when the run dies, starts it again with --resume from the newest whole "
        "checkpoint. Example: largebatch run --max-restarts 10 deepspeed --hostfile hostfile launch/train.py "
        "--deepspeed_config RECIPE --output DIR",
    )
    parser.add_argument(
        "--max-restarts", type=ZERO_OR_MORE, default=10, metavar="N", help="at most so many (default: 10)"
    )
    parser.add_argument(
        "--back-off", type=SECONDS, default=5.0, metavar="SECONDS",
        help="before a restart; doubled while there is no progress, up to 300 (default: 5)",
    )  # fmt: skip
    parser.add_argument(
        "--hang-timeout", type=SECONDS, metavar="SECONDS",
        help="start again, too, when no step has ended for so long; longer than an evaluation and a checkpoint together "
        "(default: never; collectives have a timeout of their own, largebatch.collective_timeout_seconds)",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=SECONDS, default=120.0, metavar="SECONDS",
        help="for the ranks to save after Ctrl-C or SIGTERM, before they are killed (default: 120)",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help="deepspeed [options] launch/train.py [arguments]")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 once the run is complete or has stopped as it was asked to, else the launcher's last."""
    arguments = parse_arguments(argv)
    try:
        output = output_of(arguments.command)
    except ValueError as error:
        print(f"largebatch run: error: {error}", file=sys.stderr)
        return exits.BAD_REQUEST
    policy = Policy(arguments.max_restarts, arguments.back_off, arguments.hang_timeout, arguments.grace)
    return supervise(with_resume(arguments.command), output, policy)


def output_of(command: list[str]) -> str:
    """The run's folder, from the trainer's arguments.

    Raises:
        ValueError: there is no command, or it names no folder.
    """
    if command[:1] in ([], ["--"]):
        raise ValueError(
            "no command; expected deepspeed [options] launch/train.py [arguments], as you would start it yourself"
        )
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word == "--output" and following is not None:
            return following
        if word.startswith("--output="):
            return word.partition("=")[2]
    raise ValueError("the command has no --output DIR; expected one: a restart finds its checkpoints there")


def with_resume(command: list[str]) -> list[str]:
    """The command, so that it continues what there is and begins what there is not."""
    if any(word.split("=")[0] == "--resume" for word in command):
        return command
    return [*command, "--resume", "auto"]


def supervise(command: list[str], output: str, policy: Policy) -> int:
    """Starts the command until the run is complete, is asked to stop, or has no restart left."""
    adopt_orphans()
    num_restarts = num_same_ends = num_in_vain = 0
    last_code: int | None = None
    with stop_requests() as is_asked_to_stop:
        while True:
            before = progress_of(output)
            code, is_hanging = run_once(command, output, policy, is_asked_to_stop)
            now = progress_of(output)
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
