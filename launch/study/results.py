"""What the runs of a study came to: a row per run (CSV), a row per cell with mean and spread (Markdown)."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import statistics
from dataclasses import astuple, dataclass, fields
from typing import Any

from largebatch.launch.recipe.section import RENAMED, SECTION_DEFAULTS
from largebatch.launch.study.grid import GridRun

NOT_A_SETTING = (
    "source", "expected", "hardware", "layer_stats_every_steps", "evaluate_every_epochs", "save_every_epochs",
    "save_in_background", "keep_last", "keep_best", "collective_timeout_seconds",
)  # fmt: skip
"""Keys of the "largebatch" section that change nothing in the training."""

FIRST_NAMES = {new: path[-1] for path, new in RENAMED.items()}

SPEEDS = ("images_per_second", "samples_per_second")


def events_of(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none if there is no such file. A line that was cut off is left out."""
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def trained_with(section: dict[str, Any]) -> dict[str, Any]:
    """The "largebatch" section with its defaults, without the keys that change nothing in the training."""
    return {key: value for key, value in (SECTION_DEFAULTS | section).items() if key not in NOT_A_SETTING}


def digest(recipe: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that two recipes share if they ask for the same training but for the seed.

    A key of the "largebatch" section counts as left out where it has its default. What a recipe leaves to the trainer or to
    DeepSpeed ("auto", defaults) is not in it: another version of either may do otherwise. Keys that have been renamed count
    under their first names, so that the rows of earlier studies are known again.
    """
    section = trained_with(recipe["largebatch"])
    section = {
        key: value for key, value in section.items() if key != "seed" and (key, value) not in SECTION_DEFAULTS.items()
    }
    settings = json.loads(
        json.dumps(recipe | {"largebatch": section}),
        object_pairs_hook=lambda pairs: {FIRST_NAMES.get(key, key): value for key, value in pairs},
    )
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def speed_of(end: dict[str, Any]) -> float:
    """Samples a second of an event "end"."""
    return next(end[name] for name in SPEEDS if name in end)


def metrics_of(end: dict[str, Any]) -> dict[str, float]:
    """What the model was found to do on the test set at the end of a run; the first is the main metric."""
    return {name: value for name, value in end.items() if name not in ("event", "step", *SPEEDS)}


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        metric: name of the main metric, e.g. "top1"; value: at the end, on the whole test set.
        lr: at the peak; None where the recipe leaves it to the optimizer.
        final_loss: mean training loss of the last step. is_diverged: that it, or any before it, is not finite.
        recipe: where the settings come from, for people; recipe_digest: the settings, for comparison (:func:`digest`).
    """

    model: str
    data: str
    optimizer: str
    batch: int
    seed: int
    lr: float | None
    steps: int
    epochs: float
    metric: str
    value: float
    final_loss: float
    is_diverged: bool
    samples_per_second: float
    ranks: int
    recipe: str
    recipe_digest: str
    folder: str


def read_row(run: GridRun, recipe: dict[str, Any], folder: str, metric: str | None) -> Row | None:
    """The row of a run; None if it has not ended.

    Args:
        recipe: that the run was given.
        metric: a name in the run's "end" event; None: the first metric there, which is the main one.

    Raises:
        ValueError: the run has no such metric.
    """
    events = events_of(folder)
    start = next((e for e in events if e["event"] == "start"), None)
    end = next((e for e in reversed(events) if e["event"] == "end"), None)
    if start is None or end is None:
        return None
    metrics = metrics_of(end)
    name = metric or next(iter(metrics))
    if name not in metrics:
        raise ValueError(
            f"--metric is {name!r}; expected one of {', '.join(metrics)}, which the run in {folder!r} ends with"
        )
    config, steps = start["config"], [e for e in events if e["event"] == "step"]
    section = config["largebatch"]
    return Row(
        model=section["model"],
        data=section["data"],
        optimizer=run.cell.optimizer,
        batch=config["train_batch_size"],
        seed=section["seed"],
        lr=config["optimizer"]["params"].get("lr"),
        steps=end["step"],
        epochs=float(f"{steps[-1]['epoch']:.6g}"),
        metric=name,
        value=end[name],
        final_loss=steps[-1]["loss"],
        is_diverged=not all(math.isfinite(e["loss"]) for e in steps),
        samples_per_second=round(speed_of(end), 1),
        ranks=start["world_size"],
        recipe=run.cell.origin,
        recipe_digest=digest(recipe),
        folder=os.path.basename(folder),
    )


def write_csv(path: str, rows: list[Row]) -> None:
    """One line per run, columns as in :class:`Row`."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(map(astuple, rows))


def read_csv(path: str) -> list[Row]:
    """The rows that :func:`write_csv` wrote.

    Raises:
        ValueError: the file cannot be read, or is no such table; names the line.
    """
    columns = {field.name: field.type for field in fields(Row)}
    readers = {"str": str, "int": int, "float": float, "float | None": optional_float, "bool": {"True": True, "False": False}.__getitem__}  # fmt: skip
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--finished {path!r} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(table, start=2):
        try:
            rows.append(Row(**{name: readers[str(kind)](line[name]) for name, kind in columns.items()}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"--finished {path!r}, line {number}: {error!r}; expected the columns {', '.join(columns)}, as in the "
                "runs.csv of a study"
            ) from None
    return rows


def optional_float(text: str) -> float | None:
    return None if text == "" else float(text)


def finished_row(run: GridRun, recipe: dict[str, Any], rows: list[Row], metric: str | None) -> Row | None:
    """The row of a run among those of an earlier study; None if there is none.

    Args:
        recipe: of the run, with what the command line changes.
        metric: as for :func:`read_row`.

    Raises:
        ValueError: the row is of other settings or another metric.
    """
    section = recipe["largebatch"]
    identity = (section["model"], section["data"], run.cell.optimizer, run.cell.batch, run.seed)
    row = next((r for r in rows if (r.model, r.data, r.optimizer, r.batch, r.seed) == identity), None)
    if row is None:
        return None
    wanted = {"recipe": run.cell.origin, "recipe_digest": digest(recipe), "metric": metric or row.metric}
    found = [
        f"{name} {getattr(row, name)!r}, not {value!r}" for name, value in wanted.items() if getattr(row, name) != value
    ]
    if found:
        raise ValueError(
            f"--finished has a row {row.folder} with {'; '.join(found)}: it was trained with other settings; remove the "
            "row, or leave --finished out"
        )
    return row


def by_cell(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """{(optimizer, batch): its runs}, in the order of the rows."""
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.optimizer, row.batch), []).append(row)
    return cells


def mean_and_spread(values: list[float]) -> str:
    """Mean and, of two and more, sample standard deviation."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def markdown(rows: list[Row]) -> str:
    """Two tables: the main metric by optimizer and batch, and the settings of every cell."""
    if not rows:
        return "No run has finished.\n"
    cells = by_cell(rows)
    optimizers = list(dict.fromkeys(optimizer for optimizer, _ in cells))
    batches = sorted({batch for _, batch in cells})
    first = rows[0]
    lines = [f"{first.model} on {first.data}: {first.metric}, mean ± sample standard deviation (number of runs)", ""]
    lines += ["| optimizer | " + " | ".join(f"batch {batch:,}" for batch in batches) + " |"]
    lines += ["|---" * (len(batches) + 1) + "|"]
    for optimizer in optimizers:
        texts = []
        for batch in batches:
            group = cells.get((optimizer, batch))
            texts.append(f"{mean_and_spread([r.value for r in group])} ({len(group)})" if group else "")
        lines.append(f"| {optimizer} | " + " | ".join(texts) + " |")
    lines += [
        "",
        "| optimizer | batch | learning rate | steps | epochs | runs | lowest | highest | non-finite loss | recipe |",
    ]
    lines += ["|---" * 10 + "|"]
    for (optimizer, batch), group in sorted(cells.items(), key=lambda item: (item[0][1], optimizers.index(item[0][0]))):
        row, values = group[0], [r.value for r in group]
        lines.append(
            f"| {optimizer} | {batch:,} | {'default' if row.lr is None else f'{row.lr:.4g}'} | {row.steps} | {row.epochs:.4g} | {len(group)} "
            f"| {min(values):.4f} | {max(values):.4f} | {sum(r.is_diverged for r in group)} | {row.recipe} |"
        )
    return "\n".join(lines) + "\n"
