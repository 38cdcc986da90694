"""What only a GPU can show: no wait for the device, a captured step, tensors beyond 2**31 elements, the real apex."""

import pytest
import torch

import largebatch
from largebatch.kernels import dispatch
from support.problems import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

each_class = pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB, largebatch.NNLAMB])


def made(optimizer_class, **options):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((300, 70), (70,), (64, 3, 7, 7), (1,))
    weights = [torch.nn.Parameter(torch.randn(s, device="cuda", generator=generator)) for s in shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, device="cuda", generator=generator) * 0.1
    return weights, optimizer_class(weights, lr=0.02, weight_decay=0.01, kernels="triton", **options)


@each_class
def test_a_step_does_not_wait_for_the_device(optimizer_class):
    weights, optimizer = made(optimizer_class)
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for weight in weights:
                weight.grad = weight.grad.clone()  # new addresses
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_class
def test_a_captured_step_replays_as_an_ordinary_one(optimizer_class):
    """Capture after three steps, replay five times under a changing learning rate and gradient."""
    lr = torch.tensor(0.02, device="cuda")
    (captured, graphed), (plain, ordinary) = made(optimizer_class), made(optimizer_class)
    for optimizer in (graphed, ordinary):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(3):
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    before = [w.detach().clone() for w in captured]
    with torch.cuda.graph(graph):
        graphed.step()
    assert all(torch.equal(a, b) for a, b in zip(before, captured, strict=True))  # capturing runs nothing
    for step in range(5):
        lr.fill_(0.01 * (step + 1))
        for a, b in zip(captured, plain, strict=True):
            gradient = torch.randn_like(a)
            a.grad.copy_(gradient)
            b.grad.copy_(gradient)
        graph.replay()
        ordinary.step()
    for a, b in zip(captured, plain, strict=True):
        assert torch.equal(a, b)
        for name, state in ordinary.state[b].items():
            assert torch.equal(graphed.state[a][name], state), name


@each_class
def test_the_number_of_launches_does_not_grow_with_the_layers(optimizer_class):
    counts = []
    for num_layers in (5, 200):
        weights = [torch.nn.Parameter(torch.randn(100, device="cuda")) for _ in range(num_layers)]
        optimizer = optimizer_class(weights, lr=0.01, kernels="triton")
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        counts.append(sum(event.count for event in profile.key_averages()))
    assert counts[1] <= counts[0] + 8  # torch adds to the step counters in lists of a hundred


@pytest.mark.parametrize("num_elements", [2**31 + 1000])
def test_offsets_beyond_32_bits(num_elements):
    if torch.cuda.mem_get_info()[0] < 20 * num_elements:
        pytest.skip(f"needs {20 * num_elements / 2**30:.0f} GiB of free GPU memory")
    weight = torch.nn.Parameter(torch.ones(num_elements, device="cuda"))
    weight.grad = torch.full_like(weight, 0.5)
    largebatch.LARS([weight], lr=1.0, momentum=0.0, trust_coefficient=0.25, kernels="triton").step()
    # ratio = 0.25 * ||w|| / ||g|| = 0.5: every element becomes 1 - 0.5 * 0.5
    assert weight[-1].item() == pytest.approx(0.75) and weight[0].item() == pytest.approx(0.75)


def test_the_real_apex():
    try:
        dispatch.choose("cuda", "apex")
    except dispatch.UnavailableKernelsError as error:
        pytest.skip(str(error))
    results = []
    for kernels in ("apex", "triton"):
        weights, _ = made(largebatch.LAMB)
        optimizer = largebatch.LAMB(weights, lr=0.02, weight_decay=0.01, kernels=kernels)
        gradients = [w.grad.clone() for w in weights]
        for _ in range(5):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        results.append(weights)
    assert relative_error(*results) < 1e-5
