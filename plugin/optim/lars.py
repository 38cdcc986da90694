"""LARS as a torch.optim.Optimizer: hyperparameters, defaults, state names. The formula is in largebatch.rules.lars."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from largebatch.config import LARSOptions
from largebatch.optim.layerwise import LayerwiseOptimizer, fills_from_preset, rule_of
from largebatch.presets import LARS_PRESETS
from largebatch.rules.lars import LARS2017, LARS2019
from largebatch.rules.rule import Rule


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888, Algorithm 1), exactly as printed by default.

    ``v <- m v + lr * ratio * (g + wd w)``, ``w <- w - v`` with ``ratio = trust_coefficient ||w|| / (||g|| + wd ||w||)``.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a param group, in any float dtype. State is fp32
            (fp64 for fp64 parameters).
        lr: global learning rate, >= 0; float or 0-dim tensor. The paper's gamma.
        momentum: >= 0 and < 1. The paper's m.
        weight_decay: >= 0. The paper's beta.
        trust_coefficient: > 0, no unit. The paper's eta.
        eps: >= 0, added to the denominator (apex LARC, timm).
        formulation: "2017", or "2019" for the LARS of arXiv:1904.00962, Algorithm 1, which normalises the momentum.
        nesterov: Nesterov momentum as in torch.optim.SGD.
        lr_in_momentum: the learning rate multiplies the gradient before it enters the momentum (the paper); False:
            it multiplies the momentum (timm, LARC).
        larc_clip: local learning rate min(lr, ratio) in place of lr * ratio (LARC, NVCaffe "clip").
        decay_in_ratio: wd ||w|| in the denominator; False: ||g|| alone (NVCaffe).
        decay_before_norm: ||g + wd w|| in the denominator, as most self-supervised training codes have it.
        damp_ratio_by_momentum: ratio times (1 - momentum) (NVCaffe).
        skip_zero_norm_layers: a layer with a zero norm is left without weight decay and clip (LARC).
        decoupled_weight_decay: w <- (1 - lr wd) w in place of wd w in the gradient (arXiv:1711.05101).
        weight_norm_bounds: (lower, upper) of phi(||w||) (arXiv:1904.00962); None for the identity.
        trust_ratio_bounds: (lower, upper) clamp of the ratio; None for none.
        adapt_undecayed: also adapt layers without weight decay; False as in timm and apex.
        max_grad_norm: > 0, clip of the norm of all gradients before the step; None for none.
        exclude_from_adaptation, exclude_from_weight_decay: "bias", "norm" (by module type with ``model``, else by
            name), "ndim<=1", "ndim==1" (by shape) and regular expressions for names. Excluded from adaptation: ratio 1.
        preset: "paper", "mlperf", "apex", "timm", "author"; of self-supervised training "simclr", "byol", "barlow_twins", "vicreg",
            "moco_v3", "mae_linear_probe", "swav", "lightly": fills in the options not given; see largebatch.presets.
        kernels: "auto", "reference", "cpp" (CPU), "triton" or "apex" (CUDA); see largebatch.kernels.dispatch.
        state_dtype: "fp32", or "bf16" for state of half the size with stochastic rounding.
        overwrite_grads: let step() leave its intermediate results in the gradients; LAMB gains from it, LARS does not.
        model: the module that the parameters are of, for names and module types.

    Raises:
        ValueError, TypeError: an option has an illegal value or type, or no effect.
    """

    options_class = LARSOptions
    checkpoint_names = {"momentum_buffer": "exp_avg"}
    presets = LARS_PRESETS

    @fills_from_preset
    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        *,
        formulation: str = "2017",
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        larc_clip: bool = False,
        decay_in_ratio: bool = True,
        decay_before_norm: bool = False,
        damp_ratio_by_momentum: bool = False,
        skip_zero_norm_layers: bool = False,
        decoupled_weight_decay: bool = False,
        weight_norm_bounds: tuple[float, float] | None = None,
        trust_ratio_bounds: tuple[float, float] | None = None,
        adapt_undecayed: bool = True,
        max_grad_norm: float | None = None,
        exclude_from_adaptation: Sequence[str] = (),
        exclude_from_weight_decay: Sequence[str] = (),
        preset: str | None = None,
        kernels: str = "auto",
        state_dtype: str = "fp32",
        overwrite_grads: bool = False,
        model: nn.Module | None = None,
    ):
        options = {n: v for n, v in locals().items() if n not in ("self", "params", "model", "preset", "__class__")}
        super().__init__(params, options, model)

    def make_rule(self, options: LARSOptions) -> LARS2017 | LARS2019:
        return rule_of(FORMULATIONS[options.formulation], options)


FORMULATIONS: dict[str, type[Rule]] = {"2017": LARS2017, "2019": LARS2019}
