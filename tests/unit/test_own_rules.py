"""register_rule: what it makes of a user's rule, and what it refuses."""

import copy
import inspect
import logging
import pickle
from typing import ClassVar

import pytest
import torch

import largebatch
from largebatch.optim import registry
from largebatch.optim.rule_check import RuleError
from largebatch.planning.communication import SUMS_OF_SQUARES
from largebatch.planning.memory import STATE_BYTES
from support import own_rules
from support.problems import relative_error

each_rule = pytest.mark.parametrize("rule", own_rules.OPTIONS)


@pytest.fixture(autouse=True)
def no_rule_stays():
    before = dict(registry.OPTIMIZERS)
    yield
    registry.OPTIMIZERS.clear()
    registry.OPTIMIZERS.update(before)


def layers(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (1,), (33,), (0, 3), (4, 3, 2))
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def trained(rule, num_steps=6, dtype=torch.float64, **options):
    parameters = layers(dtype)
    optimizer = registry.OPTIMIZERS[rule.lower()](parameters, **own_rules.OPTIONS[rule] | options)
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
        optimizer.step()
    return parameters, optimizer


def smoothed_ratio(weight, num_steps, number):
    """The formula of own_rules.SmoothedRatio, transcribed for one layer."""
    velocity, mean = torch.zeros_like(weight), 0.0
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in layers()]
        direction = grads[number] + 0.01 * weight
        ratio = float(weight.norm() / direction.norm())
        mean = ratio if step == 0 else 0.9 * mean + 0.1 * ratio
        velocity = 0.8 * velocity + mean * (1 - 0.5 ** (step + 1)) * direction
        weight = weight - 0.01 * (step + 1) * velocity
    return weight


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_is_its_formula(kernels):
    found, optimizer = trained("SmoothedRatio", kernels=kernels)
    for number in (0, 1, 2, 4):
        expected = smoothed_ratio(layers()[number].detach(), 6, number)
        assert relative_error([found[number]], [expected]) < 1e-13
    assert optimizer.layer_stats()["group0.param0"].keys() >= {"trust_ratio", "mean_ratio", "direction_norm"}


def test_what_a_rule_becomes():
    cls = own_rules.SmoothedRatio
    assert issubclass(cls, torch.optim.Optimizer) and registry.OPTIMIZERS["smoothedratio"] is cls
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:4] == ["params", "lr", "momentum", "smoothing"]
    assert (parameters["lr"].default, parameters["smoothing"].default, parameters["kernels"].default) == (
        0.02,
        0.5,
        "auto",
    )
    assert "averaged over the steps" in cls.__doc__ and cls.presets.keys() == {"paper", "slow"}
    optimizer = cls(layers(), preset="slow")
    assert optimizer.param_groups[0]["smoothing"] == 0.9 and cls(layers()).param_groups[0]["smoothing"] == 0.5


@each_rule
def test_copies_and_resumes(rule):
    parameters, optimizer = trained(rule)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is type(optimizer)
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = registry.OPTIMIZERS[rule.lower()](fresh, **own_rules.OPTIONS[rule])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for tensors, one in ((parameters, optimizer), (fresh, resumed)):
        for parameter in tensors:
            parameter.grad = torch.full_like(parameter, 0.25)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, fresh, strict=True))


@each_rule
@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_what_is_not_finite_stays_out(rule, kernels):
    parameters, optimizer = trained(rule, dtype=torch.float32, kernels=kernels)
    before = [p.detach().clone() for p in parameters]
    states = [copy.deepcopy(optimizer.state[p]) for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.25)
    parameters[0].grad[3, 2] = torch.inf
    optimizer.step()
    assert torch.equal(parameters[0], before[0]) and not torch.equal(parameters[2], before[2])
    assert all(torch.isfinite(p).all() for p in parameters)
    old, new = states[0], optimizer.state[parameters[0]]
    assert torch.equal(old["layer_state"], new["layer_state"])
    for name in optimizer.rule_class.elementwise_state:
        assert torch.isfinite(new[name]).all() and new[name][3, 2] == old[name][3, 2]


def test_errors_of_options():
    cls = own_rules.SmoothedRatio
    with pytest.raises(ValueError, match=r"smoothing is 1.0; expected a number >= 0 and < 1"):
        cls(layers(), smoothing=1.0)
    with pytest.raises(TypeError, match=r"SmoothedRatio.smothing is not known \(did you mean 'smoothing'\?\)"):
        cls(layers(), smothing=0.1)
    with pytest.raises(ValueError, match="preset is 'fast'; expected null or one of 'paper', 'slow'"):
        cls(layers(), preset="fast")
    with pytest.raises(RuntimeError, match="kernels 'cpp' have no formulas for SmoothedRatio"):
        trained("SmoothedRatio", kernels="cpp")


class Plain(largebatch.Rule):
    """One that is right."""

    def directions(self, part):
        return (part.grad,)

    def trust_ratio(self, layers):
        return (torch.ones_like(layers.weight_norm),)

    def advance(self, part, *, lr, ratios):
        return part.weight - lr * ratios[0] * part.grad, part.state


class LooksAtTheTensor(Plain):
    def directions(self, part):
        return (part.grad / part.grad.norm(),)


class MixesLayers(Plain):
    def trust_ratio(self, layers):
        return (layers.weight_norm / layers.weight_norm.sum(),)


class ReturnsNoTuple(Plain):
    def directions(self, part):
        return part.grad


class ReturnsANumber(Plain):
    def directions(self, part):
        return (part.grad.sum(),)


class Stateful(Plain):
    elementwise_state = ("momentum",)

    def accumulate(self, part):
        return part.state + part.state


class NormalisesAhead(Plain):
    elementwise_state = ("momentum",)

    def advance(self, part, *, lr, ratios):
        return part.weight - lr * part.grad / part.grad.abs().max(), part.state


class CountsUnsaid(Plain):
    def advance(self, part, *, lr, ratios):
        return part.weight - lr * part.grad * part.step, part.state


class RampsUnsaid(Plain):
    def trust_ratio(self, layers):
        return (1 - 0.5**layers.step,)


class WritesInPlace(Plain):
    elementwise_state = ("momentum",)

    def accumulate(self, part):
        return (part.state[0].mul_(0.9).add_(part.grad),)


class ClampsTheGradient(Plain):
    def directions(self, part):
        return (part.grad.clamp_(-0.1, 0.1),)


class Remembers(Plain):
    seen: ClassVar[list] = []

    def directions(self, part):
        self.seen.append(1)
        return (part.grad * len(self.seen),)


class RoundsOff(Plain):
    def directions(self, part):
        return (part.grad.half(),)


class ReturnsTheWeightOnly(Plain):
    def advance(self, part, *, lr, ratios):
        return part.weight - lr * part.grad


class InSinglePrecision(Plain):
    def trust_ratio(self, layers):
        return (torch.ones_like(layers.weight_norm).float(),)


@pytest.mark.parametrize(
    "rule, words",
    [
        (LooksAtTheTensor, "LooksAtTheTensor.directions returned another direction_norm for a layer in two parts"),
        (MixesLayers, "MixesLayers.trust_ratio returned trust_ratio that depends on what other layers"),
        (CountsUnsaid, r"CountsUnsaid.advance uses part.step, which is 0 .* declares counts_steps = True"),
        (RampsUnsaid, r"RampsUnsaid.trust_ratio uses layers.step, which is 0 .* declares counts_steps = True"),
        (WritesInPlace, "WritesInPlace.accumulate wrote into the state 'momentum' that it was given"),
        (ClampsTheGradient, "ClampsTheGradient.directions wrote into the grad that it was given"),
        (Remembers, "Remembers.directions returned something else when it was called again with the same"),
        (
            RoundsOff,
            "RoundsOff.directions returned direction_norm of dtype torch.float16 for a weight of dtype torch.float64",
        ),
        (
            ReturnsTheWeightOnly,
            r"ReturnsTheWeightOnly.advance returned tensor\(.*; expected \(new weight, tuple of the new state\)",
        ),
        (InSinglePrecision, r"trust_ratio of shape \(4,\) and dtype torch.float32 for 4 layers; expected"),
        (ReturnsNoTuple, r"ReturnsNoTuple.directions returned tensor\("),
        (
            ReturnsANumber,
            r"ReturnsANumber.directions returned direction_norm of shape \(\) for a weight of shape \(24,\)",
        ),
        (Stateful, "Stateful.accumulate returned 2 tensors; expected a tuple of tensors, one for each of"),
        (NormalisesAhead, "NormalisesAhead.advance returned another weight for a layer in two parts"),
    ],
)
def test_a_rule_that_no_cut_allows_is_refused_when_an_optimizer_is_built(rule, words):
    cls = largebatch.register_rule(rule.__name__)(rule)
    with pytest.raises(RuleError, match=words):
        cls(layers(), lr=0.1)


class DividesByZero(Plain):
    """For layers whose weights are all zero."""

    def trust_ratio(self, layers):
        return (layers.norms[0] / layers.weight_norm,)


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
def test_a_layer_whose_trust_ratio_is_not_finite_is_named_and_counted(caplog, kernels):
    cls = largebatch.register_rule("DividesByZero")(DividesByZero)
    parameters = [torch.nn.Parameter(torch.full((4,), value)) for value in (0.0, 1.0)]
    optimizer = cls([("zero", parameters[0]), ("one", parameters[1])], lr=0.1, kernels=kernels)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with caplog.at_level(logging.WARNING, "largebatch"):
        optimizer.step()
    assert "left zero as they were: NaN or inf in the gradient, or in what the rule made of it" in caplog.text
    assert optimizer.num_skipped_layers == 1 and torch.equal(parameters[0], torch.zeros(4))
    assert not torch.equal(parameters[1], torch.ones(4))


def test_the_plain_rule_is_right():
    cls = largebatch.register_rule("Plain")(Plain)
    parameters = layers()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in parameters]
    cls(parameters, lr=0.5, kernels="reference").step()
    assert all(torch.equal(p, b - 0.5) for p, b in zip(parameters, before, strict=True))


def test_declarations_that_are_refused():
    for declared, words in (
        ({"elementwise_state": "momentum"}, "elementwise_state is 'momentum'; expected a tuple of names"),
        ({"elementwise_state": ("step",)}, "declares 'step' twice, or it is a name of ours"),
        ({"norms": ()}, "Declared.norms is empty; expected at least one name"),
        ({"ratios": ()}, "Declared.ratios is empty; expected at least one name"),
        ({"norms": ("weight_norm",)}, "declares 'weight_norm' twice"),
        ({"lr": 0.1, "__annotations__": {"lr": float}}, "has an option 'lr', which every optimizer has"),
        ({"table": (1, 2), "__annotations__": {"table": tuple}}, "option table has type tuple and no check"),
    ):
        rule = type("Declared", (Plain,), declared)
        with pytest.raises((TypeError, ValueError), match=words):
            largebatch.register_rule("Declared")(rule)
    for name in ("LAMB", "lars", "adamw"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
            largebatch.register_rule(name)(type("Other", (Plain,), {}))
    for name in ("directions", "trust_ratio", "advance"):
        methods = {n: getattr(Plain, n) for n in ("directions", "trust_ratio", "advance") if n != name}
        with pytest.raises(TypeError, match=f"Declared has no {name}"):
            largebatch.register_rule("Declared")(type("Declared", (largebatch.Rule,), methods))
    for presets, words in (
        (["slow"], "Declared's presets is .*; expected a mapping"),
        ({"slow": None}, "Declared's preset 'slow' is .*; expected a mapping of options"),
        ({"slow": {"weight_decai": 0.1}}, r"preset 'slow'.weight_decai is not known \(did you mean 'weight_decay'\?\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            largebatch.register_rule("Declared", presets=presets)(type("Declared", (Plain,), {}))
    for name in ("LANS", "LARS"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
            largebatch.register_rule(name)(type(name, (Plain,), {}))  # a class of the same name, from another file
    with pytest.raises(ValueError, match="the name of a rule is 'my rule'; expected letters, digits and _"):
        largebatch.register_rule("my rule")
    assert "declared" not in registry.OPTIMIZERS


def test_a_rule_that_cannot_be_compiled_is_stepped_by_the_reference_and_the_log_says_so(caplog):
    class Branches(Plain):
        def advance(self, part, *, lr, ratios):
            step = part.grad if float(ratios[0]) > 0.5 else -part.grad  # a value that only a run knows
            return part.weight - lr * step, part.state

    cls = largebatch.register_rule("Branches")(Branches)
    parameters = layers(torch.float32)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in parameters]
    with caplog.at_level(logging.INFO, "largebatch"):
        cls(parameters, lr=0.5).step()
    assert any("branches is stepped by 'reference'" in record.message for record in caplog.records)
    assert all(torch.equal(p, b - 0.5) for p, b in zip(parameters, before, strict=True))


def test_at_most_two_compilations_for_a_dtype_whatever_the_sizes_and_options():
    from torch._dynamo.utils import counters

    trained("SmoothedRatio", dtype=torch.float32)  # both passes are compiled now
    before = counters["stats"]["unique_graphs"]
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (2, 3, 5, 16, 17, 1000, 4096)]
    optimizer = own_rules.SmoothedRatio(parameters, lr=0.1)
    for step in range(4):
        optimizer.param_groups[0]["momentum"] = 0.5 + 0.1 * step
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == before > 0


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_the_plan_knows_the_sums_and_the_state_of_every_optimizer_of_ours(name):
    if name in map(str.lower, own_rules.OPTIONS):
        pytest.skip("a rule of the tests")
    cls = registry.OPTIMIZERS[name]
    optimizer = cls([torch.zeros(1)], lr=0.1)
    rule = optimizer.make_rule(optimizer._group_options(optimizer.param_groups[0]))
    before = (len(rule.norms_before),) if rule.norms_before else ()
    assert SUMS_OF_SQUARES[name] == (*before, 1 + len(rule.norms))
    assert STATE_BYTES[name] == 4 * len(rule.elementwise_state)
