"""One table of optimizers that every generic test runs over, and one of illegal options with their messages."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import largebatch
from support import oracle


@dataclass(frozen=True)
class Case:
    """An optimizer with options, and the oracle's function for the same algorithm."""

    name: str
    optimizer: type
    options: dict[str, Any]
    reference: Callable
    peak_lr: float
    why: str

    def __str__(self):
        return self.name


LARS_OPTIONS = {"momentum": 0.9, "weight_decay": 5e-4, "trust_coefficient": 0.001}
LAMB_OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}

CASES = [
    Case("lars", largebatch.LARS, LARS_OPTIONS, oracle.lars, 4.0, "the paper's constants"),
    Case("lars-plain", largebatch.LARS, {}, oracle.lars, 4.0, "no decay: denominator is the gradient norm alone"),
    Case("lars-eps", largebatch.LARS, LARS_OPTIONS | {"eps": 1e-2}, oracle.lars, 4.0, "eps in the denominator"),
    Case("lars-large-wd", largebatch.LARS, LARS_OPTIONS | {"weight_decay": 0.5}, oracle.lars, 4.0, "decay dominates"),
    Case(
        "lars-2019",
        largebatch.LARS,
        {"momentum": 0.9, "weight_decay": 0.01, "formulation": "2019"},
        oracle.lars_2019,
        0.01,
        "the LAMB paper's LARS",
    ),
    Case("lamb", largebatch.LAMB, LAMB_OPTIONS, oracle.lamb, 0.01, "the paper's constants"),
    Case("lamb-plain", largebatch.LAMB, {}, functools.partial(oracle.lamb), 0.01, "no decay"),
    Case(
        "lamb-small-betas", largebatch.LAMB, LAMB_OPTIONS | {"betas": (0.66, 0.996)}, oracle.lamb, 0.01, "MLPerf BERT"
    ),
    Case("lamb-beta1-0", largebatch.LAMB, LAMB_OPTIONS | {"betas": (0.0, 0.9)}, oracle.lamb, 0.01, "no first moment"),
    Case("nlamb", largebatch.NLAMB, LAMB_OPTIONS | {"betas": (0.975, 0.999)}, oracle.nlamb, 0.01, "the paper's betas"),
    Case(
        "nnlamb", largebatch.NNLAMB, LAMB_OPTIONS | {"betas": (0.975, 0.999)}, oracle.nnlamb, 0.01, "the paper's betas"
    ),
    Case("lans", largebatch.LANS, LAMB_OPTIONS, oracle.lans, 0.01, "the paper's constants"),
]

ILLEGAL = [
    (largebatch.LANS, {"eps": 0.0}, "eps is 0.0; expected a number > 0"),
    (largebatch.LANS, {"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); expected [beta1, beta2]"),
    (largebatch.LANS, {"kernels": "gpu"}, "kernels is 'gpu'; expected one of 'auto', 'reference'"),
    (largebatch.LARS, {"lr": -1.0}, "lr is -1.0; expected a number >= 0"),
    (largebatch.LARS, {"lr": float("nan")}, "lr is nan; expected a number >= 0"),
    (largebatch.LARS, {"lr": "auto"}, "'auto' is filled in by launch/train.py"),
    (largebatch.LARS, {"momentum": 1.0}, "momentum is 1.0; expected a number >= 0 and < 1"),
    (largebatch.LARS, {"momentum": True}, "momentum is True; expected a number"),
    (largebatch.LARS, {"weight_decay": "1e-4"}, "weight_decay is '1e-4'; expected a number >= 0"),
    (largebatch.LARS, {"trust_coefficient": -0.1}, "trust_coefficient is -0.1; expected a number > 0"),
    (largebatch.LARS, {"eps": -1e-8}, "eps is -1e-08; expected a number >= 0"),
    (largebatch.LARS, {"formulation": "2018"}, "formulation is '2018'; expected one of '2017', '2019'"),
    (largebatch.LARS, {"nesterov": 1}, "nesterov is 1; expected true or false"),
    (largebatch.LARS, {"nesterov": True, "momentum": 0.0}, "where it has no effect"),
    (largebatch.LARS, {"formulation": "2019", "larc_clip": True}, "larc_clip is True with formulation '2019'"),
    (largebatch.LARS, {"trust_ratio_bounds": (2.0, 1.0)}, "expected null or [lower, upper] with 0 <= lower <= upper"),
    (largebatch.LARS, {"weight_norm_bounds": 10.0}, "weight_norm_bounds is 10.0; expected null or [lower, upper]"),
    (largebatch.LARS, {"max_grad_norm": 0}, "max_grad_norm is 0; expected null or a number > 0"),
    (largebatch.LARS, {"preset": "mlpref"}, "did you mean 'mlperf'?"),
    (
        largebatch.LARS,
        {"preset": "deepspeed"},
        "'mlperf', 'apex', 'timm', 'author', 'simclr', 'byol', 'barlow_twins', 'vicreg', 'moco_v3', 'mae_linear_probe', 'swav', 'lightly' for LARS",
    ),
    (
        largebatch.LARS,
        {"trust_coeficient": 0.1},
        "LARS.trust_coeficient is not known (did you mean 'trust_coefficient'?)",
    ),
    (largebatch.LARS, {"exclude_from_adaptation": "bias"}, "exclude_from_adaptation is 'bias'; expected a list"),
    (largebatch.LARS, {"exclude_from_adaptation": ["bias"]}, "has no name"),
    (largebatch.LARS, {"exclude_from_weight_decay": ["("]}, "this one does not compile"),
    (largebatch.LARS, {"kernels": "tritn"}, "kernels is 'tritn'; expected one of"),
    (largebatch.LAMB, {"betas": (0.9, 1.0)}, "betas is (0.9, 1.0); expected [beta1, beta2], both >= 0 and < 1"),
    (largebatch.LAMB, {"betas": 0.9}, "betas is 0.9; expected [beta1, beta2]"),
    (largebatch.LAMB, {"eps": 0.0}, "eps is 0.0; expected a number > 0"),
    (largebatch.LAMB, {"bias_correction": "yes"}, "bias_correction is 'yes'; expected one of True, False, 'lr'"),
    (largebatch.LAMB, {"momentum": 0.9}, "LAMB.momentum is not known"),
    (largebatch.NLAMB, {"bias_correction": False}, "NLAMB.bias_correction is not known"),
    (largebatch.NNLAMB, {"preset": "author"}, "expected null or one of 'paper' for NNLAMB"),
]
