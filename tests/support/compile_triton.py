"""Compiles the Triton kernels for GPUs that need not be there; prints {case: counts of instructions in its PTX} as JSON.

In a process of its own, without TRITON_INTERPRET: the interpreter's functions cannot be compiled.
"""

import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from largebatch.kernels import triton_kernels as kernels
from largebatch.kernels.interface import ALGORITHMS

POINTERS = {
    "chunks": "*i64", "spans": "*i64", "addresses": "*i64", "row_chunks": "*i64", "rows": "*fp64", "rule_options": "*fp64",
    "grad_scale": "*fp64", "sums": "*fp64", "before": "*fp64", "lr_pointer": "*fp64", "decisions": "*fp64", "moved": "*i8", "stats": "*fp64",
}  # fmt: skip
INSTRUCTIONS = {"wide loads": r"ld\.global\.v4", "wide stores": r"st\.global\.v4", "local memory": r"\b(ld|st)\.local"}
FP32 = {"T": tl.float32, "W": tl.float32, "G": tl.float32, "S": tl.float32}
HALF = {"T": tl.float32, "W": tl.bfloat16, "G": tl.float16, "S": tl.bfloat16}
FP64 = {"T": tl.float64, "W": tl.float64, "G": tl.float64, "S": tl.float64}
SIZES = {"CHUNK": kernels.CHUNK_NUMEL, "BLOCK": kernels.BLOCK_NUMEL}


def instructions(kernel, constants, target):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=target)
    assert compiled.asm["cubin"]
    return {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()}


def cases():
    """(name, kernel, its constants)"""
    for algorithm in ALGORITHMS.values():
        for types_name, types in (("fp32", FP32), ("half", HALF), ("fp64", FP64)):
            both = {"ALGORITHM": algorithm, "CORRECTS": 1, "HAS_STEPS": algorithm >= 2 or types is HALF} | types | SIZES
            yield f"first {algorithm} {types_name}", kernels.first_kernel, both | {"DECAY_BEFORE_NORM": algorithm == 0}
            second = both | {"IS_NESTEROV": algorithm == 0, "LR_IN_MOMENTUM": types is FP32}
            yield f"second {algorithm} {types_name}", kernels.second_kernel, second
        options = ("HAS_NORM_BOUNDS", "HAS_RATIO_BOUNDS", "LARC_CLIP", "DECAY_IN_RATIO", "DAMPS", "SKIPS_ZERO_NORMS")
        layer = {"ALGORITHM": algorithm, "T": tl.float32, "BLOCK": kernels.ROW_BLOCK} | dict.fromkeys(options, True)
        for decides in (True, False):
            yield f"layer {algorithm} {decides}", kernels.layer_kernel, layer | {"DECIDES": decides}
    for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        for squares in (tl.float64, tl.float32):
            yield f"square {name} {squares}", kernels.square_kernel, {"T": squares, "G": dtype} | SIZES
        yield f"norm {name}", kernels.norm_kernel, {"T": tl.float32, "BLOCK": kernels.ROW_BLOCK}


if __name__ == "__main__":
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    print(json.dumps({name: instructions(kernel, constants, target) for name, kernel, constants in cases()}))
