"""The trainings of launch/quickstart.sh on one GPU, through the deepspeed launcher: LARS first, the others as time allows.

Not the script itself, which would install packages.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

from gpu.report import ROOT, Report, stage_arguments


def launcher(*arguments: str, num_ranks: int = 1) -> list[str]:
    """The deepspeed command, by the Python that runs this."""
    from largebatch.launch.supervise.launcher import free_port

    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_ranks), "--log_level", "error",
        "--master_port", str(free_port()), *arguments,
    ]  # fmt: skip


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add("# Quick start", "", "One rank, ds_configs/lenet_digits_<optimizer>_480.json.", "")
    runs: list[pathlib.Path] = []
    seconds = 0.0
    for optimizer in ("lars", "lamb", "sgd"):
        if report.left < 1.3 * seconds:
            report.add(f"- {optimizer}: no time was left")
            continue
        folder = arguments.work / "quickstart" / f"{os.getpid()}-{optimizer}"
        options = ["--deepspeed_config", f"ds_configs/lenet_digits_{optimizer}_480.json", "--output", str(folder)]
        options += ["--steps", "3"] * arguments.rehearse
        start = time.monotonic()
        code = subprocess.run(launcher("launch/train.py", *options), cwd=ROOT).returncode
        seconds = time.monotonic() - start
        report.add(f"- {optimizer}: {f'exit code {code}' if code else 'trained'}, {seconds:.1f} s from start to end")
        if code:
            print(f"{optimizer}: exit code {code}")
            return code
        runs.append(folder)
    table = [sys.executable, "-m", "largebatch.launch.study.results_table", *map(str, runs)]
    done = subprocess.run(table, stdout=subprocess.PIPE, text=True)
    report.add("", "```", done.stdout.strip(), "```")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
