"""The machine: card, driver, versions of what is used and of the tools, a digest of the sources, what a copy moves."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import torch
from harness import copy_bandwidth, hardware, versions

from gpu.report import ROOT, Report, stage_arguments

PACKAGES = (
    "torch", "triton", "torchvision", "numpy", "deepspeed", "timm", "apex", "transformers", "scikit-learn", "scipy",
    "tensorboard", "pytest", "pytest-xdist", "hypothesis", "einops", "msgpack", "ninja", "psutil", "py-cpuinfo", "pydantic",
    "hjson", "tqdm", "setuptools", "pip",
)  # fmt: skip
TOOLS = ("nvcc", "gcc", "g++", "ninja", "compute-sanitizer", "ncu", "cuobjdump", "git")


def digest_of_sources(folder: pathlib.Path = ROOT / "plugin") -> str:
    """Twelve hexadecimal digits of all sources in a folder: where there is no git, this says what was run."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".inc"):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def said_by(*command: str) -> str:
    """The output of a command, or why there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add("# The machine", "")
    report.add(f"- {hardware('cpu')} in torch, {os.cpu_count()} cores; {platform.platform()}")
    report.add(f"- Python {platform.python_version()} at {sys.executable}; {versions(*PACKAGES)}")
    report.add(f"- plugin/: sha256 {digest_of_sources()} (benchmarks/gpu/versions.py, digest_of_sources)")
    for tool in TOOLS:
        path = shutil.which(tool)
        lines = said_by(path, "--version").splitlines() if path else []
        version = next((line for line in lines if any(c.isdigit() for c in line) and "opyright" not in line), "")
        report.add(f"- {tool}: {f'{path} ({version})' if path else 'not on the PATH'}")
    report.add(f"- disk: {shutil.disk_usage(arguments.work).free / 2**30:.0f} GiB free in {arguments.work}")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        cache = getattr(card, "L2_cache_size", 0) / 2**20
        report.add(
            f"- {hardware('cuda')}; {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors, {cache:.0f} MiB of L2; "
            f"torch for CUDA {torch.version.cuda}"
        )
    else:
        report.add("- no GPU that torch can use")
    for num_bytes in (2**29, 2**32) if arguments.device == "cuda" else (2**26,):
        speed = copy_bandwidth(arguments.device, num_bytes)
        report.add(f"- a copy of {num_bytes / 2**30:g} GiB moves {speed / 1e9:.0f} GB/s, read and written")
    report.add("", "```", said_by("nvidia-smi"), "```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
