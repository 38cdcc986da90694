"""``largebatch study`` with real runs: interrupted by a signal, called again, to the end."""

import csv
import json
import signal
import subprocess
import sys

import psutil
import pytest

from support import launching

pytestmark = pytest.mark.launcher


def test_a_study_that_is_interrupted_goes_on(tmp_path):
    """One run of 60 steps, stopped on the way by SIGTERM and resumed by the second call."""
    command = [
        sys.executable,
        "-m",
        "largebatch",
        "study",
        "--model",
        "lenet",
        "--data-set",
        "digits",
        "--batches",
        "480",
    ]
    command += [
        "--optimizers",
        "lars",
        "--seeds",
        "1",
        "--steps",
        "60",
        "--set",
        "largebatch.model=mlp",
        "--output",
        str(tmp_path),
    ]
    env, folder = launching.environment(), tmp_path / "lars_480_seed1"
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    launching.wait_for_steps(folder, 3, first)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=launching.SECONDS)
    assert first.returncode == 130 and "interrupted; the same command goes on from here" in out
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])], "left running"
    (stopped,) = launching.events(folder, "interrupted")
    assert 3 <= stopped["step"] < 60

    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=launching.SECONDS)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "[1/1] lars_480_seed1: top1 " in again.stdout and "(resumed)" in again.stdout
    assert [e["step"] for e in launching.events(folder, "step")] == list(range(1, 61))
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer"], row["model"], row["steps"], row["ranks"]) for row in rows] == [
        ("lars", "mlp", "60", "2")
    ]
    (end,) = launching.events(folder, "end")
    assert float(rows[0]["value"]) == end["top1"] > 0.8
    assert json.loads((folder / "recipe.json").read_text())["largebatch"]["steps"] == 60
    assert (tmp_path / "layers_lars_480_seed1.png").exists() and (tmp_path / "value_by_batch.png").exists()
