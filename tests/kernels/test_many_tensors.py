"""Optimizers of thousands of tensors: what is looked up for each of them, and what of it is noticed when it changes."""

import itertools
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import largebatch
from largebatch.optim.plan import same_items, values_of_all
from largebatch.optim.state import fill_state, new_states
from support.backends import threads, using

NUM_TENSORS = 1200


@pytest.fixture
def three_threads():
    with threads(3):
        yield


def many(dtype=torch.float32, seed=0, num_tensors=NUM_TENSORS):
    generator = torch.Generator().manual_seed(seed)
    shapes = itertools.islice(itertools.cycle([(3,), (1,), (5, 4), (0,), (2, 3, 2, 2), (31,)]), num_tensors)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def trained(kernels, optimizer_class, *, dtype=torch.float32, num_steps=3, change=None, num_tensors=NUM_TENSORS):
    parameters = many(dtype, num_tensors=num_tensors)
    optimizer = optimizer_class(parameters, lr=0.05, weight_decay=0.01, kernels=kernels)
    for step in range(num_steps):
        give_gradients(parameters, seed=step + 1)
        if change is not None and step == num_steps - 1:
            change(parameters, optimizer)
        optimizer.step()
    return parameters, optimizer


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB, largebatch.LANS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_as_the_reference(optimizer_class, dtype, three_threads):
    with using("cpp-portable") as kernels:
        found, optimizer = trained(kernels, optimizer_class, dtype=dtype, num_tensors=600)
    wanted, reference = trained("reference", optimizer_class, dtype=dtype, num_tensors=600)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for name, figures in reference.layer_stats().items():
        assert optimizer.layer_stats()[name] == pytest.approx(figures, rel=1e-4 if dtype != torch.float64 else 1e-9), (
            name
        )
    if optimizer_class is not largebatch.LARS:
        assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_the_number_of_threads_does_not_matter(num_threads):
    results = []
    with using("cpp-portable") as kernels:
        for n in (1, num_threads):
            with threads(n):
                results.append(trained(kernels, largebatch.LAMB)[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def take_a_gradient(parameters, optimizer):
    parameters[700].grad = None


def replace_data(parameters, optimizer):
    for p in parameters[::7]:
        p.data = p.data * 2


def replace_state(parameters, optimizer):
    optimizer.state[parameters[1100]]["momentum_buffer"] = torch.full_like(parameters[1100], 0.3)


def replace_data_of_state(parameters, optimizer):
    state = optimizer.state[parameters[11]]["momentum_buffer"]
    state.data = torch.full_like(state, -0.2)


def transpose_a_gradient(parameters, optimizer):
    grad = parameters[1004].grad
    parameters[1004].grad = grad.t().contiguous().t()
    assert not parameters[1004].grad.is_contiguous()


def reorder(parameters, optimizer):
    params = optimizer.param_groups[0]["params"]
    params[0], params[2] = params[2], params[0]


@pytest.mark.parametrize(
    "change",
    [take_a_gradient, replace_data, replace_state, replace_data_of_state, transpose_a_gradient, reorder],
    ids=lambda change: change.__name__,
)
def test_what_is_exchanged_between_two_steps(change, three_threads):
    with using("cpp-portable") as kernels:
        found, _ = trained(kernels, largebatch.LARS, change=change)
    wanted, _ = trained("reference", largebatch.LARS, change=change)
    unchanged, _ = trained("reference", largebatch.LARS)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if change not in (transpose_a_gradient, reorder):
        assert any(not torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(wanted, unchanged, strict=True))


@pytest.mark.parametrize("position", [0, 600, NUM_TENSORS - 2])
def test_a_wrong_tensor_is_an_error_in_whichever_thread(position, three_threads):
    """And not the end of the process, as an exception that leaves a thread would be."""
    with using("cpp-portable") as kernels:
        parameters, optimizer = trained(kernels, largebatch.LAMB)
        optimizer.state[parameters[position]]["exp_avg"].data = torch.zeros(
            parameters[position].shape, dtype=torch.float64
        )
        before = [p.detach().clone() for p in parameters]
        with pytest.raises(RuntimeError, match="fp64 weights go with fp64 gradients and state"):
            optimizer.step()
        optimizer.state[parameters[position]]["exp_avg"].data = torch.zeros(parameters[position].shape).bfloat16()
        with pytest.raises(RuntimeError, match="state of BFloat16 and of Float for the same weight"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


# --- the objects of two steps -----------------------------------------------------------------------------------------

pools = st.lists(st.integers(0, 3), max_size=40)


@settings(max_examples=60, deadline=None)
@given(first=pools, second=pools)
def test_same_items(first, second):
    pool = [object() for _ in range(4)]
    assert same_items([pool[i] for i in first], [pool[i] for i in second]) == (first == second)


def test_equal_is_not_same():
    one, other = [1.5], [1.5]
    assert one == other and not same_items([one], [other])


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(pools, max_size=30))
def test_values_of_all(parts):
    mappings = [{str(n): i for n, i in enumerate(part)} for part in parts]
    assert values_of_all(mappings) == [i for part in parts for i in part]


# --- gradients ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_of(three_threads):
    """(parameters, optimizer) -> its compiled plan, and what it has planned in Python, after a first step."""
    with using("cpp-portable"):

        def plan_of(optimizer):
            (plan,) = optimizer._plans.values()
            (call,) = plan.calls
            return plan, call

        yield plan_of


def test_they_are_those_of_the_weights(plan_of):
    parameters, optimizer = trained("cpp", largebatch.LAMB)
    plan, call = plan_of(optimizer)
    give_gradients(parameters, seed=7)
    assert call.segments.grads == []
    assert plan.renew(optimizer.state)
    grads = call.segments.grads
    assert len(grads) == NUM_TENSORS and all(g is p.grad for g, p in zip(grads, parameters, strict=True))


@pytest.mark.parametrize("position", [0, 401, 402, NUM_TENSORS - 2])
def test_one_that_lacks_is_noticed(plan_of, position):
    parameters, optimizer = trained("cpp", largebatch.LARS)
    plan, call = plan_of(optimizer)
    parameters[position].grad = None
    assert not plan.renew(optimizer.state)
    before = parameters[position].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[position], before)
    plan = optimizer._plans[next(iter(optimizer._plans))]
    assert plan.without_grad[0] is parameters[position] and plan.renew(optimizer.state)
    give_gradients(parameters, seed=8)
    assert not plan.renew(optimizer.state)
    optimizer.step()
    assert not torch.equal(parameters[position], before)


def test_they_are_not_kept_alive(plan_of):
    """A reference too few or too many shows in the count, or in what is gone when its owner lets it go."""
    parameters, optimizer = trained("cpp", largebatch.LAMB)
    plan, call = plan_of(optimizer)
    before = sys.getrefcount(parameters[7]), sys.getrefcount(parameters[7].grad)
    assert plan.renew(optimizer.state)
    values, gone = parameters[5].grad.clone(), weakref.ref(parameters[5].grad)
    parameters[5].grad = None
    assert torch.equal(call.segments.grads[5], values)
    plan.let_gradients_go()
    assert gone() is None
    assert (sys.getrefcount(parameters[7]), sys.getrefcount(parameters[7].grad)) == before


class WithAGradOfItsOwn(torch.nn.Parameter):
    """A subclass may answer otherwise than torch's tensor does."""

    own = None

    @property
    def grad(self):
        return self.own


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
def test_a_tensor_with_a_grad_of_its_own(plan_of, kernels):
    parameter = WithAGradOfItsOwn(torch.ones(3))
    optimizer = largebatch.LARS([parameter, torch.nn.Parameter(torch.ones(2))], lr=0.1, kernels=kernels)
    for value in (1.0, 2.0):
        parameter.own = torch.full((3,), value)
        optimizer.step()
    first, *others = parameter.tolist()
    assert first < 1 and set(others) == {first}


def test_a_call_for_each_dtype(plan_of):
    """Each finds those of its own weights."""

    def stepped(kernels):
        parameters = [torch.nn.Parameter(p.to(torch.float64)) if i % 3 else p for i, p in enumerate(many())]
        optimizer = largebatch.LAMB(parameters, lr=0.05, kernels=kernels)
        for step in range(3):
            give_gradients(parameters, seed=step)
            parameters[10].grad = None
            optimizer.step()
        return parameters, next(iter(optimizer._plans.values()))

    (found, plan), (wanted, _) = stepped("cpp"), stepped("reference")
    assert len(plan.calls) == 2 and plan.without_grad[0] is found[10]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [None, 3.0, "x"])
def test_a_gradient_that_is_no_tensor(value, three_threads):
    with using("cpp-portable") as kernels:
        _, optimizer = trained(kernels, largebatch.LAMB)
        (call,) = next(iter(optimizer._plans.values())).calls
        call.segments.grads = [*itertools.repeat(torch.zeros(1), NUM_TENSORS - 1), value]
        with pytest.raises(TypeError, match="expected a list of tensors"):
            call.step_(None)


def test_gradients_of_a_subclass(three_threads):
    class Gradient(torch.Tensor):
        pass

    def as_subclass(parameters, optimizer):
        for p in parameters[::3]:
            p.grad = p.grad.as_subclass(Gradient)

    with using("cpp-portable") as kernels:
        found, _ = trained(kernels, largebatch.LARS, change=as_subclass)
        wanted, _ = trained(kernels, largebatch.LARS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB, largebatch.LANS])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_state_made_for_many_is_that_made_for_each(optimizer_class, state_dtype):
    class Own(torch.nn.Parameter):
        pass

    image = torch.randn(4, 3, 5, 5)
    tensors = [
        torch.nn.Parameter(torch.ones(())),
        torch.nn.Parameter(torch.ones(0)),
        torch.nn.Parameter(torch.ones(3, 0, 2)),
        torch.nn.Parameter(image.clone()),
        torch.nn.Parameter(image.contiguous(memory_format=torch.channels_last)),
        torch.nn.Parameter(image.permute(3, 0, 2, 1)),
        torch.nn.Parameter(image[:, 1, ::2]),
        torch.nn.Parameter(torch.ones(7, dtype=torch.float16)),
        torch.nn.Parameter(torch.ones(7, dtype=torch.float64)),
        torch.ones(5, device="meta"),
        Own(torch.ones(2, 2)),
    ]
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    rule = optimizer.make_rule(optimizer._group_options(optimizer.param_groups[0]))
    found = new_states(tensors, rule, state_dtype)
    assert len(found) == len(tensors)
    for tensor, state in zip(tensors, found, strict=True):
        wanted: dict[str, torch.Tensor] = {}
        fill_state(wanted, tensor, rule, state_dtype)
        assert list(state) == list(wanted)
        for name, value in wanted.items():
            mine = state[name]
            assert type(mine) is type(value)
            assert (mine.dtype, mine.device, mine.shape, mine.stride()) == (
                value.dtype,
                value.device,
                value.shape,
                value.stride(),
            )
            assert mine.is_meta or torch.equal(mine, value)
            # one of its own: who saves one tensor does not save the others with it
            assert mine.untyped_storage().nbytes() == value.untyped_storage().nbytes()
    addresses = [s.data_ptr() for state in found for s in state.values() if s.numel() and not s.is_meta]
    assert len(set(addresses)) == len(addresses)


def test_only_tensors_without_state_are_given_one():
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = largebatch.LAMB(parameters, lr=0.1)
    for p in parameters[:2]:
        p.grad = torch.ones(3)
    optimizer.step()
    kept = {i: dict(optimizer.state[parameters[i]]) for i in range(2)}
    assert parameters[2] not in optimizer.state
    for p in parameters:
        p.grad = torch.ones(3)
    optimizer.step()
    for i, state in kept.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[parameters[i]][name] is state[name]
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [2.0, 2.0, 1.0]
