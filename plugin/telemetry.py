"""What every layer did in the last step. Observes; never changes a step, never synchronises with the device in one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class LayerStats(NamedTuple):
    """Figures of the layers of one kernel call, as they were used in the last step that was applied.

    Attributes:
        names: of the layers.
        figures: [len(rows), num_layers] fp64, on the device of the layers.
        rows: what the figures are; see ``Rule.figures`` in largebatch.rules.rule.

    - weight_norm, direction_norm: L2 norms of whole layers before the step; the direction is the gradient for LARS and
      the update for LAMB.
    - trust_ratio: no unit, as the step used it.
    - local_lr: lr times trust_ratio.
    - weight_decay: coupled weight decay in force.
    """

    names: tuple[str, ...]
    figures: Tensor
    rows: tuple[str, ...] = ("weight_norm", "direction_norm", "trust_ratio", "local_lr", "weight_decay")

    def as_dict(self) -> dict[str, dict[str, float]]:
        """{layer name: {figure: value}} as Python floats. Waits for the device."""
        columns = dict(zip(self.rows, self.figures.tolist(), strict=True))
        return {name: {row: columns[row][i] for row in self.rows} for i, name in enumerate(self.names)}


def merged(parts: Iterable[LayerStats]) -> dict[str, dict[str, float]]:
    """{layer name: {figure: value}} of all parts, a later one before an earlier. Waits for the device."""
    return {name: figures for stats in parts for name, figures in stats.as_dict().items()}
