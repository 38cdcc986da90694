"""A sample of benchmarks/fuzz.py, and that its judgement tells good ends from bad ones."""

import json
import pathlib
import subprocess
import sys

import pytest

from support import fuzz_cases

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
NUM_CASES = 250


def test_a_sample_trains_or_is_refused(tmp_path):
    """A process of its own: mutated sizes are tried under a limit of memory."""
    command = [sys.executable, str(SCRIPT), "--seed", "2026", "--workers", "1", "--cases", str(NUM_CASES)]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=900)
    results = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert sorted(r["number"] for r in results) == list(range(NUM_CASES)), done.stderr
    findings = [r for r in results if r["outcome"] not in fuzz_cases.GOOD]
    assert not findings and done.returncode == 0, findings
    for path in fuzz_cases.PATHS:
        assert {r["outcome"] for r in results if r["path"] == path} >= {"trained", "refused"}


def error_of(function):
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def refuse_well():
    from largebatch.config import reject

    reject("gradient_clipping", -1, "a number >= 0")


def fail_within():
    from largebatch.launch.recipe.batch_division import divisors

    divisors("three")


@pytest.mark.parametrize(
    "function, words, outcome",
    [
        (refuse_well, ["gradient_clipping"], "refused"),
        (refuse_well, ["zero_optimization"], "vague"),  # names something else than was changed
        (fail_within, ["three", "int", "str"], "vague"),  # no raise of ours
        (lambda: json.loads("{"), ["property", "1"], "foreign"),
    ],
)
def test_what_counts_as_a_clear_error(function, words, outcome):
    error = error_of(function)
    assert fuzz_cases.judge_error(error, str(error), words)[0] == outcome


def test_a_message_of_several_lines_is_not_clear():
    error = error_of(refuse_well)
    assert fuzz_cases.judge_error(error, f"{error}\nand more", ["gradient_clipping"])[0] == "vague"


def test_files_that_are_not_whole_are_seen(tmp_path):
    assert fuzz_cases.damages(tmp_path) == []
    (tmp_path / "ds_config.json").write_text('{"a": ')
    (tmp_path / "metrics.jsonl").write_text('{"event": "step"}\n{"ev')
    (tmp_path / "checkpoints" / "step1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step2.partial").mkdir()
    assert len(fuzz_cases.damages(tmp_path)) == 4
