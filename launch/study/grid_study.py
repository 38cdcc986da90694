"""The runs of a grid and the folder that they go to: which are left to do, what they came to, how long the rest will take."""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from largebatch.launch.recipe.reading import set_entry
from largebatch.launch.recipe.section import SECTION_DEFAULTS, phase_recipes
from largebatch.launch.study import plots, results, runner
from largebatch.launch.study.grid import GridRun

CPU_RANKS = 2
SET_BY_THE_GRID = ("largebatch.seed", "train_batch_size", "optimizer.type")


class Study:
    """A grid of runs and the folder that they go to."""

    def __init__(self, arguments: argparse.Namespace, runs: list[GridRun]):
        self.arguments, self.runs = arguments, runs
        self.output = os.path.abspath(arguments.output)
        ranks = arguments.ranks or torch.cuda.device_count() or CPU_RANKS
        self.launch = runner.Launch(ranks, arguments.data)
        self.failed: dict[str, str] = {}
        self.finished: dict[str, results.Row] = {}
        self.pace = Pace()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second study out of the folder, even if this one is killed and its run goes on.

        Raises:
            BlockingIOError: there is another already.
        """
        os.makedirs(self.output, exist_ok=True)
        with open(os.path.join(self.output, ".lock"), "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lock = file.fileno()
            yield

    def folder(self, run: GridRun) -> str:
        return os.path.join(self.output, run.name)

    def recipe(self, run: GridRun) -> dict[str, Any]:
        """The run's recipe with what the command line changes."""
        recipe = copy.deepcopy(run.cell.recipe)
        section = recipe["largebatch"]
        section["seed"] = run.seed
        for key, other in (("epochs", "steps"), ("steps", "epochs")):
            value = getattr(self.arguments, key)
            if value is not None:
                section[key], section[other] = value, None
        for assignment in self.arguments.set:
            if assignment.partition("=")[0] in SET_BY_THE_GRID:
                raise ValueError(
                    f"--set {assignment!r}: the grid sets that itself; use --seeds, --batches or --optimizers"
                )
            set_entry(recipe, assignment)
        return recipe

    def check(self) -> None:
        """Raises ValueError if a folder, or --finished, holds a run of another setting."""
        earlier = results.read_csv(self.arguments.finished) if self.arguments.finished is not None else []
        for run in self.runs:
            row = results.finished_row(run, self.recipe(run), earlier, self.arguments.metric)
            if row is not None and runner.state_of(self.folder(run)) == "new":
                self.finished[run.name] = row
            found = runner.differences(self.recipe(run), self.folder(run))
            if found:
                raise ValueError(
                    f"{self.folder(run)!r} holds a run with {'; '.join(found)}; choose another --output, or remove that folder"
                )

    def row(self, run: GridRun) -> results.Row | None:
        """None if the run has not ended."""
        return self.finished.get(run.name) or results.read_row(
            run, self.recipe(run), self.folder(run), self.arguments.metric
        )

    def rows(self) -> list[results.Row]:
        return [row for row in map(self.row, self.runs) if row is not None]

    def run(self) -> int:
        """Does what is left to do; returns the exit code."""
        ranks = f"{self.launch.num_ranks} rank{'s' * (self.launch.num_ranks > 1)}"
        waiting = [
            run
            for run in self.runs
            if run.name not in self.finished and runner.state_of(self.folder(run)) != "finished"
        ]
        print(
            f"{len(self.runs)} runs, {len(self.runs) - len(waiting)} of them finished before, {ranks} each, in {self.output}"
        )
        for cell in dict.fromkeys(run.cell.name for run in self.runs):
            print(f"  {cell}: recipe {next(run.cell.origin for run in self.runs if run.cell.name == cell)}")
        sys.stdout.flush()
        for run in self.runs:
            if run not in waiting:
                self.pace.note(self.row(run))
        try:
            for number, run in enumerate(waiting):
                self.run_one(
                    run, f"[{len(self.runs) - len(waiting) + number + 1}/{len(self.runs)}]", waiting[number + 1 :]
                )
                self.write_tables()
        except KeyboardInterrupt:
            self.write_tables()
            print("interrupted; the same command goes on from here", flush=True)
            return 130
        self.write_tables()
        self.draw()
        for name, reason in self.failed.items():
            print(f"failed: {name}: {reason}")
        return 1 if self.failed else 0

    def run_one(self, run: GridRun, place: str, left: list[GridRun]) -> None:
        """Trains, and prints the run's line."""
        folder, start = self.folder(run), time.monotonic()
        verb = " (resumed)" if runner.state_of(folder) == "resumable" else ""
        code = runner.train(self.launch, self.recipe(run), folder, lock=self.lock)
        seconds = time.monotonic() - start
        row = results.read_row(run, self.recipe(run), folder, self.arguments.metric)
        if row is None:
            reason = f"exit code {code}, {runner.why_failed(folder)} ({os.path.join(folder, 'log.txt')})"
            self.failed[run.name] = reason
            print(f"{place} {run.name}: FAILED{verb}: {reason}", flush=True)
            return
        if not verb:
            self.pace.measure(row, seconds)
        diverged = ", the loss became non-finite" if row.is_diverged else ""
        print(
            f"{place} {run.name}: {row.metric} {row.value:.4f} after {row.steps} steps{diverged}, {duration(seconds)}{verb}"
            f"{self.pace.left([self.recipe(r) for r in left])}",
            flush=True,
        )

    def write_tables(self) -> None:
        rows = self.rows()
        results.write_csv(os.path.join(self.output, "runs.csv"), rows)
        with open(os.path.join(self.output, "table.md"), "w", encoding="utf-8") as file:
            file.write(results.markdown(rows))

    def draw(self) -> None:
        rows = self.rows()
        print(f"\n{results.markdown(rows)}")
        written = [os.path.join(self.output, name) for name in ("runs.csv", "table.md")]
        if rows and not self.arguments.no_plots:
            written += plots.draw_all(rows, self.output)
        print("\n".join(written))


class Pace:
    """How long the runs took in this call, and from it, how long the others will."""

    def __init__(self):
        self.num_samples: float | None = None
        self.samples, self.seconds = 0.0, 0.0

    def note(self, row: results.Row) -> None:
        """Learns the size of the training set from a run."""
        self.num_samples = row.steps * row.batch / row.epochs

    def measure(self, row: results.Row, seconds: float) -> None:
        self.note(row)
        self.samples += row.steps * row.batch
        self.seconds += seconds

    def left(self, recipes: list[dict[str, Any]]) -> str:
        """The time that the recipes will take at the pace so far, for the end of a line."""
        if not recipes or not self.samples:
            return ""
        samples = sum(self.samples_of(phase) for recipe in recipes for phase in phase_recipes(recipe))
        return f"; about {duration(samples * self.seconds / self.samples)} left for {len(recipes)} runs"

    def samples_of(self, recipe: dict[str, Any]) -> float:
        """How many samples a recipe without phases trains on."""
        section = SECTION_DEFAULTS | recipe["largebatch"]
        if section["steps"] is not None:
            return section["steps"] * section["schedule_stretch"] * recipe["train_batch_size"]
        return section["epochs"] * section["schedule_stretch"] * self.num_samples


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
