"""What every layer did in the last step. Observes; never changes a step, never synchronises with the device in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Figures of the layers of one kernel call, as they were used in the last step that was applied.

    Attributes:
        names: of the layers.
        weight_norm, direction_norm: [num_layers] fp64, L2 norms of whole layers before the step; the direction is
            the gradient for LARS and the update for LAMB.
        trust_ratio: [num_layers], no unit, as the step used it.
        local_lr: [num_layers], lr times trust_ratio.
        weight_decay: [num_layers] fp64, coupled weight decay in force.
    """

    names: tuple[str, ...]
    weight_norm: Tensor
    direction_norm: Tensor
    trust_ratio: Tensor
    local_lr: Tensor
    weight_decay: Tensor

    FIGURES = ("weight_norm", "direction_norm", "trust_ratio", "local_lr", "weight_decay")

    def unless(self, is_finite: Tensor, previous: LayerStats | None) -> LayerStats:
        """These figures if the step was applied, else the previous ones; decided on the device."""
        if previous is None or previous.names != self.names:
            return self
        chosen = {f: torch.where(is_finite, getattr(self, f), getattr(previous, f)) for f in self.FIGURES}
        return LayerStats(self.names, **chosen)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """{layer name: {figure: value}} as Python floats. Waits for the device."""
        columns = {figure: getattr(self, figure).tolist() for figure in self.FIGURES}
        return {name: {f: columns[f][i] for f in self.FIGURES} for i, name in enumerate(self.names)}
