"""What torch.optim promises of an optimizer, and what ours promise beyond it."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch

import largebatch
from support.cases import CASES, ILLEGAL
from support.problems import as_parameters, random_gradients, random_layers, run_optimizer

ALGORITHMS = [
    (largebatch.LARS, 2.0),
    (largebatch.LAMB, 0.01),
    (largebatch.NLAMB, 0.01),
    (largebatch.NNLAMB, 0.01),
    (largebatch.LANS, 0.01),
]
each_algorithm = pytest.mark.parametrize("optimizer_class, lr", ALGORITHMS, ids=lambda v: getattr(v, "__name__", None))
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def steps(optimizer, parameters, num_steps, seed=1):
    lr = optimizer.param_groups[0]["lr"]
    return run_optimizer(optimizer, parameters, random_gradients(num_steps, seed), [lr] * num_steps)


def bits(tensors):
    return [t.detach().clone() for t in tensors]


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "optimizer_class, options, message", ILLEGAL, ids=lambda v: None if isinstance(v, type) else str(v)[:60]
)
def test_illegal_options(optimizer_class, options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer_class([torch.nn.Parameter(torch.ones(2))], **({"lr": 1.0} | options))
    assert message in str(caught.value)


@each_dtype
@each_algorithm
def test_state_dict_round_trip_continues_with_the_same_bits(optimizer_class, lr, dtype):
    parameters = as_parameters(random_layers(), dtype)
    optimizer = optimizer_class(parameters, lr=lr, weight_decay=0.01)
    steps(optimizer, parameters, 3)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    restored = optimizer_class(copies, lr=123.0)
    restored.load_state_dict(saved)
    steps(optimizer, parameters, 2, seed=5)
    steps(restored, copies, 2, seed=5)
    assert_same_bits(parameters, copies)
    for a, b in zip(parameters, copies, strict=True):
        assert optimizer.state[a].keys() == restored.state[b].keys()
        for name in optimizer.state[a]:
            assert torch.equal(optimizer.state[a][name], restored.state[b][name])
            assert optimizer.state[a][name].dtype == restored.state[b][name].dtype


@each_algorithm
def test_deepcopy_and_pickle(optimizer_class, lr):
    parameters = as_parameters(random_layers())
    named = [(f"l{i}.bias" if p.dim() == 1 else f"l{i}.weight", p) for i, p in enumerate(parameters)]
    optimizer = optimizer_class(named, lr=lr, exclude_from_adaptation=["bias"])
    steps(optimizer, parameters, 2)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        clones = [p for group in clone.param_groups for p in group["params"]]
        assert clone.excluded_layers == optimizer.excluded_layers != []
        original, others = copy.deepcopy(parameters), steps(clone, clones, 2, seed=9)
        reference = optimizer_class(
            [(n, p) for (n, _), p in zip(named, original, strict=True)], lr=lr, exclude_from_adaptation=["bias"]
        )
        reference.load_state_dict(optimizer.state_dict())
        assert_same_bits(steps(reference, original, 2, seed=9), others)


@each_algorithm
def test_torch_lr_scheduler_and_closure(optimizer_class, lr):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optimizer_class([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    scheduler.step()
    assert calls == [True] and optimizer.param_groups[0]["lr"] == 0.75 * lr
    assert weight.abs().sum() < 3


@each_algorithm
def test_grad_scaler_skips_an_overflow_and_unscales_the_rest(optimizer_class, lr):
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    plain, scaled = (optimizer_class([w], lr=lr) for w in weights)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 3.0):
        scaled.zero_grad()
        scaler.scale((weights[1] * torch.tensor([0.5, 1.5]) * factor).sum()).backward()
        scaler.step(scaled)
        scaler.update()
        if factor != float("inf"):
            weights[0].grad = torch.tensor([0.5, 1.5]) * factor
            plain.step()
    assert torch.equal(weights[0], weights[1])


@each_algorithm
def test_no_step_holds_gradients(optimizer_class, lr):
    """Neither one that is taken, nor one that a scaler drops, nor one that fails."""
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    optimizer = optimizer_class(weights, lr=lr)
    for end in ("taken", "dropped", "failed"):
        for weight in weights:
            weight.grad = torch.tensor([0.5, 1.5])
        gone = weakref.ref(weights[0].grad)
        if end == "dropped":
            optimizer.found_inf = torch.tensor(1.0)
        if end == "failed":
            state = next(value for value in optimizer.state[weights[1]].values() if value.dim())
            state.data = torch.zeros(2, dtype=torch.int32)
            with pytest.raises((TypeError, RuntimeError)):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.found_inf = None
        optimizer.zero_grad()
        gc.collect()  # an exception holds the frames that it came through
        assert gone() is None, end


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@each_algorithm
def test_grad_scaler_scales_as_if_it_were_not_there(optimizer_class, lr, max_grad_norm):
    """Unscaling inside the step, with and without a clip; an overflow in one parameter drops the step of all."""
    weights = [[torch.nn.Parameter(torch.tensor(v)) for v in ([1.0, -2.0], [0.5, 3.0])] for _ in range(2)]
    plain, scaled = (optimizer_class(w, lr=lr, max_grad_norm=max_grad_norm) for w in weights)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 3.0):
        scaled.zero_grad()
        loss = (weights[1][0] * torch.tensor([0.5, 1.5]) * factor).sum() + (weights[1][1] * 0.25).sum()
        scaler.scale(loss).backward()
        scaler.step(scaled)
        scaler.update()
        if factor != float("inf"):
            weights[0][0].grad, weights[0][1].grad = torch.tensor([0.5, 1.5]) * factor, torch.full((2,), 0.25)
            plain.step()
    assert_same_bits(*weights)
    assert scaled.num_skipped_steps == 1 and scaled.num_skipped_layers == 0


@pytest.mark.parametrize("optimizer_class, lr", ALGORITHMS, ids=lambda v: getattr(v, "__name__", None))
def test_gradients_are_left_alone_unless_they_may_be_overwritten(optimizer_class, lr):
    results = []
    for overwrite_grads in (False, True):
        parameters = as_parameters(random_layers())
        optimizer = optimizer_class(parameters, lr=lr, weight_decay=0.01, overwrite_grads=overwrite_grads)
        steps(optimizer, parameters, 3)
        results.append(bits(parameters))
        is_same = all(
            torch.equal(p.grad, torch.tensor(g, dtype=torch.float32))
            for p, g in zip(parameters, random_gradients(3, 1)[-1], strict=True)
        )
        assert is_same or overwrite_grads
    assert_same_bits(*results)


@each_dtype
@each_algorithm
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stops_its_layer_only(optimizer_class, lr, dtype, poison, caplog):
    """Poisoned beside clean: the layer's weights and the element's state stay, everything else is as without poison."""
    poisoned, clean = (as_parameters(random_layers(), dtype) for _ in range(2))
    optimizers = [
        optimizer_class([(f"layer{i}", p) for i, p in enumerate(parameters)], lr=lr, weight_decay=0.01)
        for parameters in (poisoned, clean)
    ]
    for optimizer, parameters in zip(optimizers, (poisoned, clean), strict=True):
        steps(optimizer, parameters, 2)
    old_weight, old_state, stats = (
        poisoned[4].clone(),
        state_of(optimizers[0], poisoned[4]),
        optimizers[0].layer_stats(),
    )
    for p, q in zip(poisoned, clean, strict=True):
        q.grad = p.grad.clone()
    poisoned[4].grad[3, 1] = poison
    with caplog.at_level(logging.WARNING, logger="largebatch"):
        optimizers[0].step()
    optimizers[1].step()
    assert "left layer4 as they were: NaN or inf in the gradient; the other layers were stepped" in caplog.text
    assert optimizers[0].num_skipped_steps == 0 and optimizers[0].num_skipped_layers == 1
    assert optimizers[0].layer_stats()["layer4"] == stats["layer4"]
    for i, (p, q) in enumerate(zip(poisoned, clean, strict=True)):
        state, expected = state_of(optimizers[0], p), state_of(optimizers[1], q)
        if i == 4:
            assert_same_bits([old_weight], [p])
            if optimizer_class is largebatch.LARS:  # the ratio is in the momentum
                expected = old_state
            elif optimizer_class is largebatch.LANS:  # the whole gradient is divided by its norm first
                expected |= {name: old_state[name] for name in ("exp_avg", "exp_avg_sq")}
            else:
                for name in ("exp_avg", "exp_avg_sq"):
                    expected[name][3, 1] = old_state[name][3, 1]
        else:
            assert_same_bits([q], [p])
            assert optimizers[0].layer_stats()[f"layer{i}"] == optimizers[1].layer_stats()[f"layer{i}"]
        assert_same_bits(expected.values(), state.values())
    steps(optimizers[0], poisoned, 1)
    assert optimizers[0].num_skipped_layers == 1


def state_of(optimizer, parameter):
    return {name: value.clone() for name, value in optimizer.state[parameter].items()}


@each_dtype
@each_algorithm
@pytest.mark.parametrize("what", ["everything", "one element, clipped"])
def test_a_step_in_which_no_layer_moves_is_as_if_it_had_not_been(optimizer_class, lr, dtype, what):
    parameters = as_parameters(random_layers(), dtype)
    max_grad_norm = None if what == "everything" else 1.0
    optimizer = optimizer_class(parameters, lr=lr, weight_decay=0.01, max_grad_norm=max_grad_norm)
    steps(optimizer, parameters, 2)
    before = bits(parameters) + [t for p in parameters for t in bits(optimizer.state[p].values())]
    stats = optimizer.layer_stats()
    if what == "everything":
        for parameter in parameters:
            parameter.grad.fill_(float("nan"))
    else:
        parameters[4].grad[3, 1] = float("nan")
    optimizer.step()
    assert_same_bits(before, bits(parameters) + [t for p in parameters for t in bits(optimizer.state[p].values())])
    assert optimizer.num_skipped_steps == 1 and optimizer.layer_stats() == stats
    steps(optimizer, parameters, 1)
    assert optimizer.num_skipped_steps == 1


def test_a_gradient_divided_by_its_norm_cannot_overflow():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = largebatch.LANS([weight], lr=0.01)
    weight.grad = torch.tensor([1.0, 1e30, 1.0])
    optimizer.step()
    assert optimizer.num_skipped_steps == 0 and not torch.equal(weight, torch.ones(3))
    assert torch.isfinite(weight).all() and torch.isfinite(optimizer.state[weight]["exp_avg_sq"]).all()


@pytest.mark.parametrize("optimizer_class, lr", ALGORITHMS[1:-1], ids=lambda v: getattr(v, "__name__", None))
def test_a_square_that_overflows_never_enters_the_second_moment(optimizer_class, lr):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([weight], lr=lr)
    weight.grad = torch.tensor([1.0, 1e30, 1.0])
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert torch.equal(weight, torch.ones(3)) and torch.isfinite(optimizer.state[weight]["exp_avg_sq"]).all()


@each_algorithm
def test_zero_norms_give_ratio_one(optimizer_class, lr):
    zero_weight = torch.nn.Parameter(torch.zeros(3))
    zero_grad = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([zero_weight, zero_grad], lr=lr)
    zero_weight.grad, zero_grad.grad = torch.ones(3), torch.zeros(3)
    optimizer.step()
    assert [figures["trust_ratio"] for figures in optimizer.layer_stats().values()] == [1.0, 1.0]
    assert torch.equal(zero_grad, torch.ones(3)) and zero_weight.abs().sum() > 0


@each_algorithm
def test_empty_one_element_and_unused_parameters(optimizer_class, lr):
    empty, single, unused = (torch.nn.Parameter(t) for t in (torch.empty(0, 3), torch.ones(1), torch.ones(2)))
    optimizer = optimizer_class([empty, single, unused], lr=lr)
    empty.grad, single.grad = torch.empty(0, 3), torch.ones(1)
    optimizer.step()
    assert torch.isfinite(single).all() and not torch.equal(single, torch.ones(1))
    assert torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
    assert optimizer.num_skipped_steps == 0
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient


@each_algorithm
def test_strides_do_not_matter(optimizer_class, lr):
    values = torch.randn(4, 3, 5, 5)
    plain = torch.nn.Parameter(values.clone())
    channels_last = torch.nn.Parameter(values.clone().contiguous(memory_format=torch.channels_last))
    strided = torch.nn.Parameter(torch.randn(4, 3, 5, 10)[..., ::2].copy_(values))
    optimizers = [optimizer_class([p], lr=lr, weight_decay=0.1) for p in (plain, channels_last, strided)]
    for step in range(3):
        grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        plain.grad = grad.clone()
        channels_last.grad = grad.clone()  # another layout than its parameter
        strided.grad = grad.clone().contiguous(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-7)


@each_algorithm
def test_param_groups_have_their_own_options(optimizer_class, lr):
    layers = random_layers()
    one, two = as_parameters(layers), as_parameters(layers)
    grouped = optimizer_class([{"params": one[:3], "lr": lr / 2, "weight_decay": 0.1}, {"params": one[3:]}], lr=lr)
    separate = [optimizer_class(two[:3], lr=lr / 2, weight_decay=0.1), optimizer_class(two[3:], lr=lr)]
    for grads in random_gradients(4):
        for parameters in (one, two):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = torch.tensor(grad, dtype=torch.float32)
        grouped.step()
        for optimizer in separate:
            optimizer.step()
    assert_same_bits(one, two)


def test_a_param_group_is_checked_like_the_constructor():
    optimizer = largebatch.LARS([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(ValueError, match="momentum is 2; expected a number >= 0 and < 1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "momentum": 2})
    with pytest.raises(ValueError, match="max_grad_norm holds for all param groups together"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "max_grad_norm": 1.0})


def test_the_learning_rate_may_be_a_tensor():
    one, two = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    optimizers = [largebatch.LAMB([one], lr=0.1), largebatch.LAMB([two], lr=torch.tensor(0.1))]
    for parameter, optimizer in zip((one, two), optimizers, strict=True):
        parameter.grad = torch.tensor([0.3, -0.1])
        optimizer.step()
    torch.testing.assert_close(one, two, rtol=1e-7, atol=0)


def test_sparse_and_complex_are_refused():
    table = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = largebatch.LAMB([table])
    table.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    with pytest.raises(TypeError, match="complex parameters are not supported"):
        largebatch.LAMB([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_a_replaced_parameter_is_an_error_not_a_wrong_norm():
    """What ZeRO does behind the optimizer's back when largebatch is not registered."""
    parameters = as_parameters(random_layers())
    optimizer = largebatch.LAMB(parameters)
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"call largebatch.register\(\) before deepspeed.initialize"):
        optimizer.step()


def test_a_momentum_of_another_meaning_is_not_loaded():
    make = lambda **options: largebatch.LARS([torch.nn.Parameter(torch.ones(2))], lr=1.0, **options)  # noqa: E731
    saved = make(lr_in_momentum=False).state_dict()
    with pytest.raises(ValueError, match="saved momentum was made with lr_in_momentum=False"):
        make().load_state_dict(saved)
    with pytest.raises(ValueError, match="formulation='2019'"):
        make().load_state_dict(make(formulation="2019").state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_input_same_bits(case):
    runs = []
    for _ in range(2):
        parameters = as_parameters(random_layers())
        runs.append(bits(steps(case.optimizer(parameters, lr=case.peak_lr, **case.options), parameters, 5)))
    assert_same_bits(*runs)


def test_ratio_does_not_depend_on_how_the_sum_was_cut():
    """A layer above the block size of the reference, whole and in pieces: the same fp32 ratio."""
    from largebatch.kernels.reference import SUM_BLOCK, square_sum

    values = torch.randn(SUM_BLOCK + 12345)
    whole = square_sum(values)
    for num_parts in (2, 3, 7, 64):
        parts = sum(square_sum(part) for part in values.chunk(num_parts))
        assert parts.sqrt().float() == whole.sqrt().float()
        assert abs(parts - whole) / whole < 1e-14


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
@pytest.mark.parametrize("algorithm", [largebatch.LARS, largebatch.LAMB])
def test_gradients_are_not_kept(algorithm, kernels):
    """After zero_grad() nothing holds their memory."""
    parameters = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5))]
    optimizer = algorithm(parameters, lr=0.1, kernels=kernels)
    for _ in range(2):
        storages = []
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
            storages.append(weakref.ref(parameter.grad))
        optimizer.step()
        optimizer.zero_grad()
        assert [grad() for grad in storages] == [None, None]
