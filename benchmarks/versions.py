"""Runs our tests under many pairs of DeepSpeed and torch, each in an environment of its own, and writes the support table.

    python benchmarks/versions.py --output DIR --report docs/results/versions.md   # every pair that DIR does not have yet
    python benchmarks/versions.py --output DIR --environments 0.16.9/2.6/3.11 --columns oldest   # one, in minutes, as CI does

uv makes the environment of a pair from the package index in a temporary folder, which goes when the tests end; what it has
downloaded stays in uv's cache, several GB a torch (UV_CACHE_DIR names another place for it). setup.cfg's own limits
hold, so a pair outside them fails to install, which is a row of the table, too. A line of JSON per pair and column goes to
DIR/results.jsonl as soon as it is known; called again, only what is missing runs. Exit code 1 if any test failed.

A cell is "passed / failed / skipped". Skipped are also the combinations that we refuse by name with that DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS_NEED = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "timm>=1.0.20")
NEW_CLIENTS = ("transformers>=5.23", "accelerate>=1.15", "lightning>=2.6.6")
OLD_CLIENTS = ("transformers>=4.56,<5", "accelerate>=1.10,<1.11", "lightning>=2.5,<2.6")
WORKERS = ("--numprocesses=2", "--dist=loadfile")
SECONDS = 3600
"""For one column; one that takes longer has failed."""

COLUMNS = {
    "exact": [
        "tests/sharding/test_exact_under_zero.py", "tests/sharding/test_accumulation.py",
        "-k", "LARS-2-2 or NNLAMB-2-3 or every_micro_batch",
    ],
    "layouts": ["tests/sharding/test_layouts.py", "tests/sharding/test_accumulation.py", "tests/sharding/test_loss_scale.py"],
    "checkpoints": [
        "tests/sharding/test_checkpoints.py", "tests/sharding/test_any_layout.py", "tests/sharding/test_whole_checkpoints.py",
        "tests/sharding/test_plain_checkpoints.py", "tests/sharding/test_plain_deepspeed_checkpoints.py",
        "tests/sharding/test_weights_alone.py",
    ],
    "engine": [
        "tests/engine/test_register.py", "tests/engine/test_baselines.py", "tests/unit/test_engine_config.py",
        "tests/unit/test_schedule.py",
    ],
    "launcher": ["tests/engine/test_launcher.py"],
    "clients": ["tests/engine/test_clients.py"],
    "oldest": [
        "tests/sharding/test_exact_under_zero.py", "tests/sharding/test_accumulation.py", "-k", "LARS-2-2 or every_micro_batch",
    ],
    "kernels": ["tests/kernels/test_backends.py", "tests/kernels/test_many_tensors.py", "-k", "not triton"],
}  # fmt: skip
"""What is tested -> arguments of pytest."""

OF_THE_TABLE = [column for column in COLUMNS if column != "oldest"]
"""The other is the short form that CI runs."""


@dataclass(frozen=True)
class Environment:
    """What is installed; written as its name, e.g. "0.18.4/2.8/3.11".

    Attributes:
        clients: requirements of transformers, accelerate and lightning.
    """

    deepspeed: str
    torch: str
    python: str = "3.11"
    clients: tuple[str, ...] = NEW_CLIENTS

    @property
    def name(self) -> str:
        return f"{self.deepspeed}/{self.torch}/{self.python}"

    @property
    def requirements(self) -> tuple[str, ...]:
        return (f"deepspeed=={self.deepspeed}", f"torch=={self.torch}.*", *TESTS_NEED, *self.clients)


ENVIRONMENTS = (
    Environment("0.16.9", "2.6", "3.10", OLD_CLIENTS),
    Environment("0.16.9", "2.6", clients=OLD_CLIENTS),
    Environment("0.17.6", "2.8", clients=OLD_CLIENTS),
    Environment("0.18.4", "2.8", clients=OLD_CLIENTS),
    Environment("0.16.9", "2.14", clients=OLD_CLIENTS),  # what Lightning's and LLaMA-Factory's limits resolve to
    Environment("0.18.6", "2.11"),
    Environment("0.18.9", "2.13"),  # axolotl's
    Environment("0.19.0", "2.11"),
    Environment("0.19.8", "2.14"),
    Environment("0.19.8", "2.14", "3.10"),
    Environment("0.19.8", "2.14", "3.13"),
    Environment("0.19.8", "2.15"),
)


def install(environment: Environment, folder: str) -> bool:
    """Makes the environment in a folder, and the kernels in their cache; False if that fails."""
    commands = (
        ["uv", "venv", "--quiet", "--python", environment.python, folder],
        ["uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", folder, "--editable", ".", *environment.requirements],
    )  # fmt: skip
    build = [
        pathlib.Path(folder, "bin", "python"),
        "-c",
        "from largebatch.kernels import dispatch; dispatch.choose('cpu', 'auto')",
    ]
    print(f"{environment.name}: installing", flush=True)
    variables = os.environ | {"DS_ACCELERATOR": "cpu"}
    # the C++ kernels now, which takes minutes on a busy machine: ranks that wait for each other have no such time
    return all(subprocess.run(c, cwd=ROOT, env=variables, check=False).returncode == 0 for c in (*commands, build))


def run_tests(environment: Environment, column: str, folder: str) -> dict[str, object]:
    """The line of results: counts of tests, or what kept them from running."""
    programs = pathlib.Path(folder, "bin")
    variables = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    report = pathlib.Path(folder, "report.xml")
    report.unlink(missing_ok=True)
    command = [
        programs / "python",
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        f"--junitxml={report}",
        *WORKERS,
        *COLUMNS[column],
    ]
    print(f"{environment.name}: {column}", flush=True)
    line: dict[str, object] = {"environment": environment.name, "column": column}
    try:
        subprocess.run(command, cwd=ROOT, env=variables, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return line | {"problem": f"no end after {SECONDS} s"}
    if not report.exists():
        return line | {"problem": "not started"}
    return line | counts(report)


def counts(report: pathlib.Path) -> dict[str, object]:
    """passed, failed and skipped of a JUnit file, and the names of the failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    num_skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(failed) - num_skipped
    return {"passed": passed, "failed": len(failed), "skipped": num_skipped, "failures": failed}


def known_results(path: pathlib.Path) -> dict[tuple[str, str], dict[str, object]]:
    """(environment, column) -> the last line about it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(line["environment"], line["column"]): line for line in map(json.loads, lines)}


def cell(line: dict[str, object] | None) -> str:
    if line is None:
        return "not run"
    return str(line["problem"]) if "problem" in line else f"{line['passed']} / {line['failed']} / {line['skipped']}"


def table(
    environments: list[Environment], results: dict[tuple[str, str], dict[str, object]], columns: list[str]
) -> str:
    rows = [("DeepSpeed", "torch", "Python", *columns), ("---",) * (3 + len(columns))]
    for e in environments:
        rows.append((e.deepspeed, e.torch, e.python, *(cell(results.get((e.name, column))) for column in columns)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    by_name = {environment.name: environment for environment in ENVIRONMENTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--environments", nargs="+", choices=by_name, default=list(by_name))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=OF_THE_TABLE)
    parser.add_argument("--report", type=pathlib.Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()
    path = arguments.output / "results.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = [by_name[name] for name in arguments.environments]
    for environment in chosen:
        missing = [c for c in arguments.columns if (environment.name, c) not in known_results(path)]
        with tempfile.TemporaryDirectory() as folder:
            is_installed = install(environment, folder) if missing else True
            for column in missing:
                line = {"environment": environment.name, "column": column, "problem": "cannot be installed"}
                line = run_tests(environment, column, folder) if is_installed else line
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    results = known_results(path)
    if arguments.report:
        arguments.report.write_text(table(list(ENVIRONMENTS), results, OF_THE_TABLE))
    print(table(chosen, results, arguments.columns))
    wanted = [results[environment.name, column] for environment in chosen for column in arguments.columns]
    return int(any(line.get("failed") or "problem" in line for line in wanted))


if __name__ == "__main__":
    sys.exit(main())
