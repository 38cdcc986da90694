"""Steps of several waves of chunks, with layers that all threads have a part of, and chunks that one takes from another."""

import pytest
import torch

import largebatch
from support.backends import threads, using

SHAPES = ((300, 1000), (7,), (4096,), (513, 517), (200_000,), (64, 3, 3, 3), (100, 100), (1,), (12_289,))
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


def trained(kernels, optimizer_class, *, num_steps=3, change=None, **options):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer_class(parameters, lr=0.05, weight_decay=0.01, kernels=kernels, **options)
    for step in range(num_steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        if change is not None and step == num_steps - 1:
            change(parameters, optimizer)
        optimizer.step()
    values = [p.detach() for p in parameters]
    values += [state[name] for state in optimizer.state.values() for name in state if torch.is_tensor(state[name])]
    return values, optimizer.layer_stats()


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1] == other[1]


@pytest.mark.parametrize(
    "optimizer_class, options",
    [
        (largebatch.LARS, {}),
        (largebatch.LARS, {"nesterov": True}),
        (largebatch.LAMB, {}),
        (largebatch.LAMB, {"overwrite_grads": True}),
        (largebatch.NNLAMB, {}),
        (largebatch.LANS, {}),
        (largebatch.LANS, {"overwrite_grads": True}),
    ],
    ids=["LARS", "LARS-nesterov", "LAMB", "LAMB-overwrite_grads", "NNLAMB", "LANS", "LANS-overwrite_grads"],
)
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_who_does_what_does_not_matter(optimizer_class, options, num_threads):
    """More threads than cores: they are held up at any place, and others take over their chunks."""
    with using("cpp-portable") as kernels:
        with threads(1):
            alone = trained(kernels, optimizer_class, **options)
        for _ in range(3):
            with threads(num_threads):
                assert_same(trained(kernels, optimizer_class, **options), alone)


def scale(parameters, optimizer):
    """As a loss scaler does; not a power of two."""
    optimizer.grad_scale = torch.tensor(3.0)
    for p in parameters:
        p.grad *= 3.0


def overflow(parameters, optimizer):
    """Momentum and gradient of the first element leave the range of fp32 together, in the larger layers."""
    optimizer.param_groups[0]["lr"] = 3e38
    for p in parameters:
        optimizer.state[p]["momentum_buffer"].view(-1)[0] = 3.4e38
        p.grad.view(-1)[0] = 1e20


@pytest.mark.parametrize("change", [None, scale, overflow])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"lr_in_momentum": False},
        {"decoupled_weight_decay": True},
        {"nesterov": True, "lr_in_momentum": False},
    ],
    ids=str,
)
def test_lars_has_the_same_bits_with_every_instruction_set(options, change):
    results = {}
    for name in INSTRUCTION_SETS:
        with using(f"cpp-{name}") as kernels:
            results[name] = trained(kernels, largebatch.LARS, change=change, momentum=0.9, **options)
    for name in INSTRUCTION_SETS[1:]:
        assert_same(results[name], results["portable"])
    if change is overflow and not options:
        values = results["portable"][0]
        assert all(torch.isfinite(value).all() for value in values)
        buffers = values[len(SHAPES) :]
        assert buffers[0].view(-1)[0] == 3.4e38 and buffers[1].view(-1)[0] < 3.2e38, "what overflows stays"


@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB, largebatch.NNLAMB, largebatch.LANS])
def test_triton_moves_aligned_and_other_chunks_alike(optimizer_class):
    """Two whole chunks and a part of one, where 16 bytes can be moved at a time and where they cannot."""
    numel = 2 * 8192 + 100
    results = []
    with using("triton") as kernels:
        for offset in (0, 1):
            generator = torch.Generator().manual_seed(0)
            values = [torch.randn(numel, generator=generator) for _ in range(3)]
            there = [torch.empty(numel + 4)[offset : offset + numel].copy_(value).view(4, -1) for value in values]
            assert all((value.data_ptr() % 16 == 0) == (offset == 0) for value in there)
            weight = torch.nn.Parameter(there[0])
            optimizer = optimizer_class([weight], lr=0.05, weight_decay=0.01, kernels=kernels)
            for grad in there[1:]:
                weight.grad = grad
                optimizer.step()
            results.append((weight.detach().clone(), optimizer.layer_stats()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    plain = torch.nn.Parameter(values[0].view(4, -1).clone())
    optimizer = optimizer_class([plain], lr=0.05, weight_decay=0.01, kernels="reference")
    for grad in values[1:]:
        plain.grad = grad.view(4, -1)
        optimizer.step()
    assert torch.linalg.vector_norm(plain - results[0][0]) < 1e-6 * torch.linalg.vector_norm(plain)
