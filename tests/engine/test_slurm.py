"""launch/slurm.sbatch with stand-ins for srun and scontrol, which start what SLURM would on this machine. Not SLURM itself."""

import os
import pathlib
import re
import signal
import stat
import subprocess

import pytest

from largebatch.launch.supervise.launcher import free_port
from support import launching

ROOT = launching.ROOT
SRUN = """#!/bin/bash
# srun: every task at once, and an end with the worst exit code. What the check prints is kept in $RECORDED; where there is
# something already, the check is that, and the training is not started but named.
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
out=/dev/stdout
case "$*" in *rank_check*) out="$RECORDED" ;; esac
if [ -s "$RECORDED" ] && [ "$out" = "$RECORDED" ]; then cat "$RECORDED"; exit; fi
if [ -s "$RECORDED" ] && [ -n "$DRY" ]; then echo "would start: $*"; exit; fi
pids=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" >> "$out" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
[ "$out" = /dev/stdout ] || cat "$out"
exit $status
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\nnode2\\n'
"""


@pytest.fixture
def job(tmp_path):
    """Runs slurm.sbatch as a job of one node with two tasks; returns (exit code, output)."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    env = launching.environment() | {
        "SLURM_JOB_ID": str(free_port() % 20000), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT), "RECORDED": str(tmp_path / "recorded"), "DRY": "",
    }  # fmt: skip
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"

    def run(*arguments, **variables):
        process = subprocess.Popen(
            ["bash", ROOT / "launch/slurm.sbatch", *map(str, arguments)], cwd=tmp_path, env=env | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=2 * launching.SECONDS)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return process.returncode, out

    return run


@pytest.mark.launcher
def test_a_job_checks_trains_and_continues(job, tmp_path):
    recipe = ("--deepspeed_config", "ds_configs/lenet_digits_lars_480.json", "--set", "largebatch.model=mlp")
    arguments = (*recipe, "--steps", 4, "--output", tmp_path / "run")
    code, out = job(*arguments)
    assert code == 0, out
    assert "ready: 2 ranks on 1 node" in out and f"results     {tmp_path / 'run'}" in out
    assert [e["step"] for e in launching.events(tmp_path / "run", "step")] == [1, 2, 3, 4]
    (start,) = launching.events(tmp_path / "run", "start")
    assert start["world_size"] == 2

    code, out = job(*arguments, DRY="1")
    assert code == 0, out
    last = out.splitlines()[-1]
    assert last.startswith("would start: bash launch/slurm_rank.sh python launch/train.py --deepspeed_config")
    assert last.endswith(" --resume"), "the job was requeued"


def test_a_job_that_cannot_run_says_why(job, tmp_path):
    code, out = job("--deepspeed_config", "x.json")
    assert code == 2 and "no --output DIR" in out
    code, out = job("--output", "run", SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2 and "submit from the repository's root" in out


def test_what_the_job_asks_for_stands_before_its_first_command():
    """sbatch stops reading #SBATCH lines there."""
    text = (ROOT / "launch/slurm.sbatch").read_text()
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    asked = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[: len(asked)] == asked and len(asked) >= 8
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in asked)


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch")))
def test_shell_syntax(path):
    subprocess.run(["bash", "-n", str(pathlib.Path(ROOT) / "launch" / path)], check=True)
