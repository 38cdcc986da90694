"""Compiles the C++ kernels on first use and keeps them: built aside, then put in place whole, under a lock of the system.

The lock dies with its owner, so a build that was killed leaves nothing behind that the next one would wait for.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from types import ModuleType

import torch

logger = logging.getLogger("largebatch")

NAME = "largebatch_cpu_kernels"
SOURCE_FOLDER = pathlib.Path(__file__).parent / "csrc"
SOURCES = ("binding.cpp", "instruction_sets.cpp", "passes_portable.cpp", "passes_avx2.cpp", "passes_avx512.cpp")
# no contraction: every instruction set rounds alike; square roots without errno, so that loops are vectorised
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


class CannotBuildError(RuntimeError):
    """Why there are no C++ kernels on this machine."""


@functools.cache
def cpu_kernels() -> ModuleType:
    """The compiled module, from the cache or built now.

    Raises:
        CannotBuildError: no compiler, no ninja, or the compiler failed.
    """
    folder = cache_folder()
    library = folder / f"{NAME}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here for the first
            if not library.exists():
                build(library)
    return load(library)


def cache_folder() -> pathlib.Path:
    """Where the library for these sources, this torch and this Python is kept."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "torch_extensions"
    )
    digest = hashlib.sha256()
    for path in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr((FLAGS, openmp_flags(), torch.__version__, sys.version_info[:3], compiler())).encode())
    return pathlib.Path(root) / f"{NAME}_{digest.hexdigest()[:16]}"


def compiler() -> str:
    return os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")


def compiler_command() -> list[str]:
    """CXX may have a launcher or options in it, as in "ccache g++"."""
    return shlex.split(compiler()) or ["c++"]


@functools.cache
def openmp_flags() -> tuple[str, ...]:
    """The compiler's flag for OpenMP; empty where it knows none, and the kernels then use one thread."""
    if shutil.which(compiler_command()[0]) is None:
        return ()
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler_command(), "-fopenmp", "-x", "c++", "-", "-o", os.path.join(folder, "probe")]
        probe = subprocess.run(command, input=program, text=True, capture_output=True)
    return ("-fopenmp",) if probe.returncode == 0 else ()


def build(library: pathlib.Path) -> None:
    """Compiles aside and moves the finished library into place."""
    if shutil.which(compiler_command()[0]) is None:
        raise CannotBuildError(f"there is no C++ compiler ({compiler()!r} is not on the PATH)")
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        raise CannotBuildError("ninja is not installed")
    # a warning, so that whoever has not set up logging sees why nothing moves
    logger.warning(
        "compiling the CPU kernels into %s: once for this torch and compiler, one to two minutes", library.parent
    )
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        try:
            cpp_extension.load(
                name=NAME,
                sources=[str(SOURCE_FOLDER / source) for source in SOURCES],
                extra_cflags=[*FLAGS, *openmp_flags()],
                extra_ldflags=list(openmp_flags()),
                build_directory=folder,
                is_python_module=False,
            )
        except (RuntimeError, OSError) as error:
            raise CannotBuildError(f"{compiler()} failed: {error}") from error
        os.replace(os.path.join(folder, f"{NAME}.so"), library)
    if not openmp_flags():
        logger.warning("%s knows no OpenMP; the CPU kernels use one thread", compiler())


def load(library: pathlib.Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_loader(NAME, loader)
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except ImportError as error:
        raise CannotBuildError(
            f"the compiled kernels cannot be loaded ({error}); delete {str(library.parent)!r}, so that they are compiled again"
        ) from error
    return module
