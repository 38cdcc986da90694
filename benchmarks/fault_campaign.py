"""Kills training runs with signal 9 at random moments and lets them resume: is anything lost, and are the results the same?

    python benchmarks/fault_campaign.py --kills 200 --seed 1 --output DIR --report docs/results/faults.md

A run is a small MLP on scikit-learn's digits, two CPU ranks, through `largebatch run` and the unmodified deepspeed launcher;
it saves every few steps, in every other run in the background. Every run is killed several times and then trains to its end.
Then all tensors of its last checkpoint (weights, fp32 masters, optimizer state) are compared with those of a run of the same
recipe that was never disturbed, bit for bit. After each kill, once nothing of the run is left: every checkpoint must be whole
by its checksums, `latest` must name one of them, and the newest may not be older than before.

A line per kill goes to DIR/kills.csv as soon as its run has ended. Called again, the campaign goes on where it was stopped.
Exit code 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from fault_kills import MOMENTS, SECONDS_TO_START, TARGETS, Kill, drawn, kill, processes_of, unfinished, wait_for_moment
from fault_report import write_report

from largebatch.launch.supervise.launcher import free_port, is_alive
from largebatch.launch.trainer.run_progress import progress_of
from largebatch.launch.trainer.saving import step_folders

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_RANKS = 2
SECONDS_TO_END = 600.0
OPTIMIZERS = {
    "LARS": {"lr": 10.0, "momentum": 0.9, "weight_decay": 1e-4},
    "LAMB": {"lr": 0.01, "weight_decay": 0.01},
}
FIELDS = (
    "number", "run", "stage", "optimizer", "in_background", "target", "rank", "moment", "was_saving", "step",
    "seconds_after_start", "newest_before", "newest_after", "num_whole", "faults", "is_identical",
)  # fmt: skip


@dataclass
class Case:
    """What is trained."""

    stage: int
    optimizer: str
    in_background: bool

    @property
    def name(self) -> str:
        return f"zero{self.stage}_{self.optimizer.lower()}"


@dataclass
class Run:
    """A run under `largebatch run`, and what it says."""

    process: subprocess.Popen
    lines: queue.Queue = field(default_factory=queue.Queue)
    log: list[str] = field(default_factory=list)

    def __post_init__(self):
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("largebatch run: "):
                self.lines.put(line)
        self.lines.put(None)

    def is_over(self) -> bool:
        return self.process.poll() is not None


def recipe(case: Case, num_steps: int) -> dict[str, Any]:
    return {
        "largebatch": {
            "model": "mlp",
            "data": "digits",
            "steps": num_steps,
            "evaluate_every_epochs": 10**6,
            "save_every_epochs": 7 * 240 / 1437,  # every 7 steps
            "save_in_background": case.in_background,
            "keep_last": 3,
        },
        "train_batch_size": 240,
        "train_micro_batch_size_per_gpu": 60,
        "optimizer": {"type": case.optimizer, "params": OPTIMIZERS[case.optimizer]},
        "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": "auto", "warmup_steps": 10, "power": 1}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case.stage},
        "tensorboard": {"enabled": False},
    }


def start(case: Case, folder: pathlib.Path, num_steps: int) -> Run:
    """`largebatch run` around the deepspeed launcher, in a session of its own."""
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps(recipe(case, num_steps)))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "largebatch", "run", "--max-restarts", "1000", "--back-off", "0", "--grace", "60"]
    command += [
        "deepspeed",
        "--num_accelerators",
        str(NUM_RANKS),
        "--master_port",
        str(free_port()),
        "--log_level",
        "error",
    ]
    command += ["launch/train.py", "--deepspeed_config", str(path), "--output", str(folder)]
    return Run(
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )
    )  # fmt: skip


def tensors_of(checkpoint: pathlib.Path) -> dict[str, torch.Tensor]:
    """Every tensor in every file of a checkpoint, by file and place."""
    found: dict[str, torch.Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            for position, inner in enumerate(value):
                collect(f"{name}/{position}", inner)

    for path in sorted(checkpoint.glob("*.pt")):
        collect(path.name, torch.load(path, map_location="cpu", weights_only=False))
    return found


def is_identical(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors_of(one), tensors_of(other)
    return bool(a) and a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def last_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    return folder / "checkpoints" / step_folders.name_of(step_folders.pointed_to(str(folder / "checkpoints")) or 0)


def reference(case: Case, output: pathlib.Path, num_steps: int) -> pathlib.Path:
    """The last checkpoint of a run that nothing disturbs, trained if that has not been done; saved in the foreground."""
    folder = output / f"reference_{case.name}"
    if not progress_of(str(folder)).is_complete:
        shutil.rmtree(folder, ignore_errors=True)
        run = start(Case(case.stage, case.optimizer, False), folder, num_steps)
        run.process.wait()
        if run.process.returncode or not progress_of(str(folder)).is_complete:
            raise RuntimeError(f"the undisturbed run of {case.name} failed:\n{''.join(run.log)}")
    return last_checkpoint(folder)


def check(folder: pathlib.Path, newest_before: int) -> tuple[int, int, list[str]]:
    """(newest whole step, number of whole checkpoints, what is wrong) while nothing writes."""
    checkpoints = str(folder / "checkpoints")
    wrong, whole = [], []
    for step in step_folders.steps_in(checkpoints):
        faults = step_folders.faults(os.path.join(checkpoints, step_folders.name_of(step)))
        wrong += [f"step{step}: {fault}" for fault in faults]
        whole += [] if faults else [step]
    newest = max(whole, default=0)
    latest = step_folders.pointed_to(checkpoints)
    if whole and latest not in whole:
        wrong.append(f"latest names {latest}, which is not whole")
    if newest < newest_before:
        wrong.append(f"the newest whole checkpoint is step{newest} and was step{newest_before}")
    return newest, len(whole), wrong


def disturbed_run(case: Case, folder: pathlib.Path, num_kills: int, num_steps: int, draw: random.Random) -> list[dict]:
    """Kills a run so often, or until it is over, and lets it end; a row for each kill."""
    shutil.rmtree(folder, ignore_errors=True)
    run, began = start(case, folder, num_steps), time.monotonic()
    rows: list[dict] = []
    newest = 0
    while len(rows) < num_kills and not run.is_over():
        target, moment = drawn(TARGETS, draw), drawn(MOMENTS, draw)
        if not wait_for_moment(moment, folder, draw, run.is_over):
            break
        was_saving = bool(unfinished(folder / "checkpoints"))
        step = progress_of(str(folder)).step or 0
        found = processes_of(run.process.pid)
        while not run.lines.empty():
            run.lines.get()
        try:
            rank = kill(target, found, draw)
        except LookupError:  # so early in a start that it is not there yet
            continue
        done = Kill(target, moment, rank, round(time.monotonic() - began, 2), step, was_saving)
        if target == "supervisor":
            run.process.wait()
            wait_until_gone(found)
            run = start(case, folder, num_steps)
        else:
            run.lines.get(
                timeout=SECONDS_TO_START
            )  # "... Restart 3 of at most 1000", said once nothing of the start is left
        began = time.monotonic()
        newest_before = newest
        newest, num_whole, wrong = check(folder, newest_before)
        rows.append(
            asdict(done)
            | {
                "newest_before": newest_before,
                "newest_after": newest,
                "num_whole": num_whole,
                "faults": "; ".join(wrong),
            }
        )
    run.process.wait()
    if run.process.returncode or not progress_of(str(folder)).is_complete:
        raise RuntimeError(f"a run of {case.name} did not reach its end:\n{''.join(run.log[-60:])}")
    return rows


def wait_until_gone(processes: dict[str, list[psutil.Process]]) -> None:
    """Waits for the processes of a run whose supervisor was killed; they have to end by themselves."""
    deadline = time.monotonic() + SECONDS_TO_END
    while left := [p for of_name in processes.values() for p in of_name if is_alive(p)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still there {SECONDS_TO_END:g} s after `largebatch run` was killed: {left}")
        time.sleep(0.05)


def rows_in(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def campaign(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Runs until there are enough kills; returns all rows."""
    output = pathlib.Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    table = output / "kills.csv"
    cases = itertools.cycle(itertools.product(arguments.stages, arguments.optimizers))
    for number in itertools.count():
        rows = rows_in(table)
        stage, optimizer = next(cases)
        if len(rows) >= arguments.kills:
            return rows
        if any(int(row["run"]) == number for row in rows):
            continue
        draw = random.Random(f"{arguments.seed} {number}")
        case = Case(stage, optimizer, draw.random() < 0.5)
        expected = reference(case, output, arguments.steps)
        folder = output / f"run{number}"
        num_kills = min(arguments.kills_per_run, arguments.kills - len(rows))
        found = disturbed_run(case, folder, num_kills, arguments.steps, draw)
        same = is_identical(last_checkpoint(folder), expected)
        with open(table, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if not rows:
                writer.writeheader()
            for position, row in enumerate(found):
                named = {"number": len(rows) + position + 1, "run": number, "stage": stage, "optimizer": optimizer}
                row = named | {"in_background": case.in_background, "is_identical": same} | row
                writer.writerow(row)
                print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        if same and not any(row["faults"] for row in found):
            shutil.rmtree(folder)


def command_of(arguments: argparse.Namespace) -> str:
    return (
        f"python benchmarks/fault_campaign.py --kills {arguments.kills} --kills_per_run {arguments.kills_per_run} "
        f"--steps {arguments.steps} --seed {arguments.seed} --output DIR"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills_per_run", type=int, default=12)
    parser.add_argument("--steps", type=int, default=900, help="of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument(
        "--output", required=True, help="folder for the runs and kills.csv; may hold an unfinished campaign"
    )
    parser.add_argument("--report", help="Markdown file to write; kills.csv is copied beside it as <name>.csv")
    parser.add_argument("--report_only", action="store_true", help="kill nothing; report on what has been done")
    arguments = parser.parse_args()
    rows = rows_in(pathlib.Path(arguments.output) / "kills.csv") if arguments.report_only else campaign(arguments)
    if arguments.report:
        write_report(rows, pathlib.Path(arguments.report), num_planned=arguments.kills, command=command_of(arguments))
        shutil.copy(pathlib.Path(arguments.output) / "kills.csv", pathlib.Path(arguments.report).with_suffix(".csv"))
    bad = [row for row in rows if row["faults"] or row["is_identical"] != "True"]
    print(f"{len(rows)} kills in {len({row['run'] for row in rows})} runs; not as they should be: {len(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
