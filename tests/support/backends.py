"""The kernel backends that a test can run here, and the option sets that each of them must know."""

import contextlib

import pytest
import torch

import largebatch
from largebatch.kernels import dispatch

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
BACKENDS = ("reference", *(f"cpp-{name}" for name in INSTRUCTION_SETS), "triton")

LARS, LAMB, NLAMB, NNLAMB, LANS = (
    largebatch.LARS,
    largebatch.LAMB,
    largebatch.NLAMB,
    largebatch.NNLAMB,
    largebatch.LANS,
)
OPTION_SETS = [
    (LARS, {}),
    (LARS, {"weight_decay": 5e-4}),
    (LARS, {"weight_decay": 5e-4, "nesterov": True, "eps": 1e-3}),
    (LARS, {"weight_decay": 5e-4, "lr_in_momentum": False}),
    (LARS, {"weight_decay": 5e-4, "lr_in_momentum": False, "nesterov": True, "larc_clip": True}),
    (LARS, {"weight_decay": 5e-4, "larc_clip": True, "skip_zero_norm_layers": True}),
    (LARS, {"weight_decay": 5e-4, "decay_in_ratio": False, "damp_ratio_by_momentum": True}),
    (LARS, {"weight_decay": 0.1, "decay_before_norm": True, "lr_in_momentum": False}),
    (LARS, {"weight_decay": 0.1, "decay_before_norm": True, "larc_clip": True, "max_grad_norm": 0.5}),
    (LARS, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (LARS, {"weight_norm_bounds": (0.5, 2.0), "trust_ratio_bounds": (0.001, 0.01)}),
    (LARS, {"formulation": "2019", "weight_decay": 0.01}),
    (LARS, {"formulation": "2019", "eps": 0.1, "momentum": 0.0}),
    (LARS, {"weight_decay": 5e-4, "adapt_undecayed": False, "exclude_from_adaptation": ["w1$"]}),
    (LAMB, {}),
    (LAMB, {"weight_decay": 0.01}),
    (LAMB, {"weight_decay": 0.01, "betas": (0.0, 0.9), "eps": 1e-3}),
    (LAMB, {"weight_decay": 0.01, "bias_correction": False}),
    (LAMB, {"weight_decay": 0.01, "bias_correction": "lr", "trust_ratio_bounds": (0.01, 10.0)}),
    (LAMB, {"weight_decay": 0.1, "decoupled_weight_decay": True, "weight_norm_bounds": (0.5, 2.0)}),
    (LAMB, {"weight_decay": 0.01, "exclude_from_weight_decay": ["w[13]$"], "adapt_undecayed": False}),
    (LAMB, {"weight_decay": 0.01, "max_grad_norm": 0.5}),
    (NLAMB, {"weight_decay": 0.01}),
    (NLAMB, {"weight_decay": 0.1, "betas": (0.0, 0.0), "decoupled_weight_decay": True}),
    (NNLAMB, {"weight_decay": 0.01}),
    (NNLAMB, {"trust_ratio_bounds": (0.1, 1.0), "betas": (0.975, 0.9)}),
    (LANS, {}),
    (LANS, {"weight_decay": 0.01, "max_grad_norm": 0.5}),
    (
        LANS,
        {"weight_decay": 0.1, "betas": (0.0, 0.9), "decoupled_weight_decay": True, "weight_norm_bounds": (0.5, 2.0)},
    ),
    (LANS, {"weight_decay": 0.01, "trust_ratio_bounds": (0.1, 1.0), "exclude_from_adaptation": ["w1$"]}),
]


def name_of(value):
    if isinstance(value, type):
        return value.__name__.lower()
    return (
        ",".join(f"{k}={v}" for k, v in value.items()).replace(" ", "") or "default"
        if isinstance(value, dict)
        else None
    )


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def using(backend):
    """Yields the ``kernels`` argument for a backend; skips the test where the machine cannot run it."""
    kernels, _, instruction_set = backend.partition("-")
    try:
        chosen = dispatch.choose(device_of(backend), kernels)
    except dispatch.UnavailableKernelsError as error:
        pytest.skip(str(error))
    if not instruction_set:
        yield kernels
        return
    fastest = chosen.module.instruction_sets()
    if instruction_set not in fastest:
        pytest.skip(f"this processor has no {instruction_set}, only {', '.join(fastest)}")
    chosen.module.use_instruction_set(instruction_set)
    try:
        yield kernels
    finally:
        chosen.module.use_instruction_set(fastest[0])


@contextlib.contextmanager
def threads(number):
    """Inside, torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
