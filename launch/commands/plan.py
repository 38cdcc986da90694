"""``largebatch plan``: what a large batch takes on the GPUs at hand, and the ds_config that trains it."""

from __future__ import annotations

import argparse
import json
import sys

from largebatch.launch.recipe.flags import ABOVE_ZERO, ONE_OR_MORE, Parser
from largebatch.launch.sizing import size_report
from largebatch.launch.sizing.sized_run import make
from largebatch.planning.choice import parse_bytes
from largebatch.planning.communication import NETWORKS
from largebatch.planning.memory import OFFLOADS, PRECISIONS
from largebatch.planning.scaling_rules import RULES


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="largebatch plan",
        description="Plans a global batch: micro-batch and accumulation, learning rate, memory, communication, time.",
        epilog="Train the plan: deepspeed launch/train.py --deepspeed_config <--output>",
        earlier={"--data": "--data-set", "--samples": "--num-samples", "--recipe-stage": "--recipe-phase"},
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--recipe", metavar="NAME|JSON", help="see `largebatch recipes`")
    what.add_argument("--recipe-phase", type=ONE_OR_MORE, metavar="N", help="which phase of a recipe that has several")
    what.add_argument("--model", help="without --recipe: its recipe of the nearest batch, e.g. resnet50")
    what.add_argument("--data-set", help="with --model, e.g. imagenet")
    what.add_argument("--optimizer", help="with --model, e.g. LAMB")
    what.add_argument("--global-batch", type=ONE_OR_MORE, metavar="N", help="samples of a step (default: the recipe's)")
    what.add_argument(
        "--num-samples", type=ONE_OR_MORE, metavar="N", help="in the training set, where the data set does not say"
    )
    what.add_argument("--epochs", type=ABOVE_ZERO, help="in place of the recipe's length")
    what.add_argument("--rule", choices=RULES, help="of learning rate and warm-up, where the batch is not the recipe's "
                      "(default: table for LARS, linear for SGD, sqrt for the others)")  # fmt: skip
    where = parser.add_argument_group("where")
    where.add_argument("--gpus", type=ONE_OR_MORE, metavar="N", help="of a node (default: those of this machine)")
    where.add_argument("--nodes", type=ONE_OR_MORE, default=1, metavar="N")
    where.add_argument("--gpu-memory", type=size, metavar="SIZE", help="e.g. 24GB (default: of this machine's GPU)")
    where.add_argument("--network", metavar="NAME|A,B", help=f"between nodes: {', '.join(NETWORKS)}, or alpha in s, beta in "
                       "s/byte (default: 100gbe)")  # fmt: skip
    where.add_argument("--gpu-network", default="pcie4", metavar="NAME|A,B", help="inside a node (default: pcie4)")
    where.add_argument("--throughput", type=ABOVE_ZERO, metavar="SAMPLES/S", help="of a GPU, forward and backward "
                       "(default: measured here)")  # fmt: skip
    where.add_argument("--overlap", type=float, default=0.0, metavar="0..1", help="share of the last backward pass that hides "
                       "communication (default: 0)")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--precision", choices=PRECISIONS, help="in place of the recipe's")
    how.add_argument("--zero-stage", default="auto", metavar="0..3|auto")
    how.add_argument("--offload", choices=OFFLOADS)
    how.add_argument("--micro-batch", type=ONE_OR_MORE, metavar="N")
    out = parser.add_argument_group("result")
    out.add_argument("--output", metavar="JSON", help="write the complete ds_config there")
    out.add_argument("--json", action="store_true", help="print JSON")
    out.add_argument("--published", action="store_true", help="the papers' systems through the same time model")
    return parser.parse_args(argv)


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line that says what is wrong with the request."""
    arguments = parse_arguments(argv)
    try:
        if arguments.published:
            print(
                json.dumps(size_report.published_record(), indent=2) if arguments.json else size_report.published_text()
            )
            return 0
        plan = make(arguments)
        if arguments.output:
            with open(arguments.output, "w", encoding="utf-8") as file:
                json.dump(plan.config, file, indent=2, ensure_ascii=False)
                file.write("\n")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"largebatch: error: {error}", file=sys.stderr)
        return 2
    print(
        json.dumps(size_report.record(plan), indent=2) if arguments.json else size_report.text(plan, arguments.output)
    )
    return 0
