"""largebatch convert: a checkpoint in another form, or with its optimizer state as another package keeps it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from typing import Any

from largebatch import checkpoint
from largebatch.launch.recipe.flags import Parser
from largebatch.launch.trainer.saving import step_folders

DESCRIPTION = """Converts a checkpoint. What SOURCE and TARGET are is told by their names:

  a folder      a DeepSpeed checkpoint that was saved with largebatch, at any layout; written, it can be loaded at any layout.
                Given a folder of several, the one that its file "latest" names is read.
  a file (.pt)  plain PyTorch: {"model": state_dict, "optimizer": state_dict}, as torch.save writes it.
"""

EXAMPLES = """examples:
  largebatch convert runs/r/checkpoints/step100 plain.pt            # DeepSpeed -> torch.load("plain.pt"), largebatch.LAMB
  largebatch convert plain.pt runs/r/checkpoints/step100            # and back
  largebatch convert runs/r/checkpoints apex.pt --to-optimizer apex.FusedLAMB
  largebatch convert theirs.pt checkpoints/step100 --from-optimizer timm.Lars --to-optimizer LARS
  largebatch convert plain.pt outside.pt --option lr_in_momentum=false

A buffer that means something else in the two is converted (a momentum with the learning rate inside or outside, moments without
averaging) or refused. What the optimizers compute from the same state may still differ: such options are printed.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="largebatch convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ", ".join(checkpoint.KINDS)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", help="must not exist")
    parser.add_argument("--from-optimizer", metavar="KIND", help=f"whose state a .pt holds: {kinds}")
    parser.add_argument("--to-optimizer", metavar="KIND", help="as whose state to write it (default: as it is)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of every param group of the result, e.g. lr_in_momentum=false (the value is JSON; may be repeated)",
    )
    parser.add_argument(
        "--names", metavar="JSON", help="a list of the optimizer's parameters, in its order, for a .pt without"
    )
    parser.add_argument("--model-key", default="model", metavar="KEY", help="of the model in a .pt (default: model)")
    parser.add_argument(
        "--optimizer-key", default="optimizer", metavar="KEY", help="of the optimizer (default: optimizer)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps taken, where a .pt does not say")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line that says what is wrong."""
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"largebatch convert: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    if os.path.exists(arguments.target):
        raise ValueError(f"TARGET {arguments.target!r} exists; choose another name")
    consolidated = read(arguments)
    kind = arguments.to_optimizer or consolidated.optimizer
    options = dict(option_in(text) for text in arguments.option)
    found = consolidated
    if kind != consolidated.optimizer or options:
        found = checkpoint.convert(consolidated, kind, **options)
    write(found, arguments.target, f"{consolidated.optimizer} in {arguments.source}")
    steps = "unknown" if found.num_steps is None else found.num_steps
    print(
        f"{arguments.target}: {len(found.layers)} layers in {len(found.groups)} param group"
        f"{'s' if len(found.groups) > 1 else ''}, state of {found.optimizer}, steps: {steps}"
    )
    if kind in checkpoint.KINDS and consolidated.optimizer in checkpoint.KINDS:
        for line in checkpoint.changed_options(consolidated, found):
            print(f"note: the next update is another: {line}")


def read(arguments: argparse.Namespace) -> checkpoint.ConsolidatedState:
    path = arguments.source
    if os.path.isdir(path):
        return checkpoint.read_deepspeed(newest_in(path))
    if not os.path.isfile(path):
        raise ValueError(f"SOURCE {path!r} does not exist; expected a checkpoint folder or a .pt file")
    names = None
    if arguments.names:
        with open(arguments.names, encoding="utf-8") as file:
            names = json.load(file)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"--names {arguments.names!r} holds {type(names).__name__}; expected a list of names")
    return checkpoint.read_pytorch(
        path,
        arguments.from_optimizer,
        names=names,
        model=arguments.model_key,
        optimizer=arguments.optimizer_key,
        num_steps=arguments.steps,
    )


def newest_in(folder: str) -> str:
    """The folder itself, or that of the checkpoint which its ``latest`` names."""
    latest = os.path.join(folder, step_folders.LATEST)
    if not os.path.isfile(latest):
        return folder
    with open(latest, encoding="utf-8") as file:
        return os.path.join(folder, file.read().strip())


def write(consolidated: checkpoint.ConsolidatedState, target: str, origin: str) -> None:
    if re.search(r"\.(pt|pth|bin)$", target):
        checkpoint.write_pytorch(consolidated, target)
        return
    step = re.fullmatch(r"step(\d+)", os.path.basename(os.path.normpath(target)))
    if step:
        number = int(step[1])
        if consolidated.num_steps is None:
            consolidated.num_steps = number
        consolidated.client_state["largebatch_step"] = number
    checkpoint.write_deepspeed(consolidated, target, origin)
    if step:
        entries = step_folders.entries(target, step_folders.files_in(target))
        step_folders.write_manifest(target, entries, step=int(step[1]), world_size=1)
        step_folders.point_to(os.path.dirname(os.path.normpath(target)) or ".", int(step[1]))


def option_in(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"--option {text!r}; expected KEY=VALUE, e.g. lr_in_momentum=false")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
