"""Mutated ds_configs and damaged checkpoints, by the thousand: each has to train, or to give one clear error.

    python benchmarks/fuzz.py --cases 10000 --seed 1 [--workers 2] [--output runs/fuzz] [--report docs/results/fuzz.md]
    python benchmarks/fuzz.py --seed 1 --case 4711        # one case, with the traceback of its error

Case number N of a seed is always the same. Cases run in worker processes of some hundreds; one that hangs or dies takes
its worker with it, is a finding, and the next worker goes on behind it. Finished cases are lines of OUTPUT/cases.jsonl and
are not run again. A finding is run a second time in a process of its own, and counts if it is one there, too: what earlier
cases leave behind in a process is the fuzz's own doing.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES_PER_WORKER = 1000
SECONDS_PER_CASE = 120
BYTES_PER_WORKER = 12 << 30
"""Of address space: a model that is far too large has to fail, not to take the machine's memory."""

GOOD = ("trained", "refused", "left alone")


def work(seed: int, numbers: list[int]) -> None:
    """Runs cases and prints a line before and a line after each."""
    import faulthandler

    resource.setrlimit(resource.RLIMIT_AS, (BYTES_PER_WORKER, BYTES_PER_WORKER))
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no result
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    import support.rank_preload  # noqa: F401

    torch.set_num_threads(1)
    from support.fuzz_cases import join_world_of_one, run_case

    join_world_of_one()
    gc.freeze()  # or each collection would look through all that torch and deepspeed hold
    for number in numbers:
        print(json.dumps({"begun": number}), file=results)
        faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            print(json.dumps(run_case(seed, number, folder)), file=results)
        faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


def run_worker(seed: int, numbers: list[int]) -> Iterator[dict]:
    """The cases' results as they come; the last may be one that hung or died."""
    command = [sys.executable, __file__, "--seed", str(seed), "--worker", ",".join(map(str, numbers))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        ) as worker:
            begun = None
            for line in map(json.loads, worker.stdout):
                begun = line.get("begun")
                if "outcome" in line:
                    yield line
        if worker.returncode == 0:
            return
        errors.seek(0)
        told = errors.read()
    if begun is None:
        raise SystemExit(f"a worker ended outside of a case:\n{told[-4000:]}")
    outcome = "hang" if "Timeout (" in told else "died"
    yield (
        {"number": begun, "path": "", "base": "", "kinds": [], "outcome": outcome}
        | {"why": f"exit code {worker.returncode}", "message": told[-3000:], "seconds": SECONDS_PER_CASE}
    )


def campaign(seed: int, num_cases: int, workers: int, output: pathlib.Path, is_confirmed: bool = True) -> list[dict]:
    """Results of all cases, those of earlier calls among them; findings run a second time if ``is_confirmed``."""
    output.mkdir(parents=True, exist_ok=True)
    path, lock = output / "cases.jsonl", threading.Lock()
    results = {r["number"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}

    def run(numbers: list[int]) -> None:
        while numbers:
            for result in run_worker(seed, numbers):
                number, outcome = result["number"], result["outcome"]
                if outcome not in GOOD and is_confirmed:
                    again = next(run_worker(seed, [number]))
                    result = again | {"first": outcome} if again["outcome"] in GOOD else again
                numbers = [n for n in numbers if n != number]
                with lock, open(path, "a") as file:
                    results[number] = result
                    file.write(json.dumps(result) + "\n")
                    if len(results) % 100 == 0:
                        bad = sum(r["outcome"] not in GOOD for r in results.values())
                        print(f"{len(results)} of {num_cases} cases, {bad} findings", flush=True)

    left = [number for number in range(num_cases) if number not in results]
    chunks = [left[i : i + CASES_PER_WORKER] for i in range(0, len(left), CASES_PER_WORKER)]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, chunks))
    return [results[number] for number in range(num_cases)]


def table(results: list[dict], column: str, values_of) -> str:
    """Counts of outcomes by a property, as Markdown."""
    outcomes = list(dict.fromkeys([*GOOD, *(r["outcome"] for r in results)]))
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for result in results:
        for value in values_of(result):
            counts[value][result["outcome"]] += 1
    lines = [f"| {column} | cases | {' | '.join(outcomes)} |", "|---|" + "---|" * (len(outcomes) + 1)]
    for value in sorted(counts):
        row = [str(sum(counts[value].values())), *(str(counts[value][o]) for o in outcomes)]
        lines.append(f"| {value} | {' | '.join(row)} |")
    return "\n".join(lines)


def report(results: list[dict], seed: int) -> str:
    findings = [r for r in results if r["outcome"] not in GOOD]
    parts = [
        f"{len(results)} cases, seed {seed}; {len(findings)} findings.",
        table(results, "input", lambda r: [{"": "hang or death"}.get(r["path"], r["path"])]),
        table(results, "mutation", lambda r: sorted(set(r["kinds"])) or ["none"]),
    ]
    for result in findings[:50]:
        parts.append(
            f"- case {result['number']} ({result['path']}, {result['base']}, {', '.join(result['kinds'])}): "
            f"{result['outcome']}, {result['why']}: {result['message'].splitlines()[:1]}"
        )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Returns the exit code: 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--report", type=pathlib.Path, help="Markdown file; the tables go behind its line '## Counts'")
    parser.add_argument("--once", action="store_true", help="run no finding a second time")
    parser.add_argument("--case", type=int, help="runs this case alone and prints what came of it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.seed, [int(number) for number in arguments.worker.split(",")])
        return 0
    if arguments.case is not None:
        result = next(run_worker(arguments.seed, [arguments.case]))
        print(json.dumps(result, indent=1))
        return int(result["outcome"] not in GOOD)
    results = campaign(
        arguments.seed, arguments.cases, arguments.workers, arguments.output, is_confirmed=not arguments.once
    )
    text = report(results, arguments.seed)
    print(text)
    if arguments.report:
        before = arguments.report.read_text().partition("## Counts\n")[0] if arguments.report.exists() else ""
        arguments.report.write_text(f"{before}## Counts\n\n{text}")
    return int(any(r["outcome"] not in GOOD for r in results))


if __name__ == "__main__":
    sys.exit(main())
