"""DavidNet on CIFAR-10, 24 epochs, all 10,000 test images: one seed of each cell, as many cells as the time allows.

Each cell is a study of one run (``largebatch study``), so it goes through the launcher and the recipes of ds_configs. A few
run side by side on the GPU: what is wanted is their accuracy, not their speed. Each finished cell is a line of davidnet.csv
at once. Another call skips what is there, and resumes what was cut short, as long as the work folder stays.
"""

from __future__ import annotations

import csv
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

from gpu.data import data_folder, missing_from
from gpu.report import ROOT, Report, measured_head, stage_arguments

LARGEST_MICRO_BATCH = 2048
"""Given, so that runs side by side do not look for the largest that fits; the recipes fix the ghost batch size."""

NUM_SIDE_BY_SIDE = 3


class Cell(NamedTuple):
    optimizer: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}_{self.batch}"


CELLS = [Cell(optimizer, 512) for optimizer in ("lamb", "lars", "sgd", "adamw")]
CELLS += [Cell(optimizer, batch) for batch in (8192, 32768) for optimizer in ("lamb", "lars")]


def study(cell: Cell, folder: pathlib.Path, arguments) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "largebatch",
        "study",
        "--model",
        "davidnet",
        "--data-set",
        "cifar10",
        "--no-plots",
    ]
    command += [
        "--data",
        str(data_folder(arguments.work)),
        "--output",
        str(folder),
        "--seeds",
        "1",
        "--ranks",
        "1",
    ]
    command += ["--batches", str(cell.batch), "--optimizers", cell.optimizer]
    command += ["--set", f"train_micro_batch_size_per_gpu={min(cell.batch, LARGEST_MICRO_BATCH)}"]
    return [*command, "--variant", "narrow", "--steps", "1"] if arguments.rehearse else command


def keep(cell: Cell, folder: pathlib.Path, table: pathlib.Path, results: pathlib.Path) -> dict[str, str]:
    """Adds a finished study's row to the table, and copies the run's metrics and log; returns the row."""
    with open(folder / "runs.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    is_new = not table.exists()
    with open(table, "a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    for name in ("metrics.jsonl", "log.txt", "ds_config.json"):
        path = folder / row["folder"] / name
        if path.is_file():
            shutil.copyfile(path, results / f"{cell.name}_{name}")
    return row


def finished(table: pathlib.Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add(*measured_head("DavidNet on CIFAR-10", arguments))
    missing = missing_from(arguments.work)
    if missing:
        report.add(
            f"CIFAR-10 is not whole in the work folder; the stage `data` brings it. Missing: {', '.join(missing)}"
        )
        print("CIFAR-10 is not whole in the work folder")
        return 1
    home = arguments.work / "davidnet"
    home.mkdir(exist_ok=True)
    table, cells = home / "davidnet.csv", CELLS[:2] if arguments.rehearse else CELLS
    rows = finished(table)
    if rows:
        shutil.copyfile(table, arguments.results / table.name)
    done = {(row["optimizer"], int(row["batch"])) for row in rows}
    report.add(f"Up to {NUM_SIDE_BY_SIDE} runs side by side on one GPU; one rank each.", "")
    report.add("| optimizer | batch | top1 | final loss | images/s | seconds |", "|---|---|---|---|---|---|")
    for row in rows:
        report.add(line(row, "earlier"))
    waiting = [cell for cell in cells if cell not in done]
    running: dict[Cell, tuple[subprocess.Popen, float]] = {}
    longest, failed = 0.0, []
    while waiting or running:
        while waiting and len(running) < NUM_SIDE_BY_SIDE and report.left > longest:
            cell = waiting.pop(0)
            process = subprocess.Popen(study(cell, home / cell.name, arguments), cwd=ROOT)
            running[cell] = (process, time.monotonic())
        if not running:
            break
        time.sleep(0.2)
        for cell, (process, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[cell]
            seconds = time.monotonic() - began
            longest = max(longest, seconds)
            if process.returncode:
                failed.append(cell.name)
                report.add(
                    f"| {cell.optimizer} | {cell.batch} | failed, exit code {process.returncode} | | | {seconds:.0f} |"
                )
                continue
            report.add(line(keep(cell, home / cell.name, table, arguments.results), f"{seconds:.0f}"))
            shutil.copyfile(table, arguments.results / table.name)
    report.add("", *(f"No time was left for {cell.name}." for cell in waiting))
    print(f"failed: {', '.join(failed)}" if failed else f"{len(waiting)} cells are left for another call")
    return int(bool(failed))


def line(row: dict[str, str], seconds: str) -> str:
    figures = f"{float(row['value']):.4f} | {float(row['final_loss']):.4f} | {float(row['samples_per_second']):.0f}"
    return f"| {row['optimizer']} | {int(row['batch']):,} | {figures} | {seconds} |"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    sys.exit(main())
