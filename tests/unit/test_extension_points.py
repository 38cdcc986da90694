"""What people attach to a torch.optim.Optimizer, side by side with torch's own Adam: hooks, state dicts, compilation, types."""

import copy
import decimal
import fractions
import gc
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import largebatch
from largebatch.config import UnknownOptionError
from largebatch.engine.lr_schedulers import SCHEDULERS

OPTIMIZERS = [torch.optim.Adam, largebatch.LARS, largebatch.LAMB, largebatch.NLAMB, largebatch.NNLAMB]
OURS = OPTIMIZERS[1:]
each = pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda c: c.__name__)
each_of_ours = pytest.mark.parametrize("optimizer_class", OURS, ids=lambda c: c.__name__)


def made(optimizer_class, seed=0, names=True, **options):
    generator = torch.Generator().manual_seed(seed)
    named = [(f"w{i}", nn.Parameter(torch.randn(s, generator=generator))) for i, s in enumerate(((3, 2), (4,), (2, 2)))]
    params = named if names else [p for _, p in named]
    return named, optimizer_class(params, **({"lr": 0.1} | options))


def stepped(named, optimizer, num_steps=2):
    for step in range(num_steps):
        for i, (_, parameter) in enumerate(named):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1 + i))
        optimizer.step()
    return named, optimizer


def moment(optimizer, parameter):
    return next(v for name, v in optimizer.state[parameter].items() if name != "step")


# --- state dicts and their hooks ----------------------------------------------------------------------------------------


@each
def test_a_hook_that_matches_state_by_name(optimizer_class):
    """torch's documented use: the model has its parameters in another order than the checkpoint."""
    named, optimizer = stepped(*made(optimizer_class))
    saved = optimizer.state_dict()
    order = [2, 0, 1]
    copies = [(named[i][0], nn.Parameter(named[i][1].detach().clone())) for i in order]
    other = optimizer_class(copies, lr=0.1)

    def by_name(optimizer, state_dict):
        (saved_group,), (group,) = state_dict["param_groups"], optimizer.state_dict()["param_groups"]
        number = dict(zip(saved_group["param_names"], saved_group["params"], strict=True))
        state = {i: state_dict["state"][number[n]] for i, n in zip(group["params"], group["param_names"], strict=True)}
        return {"state": state, "param_groups": [saved_group | {k: group[k] for k in ("params", "param_names")}]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(saved)
    for name, parameter in copies:
        assert torch.equal(moment(other, parameter), moment(optimizer, dict(named)[name])), name


@each
def test_a_hook_that_replaces_state_after_loading(optimizer_class):
    named, optimizer = stepped(*made(optimizer_class))

    def doubled(optimizer):
        for state in optimizer.state.values():
            for name in state:
                state[name] = state[name] * 2

    before = moment(optimizer, named[0][1]).clone()
    optimizer.register_load_state_dict_post_hook(doubled)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(moment(optimizer, named[0][1]), 2 * before)
    assert not any("before" in str(hook) for hook in optimizer._optimizer_load_state_dict_pre_hooks.values())


@each
def test_hooks_around_steps_and_state_dicts(optimizer_class):
    seen = []
    named, optimizer = made(optimizer_class)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, d: d | {"mine": 7})
    stepped(named, optimizer, 1)
    assert optimizer.state_dict()["mine"] == 7
    assert seen == ["before step", "after step", "before saving"]


@each
@pytest.mark.parametrize("entry", ["foreign", 12345], ids=str)
def test_state_that_belongs_to_no_parameter(optimizer_class, entry):
    named, optimizer = stepped(*made(optimizer_class))
    saved = optimizer.state_dict()
    saved["state"] = saved["state"] | {entry: {"note": 3}}
    optimizer.load_state_dict(saved)
    stepped(named, optimizer, 1)


@each
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on_with_the_same_bits(optimizer_class, way):
    named, optimizer = stepped(*made(optimizer_class))
    if way == "state_dict":
        others = [(n, nn.Parameter(p.detach().clone())) for n, p in named]
        other = optimizer_class(others, lr=0.3)
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    else:
        duplicate = copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        others, other = duplicate((named, optimizer))
    stepped(named, optimizer), stepped(others, other)
    for (_, a), (_, b) in zip(named, others, strict=True):
        assert torch.equal(a, b)


@each
def test_names_are_in_the_state_dict(optimizer_class):
    _, optimizer = made(optimizer_class)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["w0", "w1", "w2"]


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@each
def test_distributed_checkpoints_of_one_process(optimizer_class, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def trained(num_steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        stepped(list(model.named_parameters()), optimizer, num_steps)
        return model, optimizer

    model, optimizer = trained(3)
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    fresh, other = trained(1)
    state = get_optimizer_state_dict(fresh, other)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(fresh, other, state)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(moment(optimizer, a), moment(other, b))


@each_of_ours
def test_options_that_saved_state_lacks(optimizer_class):
    """An older version's: what it did not know stays as it is here."""
    named, optimizer = stepped(*made(optimizer_class, weight_decay=0.25))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("adapt_undecayed", "trust_ratio_bounds", "decoupled_weight_decay", "eps"):
            del group[name]
    others, other = made(optimizer_class, adapt_undecayed=False)
    other.load_state_dict(saved)
    assert other.param_groups[0]["adapt_undecayed"] is False and other.param_groups[0]["weight_decay"] == 0.25
    stepped(others, other, 1)


@each_of_ours
@pytest.mark.parametrize(
    "foreign, options",
    [
        (torch.optim.Adam, {}), (torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {}), (torch.optim.NAdam, {}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_another_optimizers_state_is_refused_when_loaded(optimizer_class, foreign, options):
    _, other = stepped(*made(foreign, **options))
    named, optimizer = stepped(*made(optimizer_class))
    before = moment(optimizer, named[0][1]).clone()
    with pytest.raises(ValueError, match="it is another optimizer's. `largebatch convert` makes ours"):
        optimizer.load_state_dict(other.state_dict())
    assert torch.equal(moment(optimizer, named[0][1]), before)
    stepped(named, optimizer, 1)


# --- torch.compile ------------------------------------------------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize("what", ["step", "training"])
def test_compilation_changes_no_bit(optimizer_class, what):
    results = []
    for is_compiled in (False, True):
        torch.compiler.reset()
        named, optimizer = made(optimizer_class, weight_decay=0.01)

        def train(x, named=named, optimizer=optimizer):
            loss = sum((p * x).square().sum() for _, p in named)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        if is_compiled and what == "training":
            train = torch.compile(train, backend="eager")
        if is_compiled and what == "step":
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        for step in range(3):
            train(torch.tensor(0.5 + step))
        results.append([p.detach().clone() for _, p in named])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_of_ours
def test_a_step_that_has_to_be_one_graph_is_torchs_error(optimizer_class):
    """fullgraph=True allows nothing outside of the graph. No weight has moved then."""
    torch.compiler.reset()
    named, optimizer = made(optimizer_class)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for _, p in named]
    with pytest.raises(Exception, match="a step of largebatch runs kernels of its own"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, named, strict=True))


# --- numbers and sequences of any library -------------------------------------------------------------------------------


NUMBERS = [
    np.float32(0.125), np.float64(0.125), np.float16(0.125), np.array(0.125), torch.tensor(0.125), fractions.Fraction(1, 8),
    decimal.Decimal("0.125"),
]  # fmt: skip


@each_of_ours
@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: f"{type(v).__module__}.{type(v).__name__}")
def test_numbers_of_any_library(optimizer_class, value):
    """Given to the constructor, and by a schedule in the middle of training: the same bits as Python's own."""
    results = []
    for number in (0.125, value):
        named, optimizer = made(optimizer_class, lr=number, weight_decay=number, eps=number)
        stepped(named, optimizer)
        assert type(optimizer.param_groups[0]["eps"]) is float
        for option in ("lr", "weight_decay", "eps"):
            optimizer.param_groups[0][option] = number
        stepped(named, optimizer)
        results.append([p.detach().clone() for _, p in named])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "value",
    [[0.5, 0.75], (0.5, 0.75), np.array([0.5, 0.75]), torch.tensor([0.5, 0.75]), np.float32([0.5, 0.75])],
    ids=type,
)
def test_pairs_of_any_library(value):
    named, optimizer = made(largebatch.LAMB, betas=value, trust_ratio_bounds=value)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75) == optimizer.param_groups[0]["trust_ratio_bounds"]
    stepped(named, optimizer)
    optimizer.param_groups[0]["betas"] = value
    stepped(named, optimizer)


@each_of_ours
def test_a_tensor_of_two_elements_is_no_learning_rate(optimizer_class):
    with pytest.raises(ValueError, match="lr is tensor.*a tensor of one element"):
        made(optimizer_class, lr=torch.tensor([0.1, 0.2]))
    named, optimizer = made(optimizer_class)
    optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match="a tensor of one element"):
        stepped(named, optimizer, 1)


# --- param groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight_dcay", "weightdecay", "Weight_Decay", "beta", "decoupled_weight_decya"])
def test_a_misspelt_option_in_a_group(name):
    weight, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(UnknownOptionError, match=f"a param group has '{name}', which LAMB does not know .did you mean"):
        largebatch.LAMB([{"params": [weight], name: 0.1}])
    optimizer = largebatch.LAMB([weight])
    with pytest.raises(UnknownOptionError, match="did you mean"):
        optimizer.add_param_group({"params": [other], name: 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["preset", "kernels", "max_grad_norm", "model", "state_dtype"])
def test_an_option_of_all_groups_in_one(name):
    with pytest.raises(ValueError, match=f"{name} holds for all param groups together.*[Gg]ive it to LARS itself"):
        largebatch.LARS([{"params": [nn.Parameter(torch.ones(2))], name: "other"}], lr=0.1)


def test_options_of_all_groups_that_a_wrapper_puts_into_each():
    """As ZeroRedundancyOptimizer and SAM do with the constructor's arguments."""
    given = {"preset": "apex", "kernels": "reference", "max_grad_norm": 1.0, "lr": 0.1}
    optimizer = largebatch.LAMB([{"params": [nn.Parameter(torch.ones(2))], **given}], **given)
    assert not {"preset", "kernels", "max_grad_norm"} & optimizer.param_groups[0].keys()


@each_of_ours
@pytest.mark.parametrize(
    "name", ["trust_coeff", "maximize", "learning_rate", "wd", "lars_exclude", "use_lars", "beta1", "epsilon"]
)
def test_an_option_of_another_package_in_a_group(optimizer_class, name):
    with pytest.raises(
        UnknownOptionError, match=f"a param group has '{name}', which {optimizer_class.__name__} does not know; "
    ):
        optimizer_class([{"params": [nn.Parameter(torch.ones(2))], name: 0.5}], lr=0.1)


@pytest.mark.parametrize(
    "optimizer_class, name",
    [(largebatch.LAMB, "momentum"), (largebatch.LAMB, "trust_coefficient"), (largebatch.LARS, "betas")],
)
def test_an_option_of_our_other_optimizer_in_a_group(optimizer_class, name):
    with pytest.raises(UnknownOptionError, match=f"a param group has '{name}', .* does not know; delete it"):
        optimizer_class([{"params": [nn.Parameter(torch.ones(2))], name: 0.5}], lr=0.1)


@each_of_ours
@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_param_groups_that_another_optimizer_has_filled_in(optimizer_class, other):
    groups = other([nn.Parameter(torch.ones(2))], lr=0.1).param_groups
    with pytest.raises(UnknownOptionError, match="does not know; delete it"):
        optimizer_class(groups, lr=0.1)


@each_of_ours
@pytest.mark.parametrize("value", [float("nan"), -0.1, float("inf")])
def test_a_learning_rate_in_a_tensor_is_checked_once(optimizer_class, value):
    weight = nn.Parameter(torch.ones(2))
    if value != float("inf"):
        with pytest.raises(ValueError, match="lr is .*expected a number >= 0"):
            optimizer_class([weight], lr=torch.tensor(value))
    optimizer = optimizer_class([weight], lr=0.1)
    with pytest.raises(ValueError, match="lr is .*expected a number >= 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": torch.tensor(-1.0)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "name", ["name", "initial_lr", "lr_scale", "lr_mult", "weight_decay_mult", "group_name", "is_body"]
)
def test_keys_of_the_callers_own_in_a_group(name):
    optimizer = largebatch.LAMB([{"params": [nn.Parameter(torch.ones(2))], name: 0.5}])
    assert optimizer.param_groups[0][name] == 0.5


def test_an_illegal_option_in_a_new_group_adds_nothing():
    optimizer = largebatch.LAMB([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="weight_decay is -1.0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": -1.0})
    assert len(optimizer.param_groups) == 1


# --- schedules ----------------------------------------------------------------------------------------------------------

PARAMS = {
    "WarmupPolyLR": {"total_steps": 10},
    "WarmupCosineDecayLR": {"total_steps": 10},
    "WarmupStepLR": {"milestone_steps": [3]},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_param_group_that_is_added_while_a_schedule_runs(name):
    named, optimizer = made(largebatch.LAMB, names=False)
    scheduler = SCHEDULERS[name](optimizer, warmup_steps=2, **PARAMS[name])
    for _ in range(4):
        scheduler.step()
    new = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * scheduler.factor(5))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * scheduler.factor(5))
    restored = SCHEDULERS[name](optimizer, warmup_steps=2, **PARAMS[name])
    restored.load_state_dict(scheduler.state_dict())
    assert restored.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "foreign, step",
    [({"last_batch_iteration": 6}, 7), ({"last_batch_iteration": -1}, 0), ({"last_epoch": 7, "base_lrs": [3.0]}, 7)],
    ids=["DeepSpeed's", "DeepSpeed's, fresh", "torch's"],
)
def test_another_schedules_state_gives_the_step_alone(name, foreign, step, caplog):
    _, optimizer = made(largebatch.LAMB)
    scheduler = SCHEDULERS[name](optimizer, **PARAMS[name])
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        scheduler.load_state_dict(foreign)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * scheduler.factor(step))
    assert f"its step, {step}, is taken over, its learning rates are not" in caplog.text


def test_a_state_without_any_step_is_told():
    _, optimizer = made(largebatch.LAMB)
    scheduler = SCHEDULERS["WarmupPolyLR"](optimizer, total_steps=10)
    with pytest.raises(ValueError, match="none of it says at which step it was saved"):
        scheduler.load_state_dict({"best": 0.3})


# --- tensors that are no layers -----------------------------------------------------------------------------------------


def flattened(*shapes):
    """Parameters that share one buffer."""
    flat = torch.randn(sum(torch.Size(s).numel() for s in shapes))
    parts = flat.split([torch.Size(s).numel() for s in shapes])
    return [nn.Parameter(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]


@each_of_ours
@pytest.mark.parametrize("mark", ["_fsdp_flattened", "_is_flat_param", "_is_sharded"])
def test_a_parameter_that_says_it_is_a_part_is_refused(optimizer_class, mark):
    weight = nn.Parameter(torch.ones(3))
    setattr(weight, mark, True)
    with pytest.raises(ValueError, match="is no whole layer, so its norm would be wrong; use fully_shard"):
        optimizer_class([weight], lr=0.1)


@each_of_ours
def test_slices_of_one_buffer_are_refused(optimizer_class):
    with pytest.raises(ValueError, match="view of a larger buffer, as flattened and sharded parameters are"):
        optimizer_class(flattened((7,), (5,)), lr=0.1)


@each_of_ours
@pytest.mark.parametrize("fault", ["slices", "mark", "complex"])
def test_a_later_group_is_checked_as_the_first_and_leaves_nothing_behind(optimizer_class, fault):
    optimizer = optimizer_class([("w", nn.Parameter(torch.ones(3)))], lr=0.1)
    later = flattened((7,), (5,))
    if fault == "mark":
        later = [nn.Parameter(torch.ones(3))]
        later[0]._is_flat_param = True
    if fault == "complex":
        later = [nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    with pytest.raises((ValueError, TypeError), match="view of a larger buffer|is no whole layer|complex parameters"):
        optimizer.add_param_group({"params": [(f"x{i}", x) for i, x in enumerate(later)]})
    assert len(optimizer.param_groups) == 1 and [layer.name for layer in optimizer.layers] == ["w"]
    optimizer.add_param_group({"params": [("y", nn.Parameter(torch.ones(2)))]})
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    assert list(optimizer.layer_stats()) == ["w", "y"]


@each_of_ours
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_knows_its_own_layers(optimizer_class, way):
    optimizer = optimizer_class([("w", nn.Parameter(torch.ones(3)))], lr=0.1, exclude_from_weight_decay=["w"])
    twin = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    del optimizer
    gc.collect()
    assert [(layer.name, layer.is_decayed) for layer in twin.layers] == [("w", False)]
    (weight,) = twin.param_groups[0]["params"]
    weight.grad = torch.ones(3)
    twin.step()
    assert list(twin.layer_stats()) == ["w"]


def test_views_that_are_layers_are_not():
    """Recurrent layers on GPUs share one buffer; so do a module's own parameters, whatever their shapes."""
    largebatch.LAMB(flattened((3, 2), (3,), (4,)))
    model = nn.Module()
    model.a, model.b = flattened((3,), (4,))
    largebatch.LAMB(model.parameters(), model=model)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(rank_pool, use_orig_params):
    message = rank_pool.run(2, fsdp1_error, use_orig_params)
    assert all("FullyShardedDataParallel (FSDP1)" in m and "use fully_shard (FSDP2)" in m for m in message)


def fsdp1_error(use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    try:
        largebatch.LAMB(model.parameters(), lr=0.1)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# --- values that memory does not hold ------------------------------------------------------------------------------------

LAZY_GRADIENTS = {
    "negated": lambda g: torch._neg_view(-g),
    "zeros without memory": lambda g: torch._efficientzerotensor(g.shape),
    "fp64": lambda g: g.double(),
}


@each_of_ours
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("kind", LAZY_GRADIENTS)
def test_lazy_and_odd_gradients_are_read_as_values(optimizer_class, kernels, kind):
    weights = [nn.Parameter(torch.linspace(1, 2, 12).reshape(3, 4)) for _ in range(2)]
    gradient = LAZY_GRADIENTS[kind](torch.linspace(-1, 3, 12).reshape(3, 4))
    for weight, grad in zip(weights, (gradient, (gradient + 0).float().contiguous()), strict=True):
        weight.grad_dtype = None
        weight.grad = grad
        optimizer = optimizer_class([weight], lr=0.1, kernels=kernels)
        for _ in range(3):
            optimizer.step()
    assert (weights[0] - weights[1]).abs().max() <= 1e-6
    assert kind == "zeros without memory" or not torch.equal(weights[0], torch.linspace(1, 2, 12).reshape(3, 4))


@each_of_ours
def test_a_negated_weight(optimizer_class):
    values, gradient = torch.linspace(1, 2, 12).reshape(3, 4), torch.linspace(-1, 3, 12).reshape(3, 4)
    ends = []
    for weight in (torch._neg_view(-values).requires_grad_(), values.clone().requires_grad_()):
        weight.grad = gradient.clone()
        optimizer = optimizer_class([weight], lr=0.1)
        optimizer.step()
        optimizer.step()
        ends.append(weight.detach().clone())
        if weight.is_neg():
            with pytest.raises(RuntimeError, match="only 'reference' can step"):
                optimizer_class([weight], lr=0.1, kernels="cpp").step()
    assert (ends[0] - ends[1]).abs().max() <= 1e-6 and not torch.equal(ends[1], values)


# --- parameters that others exchange ------------------------------------------------------------------------------------


@each_of_ours
def test_a_parameter_of_the_same_shape_in_anothers_place(optimizer_class):
    old, new = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = optimizer_class([("w", old)], lr=0.1)
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.ones(3, 2)
    optimizer.step()
    assert list(optimizer.layer_stats()) == ["w"]
    newer = nn.Parameter(new.detach().clone())
    newer.grad = torch.ones(3, 2)
    optimizer.param_groups[0]["params"][0] = newer
    with pytest.raises(RuntimeError, match="w was replaced by another tensor after it was stepped"):
        optimizer.step()
    optimizer.state[newer] = optimizer.state.pop(new)
    optimizer.step()
    assert not torch.equal(newer, new)


@each_of_ours
def test_parameters_that_are_moved_between_places(optimizer_class):
    """A parameter given is known wherever it stands; what is new beside it is nobody."""
    a, b, c = (nn.Parameter(torch.ones(3, 2) * i) for i in (1, 2, 3))
    optimizer = optimizer_class([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)]}], lr=0.1)
    groups = optimizer.param_groups
    for x in (a, b, c):
        x.grad = torch.ones(3, 2)
    optimizer.step()
    groups[0]["params"], groups[1]["params"] = [c, b], [a]
    optimizer.step()
    assert optimizer.layer_stats().keys() == {"a", "b", "c"}
    del groups[0]["params"][1]
    optimizer.step()
    groups[0]["params"] += [b, nn.Parameter(torch.ones(3, 2))]
    groups[0]["params"][-1].grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="A new layer of your own is taken by add_param_group"):
        optimizer.step()


@each_of_ours
@pytest.mark.parametrize("when", ["before a step", "after a step"])
def test_parameters_that_module_to_swaps(optimizer_class, when):
    """torch refuses to swap what has weak references, and DTensors are always swapped."""
    model = nn.Linear(3, 2)
    optimizer = optimizer_class(model.parameters(), lr=0.1, model=model, kernels="reference")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if when == "after a step":
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert before.dtype == torch.float64 and not torch.equal(before, model.weight)
    assert list(optimizer.layer_stats()) == ["weight", "bias"]


@each_of_ours
def test_lazy_parameters(optimizer_class):
    model = nn.LazyLinear(3)
    optimizer = optimizer_class(model.parameters(), lr=0.1, model=model)
    model(torch.ones(2, 4)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert list(optimizer.layer_stats()) == ["weight", "bias"] and not torch.equal(before, model.weight)


def step_of_a_marked_parameter(is_told):
    weight = nn.Parameter(torch.full((2, 2), float(torch.distributed.get_rank() + 1)))
    weight.tensor_model_parallel = True
    weight.grad = torch.ones(2, 2)
    optimizer = largebatch.LAMB([("w", weight)], lr=0.1)
    if is_told:
        optimizer.attach({}, {weight: torch.distributed.group.WORLD})
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return optimizer.layer_stats()["w"]["weight_norm"]


def test_a_parameter_that_tensor_parallelism_has_cut(rank_pool):
    for message in rank_pool.run(2, step_of_a_marked_parameter, False):
        assert "w is marked as a part of a layer that tensor parallelism has cut" in message
    assert rank_pool.run(2, step_of_a_marked_parameter, True) == [pytest.approx(20**0.5)] * 2
    assert rank_pool.run(1, step_of_a_marked_parameter, False) == [pytest.approx(2.0)]


# --- state of others ----------------------------------------------------------------------------------------------------


@each_of_ours
@pytest.mark.parametrize("step", [{}, {"step": 1000}], ids=["no step", "step in the group"])
def test_moments_of_an_optimizer_without_any_option_of_ours(optimizer_class, step):
    """apex's FusedAdam, Muon, Lion and others have our state names, and another meaning."""
    optimizer = optimizer_class([nn.Parameter(torch.ones(2))], lr=0.1)
    state = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "momentum_buffer": torch.ones(2)}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0]} | step
    with pytest.raises(ValueError, match="another optimizer's. `largebatch convert`"):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})


def test_moments_without_their_step():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = largebatch.LAMB([weight], lr=0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="has exp_avg, exp_avg_sq and no step; LAMB would begin at step 0"):
        optimizer.load_state_dict(saved)


# --- schedules ----------------------------------------------------------------------------------------------------------


def scheduled(lrs, num_steps=10, **options):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs]
    optimizer = largebatch.LAMB(groups, lr=0.1)
    return optimizer, largebatch.WarmupPolyLR(optimizer, total_steps=num_steps, power=1, **options)


def lrs_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_a_group_that_is_deleted_while_a_schedule_runs():
    optimizer, scheduler = scheduled([0.1, 0.5])
    scheduler.step()
    del optimizer.param_groups[0]
    scheduler.step()
    assert lrs_of(optimizer) == pytest.approx([0.5 * 0.8])


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_group_that_is_added_while_a_schedule_runs_has_the_optimizers_peak(lr):
    optimizer = largebatch.LAMB([nn.Parameter(torch.ones(2))], lr=lr)
    scheduler = largebatch.WarmupPolyLR(optimizer, total_steps=10, power=1)
    for _ in range(4):
        scheduler.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.2})
    scheduler.step()
    assert lrs_of(optimizer) == pytest.approx([0.05, 0.05, 0.1])


def test_a_schedules_state_of_fewer_groups():
    _, saved = scheduled([0.1], 1000, warmup_steps=100)
    optimizer, scheduler = scheduled([0.1, 0.1], 1000, warmup_steps=100)
    for _ in range(200):
        saved.step()
    scheduler.load_state_dict(saved.state_dict())
    assert lrs_of(optimizer) == pytest.approx([saved.get_last_lr()[0]] * 2)


def test_a_second_schedule_begins_at_the_peak():
    optimizer, scheduler = scheduled([0.1], 4)
    for _ in range(4):
        scheduler.step()
    assert lrs_of(optimizer) == [0.0]
    largebatch.WarmupPolyLR(optimizer, total_steps=4, power=1)
    assert lrs_of(optimizer) == pytest.approx([0.1])
    optimizer.param_groups[0]["lr"] = 0.7  # the caller's own, not what a schedule has left
    third = largebatch.WarmupPolyLR(optimizer, total_steps=4, power=1)
    third.step()
    assert lrs_of(optimizer) == pytest.approx([0.7 * 0.75])


def test_a_loaded_optimizer_state_leaves_the_schedules_peaks():
    optimizer, scheduler = scheduled([0.1, 0.5])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["lr"], group["initial_lr"] = 7.0, 7.0
    optimizer.load_state_dict(saved)
    scheduler.step()
    assert lrs_of(optimizer) == pytest.approx([0.09, 0.45])


def test_our_schedules_are_torchs():
    """In a chain of schedules they do what LambdaLR does with the same factor."""
    found = []
    for is_ours in (True, False):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        if is_ours:
            first = largebatch.WarmupPolyLR(optimizer, total_steps=6, warmup_steps=2, power=1)
            assert isinstance(first, torch.optim.lr_scheduler.LRScheduler)
        else:
            first = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 2 if t < 2 else (6 - t) / 4)
        second = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
        chain = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[4])
        lrs = []
        for _ in range(7):
            lrs += lrs_of(optimizer)
            optimizer.step()
            chain.step()
        found.append(lrs)
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("step, expected", [(torch.tensor(7), 7), (float("nan"), None)])
def test_steps_in_another_schedules_state(step, expected):
    _, scheduler = scheduled([0.1])
    if expected is None:
        with pytest.raises(ValueError, match="none of it says at which step"):
            scheduler.load_state_dict({"last_epoch": step})
    else:
        scheduler.load_state_dict({"last_epoch": step})
        assert scheduler.last_epoch == expected
