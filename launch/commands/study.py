"""``largebatch study``: trains a grid of optimizers, global batches and seeds, and writes what came out.

The output folder holds one folder per run, ``runs.csv`` (a row per run), ``table.md`` (mean and spread per optimizer and
batch) and the plots. Called again it goes on: finished runs are kept, interrupted ones resumed from their checkpoint. With
``--finished`` the rows of an earlier study, whose folders are gone, count as runs of this one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import largebatch.ds_configs
from largebatch.launch.recipe.flags import ONE_OR_MORE, Parser
from largebatch.launch.study import plots
from largebatch.launch.study.grid import expand
from largebatch.launch.study.grid_study import Study


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    is_earlier_style = not any(a.partition("=")[0] == "--data-set" for a in argv)
    parser = Parser(
        prog="largebatch study",
        description="Trains every optimizer at every global batch with several seeds, through the deepspeed launcher.",
        earlier={"--data": "--data-set", "--data-folder": "--data"} if is_earlier_style else None,
    )
    parser.add_argument("--model", required=True, help="as in the recipes' names, e.g. lenet")
    parser.add_argument("--data-set", required=True, help="as in the recipes' names, e.g. mnist")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set (not needed for digits)")
    parser.add_argument("--batches", required=True, type=integers, metavar="N,N,...", help="global batches")
    parser.add_argument("--optimizers", required=True, type=names, metavar="NAME,...", help="e.g. sgd,lars,lamb,adamw")
    parser.add_argument("--seeds", type=ONE_OR_MORE, default=3, metavar="N", help="seeds 1 to N (default 3)")
    parser.add_argument("--epochs", type=float, help="length of every run, in place of the recipes'")
    parser.add_argument("--steps", type=ONE_OR_MORE, help="length of every run, in place of the recipes'")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for launch/train.py, for every run"
    )
    parser.add_argument(
        "--finished", metavar="CSV", help="runs.csv of an earlier study: its runs are taken as they are, not done again"
    )
    parser.add_argument("--ranks", type=ONE_OR_MORE, help="processes (default: one per GPU, or 2 on the CPU)")
    parser.add_argument("--recipes", metavar="DIR", help="folder of recipes (default: those of the package)")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="take the recipes <model>_<data>_<optimizer>_<batch>_<NAME>, where there are any",
    )
    parser.add_argument(
        "--metric", help="main metric, a name in the runs' last line (default: the first, top1 for images)"
    )
    parser.add_argument("--output", default="runs/study", metavar="DIR")
    parser.add_argument("--no-plots", action="store_true", help="do not draw; matplotlib is not needed then")
    return parser.parse_args(argv)


def integers(text: str) -> list[int]:
    return unique([ONE_OR_MORE(part) for part in text.split(",")])


def names(text: str) -> list[str]:
    return unique([part.strip().lower() for part in text.split(",")])


def unique(values: list) -> list:
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{','.join(map(str, values))}; expected each value once")
    return values


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a run failed, 2 for a bad request, 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        if arguments.epochs is not None and arguments.steps is not None:
            raise ValueError("--epochs and --steps are both given; expected one of them")
        folder = arguments.recipes or os.path.dirname(os.path.abspath(largebatch.ds_configs.__file__))
        runs = expand(
            folder,
            model=arguments.model,
            data=arguments.data_set,
            optimizers=arguments.optimizers,
            batches=arguments.batches,
            seeds=list(range(1, arguments.seeds + 1)),
            variant=arguments.variant,
        )
        study = Study(arguments, runs)
        study.check()
        if not arguments.no_plots:
            plots.pyplot()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"largebatch: error: {error}", file=sys.stderr)
        return 2
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with study.locked():
            return study.run()
    except ValueError as error:  # what is only seen once a run has ended: its metrics
        print(f"largebatch: error: {error}", file=sys.stderr)
        return 2
    except BlockingIOError:
        print(
            f"largebatch: error: another study, or a run that it left, is at work in {study.output!r}; wait, or choose another --output",
            file=sys.stderr,
        )
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def interrupt(number, frame) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
