"""What is installed on a node: versions, the digest of our own code, kernels, compiler, and what the environment says."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig

PACKAGES = ("largebatch", "largebatch.launch", "largebatch.models", "largebatch.ds_configs")
SUFFIXES = (".py", ".json", ".cpp", ".h", ".inc")
VARIABLES = (
    "NCCL_",
    "GLOO_",
    "MASTER_",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "TORCH_EXTENSIONS_DIR",
)


def versions() -> dict[str, str | None]:
    """Of Python and of what must be equal on all nodes; None where there is none."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("deepspeed", "largebatch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
    return found


def import_problem() -> str | None:
    """Why DeepSpeed with largebatch cannot be started here, or None. Imports both."""
    from largebatch.launch.trainer.engines import set_up_deepspeed

    try:
        set_up_deepspeed()
    except Exception as error:  # whatever it is, the run would meet it too
        return f"{type(error).__name__}: {error}"[:500]
    return None


def code_digest() -> str:
    """Of the package's files by their names in the package, the same in a clone and in an installed copy."""
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        root = pathlib.Path(importlib.import_module(package).__file__).parent
        for path in root.rglob("*"):
            if path.suffix in SUFFIXES:
                files["/".join((*package.split("."), *path.relative_to(root).parts))] = path.read_bytes()
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()[:16]


def kernels() -> dict[str, str]:
    """Backend -> "compiled", "on first use", "available", or "no: " and why."""
    import torch

    found = {"cpp": cpp_kernels()}
    if not torch.cuda.is_available():
        found["triton"] = found["apex"] = "no: needs a CUDA device"
        return found
    for name, modules in (("triton", ("triton",)), ("apex", ("apex", "amp_C"))):
        try:
            for module in modules:
                importlib.import_module(module)
            found[name] = "available"
        except ImportError as error:
            found[name] = f"no: {error}"[:200]
    return found


def cpp_kernels() -> str:
    """Whether the C++ kernels are there or can be made, without making them."""
    from torch.utils import cpp_extension

    from largebatch.kernels import build

    if (build.cache_folder() / f"{build.NAME}.so").exists():
        return "compiled"
    if shutil.which(build.compiler()) is None:
        return f"no: there is no C++ compiler ({build.compiler()!r} is not on the PATH)"
    if not cpp_extension.is_ninja_available():
        return "no: ninja is not on the PATH"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "no: Python's headers are not installed (python3-dev)"
    return "on first use"


def tools() -> dict[str, str | None]:
    """First lines of the compiler's and ninja's ``--version``."""
    from largebatch.kernels import build

    return {"compiler": first_line(build.compiler()), "ninja": first_line("ninja")}


def first_line(program: str) -> str | None:
    if shutil.which(program) is None:
        return None
    ended = subprocess.run([program, "--version"], capture_output=True, text=True)
    return ended.stdout.partition("\n")[0].strip() or None


def environment() -> dict[str, str]:
    """The variables that steer devices and network."""
    return {k: v for k, v in sorted(os.environ.items()) if any(k.startswith(name) for name in VARIABLES)}


def executable() -> str:
    return sys.executable
