"""`largebatch run` around the real deepspeed launcher: kills at random moments, a preemption, a bad recipe."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from largebatch.launch.supervise.launcher import launcher_options
from support import launching

pytestmark = pytest.mark.launcher
RECIPE = "ds_configs/lenet_digits_lars_480.json"


def test_a_sample_of_the_fault_campaign(tmp_path):
    """Two kills in one run; benchmarks/fault_campaign.py does hundreds (docs/results/faults.md)."""
    result = subprocess.run(
        [sys.executable, "benchmarks/fault_campaign.py", "--kills", "2", "--steps", "400", "--seed", "3", "--stages", "2",
         "--optimizers", "LAMB", "--output", str(tmp_path), "--report", str(tmp_path / "report.md")],
        cwd=launching.ROOT, env=launching.environment(), capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    with open(tmp_path / "kills.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(row["is_identical"] == "True" and row["faults"] == "" for row in rows)
    assert re.search(r"of an undisturbed run: (\d) of \1\.", (tmp_path / "report.md").read_text())


def supervise(*arguments):
    """`largebatch run` with two ranks, as a user would start it."""
    command = [
        shutil.which("largebatch", path=launching.environment()["PATH"]),
        "run",
        "--back-off",
        "0",
        "--grace",
        "200",
        "deepspeed",
    ]
    command += [*launcher_options(2), "launch/train.py"]
    return subprocess.Popen(
        [*command, "--deepspeed_config", RECIPE, *map(str, arguments)], cwd=launching.ROOT, env=launching.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_a_preemption_in_the_middle_of_a_long_accumulation(tmp_path):
    """A step of 24,000 micro-batches of one image on each rank."""
    process = supervise(
        "--steps", 3, "--output", tmp_path, "--set", "train_batch_size=48000", "--set", "train_micro_batch_size_per_gpu=1"
    )  # fmt: skip
    launching.wait_for_file(tmp_path / "metrics.jsonl")
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    code, out, err = launching.finish(process)
    assert code == 0, out + err
    assert "stopped as asked" in err and "interrupted after 0 of 3 steps; continue with --resume" in out
    assert launching.events(tmp_path, "step") == [] and os.path.isfile(tmp_path / "checkpoints" / "latest")


def test_a_bad_recipe_is_started_once(tmp_path):
    code, out, err = launching.finish(supervise("--output", tmp_path, "--set", "optimizer.params.momentun=0.5"))
    assert code == 2 and err.count("did you mean 'momentum'?") == 1
    assert "Not started again: it would end in the same way" in err and "Traceback" not in out + err
