"""The folder of a run: whether it may be used, and the filled-in ds_config of each phase in it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from largebatch.engine.config_checks.json_files import read_json
from largebatch.launch.recipe.resolved_run import Phase
from largebatch.launch.trainer.saving import step_folders
from largebatch.launch.trainer.saving.storage import broadcast


def default_output(config_path: str, seed: int) -> str:
    """Where a run goes that is not told where to."""
    name = os.path.splitext(os.path.basename(config_path))[0]
    return os.path.join("runs", f"{name}_seed{seed}")


def check_run_folder(folder: str, resume: str | None) -> None:
    """Refuses a folder with another run, and to continue what is not there.

    Args:
        resume: of the command line: None, "required" or "auto".
    """
    metrics = os.path.join(folder, "metrics.jsonl")
    has_results = os.path.lexists(metrics)
    if has_results and not os.path.isfile(metrics):
        raise ValueError(f"{metrics!r} is no file; take it away, or choose another --output")
    if has_results and not resume:
        raise ValueError(f"{folder!r} already holds a run; continue it with --resume, or choose another --output")
    if resume == "required" and not os.path.isdir(folder):
        raise ValueError(f"--resume: {folder!r} does not exist; name the run to continue with --output")


def config_path(folder: str, number: int, word: str = "phase") -> str:
    """The file with the filled-in ds_config of a phase, numbered from 0."""
    return os.path.join(folder, f"ds_config_{word}{number + 1}.json" if number else "ds_config.json")


def earlier_config(folder: str, number: int) -> dict[str, Any] | None:
    """The filled-in config with which a run that is to be resumed has trained a phase."""
    for path in (config_path(folder, number), config_path(folder, number, "stage")):  # as earlier versions call it
        if os.path.lexists(path):
            return read_json(path, f"the config {path!r} of the run")
    return None


def write_configs(folder: str, phases: Sequence[Phase], rank: int) -> None:
    """Writes the config of each phase on rank 0. A collective.

    Raises:
        ValueError: on all ranks, if the folder cannot be written.
    """
    reason = None
    if rank == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            for phase in phases:
                text = json.dumps(phase.resolved.config, indent=2) + "\n"
                step_folders.write_text(config_path(folder, phase.number), text)
        except OSError as error:
            reason = str(error)
    reason = broadcast(reason)
    if reason is not None:
        raise ValueError(f"--output {folder!r} cannot be written: {reason}")
