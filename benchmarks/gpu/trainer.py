"""Images a second of the trainer beside a bare loop of torch, by benchmarks/trainer.py, in one process on one GPU.

DavidNet on CIFAR-10 where the work folder has it whole, on synthetic images of that size where not; then ResNet-50.
"""

from __future__ import annotations

import subprocess
import sys

from gpu.data import data_folder, missing_from
from gpu.report import ROOT, Report, measured_head, stage_arguments


def cases(arguments) -> list[list[str]]:
    """Options of benchmarks/trainer.py, the most important first."""
    if arguments.rehearse:
        return [["--model", "lenet", "--data", "digits", "--micro-batch", "32", "--steps", "2", "--rounds", "2"]]
    small = ["--data", "synthetic", "--image-size", "32"]
    if not missing_from(arguments.work):
        small = ["--data", "cifar10", "--data-dir", str(data_folder(arguments.work))]
    return [
        ["--model", "davidnet", *small, "--micro-batch", "512", "--steps", "20"],
        ["--model", "davidnet", *small, "--micro-batch", "512", "--accumulation-steps", "4", "--steps", "5"],
        ["--model", "resnet50", "--data", "synthetic", "--micro-batch", "64", "--steps", "5"],
    ]


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add(*measured_head("The trainer beside a bare loop", arguments))
    failed = 0
    for options in cases(arguments):
        report.add(f"## `python3 benchmarks/trainer.py {' '.join(options)}`", "")
        command = [sys.executable, str(ROOT / "benchmarks" / "trainer.py"), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = []
        for line in process.stdout:
            print(line, end="")
            lines.append(line.rstrip())
        code = process.wait()
        report.add(*([f"Exit code {code}.", ""] if code else []), "```", *lines[-5:], "```", "")
        failed = failed or code
    return failed


if __name__ == "__main__":
    sys.exit(main())
