"""``largebatch run``: starts the deepspeed launcher, and again from the newest whole checkpoint whenever the run dies."""

from __future__ import annotations

import argparse
import sys

from largebatch.launch.recipe.flags import SECONDS, ZERO_OR_MORE, Parser
from largebatch.launch.supervise import exits
from largebatch.launch.supervise.restarts import Policy, supervise
from largebatch.launch.trainer.run_progress import progress_of


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
    return supervise(with_resume(arguments.command), output, policy, lambda: progress_of(output))


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
