"""The flags of all commands in one style: ``--zero-stage``, never abbreviated; ``--data`` is a folder, ``--data-set`` a name.

Plain argparse: typer and tyro would make flags out of function signatures, but what the flags change here is a recipe of some
hundred keys, which has a reader of its own; a dozen flags a command are a dozen lines either way, and one package less.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An argument parser that also takes earlier spellings of its flags, and says on rank 0 how they are written now.

    Args:
        earlier: spelling -> flag.
    """

    def __init__(self, *, earlier: Mapping[str, str] | None = None, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.earlier = earlier or {}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args([self._renamed(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def _renamed(self, argument: str) -> str:
        spelling, equals, value = argument.partition("=")
        if spelling not in self.earlier:
            return argument
        tell(f"{spelling} is written {self.earlier[spelling]} now")
        return self.earlier[spelling] + equals + value


def number(kind: Callable[[str], Any], is_allowed: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """The type of a flag that takes numbers."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if is_allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")

    return convert


ONE_OR_MORE = number(int, lambda n: n >= 1, "an integer >= 1")
ZERO_OR_MORE = number(int, lambda n: n >= 0, "an integer >= 0")
ABOVE_ZERO = number(float, lambda x: 0 < x < math.inf, "a number > 0")
SECONDS = number(float, lambda x: x >= 0, "a number >= 0")


def tell(note: str) -> None:
    """Writes a line for people to standard error, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"largebatch: note: {note}", file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of launch/train.py."""
    parser = Parser(
        prog="deepspeed launch/train.py",
        description="Trains the model and data set of a recipe. The recipe is a DeepSpeed JSON with a 'largebatch' section.",
        earlier={"--zero_stage": "--zero-stage"},
    )
    parser.add_argument(
        "--deepspeed_config",  # as DeepSpeed spells it
        "--deepspeed-config",
        required=True,
        metavar="JSON",
        help="a recipe: a file, or a name of `largebatch recipes`",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (not needed for digits)")
    parser.add_argument("--output", metavar="DIR", help="where results go (default: runs/<recipe>_seed<seed>)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="continue the run in --output from its newest whole checkpoint; auto: from the beginning if there is none yet",
    )
    parser.add_argument("--seed", type=int, help="of initialisation, data order and dropout")
    parser.add_argument("--epochs", type=float, help="length of training, in passes over the data")
    parser.add_argument("--steps", type=int, help="length of training, in optimizer steps")
    parser.add_argument("--zero-stage", type=int, help="ZeRO stage in place of the recipe's")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="compute type in place of the recipe's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any entry of the JSON, e.g. optimizer.params.lr=2.5 (the value is JSON; may be repeated)",
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return parser.parse_args(argv)
