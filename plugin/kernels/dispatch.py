"""Chooses the kernel backend. A request that cannot be met is an error; an automatic choice is logged once."""

from __future__ import annotations

import functools
import logging
import os
import re

import torch

from largebatch.kernels.build import CannotBuildError
from largebatch.kernels.interface import ALGORITHMS, Kernels
from largebatch.kernels.reference import ReferenceKernels
from largebatch.rules.rule import Rule

logger = logging.getLogger("largebatch")


OLDEST_TRITON = (3, 2)
"""Triton that compiles the kernels; tests/kernels/test_launch_path.py compiles them with what is installed and an older one."""


class UnavailableKernelsError(RuntimeError):
    """A backend that was asked for cannot work here; says why."""


@functools.cache
def choose(device_type: str, requested: str) -> Kernels:
    """The backend for tensors on ``device_type`` ("cpu", "cuda", ...).

    - "reference": plain torch, everywhere.
    - "cpp": CPU tensors; needs a C++ compiler on first use.
    - "triton": CUDA tensors; needs triton.
    - "apex": CUDA tensors, LAMB; needs NVIDIA apex. Never taken by "auto".
    - "compiled": torch.compile, everywhere. Taken by "auto" for rules without kernels of their own, see :func:`choose_for`.
    - "auto": the fastest of the first three that works here.

    Args:
        requested: one of ``largebatch.config.KERNELS``, already checked; or "compiled, or reference".

    Raises:
        UnavailableKernelsError: the backend that was named does not work here.
    """
    if requested in BUILDERS:
        return BUILDERS[requested](device_type)
    fastest = "compiled" if requested != "auto" else {"cpu": "cpp", "cuda": "triton"}.get(device_type)
    if fastest is not None:
        try:
            kernels = BUILDERS[fastest](device_type)
            logger.info("kernels: auto took %r for %s tensors", fastest, device_type)
            return kernels
        except UnavailableKernelsError as error:
            logger.warning("kernels: auto took 'reference' (slower) for %s tensors, because %s", device_type, error)
    else:
        logger.info("kernels: auto took 'reference' for %s tensors; no other backend knows them", device_type)
    return ReferenceKernels()


def choose_for(rule_class: type[Rule], device_type: str, requested: str) -> Kernels:
    """The backend for a rule. For those with kernels of their own as :func:`choose`; for others:

    - "reference": plain torch, everywhere.
    - "compiled": torch.compile, everywhere where it finds a compiler.
    - "auto": "compiled" if that works here.

    Raises:
        UnavailableKernelsError: the backend that was named does not work here, or not for this rule.
    """
    if rule_class in ALGORITHMS or requested in ("reference", "compiled"):
        return choose(device_type, requested)
    if requested == "auto":
        return choose(device_type, "compiled, or reference")
    raise UnavailableKernelsError(
        f"kernels {requested!r} have no formulas for {rule_class.__name__}; use 'auto', 'compiled' or 'reference'"
    )


def reason_of(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    first_line = lines[0] if lines else "no message"
    return first_line if isinstance(error, CannotBuildError) else f"{type(error).__name__}: {first_line}"


def reference(device_type: str) -> Kernels:
    return ReferenceKernels()


def cpp(device_type: str) -> Kernels:
    if device_type != "cpu":
        raise UnavailableKernelsError(f"kernels 'cpp' work on cpu tensors, not on {device_type} ones; use 'auto'")
    from largebatch.kernels.cpp_cpu import CppKernels, use_instruction_set

    try:
        kernels = CppKernels()
    except Exception as error:  # whatever compilers, loaders and file systems raise
        raise UnavailableKernelsError(
            f"kernels 'cpp' cannot be built: {reason_of(error)}. They need a C++ compiler, ninja, and a folder to keep them in "
            "(TORCH_EXTENSIONS_DIR); or use 'auto' or 'reference'"
        ) from error
    use_instruction_set(kernels.module)
    return kernels


def triton(device_type: str) -> Kernels:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: runs on the CPU, for tests
    if device_type != "cuda" and not (is_interpreted and device_type == "cpu"):
        raise UnavailableKernelsError(f"kernels 'triton' work on cuda tensors, not on {device_type} ones; use 'auto'")
    try:
        import triton
    except Exception as error:  # an installation can be broken in any way
        raise UnavailableKernelsError(
            f"kernels 'triton' need triton, which does not import here ({reason_of(error)}). Install it (it comes with torch for "
            "CUDA on Linux), or use 'auto' or 'reference'"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise UnavailableKernelsError(
            f"kernels 'triton' need triton {oldest} or newer, and here is {triton.__version__}: it does not compile them. "
            "Install a newer torch, which brings a newer triton, or use 'auto' or 'reference'"
        )
    from largebatch.kernels.triton_gpu import TritonKernels, probe

    try:
        probe(torch.device(device_type))
    except Exception as error:  # whatever compilers, drivers and caches raise
        raise UnavailableKernelsError(
            f"kernels 'triton' cannot be compiled or launched here ({reason_of(error)}). Triton needs a C "
            "compiler and Python's headers at first use (Debian and Ubuntu: apt-get install gcc python3-dev) and a folder to "
            "write to (TRITON_CACHE_DIR); or use 'auto' or 'reference'"
        ) from error
    return TritonKernels()


def apex(device_type: str) -> Kernels:
    if device_type != "cuda":
        raise UnavailableKernelsError(f"kernels 'apex' work on cuda tensors, not on {device_type} ones; use 'auto'")
    try:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier
    except Exception as error:  # an installation can be broken in any way
        raise UnavailableKernelsError(
            f"kernels 'apex' need NVIDIA apex built with its CUDA extensions ({reason_of(error)}). See github.com/NVIDIA/apex; it is "
            "not on PyPI. Or use 'auto' or 'triton'"
        ) from error
    from largebatch.kernels.apex_gpu import ApexKernels

    return ApexKernels(multi_tensor_applier, amp_C)


def compiled(device_type: str) -> Kernels:
    from largebatch.kernels.compiled import CompiledKernels, probe

    try:
        probe(torch.device(device_type))
    except Exception as error:  # whatever compilers, drivers and caches raise
        raise UnavailableKernelsError(
            f"kernels 'compiled' cannot be made here ({reason_of(error)}). torch.compile needs a C++ compiler (Debian and Ubuntu: "
            "apt-get install g++); or use 'auto' or 'reference'"
        ) from error
    return CompiledKernels()


BUILDERS = {"reference": reference, "cpp": cpp, "triton": triton, "apex": apex, "compiled": compiled}
