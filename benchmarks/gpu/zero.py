"""The kernels in the DeepSpeed engine against the reference kernels in the same engine, one rank: ZeRO 0 to 3, with offload.

The model and its gradients are those of tests/support/engine_runs.py: the same bits in every precision. Compared are the fp32
masters after the last step and the trust ratio of every layer and step. Both may be off from the reference by 3e-6, relative,
because kernels round in another order; but the ratios of one and the same kernels must be the same bits in every layout: on
the GPU those of stage 0 in fp32, and for what is offloaded those of the first layout that is.
"""

from __future__ import annotations

import gc
import os
import sys

from gpu.report import ROOT, Report, measured_head, stage_arguments

sys.path.insert(0, str(ROOT / "tests"))

NUM_STEPS = 20
BOUND = 3e-6
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS = [
    (stage, precision, is_offloaded)
    for precision in ("fp32", "bf16", "fp16")
    for stage in (0, 1, 2, 3)
    for is_offloaded in (False, True)
    if stage > 0 or not is_offloaded  # DeepSpeed offloads nothing in stage 0
]


def trained(engine_runs, algorithm: str, layout: tuple, kernels: str) -> tuple[list, list[dict[str, float]]]:
    """Masters of all layers on the CPU, and the trust ratios of every step."""
    stage, precision, is_offloaded = layout
    zero = {"sub_group_size": 700, "stage3_param_persistence_threshold": 0} if stage == 3 else {}
    zero |= OFFLOAD if is_offloaded else {}
    params = engine_runs.ALGORITHMS[algorithm] | {"kernels": kernels}
    more = {"optimizer": {"type": algorithm, "params": params}}
    result = engine_runs.train(algorithm, stage, precision, NUM_STEPS, zero=zero, extra=more)
    return engine_runs.assemble([result["pieces"]]), result["ratios"]


def ratio_errors(found: list[dict[str, float]], expected: list[dict[str, float]]) -> tuple[int, float]:
    """How many ratios differ at all, and by how much at most, relative."""
    pairs = [(f[name], e[name]) for f, e in zip(found, expected, strict=True) for name in e]
    return sum(f != e for f, e in pairs), max(abs(f - e) / max(abs(e), 1e-30) for f, e in pairs)


def main() -> int:
    arguments = stage_arguments(__doc__)
    report = Report(arguments)
    report.add(*measured_head("The kernels in the engine, against the reference", arguments))
    from largebatch.engine.initialization import init_distributed, prepare_deepspeed
    from largebatch.launch.supervise.launcher import be_the_only_rank

    be_the_only_rank()
    import torch

    prepare_deepspeed()
    init_distributed("gloo" if arguments.device == "cpu" else "nccl")
    from support import engine_runs
    from support.problems import relative_error

    layouts = [(0, "fp32", False), (2, "fp16", True), (3, "bf16", False)] if arguments.rehearse else LAYOUTS
    report.add(
        f"{NUM_STEPS} steps, `kernels` auto (Triton on the GPU, C++ for what is offloaded) and reference.",
        "",
        "| optimizer | ZeRO | precision | offload | masters off by | ratios unlike the reference's | by at most | unlike the first layout's |",
        "|---|---|---|---|---|---|---|---|",
    )
    wrong, first = [], {}
    for algorithm in ("LAMB", "LARS"):
        for layout in layouts:
            stage, precision, is_offloaded = layout
            cells = f"| {algorithm} | {stage} | {precision} | {'CPU' if is_offloaded else ''} "
            try:
                (masters, ratios), (expected, reference_ratios) = (
                    trained(engine_runs, algorithm, layout, kernels) for kernels in ("auto", "reference")
                )
            except Exception as error:  # the other layouts may do
                report.add(f"{cells}| {type(error).__name__}: {' '.join(str(error).split())[:200]} | | | |")
                wrong.append(cells)
                continue
            gc.collect()
            off = relative_error(masters, expected)
            count, most = ratio_errors(ratios, reference_ratios)
            total = sum(map(len, ratios))
            unlike, _ = ratio_errors(ratios, first.setdefault((algorithm, is_offloaded), ratios))
            report.add(f"{cells}| {off:.1e} | {count} of {total} | {most:.1e} | {unlike} of {total} |")
            if max(off, most) >= BOUND or unlike:
                wrong.append(cells)
    report.add("", f"{len(wrong)} of {2 * len(layouts)} layouts are not as they should be.")
    torch.distributed.destroy_process_group()
    print(f"{len(wrong)} of {2 * len(layouts)} layouts are not as they should be")
    os._exit(int(bool(wrong)))  # engines leave threads that would be waited for


if __name__ == "__main__":
    sys.exit(main())
