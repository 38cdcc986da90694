"""All checks and measurements that need a GPU, stage by stage: no stage stops another, and each is packed before the next.

    bash benchmarks/gpu.sh --output DIR --data PART                                      # at most 7 minutes
    bash benchmarks/gpu.sh --output DIR --data PART --stages data,davidnet,trainer       # at most 5 minutes
    bash benchmarks/gpu.sh --output DIR --data WHOLE --rehearse                          # every stage, without a GPU

The second call follows the first on the same machine: PART is half of packed CIFAR-10 each time (gpu/halves.sh), and the
work folder keeps the other half. Packages that the machine lacks are installed from a folder of wheels, see gpu/wheels.sh;
nothing is fetched. DIR gets three files, written anew after each stage and while one runs: summary.md with all reports,
outcomes.json, and stages.tar.gz with everything. A stage that runs out of its time is killed with all that it started, and
what it had written stays. What earlier stages leave of their time goes to the next. This module needs Python alone. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
MARK = "LARGEBATCH_GPU_JOB"
"""The environment variable by which all processes of a job are found, whatever their parents and sessions."""

BUILD_SECONDS = 150
"""What compiling in the background may take, from the start of the call."""

REHEARSAL_FACTOR = 6
"""Two CPU cores are slower than a GPU, and nothing is measured on them."""

SECONDS_BETWEEN_PACKS, SECONDS_TO_DIE = 15, 10
LARGEST_FILE, LARGEST_PACK = 2**20, 15 * 2**20
"""Bytes. Of a larger file the beginning and the end are packed; more files than fit are left out, and named."""


@dataclass(frozen=True)
class Stage:
    """A question, answered by the module ``gpu.<name>`` in so many seconds."""

    name: str
    seconds: float
    answers: str
    needs_builds: bool = False


SETUP = Stage("setup", 30, "installs wheels and the repository")
STAGES = (
    Stage("versions", 15, "versions, card, driver, what a copy moves"),
    Stage("tests", 100, "tests/kernels on the GPU"),
    Stage("sanitizer", 45, "compute-sanitizer on a step of LAMB and of LARS"),
    Stage("kernels", 85, "what a step costs beside the other optimizers", needs_builds=True),
    Stage("blocks", 35, "which block sizes are fastest"),
    Stage("zero", 60, "the kernels in the engine, every ZeRO stage and precision, against the reference", needs_builds=True),
    Stage("quickstart", 35, "LeNet on digits through the launcher"),
    Stage("data", 15, "unpacks a part of packed CIFAR-10 into the work folder, and checks the whole"),
    Stage("trainer", 60, "the trainer beside a bare loop"),
    Stage("davidnet", 195, "DavidNet on CIFAR-10, 24 epochs, optimizer by optimizer"),
)  # fmt: skip
SECOND_CALL = ("trainer", "davidnet")
"""Not in the first call, which has no time for them."""


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        status: "done", "failed", "timed out" or "not started".
        reason: why, if it is not done.
        seconds, limit: what it took, and what it had.
    """

    name: str
    status: str
    reason: str
    seconds: float
    limit: float
    started: str


def selected(names: str | None, *, has_data: bool, is_rehearsal: bool) -> list[Stage]:
    """The stages to run, in the order in which they are named.

    Raises:
        ValueError: there is no such stage, or one is named twice; names those that there are.
    """
    if names is None:
        return [
            stage
            for stage in STAGES
            if is_rehearsal or (stage.name not in SECOND_CALL and (has_data or stage.name != "data"))
        ]
    known = {stage.name: stage for stage in STAGES}
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown or len(set(wanted)) < len(wanted):
        wrong = f"there is no stage {', '.join(map(repr, unknown))}" if unknown else "a stage is named twice"
        raise ValueError(f"--stages is {names!r}: {wrong}; expected some of {', '.join(known)}")
    return [known[name] for name in wanted]


def budgets_of(stages: list[Stage], seconds: float | None) -> list[float]:
    """What each stage gets, the setup first: its own time, or its share where ``seconds`` is given for all."""
    budgets = [SETUP.seconds, *(stage.seconds for stage in stages)]
    for place, stage in enumerate(stages, start=1):
        if stage.needs_builds:  # nothing before it that takes as long as compiling does
            budgets[place] += max(0, BUILD_SECONDS - sum(budgets[:place]))
            break
    if seconds is None:
        return budgets
    setup = max(budgets[0] * seconds / sum(budgets), min(budgets[0], seconds / 4))  # it takes no less for fewer stages
    return [setup, *((seconds - setup) * budget / sum(budgets[1:]) for budget in budgets[1:])]


def time_limit(budgets: list[float], place: int, left: float) -> float:
    """What the stage at a place may take: its own budget and what is left over, while the later ones keep theirs."""
    return min(max(budgets[place], left - sum(budgets[place + 1 :])), left)


class Job:
    """A process with all that it starts, and its log.

    Args:
        folder: emptied; gets ``log.txt`` beside what the process writes there.
    """

    def __init__(self, name: str, command: list[str], folder: pathlib.Path, environment: dict[str, str]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.name, self.log = name, folder / "log.txt"
        self.mark = f"{name}-{os.getpid()}-{time.monotonic_ns()}"
        self.began, self.started = time.monotonic(), f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {MARK: self.mark},
                cwd=ROOT,
                start_new_session=True,
            )

    def wait(self, limit: float, meanwhile: Callable[[], None] = lambda: None) -> Outcome:
        """Waits until it is so many seconds old, then ends it; nothing that it started is left behind."""
        deadline, ended = self.began + limit, None
        if self.process.poll() is not None:  # some time ago: what it printed last says when
            ended = time.monotonic() - (time.time() - self.log.stat().st_mtime)
        try:
            while self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
                meanwhile()
            is_late = self.process.poll() is None
        finally:
            left = end_marked(self.mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        seconds = (ended or time.monotonic()) - self.began
        stuck = f"; processes that cannot be killed: {left}" if left else ""
        if is_late:
            return self.outcome("timed out", f"not at its end after {seconds:.0f} s{stuck}", seconds, limit)
        if self.process.returncode:
            reason = f"exit code {self.process.returncode}: {last_line(self.log)}{stuck}"
            return self.outcome("failed", reason, seconds, limit)
        return self.outcome("done", "", seconds, limit)

    def outcome(self, status: str, reason: str, seconds: float, limit: float) -> Outcome:
        return Outcome(self.name, status, reason, round(seconds, 1), round(limit, 1), self.started)


def last_line(log: pathlib.Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1][:300]


def end_marked(mark: str) -> list[int]:
    """Kills every process that has the mark; returns those that are left, which wait for a device."""
    wanted, deadline = f"{MARK}={mark}".encode(), time.monotonic() + SECONDS_TO_DIE
    while True:
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it is gone, or another user's
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


class Results:
    """The results of all stages on this machine, and their packed form.

    Args:
        folder: one folder a stage.
        output: where the packed files go.
    """

    def __init__(self, folder: pathlib.Path, output: pathlib.Path):
        self.folder, self.output, self.packed_at = folder, output, 0.0
        output.mkdir(parents=True, exist_ok=True)

    def record(self, outcome: Outcome) -> None:
        folder = self.folder / outcome.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
        self.pack()

    def outcomes(self) -> list[Outcome]:
        """In the order in which they began."""
        found = [Outcome(**json.loads(path.read_text())) for path in self.folder.glob("*/outcome.json")]
        return sorted(found, key=lambda outcome: outcome.started)

    def pack_now_and_then(self) -> None:
        if time.monotonic() - self.packed_at > SECONDS_BETWEEN_PACKS:
            self.pack()

    def pack(self) -> None:
        """Writes the three files, each whole."""
        outcomes = self.outcomes()
        archive, left_out = self.archive()
        self.write("stages.tar.gz", archive)
        self.write("outcomes.json", json.dumps([asdict(outcome) for outcome in outcomes], indent=1).encode())
        self.write("summary.md", self.summary(outcomes, left_out).encode())
        self.packed_at = time.monotonic()

    def write(self, name: str, content: bytes) -> None:
        aside = self.output / f"{name}.part"
        aside.write_bytes(content)
        os.replace(aside, self.output / name)

    def archive(self) -> tuple[bytes, list[str]]:
        """A compressed archive of all files, and the names of those that did not fit."""
        packed, left_out, total = io.BytesIO(), [], 0
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                name = str(path.relative_to(self.folder))
                content = shortened(path)
                total += len(content)
                if total > LARGEST_PACK:
                    left_out.append(name)
                    continue
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                archive.addfile(entry, io.BytesIO(content))
        return packed.getvalue(), left_out

    def summary(self, outcomes: list[Outcome], left_out: list[str]) -> str:
        lines = [
            "# Stages on the GPU",
            "",
            "| stage | began | ended | seconds | of | reason |",
            "|---|---|---|---|---|---|",
        ]
        for o in outcomes:
            reason = o.reason.replace("|", "/")
            lines.append(f"| {o.name} | {o.started} | {o.status} | {o.seconds:g} | {o.limit:g} | {reason} |")
        lines += [""] + [f"Left out of stages.tar.gz, which was full: {name}" for name in left_out]
        names = [o.name for o in outcomes]
        names += sorted(path.name for path in self.folder.iterdir() if path.name not in names)
        for name in names:
            lines += [f"<!-- {name} -->", self.report(name), ""]
        return "\n".join(lines)

    def report(self, name: str) -> str:
        path = self.folder / name / "report.md"
        return shortened(path).decode(errors="replace") if path.is_file() else f"{name}: no report; see its log.txt"


def shortened(path: pathlib.Path) -> bytes:
    """What a file holds; of a large one its beginning and its end."""
    content = path.read_bytes()
    if len(content) <= LARGEST_FILE:
        return content
    half = LARGEST_FILE // 2
    return content[:half] + b"\n[... %d bytes left out ...]\n" % (len(content) - 2 * half) + content[-half:]


def environment(work: pathlib.Path, *, is_rehearsal: bool) -> dict[str, str]:
    """What all stages run in: these scripts on the path, and caches in the work folder."""
    # site and alias are in the environment that the setup makes; here for a machine where it cannot make one
    paths = [str(ROOT / "benchmarks"), str(work / "site"), str(work / "alias")]
    paths += os.environ.get("PYTHONPATH", "").split(":")
    tools = pathlib.Path(sys.executable).parent  # ninja lies beside a Python that need not be on the path itself
    variables = os.environ | {
        "PATH": f"{os.environ['PATH']}:{tools}",
        "PYTHONPATH": ":".join(path for path in dict.fromkeys(paths) if path),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCH_EXTENSIONS_DIR": str(work / "extensions"),
        "DS_ACCELERATOR": "cpu" if is_rehearsal else "cuda",
        "MAX_JOBS": os.environ.get("MAX_JOBS", "8"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return variables | {"CUDA_VISIBLE_DEVICES": ""} if is_rehearsal else variables


class Call:
    """One call of the program: its stages, one after the other, and compiling beside the first of them."""

    def __init__(self, arguments: argparse.Namespace, stages: list[Stage]):
        self.arguments, self.stages, self.began = arguments, stages, time.monotonic()
        seconds = arguments.seconds
        if arguments.rehearse and seconds is None:
            seconds = REHEARSAL_FACTOR * sum(budgets_of(stages, None))
        self.budgets = budgets_of(stages, seconds)
        arguments.work.mkdir(parents=True, exist_ok=True)
        self.results = Results(arguments.work / "results", arguments.output)
        self.environment = environment(arguments.work, is_rehearsal=arguments.rehearse)
        self.seconds_to_build = BUILD_SECONDS * sum(self.budgets) / sum(budgets_of(stages, None))
        self.builds: Job | None = None

    @property
    def left(self) -> float:
        return self.began + sum(self.budgets) - time.monotonic()

    def command(self, name: str, limit: float) -> list[str]:
        made = self.arguments.work / "venv" / "bin" / "python3"  # by the setup, see gpu.setup
        python = str(made) if made.exists() and name != SETUP.name else sys.executable
        command = [python, "-m", f"gpu.{name}", "--results", str(self.results.folder / name)]
        command += ["--work", str(self.arguments.work), "--seconds", f"{limit:.1f}"]
        for option in ("wheels", "data", "apex"):
            value = getattr(self.arguments, option)
            command += [f"--{option}", str(value)] if value is not None else []
        return command + ["--rehearse"] * self.arguments.rehearse

    def start(self, name: str, limit: float) -> Job:
        return Job(name, self.command(name, limit), self.results.folder / name, self.environment)

    def run(self) -> None:
        try:
            self.run_stage(SETUP, 0)
            for place, stage in enumerate(self.stages, start=1):
                if place == 1 and any(later.needs_builds for later in self.stages):
                    self.builds = self.start("builds", self.seconds_to_build)
                if stage.needs_builds:
                    self.finish_builds(min(self.seconds_to_build, self.left))
                self.run_stage(stage, place)
        finally:
            self.finish_builds(0.0)
            self.results.pack()

    def run_stage(self, stage: Stage, place: int) -> None:
        limit = time_limit(self.budgets, place, self.left)
        if limit < 1:
            now = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
            self.end(Outcome(stage.name, "not started", "no time was left", 0.0, 0.0, now))
            return
        self.end(self.start(stage.name, limit).wait(limit, self.results.pack_now_and_then))

    def finish_builds(self, limit: float) -> None:
        """Waits for what is being compiled until that has taken so many seconds; once only."""
        if self.builds is not None:
            job, self.builds = self.builds, None
            self.end(job.wait(limit, self.results.pack_now_and_then))

    def end(self, outcome: Outcome) -> None:
        """Keeps and prints what came of a stage."""
        self.results.record(outcome)
        print(self.results.report(outcome.name)[:3000])
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(
            f"== {outcome.name}: {outcome.status} in {outcome.seconds:g} of {outcome.limit:g} s{reason}\n", flush=True
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    stages = "\n".join(f"  {stage.name:<11}{stage.seconds:>4} s  {stage.answers}" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh",
        description=__doc__,
        epilog=f"stages, and the time of each:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    folder = pathlib.Path
    parser.add_argument(
        "--stages", metavar="A,B", help=f"default: all but {','.join(SECOND_CALL)}; data if --data is given"
    )
    parser.add_argument("--output", type=folder, default=folder("runs/gpu"), metavar="DIR", help="gets three files")
    parser.add_argument("--wheels", type=folder, metavar="DIR", help="default: build/wheels, if there is such a folder")
    parser.add_argument("--data", type=folder, metavar="DIR", help="packed CIFAR-10, or a part of it")
    parser.add_argument(
        "--apex", type=folder, metavar="DIR", help="a checkout of NVIDIA apex, to be compiled and timed"
    )
    parser.add_argument(
        "--work", type=folder, metavar="DIR", help="everything else; default: largebatch-gpu in $TMPDIR or /tmp"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="for all stages together; default: the sum of theirs"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        arguments.chosen = selected(
            arguments.stages, has_data=arguments.data is not None, is_rehearsal=arguments.rehearse
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.wheels is None and (ROOT / "build" / "wheels").is_dir():
        arguments.wheels = ROOT / "build" / "wheels"
    if arguments.work is None:
        name = f"largebatch-gpu{'-rehearsal' if arguments.rehearse else ''}"
        arguments.work = folder(tempfile.gettempdir()) / name
    for option in ("output", "wheels", "data", "apex", "work"):
        path = getattr(arguments, option)
        if path is not None:
            setattr(arguments, option, path.resolve())
            if option in ("wheels", "data", "apex") and not path.is_dir():
                parser.error(f"--{option} is {str(path)!r}, which is no folder")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns 0 whatever the stages found, 2 for a bad request."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    call = Call(arguments, arguments.chosen)
    call.run()
    table = (arguments.output / "summary.md").read_text().split("<!--")[0]
    print(f"{table.strip()}\n\n{time.monotonic() - call.began:.0f} s in all; results in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
