"""benchmarks/gpu.sh without a GPU: which stages run, for how long, what is left of them, and what comes back."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPU_FOLDER = ROOT / "benchmarks" / "gpu"
MAX_COMMAND, MAX_FILES = 2000, 4


def loaded(name):
    """A module of benchmarks/gpu; their folder stays off the path, where its names could be taken for others."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU_FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stages = loaded("stages")

HANGS = """
import pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(folder / "child.txt").write_text(str(child.pid))
(folder / "report.md").write_text("the first half")
time.sleep(600)
"""
PROGRAMS = {
    "setup": "print('ready')",
    "good": "import pathlib, sys; pathlib.Path(sys.argv[1], 'report.md').write_text('all is well')",
    "bad": "print('so far so good'); raise SystemExit('error: it broke')",
    "hangs": HANGS,
    "late": "print('never')",
}


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A function that runs stages given as name -> seconds, each by its program above; returns the outcomes by name."""

    def run(seconds_of, *options):
        arguments = stages.parse_arguments(
            ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *options]
        )
        made = stages.Call(arguments, [stages.Stage(name, seconds, "") for name, seconds in seconds_of.items()])
        monkeypatch.setattr(
            made,
            "command",
            lambda name, limit: [sys.executable, "-c", PROGRAMS[name], str(made.results.folder / name)],
        )
        made.run()
        return {o["name"]: o for o in json.loads((tmp_path / "out" / "outcomes.json").read_text())}

    return run


def is_alive(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_no_stage_stops_another(call, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SETUP", stages.Stage("setup", 1, ""))
    began = time.monotonic()
    outcomes = call({"bad": 1, "hangs": 1, "good": 10})
    assert time.monotonic() - began < 20
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "setup": "done",
        "bad": "failed",
        "hangs": "timed out",
        "good": "done",
    }
    assert outcomes["bad"]["reason"] == "exit code 1: error: it broke"
    assert re.fullmatch(r"not at its end after \d+ s", outcomes["hangs"]["reason"])
    child = int((tmp_path / "work" / "results" / "hangs" / "child.txt").read_text())
    assert not is_alive(child), "a process in a session of its own outlived its stage"
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "the first half" in summary and "all is well" in summary and "error: it broke" in summary


def test_what_comes_back_is_few_and_small_files(call, tmp_path):
    call({"good": 5, "bad": 5})
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= MAX_FILES
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) and path.is_file() for path in files)
    with tarfile.open(tmp_path / "out" / "stages.tar.gz") as archive:
        assert {"good/report.md", "good/log.txt", "bad/log.txt", "bad/outcome.json"} <= set(archive.getnames())


def test_each_result_is_packed_before_the_next_stage_begins(call, tmp_path, monkeypatch):
    packed = f"import os, sys; sys.exit(not os.path.getsize({str(tmp_path / 'out' / 'summary.md')!r}))"
    monkeypatch.setitem(PROGRAMS, "late", packed)
    assert call({"good": 5, "late": 5})["late"]["status"] == "done"


def test_a_stage_without_time_is_recorded(call):
    outcomes = call({"hangs": 1, "late": 0}, "--seconds", "2")
    assert outcomes["late"]["status"] == "not started" and outcomes["late"]["reason"] == "no time was left"


def test_large_files_are_shortened_and_too_many_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LARGEST_PACK", 5 * 2**20)
    results = stages.Results(tmp_path / "results", tmp_path / "out")
    for number in range(6):
        folder = tmp_path / "results" / f"stage{number}"
        folder.mkdir(parents=True)
        (folder / "log.txt").write_bytes(b"begin" + os.urandom(2 * 2**20) + b"end")
    archive, left_out = results.archive()
    assert len(archive) < 2**24 and left_out == ["stage4/log.txt", "stage5/log.txt"]
    shortened = stages.shortened(tmp_path / "results" / "stage0" / "log.txt")
    assert shortened.startswith(b"begin") and shortened.endswith(b"end") and b"bytes left out" in shortened
    results.pack()
    assert "Left out of stages.tar.gz, which was full: stage4/log.txt" in (tmp_path / "out" / "summary.md").read_text()


def test_which_stages_run():
    def names(text, **options):
        chosen = stages.selected(text, **({"has_data": False, "is_rehearsal": False} | options))
        return [stage.name for stage in chosen]

    first = ["versions", "tests", "sanitizer", "kernels", "blocks", "zero", "quickstart"]
    assert names(None) == first
    assert names(None, has_data=True) == [*first, "data"]
    assert set(names(None, is_rehearsal=True)) == {stage.name for stage in stages.STAGES}
    assert names("data,davidnet,trainer") == ["data", "davidnet", "trainer"]


@pytest.mark.parametrize(
    "names, said", [("tests,kernel", "there is no stage 'kernel'"), ("zero,zero", "a stage is named twice")]
)
def test_a_wrong_stage_is_an_error_that_names_the_known_ones(names, said):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--stages", names]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 2 and said in done.stderr
    assert all(stage.name in done.stderr for stage in stages.STAGES)


def test_time_is_shared_out():
    first = stages.selected(None, has_data=True, is_rehearsal=False)
    assert sum(stages.budgets_of(first, None)) <= 420
    second = stages.selected("data,davidnet,trainer", has_data=True, is_rehearsal=False)
    assert sum(stages.budgets_of(second, None)) <= 300
    assert sum(stages.budgets_of(first, 210)) == pytest.approx(210)
    # alone, what needs compiled operators waits for them in time of its own
    kernels = next(stage for stage in stages.STAGES if stage.name == "kernels")
    assert sum(stages.budgets_of([kernels], None)) == stages.BUILD_SECONDS + kernels.seconds
    # the rest of an earlier stage is the next one's; later ones keep theirs
    assert stages.time_limit([10, 20, 30], 1, 55) == 25
    assert stages.time_limit([10, 20, 30], 1, 45) == 20
    assert stages.time_limit([10, 20, 30], 2, 12) == 12


def test_the_recommended_commands_are_short():
    commands = [line.strip() for line in stages.__doc__.splitlines() if line.strip().startswith("bash ")]
    assert len(commands) == 3 and all(len(command) < MAX_COMMAND for command in commands)


def test_every_stage_has_its_module():
    for stage in (stages.SETUP, *stages.STAGES):
        assert (GPU_FOLDER / f"{stage.name}.py").is_file(), stage.name


def test_the_wheels_complete_deepspeed():
    """Each of its requirements is among the wheels, or named as there already."""
    text = (GPU_FOLDER / "wheels.txt").read_text()
    known = {name.lower().replace("_", "-") for name in re.findall(r"[A-Za-z][\w-]*", text)}
    for requirement in importlib.metadata.requires("deepspeed"):
        if "extra ==" not in requirement:
            assert re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") in known, requirement
