"""Networks with auxiliary classifiers, such as GoogLeNet: what their loss is.

In training with ``aux_logits`` they return a tuple (logits, auxiliary logits, ...), else logits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

AUXILIARY_LOSS_WEIGHT = 0.3
"""arXiv:1409.4842, section 5."""


def loss_with_auxiliaries(outputs: Tensor | tuple[Any, ...], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of the logits, and 0.3 times that of each auxiliary classifier where there are any.

    Args:
        outputs: [batch, num_classes] logits, or a tuple that begins with them.
        loss: of one [batch, num_classes] tensor of logits in fp32.
    """
    if isinstance(outputs, Tensor):
        return loss(outputs.float())
    logits, *auxiliaries = outputs
    return loss(logits.float()) + AUXILIARY_LOSS_WEIGHT * sum(loss(a.float()) for a in auxiliaries if a is not None)
