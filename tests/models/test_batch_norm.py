"""Batch normalisation over ghost batches, against torch's own layer on exactly the images that each should hold."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from largebatch.exclusion import identities, kinds_of
from largebatch.models.batch_norm import apply_ghost_batches, average_running_statistics
from largebatch.models.catalogue import build_model
from largebatch.models.ghost_batch_norm import GhostBatchNorm

CHANNELS = 5


def torch_layer(affine=True, cls=nn.BatchNorm2d, dtype=torch.float64):
    torch.manual_seed(3)
    layer = cls(CHANNELS, affine=affine, dtype=dtype)
    for tensor in (*layer.parameters(), layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return nn.Sequential(layer)


def with_ghosts(model, ghost_batch_size, micro_batch, world_size=1, accumulation_steps=1):
    model = copy.deepcopy(model)
    apply_ghost_batches(
        model,
        ghost_batch_size=ghost_batch_size,
        micro_batch=micro_batch,
        accumulation_steps=accumulation_steps,
        world_size=world_size,
    )
    return model


def images(num, shape=(4, 3)):
    torch.manual_seed(5)
    return 3 + 2 * torch.randn(num, CHANNELS, *shape, dtype=torch.float64)


def outcome(model, x, grad_y):
    """Everything that a layer makes: outputs, gradients, running statistics."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad_y)
    buffers = {n: b for n, b in model.named_buffers() if "running" in n}
    return {"y": y.detach(), "x.grad": x.grad} | {n: p.grad for n, p in model.named_parameters()} | buffers


def ghosts_one_by_one(model, x, grad_y, ghost_size):
    """torch's layer on each ghost by itself: outputs joined, gradients added, running statistics averaged."""
    outcomes = [
        outcome(copy.deepcopy(model), xs, gs)
        for xs, gs in zip(x.split(ghost_size), grad_y.split(ghost_size), strict=True)
    ]
    joined = {}
    for key in outcomes[0]:
        values = [o[key] for o in outcomes]
        is_mean = "running" in key
        joined[key] = torch.cat(values) if key in ("y", "x.grad") else sum(values) / (len(values) if is_mean else 1)
    return joined


def assert_equal(found, expected, rtol=1e-12):
    assert found.keys() == expected.keys()
    for key in expected:
        error = (found[key] - expected[key]).abs().max() / expected[key].abs().max()
        assert error <= rtol, (key, error)


@pytest.mark.parametrize("ghost_size", [1, 2, 4, 8])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("cls, shape", [(nn.BatchNorm2d, (4, 3)), (nn.BatchNorm1d, (6,)), (nn.BatchNorm3d, (2, 3, 2))])
def test_ghosts_are_torchs_layer_on_each_ghost(ghost_size, affine, cls, shape):
    model, x = torch_layer(affine, cls), images(8, shape)
    grad_y = torch.randn_like(x)
    found = outcome(with_ghosts(model, ghost_size, micro_batch=8), x, grad_y)
    assert_equal(found, ghosts_one_by_one(model, x, grad_y, ghost_size))


def test_ghosts_of_a_dense_layer():
    model, x = torch_layer(cls=nn.BatchNorm1d), images(8, ())
    grad_y = torch.randn_like(x)
    found = outcome(with_ghosts(model, 4, micro_batch=8), x, grad_y)
    assert_equal(found, ghosts_one_by_one(model, x, grad_y, 4))
    with pytest.raises(ValueError, match="over one value per channel"):
        with_ghosts(model, 1, micro_batch=8)(x)


def test_channels_last_is_kept():
    model, x = torch_layer(), images(8).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = with_ghosts(model, 2, micro_batch=8)(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_micro_batch_is_torchs_layer_bit_for_bit():
    model, x = torch_layer(dtype=torch.float32), images(8).float()
    grad_y = torch.randn_like(x)
    found, expected = outcome(with_ghosts(model, "micro_batch", 8), x, grad_y), outcome(model, x, grad_y)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def sync_outcome(ghost_batch_size, per_rank):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = images(per_rank * world_size)
    grad_y = torch.randn_like(x)
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    return outcome(with_ghosts(torch_layer(), ghost_batch_size, per_rank, world_size), x[mine], grad_y[mine])


def joined_over_ranks(outcomes):
    joined = {}
    for key in outcomes[0]:
        values = [o[key] for o in outcomes]
        joined[key] = torch.cat(values) if key in ("y", "x.grad") else values[0] if "running" in key else sum(values)
    return joined


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_global_ghost_batch_is_one_layer_on_all_images(rank_pool, world_size):
    outcomes = rank_pool.run(world_size, sync_outcome, "global", 2)
    x = images(2 * world_size)
    grad_y = torch.randn_like(x)
    assert_equal(joined_over_ranks(outcomes), outcome(torch_layer(), x, grad_y))
    for key in ("0.running_mean", "0.running_var"):
        assert all(torch.equal(o[key], outcomes[0][key]) for o in outcomes)


def test_a_ghost_batch_over_pairs_of_ranks(rank_pool):
    outcomes = rank_pool.run(4, sync_outcome, 6, 3)
    x = images(12)
    grad_y = torch.randn_like(x)
    expected = ghosts_one_by_one(torch_layer(), x, grad_y, 6)
    for key in ("0.running_mean", "0.running_var"):  # each pair keeps its own
        outcomes[0][key] = (outcomes[0][key] + outcomes[2][key]) / 2
        assert torch.equal(outcomes[2][key], outcomes[3][key])
    assert_equal(joined_over_ranks(outcomes), expected)


def davidnet_gradients(micro_batch, accumulation_steps, ghost_batch_size):
    """Gradient of the mean loss over 16 images in this layout, and running statistics averaged over the ranks."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    model = build_model("davidnet", image_shape=(3, 8, 8), num_classes=3, options={"width": 2}).double()
    arguments = dict(micro_batch=micro_batch, accumulation_steps=accumulation_steps, world_size=world_size)
    apply_ghost_batches(model, ghost_batch_size=ghost_batch_size, **arguments)
    pixels, labels = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 3
    for micro_step in range(accumulation_steps):
        start = (micro_step * world_size + rank) * micro_batch
        batch = slice(start, start + micro_batch)
        nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()]) / accumulation_steps
    dist.all_reduce(gradients)
    average_running_statistics(model)
    return gradients / world_size, torch.cat([b.flatten() for n, b in model.named_buffers() if "running" in n])


def test_the_gradient_of_a_global_batch_does_not_depend_on_the_layout(rank_pool):
    """Ghost batches of 4 images in every split of a global batch of 16; with the micro-batch in their place another gradient."""
    (expected, statistics), *_ = rank_pool.run(1, davidnet_gradients, 16, 1, 4)
    for world_size, micro_batch, accumulation_steps in (
        (1, 8, 2),
        (1, 4, 4),
        (2, 8, 1),
        (2, 4, 2),
        (2, 2, 4),
        (4, 2, 2),
    ):
        for gradient, found in rank_pool.run(world_size, davidnet_gradients, micro_batch, accumulation_steps, 4):
            assert (gradient - expected).norm() <= 1e-12 * expected.norm(), (world_size, micro_batch)
            # later micro-steps of a step weigh a little more in the running statistics
            tolerance = 1e-12 if accumulation_steps == 1 else 0.01
            assert (found - statistics).norm() <= tolerance * statistics.norm()
    (other, _), *_ = rank_pool.run(1, davidnet_gradients, 8, 2, "micro_batch")
    assert (other - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("ghost_batch_size", ["micro_batch", 2])
@pytest.mark.parametrize("accumulation_steps", [1, 3, 64])
def test_running_statistics_decay_once_a_step(ghost_batch_size, accumulation_steps):
    """With the same images in each micro-step, a step moves them as one update of torch's layer."""
    model, x = torch_layer(), images(2)
    expected = copy.deepcopy(model)
    found = with_ghosts(model, ghost_batch_size, 2, accumulation_steps=accumulation_steps)
    for _ in range(3):
        expected(x)
        for _ in range(accumulation_steps):
            found(x)
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(found[0], name), getattr(expected[0], name), rtol=1e-12)
    with_two_batches = with_ghosts(
        found, ghost_batch_size, 2, accumulation_steps=1
    )  # applied again: from the step's momentum
    assert with_two_batches[0].momentum == pytest.approx(0.1)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_running_statistics_move_by_the_momentum_asked_for(accumulation_steps):
    """Constant images: after each step the distance from their statistics is a quarter of what it was."""
    model, x = torch_layer(), images(8)
    arguments = {"micro_batch": 8, "accumulation_steps": accumulation_steps, "world_size": 1}
    line = apply_ghost_batches(model, ghost_batch_size="micro_batch", momentum=0.75, **arguments)
    assert "momentum 0.75 a step" in line
    target = x.mean((0, 2, 3))
    distance = (model[0].running_mean - target).abs()
    for _ in range(3):
        for _ in range(accumulation_steps):
            model(x)
        torch.testing.assert_close((model[0].running_mean - target).abs(), distance / 4)
        distance = (model[0].running_mean - target).abs()
    line = apply_ghost_batches(model, ghost_batch_size="micro_batch", **arguments)
    assert "momentum 0.75 a step" in line, "it stays when the micro-batch changes"


def test_a_cumulative_average_stays_one():
    model, x = torch_layer(), images(6)
    model[0].momentum = None
    model[0].reset_running_stats()
    found = with_ghosts(model, "micro_batch", 2, accumulation_steps=3)
    for part in x.split(2):
        found(part), model(part)
    assert torch.equal(found[0].running_mean, model[0].running_mean)


@pytest.mark.parametrize("ghost_batch_size", ["micro_batch", 4])
def test_running_statistics_keep_fp32_in_a_16_bit_model(ghost_batch_size):
    """In bf16 each of 256 updates by 0.0004 would be lost: half a unit in the last place is 0.002."""
    model, x = torch_layer(dtype=torch.float32), images(8).float()
    exact = with_ghosts(model, ghost_batch_size, 8, accumulation_steps=256)
    found = with_ghosts(model, ghost_batch_size, 8, accumulation_steps=256).bfloat16()
    assert found[0].weight.dtype == torch.bfloat16 and found[0].running_var.dtype == torch.float32
    for _ in range(256):
        y = found(x.bfloat16())
        exact(x)
    y.sum().backward()
    assert y.dtype == found[0].weight.grad.dtype == torch.bfloat16
    # the input's rounding is what is left: 8 bits, averaged over the images
    assert torch.allclose(found[0].running_mean, exact[0].running_mean, rtol=0, atol=2e-3)
    assert torch.allclose(found[0].running_var, exact[0].running_var, rtol=1e-2)
    found.eval()
    assert torch.allclose(found(x.bfloat16()).float(), exact.eval()(x), rtol=0, atol=0.05)


def test_the_layer_is_torchs_to_everything_else():
    model = build_model("resnet50", image_shape=(3, 32, 32), num_classes=3)
    original = copy.deepcopy(model)
    parameters = list(model.parameters())
    line = apply_ghost_batches(model, ghost_batch_size=4, micro_batch=8, accumulation_steps=2, world_size=2)
    assert line == (
        "batch normalisation (53 layers) over 4 consecutive images x 2 micro-steps; running statistics in fp32: momentum 0.1 a "
        "step, 0.0513 a micro-step"
    )
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(type(m) is nn.BatchNorm2d for m in model.modules())
    original.load_state_dict(model.state_dict())
    model.load_state_dict(original.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), original.eval()(x))
    kinds = {i.name: kinds_of(i) for i in identities(model).values()}
    assert kinds["bn1.weight"] == {"norm"} and kinds["layer4.2.bn3.bias"] == {"norm", "bias"}
    assert kinds == {i.name: kinds_of(i) for i in identities(original).values()}


def test_a_layer_used_twice_stays_one_layer():
    layer = nn.BatchNorm2d(CHANNELS)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    apply_ghost_batches(model, ghost_batch_size="micro_batch", micro_batch=2, accumulation_steps=1, world_size=1)
    assert model[0] is model[2] and isinstance(model[0], GhostBatchNorm)


def averaged_statistics():
    model = torch_layer()
    model[0].running_mean.add_(dist.get_rank())
    average_running_statistics(model)
    return model[0].running_mean


def test_running_statistics_are_averaged_over_the_ranks(rank_pool):
    expected = torch_layer()[0].running_mean + 1
    for found in rank_pool.run(3, averaged_statistics):
        assert torch.allclose(found, expected, rtol=1e-12)


def statistics_of_engine(ghost_batch_size):
    """What DeepSpeed's bf16 training leaves of the running statistics: (dtypes, before averaging, after)."""
    import deepspeed

    world_size = dist.get_world_size()
    torch.manual_seed(0)
    model = build_model("davidnet", image_shape=(3, 8, 8), num_classes=3, options={"width": 2})
    apply_ghost_batches(
        model, ghost_batch_size=ghost_batch_size, micro_batch=4, accumulation_steps=2, world_size=world_size
    )
    config = {
        "train_batch_size": 8 * world_size,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LARS", "params": {"lr": 0.1, "exclude_from_adaptation": ["norm"]}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    num_excluded = len(engine.basic_optimizer.excluded_layers)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        loss = engine(torch.randn(4, 3, 8, 8).bfloat16()).float().logsumexp(1).mean()
        engine.backward(loss)
        engine.step()
    buffers = {n: b for n, b in engine.module.named_buffers() if "running" in n}
    before = torch.cat([b.double().flatten() for b in buffers.values()])
    average_running_statistics(engine.module)
    after = torch.cat([b.double().flatten() for b in buffers.values()])
    engine.destroy()
    return {b.dtype for b in buffers.values()}, num_excluded, before, after


@pytest.mark.parametrize("ghost_batch_size", ["micro_batch", 2, "global"])
def test_running_statistics_of_a_bf16_engine(rank_pool, ghost_batch_size):
    (dtypes, num_excluded, first, mean), (_, _, second, same) = rank_pool.run(2, statistics_of_engine, ghost_batch_size)
    assert dtypes == {torch.float32} and num_excluded == 2 * 8
    assert torch.equal(mean, same) and torch.allclose(mean, (first + second) / 2, rtol=1e-6)
    assert torch.equal(first, second) == (ghost_batch_size == "global")
    untouched = torch.cat([torch.zeros(2), torch.ones(2)])
    assert not torch.equal(first[:4].float(), untouched)


@pytest.mark.parametrize(
    "ghost_batch_size, micro_batch, world_size, expected",
    [
        ("micro_batch", 32, 2, "over 32 images, the micro-batch;"),
        (32, 32, 2, "over 32 images, the micro-batch;"),
        ("global", 32, 1, "over 32 images, the micro-batch;"),
        ("global", 32, 4, "over 128 images, the micro-batches of 4 ranks;"),
        (64, 32, 4, "over 64 images, the micro-batches of 2 ranks;"),
        (8, 32, 4, "over 8 consecutive images;"),
    ],
)
def test_what_is_in_force_is_said(ghost_batch_size, micro_batch, world_size, expected):
    line = apply_ghost_batches(
        torch_layer(),
        ghost_batch_size=ghost_batch_size,
        micro_batch=micro_batch,
        accumulation_steps=1,
        world_size=world_size,
    )
    assert expected in line


@pytest.mark.parametrize(
    "ghost_batch_size, message",
    [
        (
            64,
            "ghost_batch_size is 64, the micro-batch 32 on 1 rank; expected one of 1, 2, 4, 8, 16, 32: .*train_micro_batch_size_per_gpu",
        ),
        (12, "ghost_batch_size is 12, the micro-batch 32"),
        (0, 'ghost_batch_size is 0; expected "micro_batch", "global", or a number of images >= 1'),
        ("globl", "ghost_batch_size is 'globl'; expected"),
        (2.0, "ghost_batch_size is 2.0; expected"),
        (True, "ghost_batch_size is True; expected"),
    ],
)
def test_sizes_that_cannot_be_had(ghost_batch_size, message):
    with pytest.raises((ValueError, TypeError), match=message):
        with_ghosts(torch_layer(), ghost_batch_size, 32)


def test_models_without_a_layer_to_set():
    assert with_ghosts(nn.Sequential(nn.Linear(2, 2)), "micro_batch", 4)
    line = apply_ghost_batches(
        nn.Linear(2, 2), ghost_batch_size="micro_batch", micro_batch=4, accumulation_steps=1, world_size=1
    )
    assert line == "no batch normalisation"
    with pytest.raises(ValueError, match="the model has no batch normalisation; leave it out"):
        with_ghosts(nn.Sequential(nn.Linear(2, 2)), 2, 4)
    with pytest.raises(ValueError, match="momentum is 0.5 and the model has no batch normalisation; leave it out"):
        apply_ghost_batches(
            nn.Linear(2, 2),
            ghost_batch_size="micro_batch",
            micro_batch=4,
            accumulation_steps=1,
            world_size=1,
            momentum=0.5,
        )
    with pytest.raises(ValueError, match="0 is a SyncBatchNorm; expected torch's BatchNorm1d, 2d or 3d"):
        with_ghosts(nn.Sequential(nn.SyncBatchNorm(2)), 2, 4)


def test_a_micro_batch_that_the_ghost_batch_does_not_divide():
    with pytest.raises(ValueError, match="ghost batch size is 4 images and a micro-batch has 6"):
        with_ghosts(torch_layer(), 4, 8)(images(6))
