"""The papers' baselines under DeepSpeed: SGD, Adagrad, Adam and AdamW, with two faults of DeepSpeed 0.19.8 repaired.

| JSON                                                         | class                                              |
|--------------------------------------------------------------|----------------------------------------------------|
| "SGD" (momentum, nesterov; weight_decay is L2)               | torch.optim.SGD                                    |
| "Adagrad" (weight_decay is L2)                               | Adagrad below; with optimizer offload DeepSpeed's  |
| "Adam" with "torch_adam": true, "adam_w_mode": false         | torch.optim.Adam (weight_decay is L2)              |
| "AdamW" with "torch_adam": true; "Adam" without adam_w_mode! | torch.optim.AdamW (weight_decay is decoupled)      |
| "Adam", "AdamW" without torch_adam                           | DeepSpeed's FusedAdam; with offload its CPUAdam    |

They are elementwise, so ZeRO changes nothing in them. The faults:

- Stage 0 with bf16 or fp16: FP16_UnfusedOptimizer steps the new optimizer once with gradients of zero, to have its state
  made. That decays the weights once and leaves Adam's moments one step ahead of what was averaged into them, so that
  the bias correction of the first real steps is too weak. :func:`undo_first_step` undoes it.
- ZeRO replaces a torch.optim.Adagrad by a new one with a single param group: the options of the others are lost, the
  step of a second group ends in an IndexError, and a scheduler that holds the first optimizer changes nothing.
  :class:`Adagrad` is not replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adagrad import adagrad

from largebatch.engine.wrappers import reader_of

logger = logging.getLogger("largebatch")


class Adagrad(torch.optim.Optimizer):
    """torch.optim.Adagrad, whose state is made at the first step: for the tensors that are then in the param groups.

    Arguments, numbers and state names are torch's; ``fused`` and ``differentiable`` are left out.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
    ):
        options = {n: v for n, v in locals().items() if n not in ("self", "params", "__class__")}
        torch.optim.Adagrad([torch.zeros(0)], **options)  # checks the values
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    total = torch.full_like(p, group["initial_accumulator_value"], memory_format=torch.preserve_format)
                    self.state[p].update(step=torch.tensor(0.0), sum=total)
            adagrad(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["sum"] for p in parameters],
                [self.state[p]["step"] for p in parameters],
                **{name: group[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize", "foreach")},
            )
        return loss


BASELINES = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, Adagrad)


@torch.no_grad()
def undo_first_step(engine: Any) -> None:
    """Makes stage 0's masters the parameters again and drops the optimizer's state, which a step of zeros had changed."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if type(wrapper).__name__ != "FP16_UnfusedOptimizer":
        return
    for master, partition in reader_of(wrapper).layout(wrapper).items():
        (parameter,) = partition.parameters
        master.copy_(parameter)
    optimizer.state.clear()
    name = type(optimizer).__name__
    logger.info("%s: undid the step that DeepSpeed's FP16_UnfusedOptimizer takes with gradients of zero", name)
