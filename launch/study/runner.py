"""Runs of a study, one after the other, through the deepspeed launcher and launch/train.py."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from largebatch.launch.recipe.resolved_run import stretch_lengths
from largebatch.launch.recipe.section import SECTION_DEFAULTS, phase_recipes, with_current_names
from largebatch.launch.study.results import events_of, trained_with
from largebatch.launch.supervise.launcher import launcher_options

TRAIN_SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
SECONDS_TO_SAVE = 120
"""How long an interrupted run gets to write its checkpoint. The launcher itself gives its processes about 30 s."""


@dataclass(frozen=True)
class Launch:
    """How the runs of a study are started.

    Attributes:
        num_ranks: processes, one GPU each where there are GPUs.
        data_folder: given to train.py as --data, or None.
    """

    num_ranks: int
    data_folder: str | None

    def command(self, recipe: str, folder: str, *, is_resumed: bool) -> list[str]:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher_options(self.num_ranks)]
        command += [TRAIN_SCRIPT, "--deepspeed_config", recipe, "--output", folder]
        if self.data_folder is not None:
            command += ["--data", os.path.abspath(self.data_folder)]
        return [*command, "--resume"] if is_resumed else command


def state_of(folder: str) -> str:
    """ "finished", "resumable" (it has a checkpoint), "begun" (it has none) or "new"."""
    if any(e["event"] == "end" for e in events_of(folder)):
        return "finished"
    if os.path.isfile(os.path.join(folder, "checkpoints", "latest")):
        return "resumable"
    return "begun" if os.path.exists(os.path.join(folder, "metrics.jsonl")) else "new"


def train(launch: Launch, recipe: dict[str, Any], folder: str, *, lock: int) -> int:
    """Runs one training to its end, or until interrupted; its output goes to ``folder/log.txt``.

    A run that was killed before its first checkpoint starts anew.

    Args:
        lock: descriptor of the study's locked file; the launcher keeps it open, should it outlive the study.

    Returns:
        The launcher's exit code.

    Raises:
        KeyboardInterrupt: as asked by Ctrl-C, once the run has saved its checkpoint and ended.
    """
    state = state_of(folder)
    if state == "begun":
        shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)
    recipe_path = os.path.join(folder, "recipe.json")
    with open(recipe_path, "w", encoding="utf-8") as file:
        json.dump(recipe, file, indent=2)
        file.write("\n")
    command = launch.command(recipe_path, folder, is_resumed=state == "resumable")
    with open(os.path.join(folder, "log.txt"), "a", encoding="utf-8") as log:
        # a session of its own: Ctrl-C reaches it through stop() alone, once
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True, pass_fds=(lock,)
        )
        try:
            return process.wait()
        except BaseException:
            stop(process)
            raise


def environment() -> dict[str, str]:
    variables = dict(os.environ)
    if not torch.cuda.is_available():
        variables.setdefault("DS_ACCELERATOR", "cpu")
    return variables


def stop(process: subprocess.Popen) -> None:
    """Asks a run to save and end; kills it if it does not within SECONDS_TO_SAVE."""
    deadline = time.monotonic() + SECONDS_TO_SAVE
    try:
        os.killpg(process.pid, signal.SIGINT)
        while time.monotonic() < deadline:
            process.poll()  # reaps the launcher, which ends before the processes that it started
            os.killpg(process.pid, 0)
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    except KeyboardInterrupt:  # asked twice: at once, then
        os.killpg(process.pid, signal.SIGKILL)
        raise
    except ProcessLookupError:
        process.wait()


def why_failed(folder: str) -> str:
    """The last error in a run's log, for one line."""
    with open(os.path.join(folder, "log.txt"), encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    errors = [line for line in lines if "rror:" in line]
    return (errors or lines or ["it said nothing"])[-1]


def differences(recipe: dict[str, Any], folder: str) -> list[str]:
    """What a run in a folder was trained with, where it is not what the recipe says; "auto" agrees with anything."""
    recorded = next((e["config"] for e in events_of(folder) if e["event"] == "start"), None)
    if recorded is None:
        return []
    recorded, _ = with_current_names(recorded)
    wanted = copy.deepcopy(phase_recipes(recipe)[0])  # the run records the first phase first
    wanted["largebatch"] = SECTION_DEFAULTS | wanted["largebatch"]
    stretch_lengths(wanted)
    wanted["largebatch"] = trained_with(wanted["largebatch"])
    return compare(wanted, recorded | {"largebatch": trained_with(recorded["largebatch"])}, "")


def compare(wanted: dict[str, Any], recorded: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in wanted.items():
        name, there = f"{prefix}{key}", recorded.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            found += compare(value, there, f"{name}.")
        elif value != "auto" and value != there:
            found.append(f"{name} {there!r}, not {value!r}")
    return found
