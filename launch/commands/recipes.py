"""``largebatch recipes``: lists and filters the recipes; ``largebatch recipes show NAME`` prints one with nothing left open."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from typing import Any

from largebatch.config import nearest_hint
from largebatch.launch.data.options import NUM_SAMPLES
from largebatch.launch.recipe.flags import Parser
from largebatch.launch.recipe.reading import find_recipe, load_recipes
from largebatch.launch.recipe.resolved_run import ResolvedRun, resolve
from largebatch.launch.recipe.section import phase_recipes
from largebatch.schedule import scaled_lr

FLAGS = {"data": "data-set"}
"""Column -> flag that filters by it, where they are called differently."""

COLUMNS = ("name", "model", "data", "optimizer", "lr", "batch", "expected", "source")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if no recipe matches, 2 after one line that says what is wrong with the request."""
    arguments = parse_arguments(argv)
    try:
        code = show(arguments) if arguments.command == "show" else list_recipes(arguments)
        sys.stdout.flush()
        return code
    except (ValueError, TypeError) as error:
        print(f"largebatch: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough, and would again at the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="largebatch recipes",
        description="Lists the recipes in ds_configs. Filters go together.",
        epilog="Train one: deepspeed launch/train.py --deepspeed_config NAME",
        earlier={"--data": "--data-set"},
    )
    parser.add_argument("--model", help="e.g. resnet50")
    parser.add_argument("--optimizer", help="e.g. LARS")
    parser.add_argument("--batch", help="global batch, e.g. 32768 or 32k")
    parser.add_argument("--data-set", dest="data", help="e.g. imagenet")
    parser.add_argument(
        "--text", "--paper", nargs="+", help="words in the name, the source or the hardware, e.g. 1904.00962"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command="list")
    commands = parser.add_subparsers(title="commands", metavar="show NAME")
    one = commands.add_parser("show", help="prints a recipe with every 'auto' filled in")
    one.add_argument("name")
    one.add_argument("--ranks", type=int, default=1, help="world size (default: 1)")
    one.add_argument("--num-samples", type=int, help="samples of the training set (default: those of the public one)")
    one.add_argument("--json", action="store_true", help="print the ds_config only")
    one.set_defaults(command="show")
    return parser.parse_args(argv)


def row_of(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the list says of a recipe."""
    section, optimizer = recipe["largebatch"], recipe["optimizer"]
    return {
        "name": name,
        "model": section["model"],
        "data": section["data"],
        "optimizer": optimizer["type"],
        "lr": learning_rate(recipe),
        "batch": recipe["train_batch_size"],
        "expected": section.get("expected"),
        "source": section.get("source") or "",
        "hardware": section.get("hardware") or "",
    }


def learning_rate(recipe: dict[str, Any]) -> float:
    """The peak, by the recipe's rule where it has one."""
    lr = recipe["optimizer"]["params"]["lr"]
    if lr != "auto":
        return lr
    return scaled_lr(**recipe["largebatch"]["lr_scaling"], global_batch=recipe["train_batch_size"])


def list_recipes(arguments: argparse.Namespace) -> int:
    rows = [row_of(name, recipe) for name, recipe in load_recipes().items()]
    rows = [row for row in rows if matches(row, arguments, rows)]
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif rows:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(table([{column: cell(column, row[column]) for column in COLUMNS} for row in rows], width))
    else:
        print("no recipe matches all of this; drop a filter, or see `largebatch recipes`", file=sys.stderr)
    return 0 if rows else 1


def matches(row: dict[str, Any], arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> bool:
    """Whether a row passes the filters.

    Raises:
        ValueError: no recipe at all has that model, optimizer, data set or batch.
    """
    for column in ("model", "optimizer", "data"):
        wanted = getattr(arguments, column)
        if wanted is None:
            continue
        known = sorted({other[column] for other in rows})
        if wanted.lower() not in [value.lower() for value in known]:
            hint = nearest_hint(wanted, [value.lower() for value in known])
            raise ValueError(f"--{FLAGS.get(column, column)} is {wanted!r}; the recipes have {', '.join(known)}{hint}")
        if row[column].lower() != wanted.lower():
            return False
    if arguments.batch is not None and row["batch"] != batch_size(arguments.batch, {other["batch"] for other in rows}):
        return False
    text = " ".join((row["name"], row["source"], row["hardware"])).lower()
    return all(word.lower() in text for word in arguments.text or ())


def batch_size(text: str, known: set[int]) -> int:
    """32768, "32768" and "32k" are one batch.

    Raises:
        ValueError: not a number, or no recipe has it; names the nearest.
    """
    digits, factor = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    if not digits.isdigit():
        raise ValueError(f"--batch is {text!r}; expected a number such as 32768 or 32k")
    batch = int(digits) * factor
    if batch not in known:
        nearest = sorted(sorted(known, key=lambda other: abs(other - batch))[:4])
        raise ValueError(f"--batch is {text!r}, and no recipe has it; the nearest are {', '.join(map(str, nearest))}")
    return batch


def cell(column: str, value: Any) -> str:
    if column == "expected":
        return accuracy(value)
    return f"{value:.4g}" if column == "lr" else f"{value:,}" if column == "batch" else str(value)


def accuracy(expected: dict[str, Any] | None) -> str:
    """E.g. "top1 0.759", with "~" for a figure that was not read on its page."""
    if expected is None:
        return "-"
    return f"{expected['metric']} {'~' if expected['is_approximate'] else ''}{expected['value']:.4g}"


def table(rows: list[dict[str, str]], width: int | None) -> str:
    """Aligned columns; the last one is cut at ``width``."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS}
    right = ("lr", "batch")
    lines = []
    for row in [{column: column for column in COLUMNS}, *rows]:
        line = "  ".join(row[c].rjust(widths[c]) if c in right else row[c].ljust(widths[c]) for c in COLUMNS).rstrip()
        lines.append(line[:width])
    return "\n".join(lines)


def show(arguments: argparse.Namespace) -> int:
    path = find_recipe(arguments.name)
    recipe = load_recipes()[path.stem]
    if arguments.ranks < 1:
        raise ValueError(f"--ranks is {arguments.ranks}; expected a number >= 1")
    data = recipe["largebatch"]["data"]
    if arguments.num_samples is not None and arguments.num_samples < 1:
        raise ValueError(f"--num-samples is {arguments.num_samples}; expected a number >= 1")
    num_samples = arguments.num_samples or NUM_SAMPLES.get(data)
    if num_samples is None:
        raise ValueError(f"{path.stem} needs --num-samples: the size of its training set ({data}) is yours")
    phases = phase_recipes(recipe)
    resolved_runs = [resolve(s, num_samples=num_samples, world_size=arguments.ranks, output=path.stem) for s in phases]
    configs = [
        {key: value for key, value in resolved.config.items() if key != "tensorboard"} for resolved in resolved_runs
    ]
    if not arguments.json:
        row = row_of(path.stem, recipe)
        print(f"{path.stem}: {row['model']} on {data} ({num_samples:,} samples)")
        print(f"expected: {accuracy(row['expected'])}\nsource: {row['source']}\nhardware: {row['hardware']}")
        for resolved in resolved_runs:
            print(summary(resolved, num_samples, arguments.ranks))
    print(json.dumps(configs if len(configs) > 1 else configs[0], indent=2, ensure_ascii=False))
    return 0


def summary(resolved: ResolvedRun, num_samples: int, num_ranks: int) -> str:
    optimizer = resolved.config["optimizer"]
    return (
        f"{resolved.num_steps:,} steps ({resolved.num_steps * resolved.global_batch / num_samples:.4g} epochs) of {resolved.global_batch:,} = "
        f"{resolved.micro_batch} x {resolved.accumulation_steps} accumulation steps x {num_ranks} ranks, {optimizer['type']} "
        f"lr {optimizer['params']['lr']:.6g}"
    )
