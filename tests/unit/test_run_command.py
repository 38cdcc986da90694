"""`largebatch run`: which ends are followed by another start, and that nothing is left behind. The launcher is a stand-in."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from largebatch.launch.commands.run import main, output_of, with_resume
from largebatch.launch.supervise.restarts import what_happened
from largebatch.launch.trainer.run_progress import progress_of

STAND_IN = pathlib.Path(__file__).parents[1] / "support" / "dying_launcher.py"
RUN = "import sys; from largebatch.launch.commands.run import main; sys.exit(main(sys.argv[1:]))"


def command(folder, ends, *options):
    """`largebatch run` in a process of its own: it adopts what its children leave."""
    stand_in = [sys.executable, str(STAND_IN), str(folder), ",".join(ends), "--output", str(folder / "out")]
    return [sys.executable, "-c", RUN, "--back-off", "0", *options, *stand_in]


def supervised(folder, ends, *options):
    """(exit code, what was said, arguments of each start)."""
    result = subprocess.run(command(folder, ends, *options), capture_output=True, text=True, timeout=600)
    return result.returncode, result.stderr.splitlines(), (folder / "starts").read_text().splitlines()


def test_every_death_is_followed_by_a_start_until_the_end(tmp_path):
    ends = ["code:3", "killed", "code:247", "orphan", "code:0", "hang", "step", "done"]
    code, said, starts = supervised(tmp_path, ends, "--hang-timeout", "1")
    assert code == 0 and len(starts) == len(ends) and len(said) == len(ends) - 1
    assert set(starts) == {"--resume auto"}
    for line, words in zip(
        said,
        ["lost one another", "launcher was ended by SIGKILL", "a rank was ended by SIGKILL", "exit code 0, but no end",
         "exit code 0, but no end", "no step for 1 s", "error (exit code 1); last step 7"],
        strict=True,
    ):  # fmt: skip
        assert words in line and "Restart " in line and "of at most 10" in line
    assert "no step taken yet, no checkpoint yet" in said[0]
    assert (tmp_path / "orphan").read_text() == "saved", "what a dead launcher leaves may save"
    assert (tmp_path / "hang").read_text() == "started", "what hangs is killed"


@pytest.mark.parametrize(
    "ends, options, code, num_starts, words",
    [
        (["code:2"], (), 2, 1, "Not started again: it would end in the same way"),
        (["code:1"], (), 1, 3, "3 times in a row without a step"),
        (
            ["step"],
            ("--max-restarts", "3"),
            1,
            4,
            "last step 4, no checkpoint yet. Not started again: --max-restarts 3 is used up",
        ),
    ],
)
def test_when_it_gives_up(tmp_path, ends, options, code, num_starts, words):
    found, said, starts = supervised(tmp_path, ends, *options)
    assert found == code and len(starts) == num_starts and words in said[-1]


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # init has only to take note of it
    except psutil.NoSuchProcess:
        return True


def test_a_stop_is_passed_on_to_the_ranks(tmp_path):
    process = subprocess.Popen(command(tmp_path, ["hang"], "--grace", "0.8"), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "hang").exists():
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert "stopped as asked" in said and len(said.splitlines()) == 1
    assert (tmp_path / "hang").read_text() == "saved"
    assert len(children) >= 2 and all(has_ended(child) for child in children)


def test_a_killed_supervisor_takes_its_launcher_along(tmp_path):
    process = subprocess.Popen(command(tmp_path, ["hang"]))
    while not (tmp_path / "hang").exists():
        time.sleep(0.02)
    (launcher,) = psutil.Process(process.pid).children()
    (rank,) = launcher.children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([launcher], timeout=120)
    rank.kill()  # a stand-in; a rank of the trainer ends with its launcher
    assert not alive


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "no command; expected deepspeed"),
        (["deepspeed", "launch/train.py", "--deepspeed_config", "x"], "no --output DIR"),
        (["--max-restarts", "-1", "deepspeed"], "expected an integer >= 0"),
        (["--grace", "nan", "deepspeed"], "expected a number >= 0"),
    ],
)
def test_bad_requests(argv, words, capsys):
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2 and words in capsys.readouterr().err


def test_the_command_is_left_alone_but_for_resume():
    line = ["deepspeed", "--hostfile", "h", "launch/train.py", "--output=there"]
    assert output_of(line) == "there"
    assert with_resume(line) == [*line, "--resume", "auto"]
    assert with_resume([*line, "--resume"]) == [*line, "--resume"]


def test_words_for_signals():
    assert what_happened(128 + 15, False, None) == "a rank was ended by SIGTERM"
    assert what_happened(-signal.SIGSEGV, False, None) == "the launcher was ended by SIGSEGV"


@pytest.mark.parametrize(
    "content, step, is_complete",
    [
        ("", None, False),
        ('{"event": "start"}\n', None, False),
        ('{"event": "step", "step": 4}\n{"event": "st', 4, False),
        ('{"event": "step", "step": 4}\n{"event": "end", "step": 4}\n', 4, True),
        ('{"event": "end", "step": 4}\n{"event": "step", "step": 5}\n', 5, False),
        ('{"event": "layers", "step": 3, "x": "' + "y" * 70000 + '"}\n{"event": "step", "step": 3}\n', 3, False),
    ],
)
def test_progress_is_read_from_the_end_of_the_metrics(tmp_path, content, step, is_complete):
    (tmp_path / "metrics.jsonl").write_text(content)
    progress = progress_of(str(tmp_path))
    assert (progress.step, progress.is_complete, progress.checkpoint) == (step, is_complete, None)
    os.makedirs(tmp_path / "checkpoints" / "step2")
    assert progress_of(str(tmp_path)).checkpoint == 2
