"""Copies between the host and the device for which nobody stands still.

A copy out of ordinary memory, or one whose result is read at once, waits until a GPU has done everything that was queued before.
Pinned memory is read and written by the GPU itself, in its turn. It is taken anew for each copy: torch keeps a block of it for
as long as a copy needs it, and lends it out again afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device.

    Args:
        tensor: if pinned already, not to be written any more: the copy may be made later.
    """
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Values on their way to the host, as they are once the device has done what is queued so far.

    Args:
        tensor: as the result, not to be written any more if it is on the host.
    """

    def __init__(self, tensor: Tensor):
        self._values = tensor
        self._arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(tensor.device))

    def values(self) -> Tensor:
        """On the host. Waits until they are there, but not for what was queued after them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values
