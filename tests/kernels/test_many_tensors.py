"""Optimizers of thousands of tensors: what is looked up for each of them is looked up by several threads, and compiled."""

import itertools
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import largebatch
from largebatch.optim.plan import PLAIN_OBJECTS
from support.backends import threads, using

NUM_TENSORS = 2500


@pytest.fixture(scope="module", params=["python", "compiled"])
def objects(request):
    if request.param == "python":
        yield PLAIN_OBJECTS
        return
    with using("cpp-portable"):
        from largebatch.kernels.build import cpu_kernels

        yield cpu_kernels()


@pytest.fixture
def three_threads():
    with threads(3):
        yield


def many(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = itertools.islice(itertools.cycle([(3,), (1,), (5, 4), (0,), (2, 3, 2, 2), (31,)]), NUM_TENSORS)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def trained(kernels, optimizer_class, *, dtype=torch.float32, num_steps=3, change=None):
    parameters = many(dtype)
    optimizer = optimizer_class(parameters, lr=0.05, weight_decay=0.01, kernels=kernels)
    for step in range(num_steps):
        give_gradients(parameters, seed=step + 1)
        if change is not None and step == num_steps - 1:
            change(parameters, optimizer)
        optimizer.step()
    return parameters, optimizer


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_as_the_reference(optimizer_class, dtype, three_threads):
    with using("cpp-portable") as kernels:
        found, optimizer = trained(kernels, optimizer_class, dtype=dtype)
    wanted, reference = trained("reference", optimizer_class, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for name, figures in reference.layer_stats().items():
        assert optimizer.layer_stats()[name] == pytest.approx(figures, rel=1e-4 if dtype != torch.float64 else 1e-9), (
            name
        )
    if optimizer_class is largebatch.LAMB:
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
    parameters[1700].grad = None


def replace_data(parameters, optimizer):
    for p in parameters[::7]:
        p.data = p.data * 2


def replace_state(parameters, optimizer):
    optimizer.state[parameters[2400]]["momentum_buffer"] = torch.full_like(parameters[2400], 0.3)


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


@pytest.mark.parametrize("position", [0, 1300, NUM_TENSORS - 2])
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
def test_same_items(objects, first, second):
    pool = [object() for _ in range(4)]
    assert objects.same_items([pool[i] for i in first], [pool[i] for i in second]) == (first == second)


def test_equal_is_not_same(objects):
    one, other = [1.5], [1.5]
    assert one == other and not objects.same_items([one], [other])
    assert not objects.same_values({"a": one}, [other]) and not objects.same_values_of_all([{"a": one}], [other])


@settings(max_examples=60, deadline=None)
@given(first=pools, second=pools)
def test_same_values(objects, first, second):
    pool = [object() for _ in range(4)]
    mapping = dict(enumerate(pool[i] for i in first))
    assert objects.same_values(mapping, [pool[i] for i in second]) == (first == second)


@settings(max_examples=60, deadline=None)
@given(first=st.lists(pools, max_size=30), second=pools, is_same=st.booleans())
def test_same_values_of_all(objects, first, second, is_same):
    pool = [object() for _ in range(4)]
    flat = [i for part in first for i in part]
    mappings = [{str(n): pool[i] for n, i in enumerate(part)} for part in first]
    wanted = flat if is_same else second
    assert objects.same_values_of_all(mappings, [pool[i] for i in wanted]) == (flat == wanted)


def test_a_removed_entry_is_seen(objects):
    values = [object() for _ in range(5)]
    mapping = dict(enumerate(values))
    del mapping[2]
    assert not objects.same_values(mapping, values) and not objects.same_values_of_all([mapping], values)
    assert objects.same_values(mapping, values[:2] + values[3:])


def test_gradients(objects):
    parameters = many()
    give_gradients(parameters, seed=1)
    nothing_lacks = [False] * NUM_TENSORS
    grads = objects.gradients(parameters, nothing_lacks)
    assert len(grads) == NUM_TENSORS and all(g is p.grad for g, p in zip(grads, parameters, strict=True))
    parameters[77].grad = None
    assert objects.gradients(parameters, nothing_lacks) is None
    lacks = [i == 77 for i in range(NUM_TENSORS)]
    grads = objects.gradients(parameters, lacks)
    assert grads[77] is None and grads[78] is parameters[78].grad
    give_gradients(parameters, seed=2)
    assert objects.gradients(parameters, lacks) is None


def test_a_tensor_with_a_grad_of_its_own(objects):
    """A subclass may answer otherwise than torch's tensor does."""

    class Kept(torch.Tensor):
        kept = None

        @property
        def grad(self):
            return self.kept

    tensor = torch.zeros(3).as_subclass(Kept)
    tensor.kept = torch.ones(3)
    (grad,) = objects.gradients([tensor], [False])
    assert grad is tensor.kept
    assert list(objects.gradients([torch.zeros(2)], [True])) == [None]


def test_nothing_is_kept_alive(objects):
    """A reference too few or too many shows in the count, or in what is gone when its owner lets it go."""
    parameters = many()
    give_gradients(parameters, seed=1)
    lacks = [False] * NUM_TENSORS
    grads = objects.gradients(parameters, lacks)
    assert len(grads) == NUM_TENSORS
    values, gone = parameters[5].grad.clone(), weakref.ref(parameters[5].grad)
    parameters[5].grad = None
    assert torch.equal(grads[5], values)
    assert objects.gradients(parameters, lacks) is None
    with pytest.raises(IndexError):
        grads[NUM_TENSORS]
    del grads
    assert gone() is None

    lacks[5], parameter = True, parameters[7]
    before, gone = sys.getrefcount(parameter), weakref.ref(parameters[7].grad)
    found = objects.gradients(parameters, lacks), objects.same_items(parameters, list(parameters))
    assert found[0] is not None and found[1]
    del found
    assert sys.getrefcount(parameter) == before
    parameter.grad = None
    assert gone() is None


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
