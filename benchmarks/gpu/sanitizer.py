"""compute-sanitizer on two steps of LAMB and of LARS over layers of odd shapes: memcheck, then racecheck if there is time.

Without torch's memory pool, so that every tensor is an allocation of its own and a read past its end is seen.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from gpu.report import Report, stage_arguments

SHAPES = ((37, 13), (1,), (8193,), (5, 3, 7), (64, 3, 3, 3), (100003,))
OPTIONS = (("LAMB", {"state_dtype": "fp32"}), ("LARS", {"state_dtype": "fp32"}), ("LAMB", {"state_dtype": "bf16"}))
CHECKS = ("memcheck", "racecheck")
FOUND_ERRORS = 9
"""Exit code of compute-sanitizer where it found any; none of Python's."""


def take_steps(device: str) -> None:
    import torch

    import largebatch

    for name, options in OPTIONS:
        generator = torch.Generator(device).manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(s, device=device, generator=generator)) for s in SHAPES]
        kernels = "triton" if device == "cuda" else "reference"  # nothing that would be compiled for minutes
        optimizer = getattr(largebatch, name)(weights, lr=0.01, weight_decay=0.01, kernels=kernels, **options)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, device=device, generator=generator)
            optimizer.step()
        assert all(torch.isfinite(weight).all() for weight in weights)
        print(f"{name} {options}: two steps taken", flush=True)


def find_tool() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ["PATH"], *(str(pathlib.Path(home) / "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=":".join(places))


def main() -> int:
    arguments = stage_arguments(__doc__, step="")
    if arguments.step:
        take_steps(arguments.device)
        return 0
    report = Report(arguments)
    report.add("# compute-sanitizer", "")
    step = [sys.executable, "-m", "gpu.sanitizer", "--step", "yes", "--results", str(arguments.results)]
    step += ["--work", str(arguments.work)] + ["--rehearse"] * arguments.rehearse
    plain = run(step, arguments.results / "plain.txt", report.left)  # compiles, which takes longer under the tool
    report.add(*told("without it", plain))
    tool = find_tool()
    reasons = [
        (plain.returncode, "the steps fail without it"),
        (arguments.rehearse, "there is no GPU, which is as it should be in a rehearsal"),
        (tool is None, "it is not installed"),
    ]
    reason = next((text for is_so, text in reasons if is_so), None)
    if reason is not None:
        report.add(f"compute-sanitizer was not run: {reason}.")
        print(reason)
        return plain.returncode
    code = 0
    for check in CHECKS:
        if report.left < 10:
            report.add(f"{check}: no time was left.")
            continue
        options = ["--tool", check, "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "20"]
        output = arguments.results / f"{check}.txt"
        checked = run([tool, *options, *step], output, report.left - 3, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        report.add(*told(f"{check}, {tool}", checked))
        code = code or checked.returncode
    print("compute-sanitizer: see the report")
    return code


def run(command: list[str], output: pathlib.Path, seconds: float, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command, and all that it starts, for so many seconds at most; its output goes to a file and is returned."""
    start = time.monotonic()
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | variables, start_new_session=True
        )
    try:
        code, ending = process.wait(seconds), ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        code, ending = process.wait(), ", stopped there: no time was left"
    said = output.read_text(errors="replace").strip()
    return subprocess.CompletedProcess(command, code, f"{said}\n[{time.monotonic() - start:.0f} s{ending}]")


def told(title: str, done: subprocess.CompletedProcess) -> list[str]:
    summaries = [line for line in done.stdout.splitlines() if "SUMMARY" in line or "not supported" in line]
    lines = done.stdout.splitlines()
    shown = lines if len(lines) <= 60 else [*lines[:40], f"[... {len(lines) - 60} lines ...]", *lines[-20:]]
    return [f"## {title}", "", f"Exit code {done.returncode}. {' '.join(summaries)}", "", "```", *shown, "```", ""]


if __name__ == "__main__":
    sys.exit(main())
