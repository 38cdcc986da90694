"""The CPU kernels in a program of their own, without Python: under sanitizers, and on a processor of another kind."""

import os
import pathlib
import shutil
import subprocess

import pytest

from largebatch.kernels.build import FLAGS, SOURCE_FOLDER, SOURCES, compiler_command

pytestmark = pytest.mark.full
PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "kernel_program.cpp"
WITHOUT_TORCH = [str(SOURCE_FOLDER / source) for source in SOURCES if source != "binding.cpp"]
# the last two: of the headers with the intrinsics of AVX-512 (GCC 12)
WARNINGS = ("-Wall", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
NUM_RULES, NUM_TYPES, NUM_TEAMS = 6, 5, 2


def built(command, folder, *flags, of_vectors=()):
    """The program, its objects beside it.

    Args:
        of_vectors: more flags, for the files of instruction sets with vectors.
    """
    flags = [*FLAGS, "-I", str(SOURCE_FOLDER), *flags]
    objects = {str(source): str(folder / f"{pathlib.Path(source).stem}.o") for source in (PROGRAM, *WITHOUT_TORCH)}
    compilers = [
        subprocess.Popen(
            [*command, *flags, *(of_vectors if "_avx" in source else ()), "-c", source, "-o", target],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, target in objects.items()
    ]
    for compiler in compilers:
        errors = compiler.communicate(timeout=900)[1]
        assert compiler.returncode == 0, errors[-3000:]
    subprocess.run(
        [*command, *flags, *of_vectors, *objects.values(), "-o", str(folder / "program")], check=True, timeout=900
    )
    return str(folder / "program")


def hashes(*command):
    """(rule, types) -> the hashes found, by whatever instruction set and number of threads; and the instruction sets."""
    waits_asleep = os.environ | {"OMP_WAIT_POLICY": "passive"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=waits_asleep)
    assert run.returncode == 0, run.stderr[-3000:]
    found, names = {}, set()
    for line in run.stdout.splitlines():
        name, rule, types, _, value = line.split(",")
        found.setdefault((rule, types), set()).add(value)
        names.add(name)
    assert len(run.stdout.splitlines()) == len(names) * NUM_RULES * NUM_TYPES * NUM_TEAMS
    return found, names


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if shutil.which(compiler_command()[0]) is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    return *hashes(built(compiler_command(), folder, "-fopenmp", *WARNINGS)), folder


def test_every_instruction_set_and_team_writes_the_same_bits(native):
    found, names, _ = native
    assert "portable" in names
    assert {key: len(values) for key, values in found.items()} == dict.fromkeys(found, 1)
    assert len(set.union(*found.values())) == NUM_RULES * NUM_TYPES, "rules and types differ from each other"


def test_sanitizers_find_nothing(native, tmp_path):
    """Addresses beyond an array; undefined shifts, conversions, null pointers, which take minutes to compile in without vectors."""
    flags = ("-fopenmp", "-O1", "-fsanitize=address", "-Wno-psabi")
    undefined = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
    assert hashes(built(compiler_command(), tmp_path, *flags, of_vectors=undefined))[0] == native[0]


def test_arm_writes_the_same_bits(native, tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if missing := [tool for tool in (compiler, emulator) if shutil.which(tool) is None]:
        pytest.skip(
            f"needs {' and '.join(missing)} (Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user)"
        )
    found, names = hashes(emulator, built([compiler], tmp_path, "-static", "-Wno-psabi"))
    assert names == {"portable"} and found == native[0]


def test_no_code_for_one_instruction_set_is_shared_with_another(native):
    """A function that the linker takes from any file must not be one that only some processors can run."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm (binutils)")
    objects = sorted(native[2].glob("passes_*.o"))
    assert len(objects) == 3
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        assert [line for line in symbols.splitlines() if line.split()[-2] in ("W", "V", "u")] == []
