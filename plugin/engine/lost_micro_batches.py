"""Two faults of DeepSpeed's ZeRO stage 2 with gradient accumulation, repaired on the engines that step one of ours or a baseline.

Both are in runtime/zero/stage_1_and_2.py and hit every optimizer.

- 0.17.6 to 0.18.2, without optimizer offload: independent_gradient_partition_epilogue asks whether ``averaged_gradients`` has
  anything, where it means ``all_grad_tensors``, in which micro-batches are added up. Before the last micro-batch it has nothing, so
  each overwrites those before, and the step is taken with the last alone, divided by their number. Mended by pull request 7665.
- Before 0.19, with optimizer offload: async_accumulate_grad_in_cpu_via_gpu puts the first micro-batch into its buffer, adds the
  buffer to each later one, and does not store the sum: the step is taken with the first and the last, and clipped by the norm of
  the first. Mended by pull request 7967.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from packaging.version import Version

from largebatch.engine.internals import installed_version

logger = logging.getLogger("largebatch")

ENGINE_CLASS = "DeepSpeedZeroOptimizer"
WITHOUT_OFFLOAD = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue"
WITH_OFFLOAD = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu"
"""What is replaced, on one wrapper."""


def repair(engine: Any) -> None:
    """Lets each micro-batch be added to those before."""
    wrapper, version = engine.optimizer, installed_version()
    if type(wrapper).__name__ != ENGINE_CLASS or not wrapper.partition_gradients:
        return
    release = Version(version).release
    if wrapper.cpu_offload and release < (0, 19):
        store_every_sum(wrapper)
    elif not wrapper.cpu_offload and (0, 17, 6) <= release < (0, 18, 3):
        add_to_what_is_there(wrapper)
    else:
        return
    if engine.gradient_accumulation_steps() > 1:
        logger.info("repaired DeepSpeed %s: its stage 2 forgets micro-batches", version)


def add_to_what_is_there(wrapper: Any) -> None:
    epilogue = wrapper.independent_gradient_partition_epilogue

    @functools.wraps(epilogue)
    def independent_gradient_partition_epilogue() -> None:
        for group, tensors in wrapper.all_grad_tensors.items():
            if tensors is not None and wrapper.averaged_gradients.get(group) is None:
                wrapper.averaged_gradients[group] = []  # something: what has been added up so far is added to
        epilogue()

    wrapper.independent_gradient_partition_epilogue = independent_gradient_partition_epilogue


def store_every_sum(wrapper: Any) -> None:
    accumulate = wrapper.async_accumulate_grad_in_cpu_via_gpu

    @functools.wraps(accumulate)
    def async_accumulate_grad_in_cpu_via_gpu(param: Any) -> None:
        accumulate(param)
        number = wrapper.get_param_id(param)
        gradient = wrapper.get_param_gradient_attribute(param).data.view(-1)
        buffer = wrapper.accumulated_grads_in_cpu[number]
        if buffer.numel() != gradient.numel():  # with fp16 masters, of this rank's elements alone
            _, start, _, numel = wrapper.grad_position[number]
            gradient = gradient.narrow(0, start, numel)
        buffer.data.copy_(gradient, non_blocking=True)

    wrapper.async_accumulate_grad_in_cpu_via_gpu = async_accumulate_grad_in_cpu_via_gpu
