"""LAMB, N-LAMB and NN-LAMB as torch.optim.Optimizer classes. The formulas are in largebatch.rules.lamb."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from torch import nn

from largebatch.config import LAMBOptions, NesterovLAMBOptions
from largebatch.optim.layerwise import LayerwiseOptimizer, fills_from_preset, rule_of
from largebatch.presets import LAMB_PRESETS, NESTEROV_LAMB_PRESETS
from largebatch.rules import lamb as rules


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments for batch training (arXiv:1904.00962, Algorithm 2), exactly as printed by default.

    ``w <- w - lr * ||w|| / ||u|| * u`` with ``u = m^ / (sqrt(v^) + eps) + wd w``.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a param group, in any float dtype. State is fp32
            (fp64 for fp64 parameters).
        lr: learning rate, >= 0; float or 0-dim tensor. The paper's eta_t.
        betas: decay rates of the moments, both >= 0 and < 1.
        eps: > 0, added to sqrt(v^).
        weight_decay: >= 0. The paper's lambda; inside the norm of the update.
        bias_correction: True (Algorithm 2), False (the authors' code), or "lr": both corrections folded into the
            learning rate, as DeepSpeed's FusedLamb does.
        decoupled_weight_decay: w <- (1 - lr wd) w in place of wd w in the update (timm, Keras).
        weight_norm_bounds: (lower, upper) of phi(||w||); None for the identity, as in the paper's experiments.
        trust_ratio_bounds: (lower, upper) clamp of the ratio; None for none.
        adapt_undecayed: also adapt layers without weight decay; False as in timm and apex.
        max_grad_norm: > 0, clip of the norm of all gradients before the step (NVLAMB); None for none.
        exclude_from_adaptation, exclude_from_weight_decay: "bias", "norm" (by module type with ``model``, else by
            name), "ndim<=1", "ndim==1" (by shape) and regular expressions for names. Excluded from adaptation: ratio 1.
        preset: "paper", "mlperf", "apex", "timm", "deepspeed" or "author": fills in the options not given; see
            largebatch.presets.
        kernels: "auto", "reference", "cpp" (CPU), "triton" or "apex" (CUDA); see largebatch.kernels.dispatch.
        state_dtype: "fp32", or "bf16" for state of half the size with stochastic rounding.
        overwrite_grads: let step() leave its intermediate results in the gradients, which makes LAMB on CPUs faster by
            an eighth; read gradients before the step then. Same numbers. Gradients of a sharded engine always are.
        model: the module that the parameters are of, for names and module types.

    Raises:
        ValueError, TypeError: an option has an illegal value or type, or no effect.
    """

    rule_class = rules.LAMB
    options_class = LAMBOptions
    presets = LAMB_PRESETS

    @fills_from_preset
    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool | str = True,
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


class NesterovLAMB(LayerwiseOptimizer):
    """What N-LAMB and NN-LAMB share. Their bias corrections are part of the look-ahead and cannot be switched off."""

    options_class = NesterovLAMBOptions
    presets = NESTEROV_LAMB_PRESETS

    @fills_from_preset
    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
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

    def make_rule(self, options: NesterovLAMBOptions) -> rules.LAMB:
        return rule_of(self.rule_class, SimpleNamespace(**vars(options), bias_correction=True))


class NLAMB(NesterovLAMB):
    """N-LAMB: LAMB with Nesterov's look-ahead in the first moment (arXiv:1904.00962, appendix).

    Arguments as for :class:`LAMB`, less ``bias_correction``. The paper reports it with betas (0.975, 0.999).
    """

    rule_class = rules.NLAMB


class NNLAMB(NesterovLAMB):
    """NN-LAMB: LAMB with Nesterov's look-ahead in both moments (arXiv:1904.00962, appendix).

    Arguments as for :class:`LAMB`, less ``bias_correction``. The paper reports it with betas (0.975, 0.999).
    """

    rule_class = rules.NNLAMB
