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
from largebatch.kernels.triton_gpu import block_numel

POINTERS = {
    "chunks": "*i64", "spans": "*i64", "addresses": "*i64", "row_chunks": "*i64", "rows": "*fp64", "rule_options": "*fp64",
    "grad_scale": "*fp64", "sums": "*fp64", "before": "*fp64", "lr_pointer": "*fp64", "decisions": "*fp64", "moved": "*i8", "stats": "*fp64",
    "arrivals": "*i32", "step_numbers": "*fp64", "calls": "*i64", "num_skipped": "*i64", "num_skipped_layers": "*i64", "factor": "*fp64",
    "max_norm": "*fp64", "clipped": "*fp64",
}  # fmt: skip
INSTRUCTIONS = {
    "wide loads": r"ld\.global\.v4", "wide stores": r"st\.global\.v4", "local memory": r"\b(ld|st)\.local",
    "arrivals": r"\batom\.global\.gpu\.acq_rel\.add\.u32\b", "atomics": r"\b(atom|red)\.", "loads past the cache": r"\bld\.global\.cg\b",
    "arrivals after a barrier": r"\bbar\.sync\b(?:(?!\bst\.global\b|\bld\.global\b)[\s\S])*?\batom\.",
}  # fmt: skip
FP32 = {"T": tl.float32, "W": tl.float32, "G": tl.float32, "S": tl.float32}
HALF = {"T": tl.float32, "W": tl.bfloat16, "G": tl.float16, "S": tl.bfloat16}
FP64 = {"T": tl.float64, "W": tl.float64, "G": tl.float64, "S": tl.float64}
SIZES = {"CHUNK": kernels.CHUNK_NUMEL, "ROW_BLOCK": kernels.ROW_BLOCK}


def compiled_for(kernel, constants, target):
    """Triton's CompiledKernel, for pointers that may lie anywhere."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=target)


def instructions(compiled):
    assert compiled.asm["cubin"]
    return {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()}


def cases():
    """(name, kernel, its constants)"""
    switches = ("HAS_NORM_BOUNDS", "HAS_RATIO_BOUNDS", "LARC_CLIP", "DECAY_IN_RATIO", "DAMPS", "SKIPS_ZERO_NORMS")
    for algorithm in ALGORITHMS.values():
        for types_name, types in (("fp32", FP32), ("half", HALF), ("fp64", FP64)):
            both = {"ALGORITHM": algorithm, "CORRECTS": 1, "HAS_STEPS": algorithm >= 2 or types is HALF} | types | SIZES
            both["BLOCK"] = block_numel(*(types[name] for name in "WGS"))
            first = both | {"DECAY_BEFORE_NORM": algorithm == 0} | dict.fromkeys(switches, True)
            for decides in (True, False):
                yield f"first {algorithm} {types_name} {decides}", kernels.first_kernel, first | {"DECIDES": decides}
            second = both | {"IS_NESTEROV": algorithm == 0, "LR_IN_MOMENTUM": types is FP32}
            for counts in (True, False):
                yield f"second {algorithm} {types_name} {counts}", kernels.second_kernel, second | {"COUNTS": counts}
    for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        for squares, clips in ((tl.float64, True), (tl.float32, False)):
            constants = {"T": squares, "G": dtype, "CLIPS": clips, "BLOCK": block_numel(dtype)} | SIZES
            yield f"square {name} {squares}", kernels.square_kernel, constants


if __name__ == "__main__":
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    found = {name: instructions(compiled_for(kernel, constants, target)) for name, kernel, constants in cases()}
    print(json.dumps(found))
