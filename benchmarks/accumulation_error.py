"""What adding gradients up in 16 bits costs: relative error of the sum of a LeNet's micro-batch gradients on digits.

    python benchmarks/accumulation_error.py

Gradients are computed in bf16, as in training; only the type in which they are added up differs. DeepSpeed scales each by
1 / micro-steps and adds it to a buffer of its gradient type, and so does this. The reference adds up in fp64.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.launch.data.in_memory import load_digits
from largebatch.launch.data.sample_order import SampleOrder
from largebatch.models.catalogue import build_model

MICRO_STEPS = (1, 8, 64, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def micro_gradients(num_micro_steps: int, micro_batch: int, seed: int):
    """The gradient of each micro-batch as one flat bf16 tensor."""
    torch.manual_seed(seed)
    data = load_digits()
    model = build_model("lenet", image_shape=data.image_shape, num_classes=10).bfloat16()
    order = SampleOrder(len(data.train), seed)
    for micro_step in range(num_micro_steps):
        indices = order.indices(micro_step * micro_batch, (micro_step + 1) * micro_batch)
        logits = model(data.inputs(data.train.pixels[indices], torch.bfloat16)).float()
        gradients = torch.autograd.grad(F.cross_entropy(logits, data.train.labels[indices]), list(model.parameters()))
        yield torch.cat([g.flatten() for g in gradients])


def errors(num_micro_steps: int, micro_batch: int, seed: int) -> dict[torch.dtype, float]:
    """Relative L2 error of the mean gradient for each type that it is added up in."""
    sums: dict[torch.dtype, Tensor] = {}
    for gradient in micro_gradients(num_micro_steps, micro_batch, seed):
        for dtype in (*DTYPES, torch.float64):
            scaled = (gradient.to(dtype) / num_micro_steps).to(dtype)
            sums[dtype] = sums[dtype] + scaled if dtype in sums else scaled
    exact = sums[torch.float64]
    return {dtype: ((sums[dtype].double() - exact).norm() / exact.norm()).item() for dtype in DTYPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print("| micro-steps | " + " | ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES) + " |")
    print("|---|" + "---|" * len(DTYPES))
    for num_micro_steps in MICRO_STEPS:
        found = errors(num_micro_steps, arguments.micro_batch, arguments.seed)
        print(f"| {num_micro_steps} | " + " | ".join(f"{found[dtype]:.1e}" for dtype in DTYPES) + " |")


if __name__ == "__main__":
    main()
