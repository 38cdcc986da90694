"""Python as ruff, C++ as clang-format and clang-tidy want it; their settings lie at the top of the repository."""

import pathlib
import subprocess
import sys

import pytest

from largebatch.kernels.build import SOURCE_FOLDER

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests/support/kernel_program.cpp"
"""Has all of plan.h, too."""


def said_by(*command):
    """What a command says, which shall be nothing."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def tool(name):
    return pathlib.Path(sys.executable).parent / name


@pytest.mark.parametrize("arguments", [("check", "--quiet"), ("format", "--check", "--quiet")], ids=lambda a: a[0])
def test_python(arguments):
    assert said_by(sys.executable, "-m", "ruff", *arguments, ROOT) == ""


def test_layout_of_cpp():
    assert said_by(tool("clang-format"), "--dry-run", "--Werror", *SOURCE_FOLDER.iterdir(), PROGRAM) == ""


def test_the_cpu_kernels_are_no_more_than_1400_lines():
    lines = [line.strip() for path in SOURCE_FOLDER.iterdir() for line in path.read_text().splitlines()]
    assert sum(bool(line) and not line.startswith("//") for line in lines) <= 1400


@pytest.mark.full
@pytest.mark.parametrize("path", [PROGRAM, SOURCE_FOLDER / "passes_portable.cpp"], ids=lambda path: path.name)
def test_clang_tidy_finds_nothing(path):
    assert said_by(tool("clang-tidy"), "--quiet", path, "--", "-std=c++20", "-I", SOURCE_FOLDER) == ""
