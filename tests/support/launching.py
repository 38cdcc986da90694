"""Starts the real deepspeed launcher and reads what a run leaves behind."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import torch

from largebatch.launch.supervise.launcher import launcher_options

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 900


def environment():
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    env["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{env['PATH']}"
    env["DS_ACCELERATOR"] = "cpu"
    env["OMP_NUM_THREADS"] = "1"
    return env


def start(*arguments, num_ranks=2, is_module=False):
    """The deepspeed launcher as a user's shell would start it, in a process group of its own."""
    launcher = shutil.which("deepspeed", path=environment()["PATH"])
    options = launcher_options(num_ranks)
    command = [launcher, *options, *(["--module"] if is_module else []), *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # fmt: skip
    process.port = int(options[options.index("--master_port") + 1])
    return process


def finish(process):
    """(exit code, standard output, standard error); nothing of the run's process group is left running."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, out, err


def train(*arguments, **options):
    """Runs launch/train.py to its end; asserts that it ends well and without noise."""
    process = start("launch/train.py", *arguments, **options)
    code, out, err = finish(process)
    assert code == 0, f"exit code {code}\n{out}\n{err}"
    noise = [
        line for line in err.splitlines() if any(w in line for w in ("Warning", "WARNING", "Traceback", "terminate"))
    ]
    assert [line for line in noise if "hostfile" not in line] == [], err
    # the names of DeepSpeed's buffers end in the port; those of other runs are not ours
    assert not [name for name in os.listdir("/dev/shm") if "deepspeed" in name and str(process.port) in name]
    return out


def events(folder, kind):
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if record["event"] == kind]


def final_weights(folder):
    """The model's parameters in the newest checkpoint."""
    checkpoints = pathlib.Path(folder) / "checkpoints"
    tag = (checkpoints / "latest").read_text()
    state = torch.load(checkpoints / tag / "mp_rank_00_model_states.pt", weights_only=False)
    return state["module"]


def wait_for_steps(folder, num_steps, process):
    """Returns once the metrics file tells of so many steps."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        try:
            if len(events(folder, "step")) >= num_steps:
                return
        except (OSError, json.JSONDecodeError):
            pass
        time.sleep(0.05)
    raise AssertionError("no progress")


def wait_for_file(path):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if os.path.exists(path):
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")
