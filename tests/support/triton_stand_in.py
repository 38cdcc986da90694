"""A driver for Triton on machines without a GPU: everything happens but the launch itself, which is recorded."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget


class Launch(NamedTuple):
    """What would have gone to the GPU."""

    kernel: str
    grid: tuple[int, int, int]
    binary: Any
    """Triton's CompiledKernel metadata: the same object for the same binary."""
    arguments: tuple[Any, ...]
    """What its launcher is given for the kernel's own."""


class StandInDriver:
    """Of a GPU with this compute capability (80: A100, 90: H100). Put in force by :func:`use`.

    Binaries are really compiled, by Triton's own ptxas, for exactly the arguments of each launch. Loading them into a GPU and
    launching them there is left out.
    """

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.launches: list[Launch] = []
        loaded = (object(), object(), 32, 0, 1024)  # module, function, registers, spills; from 3.4 on, threads at most
        is_older = [int(n) for n in triton.__version__.split(".")[:2]] < [3, 4]
        self.utils = types.SimpleNamespace(
            load_binary=lambda *_: loaded[: 4 if is_older else 5],
            get_device_properties=lambda device: {"max_shared_mem": 160 * 1024, "multiprocessor_count": 108},
        )
        driver = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any):
                self.name, self.metadata = source.fn.__name__, metadata

            def __call__(self, x: int, y: int, z: int, *others: Any) -> None:
                # stream, function, packed metadata, launch metadata and two hooks come first
                driver.launches.append(Launch(self.name, (x, y, z), self.metadata, others[6:]))

        self.launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def use(capability: int) -> StandInDriver:
    """Every Triton kernel of this process goes to a stand-in from now on."""
    driver = StandInDriver(capability)
    triton.runtime.driver.set_active(driver)
    return driver
