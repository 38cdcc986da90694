"""What the binaries of the Triton kernels promise on an A100 and an H100; needs no GPU.

    python benchmarks/binaries.py [--blocks 1024,512] [--report FILE.md]

Each kernel is compiled by Triton's own ptxas, for fp32 and whole chunks at multiples of 16 bytes. Registers and stack are those
of the binary (a stack is what did not fit into registers), widths and bytes those of its memory instructions. A processor that
keeps as many bytes under way as its share of the memory's bandwidth times the latency moves them as fast as a copy does; the
promise is what the kernel's own threads keep under way, all loads of a block at once, of that. Bandwidth is the data sheet's,
the latency of a load that misses all caches is taken to be 700 ns: no measurement of these kernels.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from harness import preamble  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import largebatch  # noqa: E402
from largebatch.kernels import triton_gpu, triton_kernels  # noqa: E402
from largebatch.rules.rule import Rule  # noqa: E402
from support.compile_triton import FP32, SIZES, compiled_for, instructions  # noqa: E402

NUM_THREADS, WIDTH = 128, 16
LATENCY = 700e-9
HEAD = "| kernel | block | registers | stack | threads a processor | load width | bytes read | written | KB under way | promise |"


class GPU(NamedTuple):
    name: str
    capability: int
    bandwidth: float
    num_processors: int
    num_registers: int = 65536
    num_threads: int = 2048

    @property
    def bytes_wanted(self) -> float:
        """That each processor has to have under way."""
        return self.bandwidth * LATENCY / self.num_processors


GPUS = (GPU("A100 (8.0)", 80, 1.555e12, 108), GPU("H100 (9.0)", 90, 3.35e12, 132))


OPTIMIZERS = {
    "LARS": (largebatch.LARS, {}),
    "LARS 2019": (largebatch.LARS, {"formulation": "2019"}),
    "LAMB": (largebatch.LAMB, {}),
    "N-LAMB": (largebatch.NLAMB, {}),
    "NN-LAMB": (largebatch.NNLAMB, {}),
    "LANS": (largebatch.LANS, {}),
}


def rules() -> Iterator[tuple[str, Rule]]:
    for name, (optimizer_class, options) in OPTIMIZERS.items():
        optimizer = optimizer_class([torch.nn.Parameter(torch.ones(1))], lr=0.1, **options)
        yield name, optimizer._options_and_rule(optimizer.param_groups[0])[1]


def kernels() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, its constants), as a step of an optimizer with default options launches them."""
    for name, rule in rules():
        passes = triton_gpu.switches_of_passes(rule) | FP32 | {"HAS_STEPS": rule.counts_steps}
        options = triton_gpu.options_of(rule)
        first = passes | triton_gpu.switches_of_layers(rule) | {"DECIDES": True}
        yield f"{name}, first pass", triton_kernels.first_kernel, first | {"DECAY_BEFORE_NORM": False}
        nesterov, lr_in_momentum = options.get("nesterov", False), options.get("lr_in_momentum", False)
        second = passes | {"COUNTS": True, "IS_NESTEROV": nesterov, "LR_IN_MOMENTUM": lr_in_momentum}
        yield f"{name}, second pass", triton_kernels.second_kernel, second
    for name, dtype in (("norms of gradients", tl.float32), ("clipping", tl.float64)):
        constants = {"T": dtype, "G": tl.float32, "CLIPS": dtype == tl.float64}
        yield name, triton_kernels.square_kernel, constants


def resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def resident(num_registers: int, gpu: GPU) -> int:
    """Threads that a processor has room for at a time; a warp's registers are given out 256 at a time."""
    of_program = -(-num_registers * 32 // 256) * 256 * (NUM_THREADS // 32)
    return min(gpu.num_registers // of_program * NUM_THREADS, gpu.num_threads)


def row(name: str, kernel: Any, constants: dict[str, Any], block: int, gpu: GPU) -> str:
    sizes = SIZES | {"BLOCK": block}
    used = {n: v for n, v in (sizes | constants).items() if n in kernel.arg_names}
    compiled = compiled_for(kernel, used, GPUTarget("cuda", gpu.capability, 32))
    found, (num_registers, stack) = instructions(compiled), resources(compiled.asm["cubin"])
    num_threads = resident(num_registers, gpu)
    # no kernel has more than four arrays: with more loads, the compiler has written the loop over the blocks of a chunk out
    num_blocks = sizes["CHUNK"] // block if found["wide loads"] * WIDTH * NUM_THREADS > 4 * block * 4 else 1
    read, written = (found[f"wide {kind}"] / num_blocks * WIDTH * NUM_THREADS / block for kind in ("loads", "stores"))
    under_way = num_threads * found["wide loads"] / num_blocks * WIDTH
    promise = min(1.0, under_way / gpu.bytes_wanted)
    return (
        f"| {name} | {block} | {num_registers} | {stack} | {num_threads} | {WIDTH if found['wide loads'] else '?'} | {read:g} | "
        f"{written:g} | {under_way / 1e3:.0f} of {gpu.bytes_wanted / 1e3:.0f} | {promise:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks", default=str(triton_gpu.block_numel(tl.float32)), help="sizes of a block, with commas"
    )
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE.md")
    arguments = parser.parse_args()
    blocks = [int(block) for block in arguments.blocks.split(",")]
    lines = preamble(
        "What the Triton kernels' binaries promise", "cpu", f"python benchmarks/binaries.py --blocks {arguments.blocks}"
    )
    for gpu in GPUS:
        lines += [f"## {gpu.name}", "", HEAD, "|---" * HEAD.count(" | ") + "|---|"]
        lines += [row(*case, block, gpu) for case in kernels() for block in blocks]
        lines.append("")
    print("\n".join(lines))
    if arguments.report:
        arguments.report.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
