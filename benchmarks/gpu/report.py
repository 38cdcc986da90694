"""What a stage is told on its command line, and the report that it writes line by line, so that a killed one leaves its part."""

from __future__ import annotations

import argparse
import pathlib
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERDICT = "verdict.txt"
"""In the folder of the stage ``tests``: one line on how they went."""


def stage_arguments(description: str | None, **more: str) -> argparse.Namespace:
    """The arguments that every stage takes, and ``device``, ``deadline`` (monotonic) beside them.

    Args:
        more: name -> default of further texts that this stage takes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = pathlib.Path
    parser.add_argument("--results", type=folder, required=True, help="where this stage writes")
    parser.add_argument("--work", type=folder, required=True, help="folder of the whole program on this machine")
    parser.add_argument("--seconds", type=float, default=60.0, help="what this stage may take")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    for name in ("wheels", "data", "apex"):
        parser.add_argument(f"--{name}", type=folder)
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    arguments.device = "cpu" if arguments.rehearse else "cuda"
    arguments.deadline = time.monotonic() + arguments.seconds
    return arguments


class Report:
    """``report.md`` of a stage: every line is on the disk when :meth:`add` returns."""

    def __init__(self, arguments: argparse.Namespace):
        self.path = arguments.results / "report.md"
        self.deadline = arguments.deadline

    @property
    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.deadline - time.monotonic()

    def add(self, *lines: str) -> None:
        text = "".join(f"{line}\n" for line in lines)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
        print(text, end="", flush=True)


def measured_head(title: str, arguments: argparse.Namespace) -> list[str]:
    """The head of a report with figures: hardware, versions, and how the tests of the kernels went on this machine."""
    from harness import preamble

    path = arguments.results.parent / "tests" / VERDICT
    verdict = path.read_text().strip() if path.is_file() else "not run on this machine"
    command = f"bash benchmarks/gpu.sh --stages {arguments.results.name}{' --rehearse' * arguments.rehearse}"
    lines = preamble(title, arguments.device, command)
    lines.insert(-1, f"- tests of the kernels: {verdict}")
    if arguments.rehearse:
        lines.insert(-1, "- a rehearsal on the CPU: the figures mean nothing")
    return lines
