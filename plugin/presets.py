"""Named sets of deviations: what each well-known implementation does differently from the paper.

A preset fills in the options that the caller leaves out; an option given beside it wins. Learning rates, weight decay
and betas are recipes, not deviations, and are in no preset. tests/unit/test_presets.py computes each peer's formula
independently and compares.
"""

from __future__ import annotations

from typing import Any

BIAS_AND_NORM = ("bias", "norm")

WITHOUT_BIAS_AND_NORM = {"exclude_from_adaptation": BIAS_AND_NORM, "exclude_from_weight_decay": BIAS_AND_NORM}
WITHOUT_VECTORS = {"exclude_from_adaptation": ("ndim==1",), "exclude_from_weight_decay": ("ndim==1",)}
WITHOUT_SCALARS_AND_VECTORS = {"exclude_from_adaptation": ("ndim<=1",), "exclude_from_weight_decay": ("ndim<=1",)}

SELF_SUPERVISED = {"decay_before_norm": True, "lr_in_momentum": False}
"""q = eta ||w|| / ||g + wd w||; v <- m v + q (g + wd w); w <- w - lr v."""

LARS_PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:1708.03888, Algorithm 1
    "paper": {},
    # mlcommons/training retired_benchmarks/resnet-tf2 lars_optimizer.py: excluded layers get the raw learning rate
    "mlperf": {
        "exclude_from_adaptation": BIAS_AND_NORM,
        "exclude_from_weight_decay": BIAS_AND_NORM,
    },
    # apex/parallel/LARC.py around torch.optim.SGD, clip=True
    "apex": {
        "trust_coefficient": 0.02,
        "eps": 1e-8,
        "larc_clip": True,
        "lr_in_momentum": False,
        "skip_zero_norm_layers": True,
    },
    # timm/optim/lars.py: no trust ratio without weight decay
    "timm": {"eps": 1e-8, "lr_in_momentum": False, "adapt_undecayed": False},
    # NVIDIA/caffe sgd_solver.cpp GetLocalRate with policy "clip", the code behind arXiv:1708.03888
    "author": {"larc_clip": True, "decay_in_ratio": False, "damp_ratio_by_momentum": True},
    # google-research/simclr lars_optimizer.py: the learning rate inside the momentum
    "simclr": {"decay_before_norm": True} | WITHOUT_BIAS_AND_NORM,
    # deepmind-research/byol utils/optimizers.py
    "byol": SELF_SUPERVISED | WITHOUT_BIAS_AND_NORM,
    # facebookresearch/barlowtwins main.py; what is excluded has a learning rate of its own there: a second param group
    "barlow_twins": SELF_SUPERVISED | WITHOUT_VECTORS,
    # facebookresearch/vicreg main_vicreg.py
    "vicreg": SELF_SUPERVISED | WITHOUT_VECTORS,
    # facebookresearch/moco-v3 moco/optimizer.py
    "moco_v3": SELF_SUPERVISED | WITHOUT_SCALARS_AND_VECTORS,
    # facebookresearch/mae util/lars.py
    "mae_linear_probe": SELF_SUPERVISED | WITHOUT_SCALARS_AND_VECTORS,
    # facebookresearch/swav main_swav.py: apex LARC with clip=False around SGD, nothing excluded
    "swav": {"eps": 1e-8, "lr_in_momentum": False, "skip_zero_norm_layers": True},
    # lightly/utils/lars.py: param groups without weight decay are not adapted; norms and biases are put into such a group
    "lightly": {
        "eps": 1e-8,
        "lr_in_momentum": False,
        "skip_zero_norm_layers": True,
        "adapt_undecayed": False,
        "exclude_from_weight_decay": BIAS_AND_NORM,
    },
}

LAMB_PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:1904.00962, Algorithm 2
    "paper": {},
    # MLPerf BERT reference: excluded layers neither decayed nor adapted, global clip at 1 before the step
    "mlperf": {
        "exclude_from_adaptation": BIAS_AND_NORM,
        "exclude_from_weight_decay": BIAS_AND_NORM,
        "max_grad_norm": 1.0,
    },
    # apex/optimizers/fused_lamb.py (NVLAMB): global pre-clip, no trust ratio without weight decay
    "apex": {"max_grad_norm": 1.0, "adapt_undecayed": False},
    # timm/optim/lamb.py: the same two
    "timm": {"max_grad_norm": 1.0, "adapt_undecayed": False},
    # deepspeed/ops/lamb: bias correction folded into the learning rate, coefficient clamped
    "deepspeed": {"bias_correction": "lr", "trust_ratio_bounds": (0.01, 10.0)},
    # fastalgo/imagenet_resnet50_lamb: no bias correction, global clip, batch norm excluded from both, biases not
    "author": {
        "bias_correction": False,
        "max_grad_norm": 1.0,
        "exclude_from_adaptation": ("norm",),
        "exclude_from_weight_decay": ("norm",),
    },
}

NESTEROV_LAMB_PRESETS: dict[str, dict[str, Any]] = {"paper": {}}
