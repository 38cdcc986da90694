"""A rule's options reach the compiled kernels by their names: one that is missing, renamed or new is an error, never a default."""

import dataclasses

import pytest
import torch

import largebatch
from largebatch.kernels import cpp_cpu, dispatch
from largebatch.kernels.interface import ALGORITHMS
from largebatch.optim.layerwise import rule_of
from largebatch.rules.rule import Rule
from support.backends import using

WITH_OPTIONS = {
    "lars": (largebatch.LARS, {}),
    "lars2019": (largebatch.LARS, {"formulation": "2019"}),
    "lamb": (largebatch.LAMB, {}),
    "nlamb": (largebatch.NLAMB, {}),
    "nnlamb": (largebatch.NNLAMB, {}),
    "lans": (largebatch.LANS, {}),
}
RULES = {cls.name: cls for cls in ALGORITHMS}
EACH_OPTION = [(name, field.name) for name, cls in RULES.items() for field in dataclasses.fields(cls)]


def rule_named(name):
    optimizer_class, options = WITH_OPTIONS[name]
    optimizer = optimizer_class([torch.zeros(1)], lr=0.1, **options)
    return optimizer.make_rule(optimizer._group_options(optimizer.param_groups[0]))


def plan(name, options):
    module = dispatch.choose("cpu", "cpp").module
    return module.Plan([], [], [], [], [], [], [], [], name, options, False)


def test_every_rule_with_kernels_is_here():
    assert WITH_OPTIONS.keys() == RULES.keys()


@pytest.mark.parametrize("name, option", EACH_OPTION)
def test_cpp_takes_each_option_by_its_name(name, option):
    with using("cpp-portable"):
        options = cpp_cpu.rule_options(rule_named(name))
        plan(name, options)
        value = options.pop(option)
        with pytest.raises(KeyError, match=f"miss the option {option}"):
            plan(name, options)
        with pytest.raises(KeyError, match=f"miss the option {option}|do not know the option {option}s"):
            plan(name, options | {f"{option}s": value})


@pytest.mark.parametrize("name", RULES)
def test_cpp_refuses_an_option_and_a_rule_that_it_does_not_know(name):
    with using("cpp-portable"):
        options = cpp_cpu.rule_options(rule_named(name))
        with pytest.raises(KeyError, match="do not know the option warmth"):
            plan(name, options | {"warmth": 1.0})
        with pytest.raises(KeyError, match="have no formulas for lambda"):
            plan("lambda", options)


@pytest.mark.parametrize("name, option", EACH_OPTION)
def test_triton_takes_each_option_by_its_name(name, option, monkeypatch):
    triton_gpu = pytest.importorskip("largebatch.kernels.triton_gpu", reason="triton is not installed")
    rule = rule_named(name)
    assert len(triton_gpu.numbers_of(rule)) == len(triton_gpu.NUMBERS)
    known = triton_gpu.OPTIONS[name]
    for other in (tuple(o for o in known if o != option), (*known, f"{option}s")):
        monkeypatch.setitem(triton_gpu.OPTIONS, name, other)
        for function in (triton_gpu.numbers_of, triton_gpu.switches_of_passes, triton_gpu.switches_of_layers):
            with pytest.raises(KeyError, match=f"the Triton kernels know .* of {name}"):
                function(rule)


def test_an_instruction_set_by_name(monkeypatch):
    with using("cpp-portable"):
        module = dispatch.choose("cpu", "cpp").module
        for name in module.instruction_sets():
            monkeypatch.setenv("LARGEBATCH_INSTRUCTION_SET", name)
            cpp_cpu.use_instruction_set(module)
            assert module.instruction_set() == name
        monkeypatch.setenv("LARGEBATCH_INSTRUCTION_SET", "avx1024")
        with pytest.raises(
            ValueError, match="LARGEBATCH_INSTRUCTION_SET is 'avx1024'; this processor has .*'portable'"
        ):
            cpp_cpu.use_instruction_set(module)


def test_a_rule_takes_all_of_its_options_from_the_optimizers():
    for name, cls in RULES.items():
        assert rule_named(name) == rule_of(cls, rule_named(name)) and issubclass(cls, Rule)
