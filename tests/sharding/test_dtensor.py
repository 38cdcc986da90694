"""FSDP2, HSDP and tensor parallelism in plain PyTorch: DTensor parameters step as whole layers do."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import largebatch
from support.problems import changing_lrs, random_gradients, random_layers, relative_error, run_optimizer

NUM_STEPS = 12
BOUND = 3e-6
OPTIONS = {
    "LARS": dict(lr=1.0, weight_decay=5e-4),
    "LAMB": dict(lr=0.01, weight_decay=0.01, exclude_from_adaptation=["w1"]),
    "NNLAMB": dict(lr=0.01, weight_decay=0.01),
}
PEAK = {"LARS": 1.0, "LAMB": 0.02, "NNLAMB": 0.02}


def build(algorithm, parameters, **more):
    named = [(f"w{i}", p) for i, p in enumerate(parameters)]
    return getattr(largebatch, algorithm)(named, **OPTIONS[algorithm], **more)


def unsharded(algorithm, num_steps=NUM_STEPS, **more):
    parameters = [nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in random_layers()]
    optimizer = build(algorithm, parameters, **more)
    run_optimizer(optimizer, parameters, random_gradients(num_steps), changing_lrs(num_steps, PEAK[algorithm]))
    return parameters, optimizer


def mesh_and_placements(layout):
    world = dist.get_world_size()
    if layout == "hsdp":
        return init_device_mesh("cpu", (2, world // 2)), lambda shape: (Replicate(), Shard(0))
    if layout == "rows and columns":  # cut along both mesh dimensions
        return init_device_mesh("cpu", (2, world // 2)), lambda shape: (Shard(0), Shard(len(shape) - 1))
    dimension = {"rows": 0, "columns": -1}[layout]
    return init_device_mesh("cpu", (world,)), lambda shape: (Shard(dimension % len(shape)),)


def step_sharded(algorithm, layout, kernels, num_steps=NUM_STEPS):
    """(whole parameters, trust ratios, state types) after stepping DTensors of the given layout."""
    mesh, placements = mesh_and_placements(layout)
    parameters = [
        nn.Parameter(distribute_tensor(torch.tensor(w, dtype=torch.float32), mesh, placements(w.shape)))
        for w in random_layers()
    ]
    optimizer = build(algorithm, parameters, kernels=kernels)
    for lr, grads in zip(changing_lrs(num_steps, PEAK[algorithm]), random_gradients(num_steps), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for parameter, grad in zip(parameters, grads, strict=True):
            grad = torch.tensor(grad, dtype=torch.float32)
            parameter.grad = distribute_tensor(grad, mesh, placements(grad.shape))
        optimizer.step()
    assert all(isinstance(v, DTensor) for p in parameters for name, v in optimizer.state[p].items() if name != "step")
    ratios = {name: figures["trust_ratio"] for name, figures in optimizer.layer_stats().items()}
    return [p.full_tensor().detach() for p in parameters], ratios


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
@pytest.mark.parametrize("algorithm", OPTIONS)
@pytest.mark.parametrize(
    "layout, world_size",
    [("rows", 1), ("rows", 2), ("rows", 3), ("columns", 3), ("columns", 4), ("hsdp", 4), ("rows and columns", 4)],
)
def test_dtensors_step_as_whole_layers(rank_pool, layout, world_size, algorithm, kernels):
    expected, optimizer = unsharded(algorithm, kernels=kernels)
    ratios = {name: figures["trust_ratio"] for name, figures in optimizer.layer_stats().items()}
    for found, found_ratios in rank_pool.run(world_size, step_sharded, algorithm, layout, kernels):
        assert relative_error(found, expected) < BOUND
        assert found_ratios == ratios


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(13, 31)
        self.second = nn.Linear(31, 5, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def train_network(algorithm, is_sharded, continue_after=None):
    """Losses and whole parameters of a network on one batch that all ranks see."""
    model = Network()
    if is_sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = getattr(largebatch, algorithm)(model.parameters(), model=model, **OPTIONS_OF_NETWORK[algorithm])
    x, y = torch.randn(8, 13, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    losses = []
    for step in range(NUM_STEPS):
        if step == continue_after:
            state = get_optimizer_state_dict(model, optimizer)
            optimizer = getattr(largebatch, algorithm)(model.parameters(), model=model, **OPTIONS_OF_NETWORK[algorithm])
            set_optimizer_state_dict(model, optimizer, state)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert set(optimizer.layer_stats()) == {"first.weight", "first.bias", "second.weight"}
    return losses, [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


OPTIONS_OF_NETWORK = {
    "LARS": dict(lr=5.0, weight_decay=1e-4, trust_coefficient=0.01, exclude_from_adaptation=["bias"]),
    "LAMB": dict(lr=0.02, weight_decay=0.01, exclude_from_adaptation=["bias"]),
}


@pytest.mark.parametrize("continue_after", [None, 5], ids=["straight", "through a checkpoint"])
@pytest.mark.parametrize("algorithm", OPTIONS_OF_NETWORK)
@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp2_trains_as_one_process(rank_pool, world_size, algorithm, continue_after):
    losses, expected = train_network(algorithm, is_sharded=False)
    assert losses[-1] < losses[0] / 1.2
    for found_losses, found in rank_pool.run(world_size, train_network, algorithm, True, continue_after):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert relative_error(found, expected) < 1e-5


def train_with_exchanged_parameters(algorithm, has_placeholders):
    """As train_network, fully_shard only after the optimizer was built, whose tensors are then exchanged.

    Accelerate keeps tensors of one element in their place meanwhile, so that the whole layers can go.
    """
    model = Network()
    named = list(model.named_parameters())
    groups = [{"params": [p for n, p in named if (".bias" in n) == is_bias]} for is_bias in (False, True)]
    places = [[n for n, _ in named if (".bias" in n) == is_bias] for is_bias in (False, True)]
    optimizer = getattr(largebatch, algorithm)(groups, model=model, **OPTIONS_OF_NETWORK[algorithm])
    names_before = [layer.name for layer in optimizer.layers]
    wholes = [weakref.ref(p) for _, p in named]
    if has_placeholders:
        for group in optimizer.param_groups:
            group["params"] = [torch.empty(1) for _ in group["params"]]
    del named, groups
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cut = dict(model.named_parameters())
    for group, names in zip(optimizer.param_groups, places, strict=True):
        group["params"] = [cut[name] for name in names]
    gc.collect()
    assert not any(whole() is not None for whole in wholes), "the optimizer keeps what was exchanged"
    x, y = torch.randn(8, 13, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    losses = []
    for _ in range(NUM_STEPS):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [layer.name for layer in optimizer.layers] == names_before
    return losses, [p.full_tensor().detach() for p in model.parameters()], list(optimizer.layer_stats())


@pytest.mark.parametrize("has_placeholders", [True, False], ids=["placeholders", "at once"])
@pytest.mark.parametrize("algorithm", OPTIONS_OF_NETWORK)
def test_layers_exchanged_for_dtensors_after_the_optimizer_was_built(rank_pool, algorithm, has_placeholders):
    losses, expected = train_network(algorithm, is_sharded=False)
    for found_losses, found, names in rank_pool.run(2, train_with_exchanged_parameters, algorithm, has_placeholders):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert relative_error(found, expected) < 1e-5
        assert names == ["first.weight", "second.weight", "first.bias"]


def message_after_exchange(case):
    """What the step says where the exchanged tensors are not known to be the same layers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = nn.Parameter(torch.ones(4, 4))
    optimizer = largebatch.LAMB([("w", whole)], lr=0.1)
    shape = (2, 8) if case == "another shape" else (4, 4)
    cut = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, (Shard(0),)))
    cut.grad = distribute_tensor(torch.ones(shape), mesh, (Shard(0),))
    if case == "after a step":
        whole.grad = torch.ones(4, 4)
        optimizer.step()
    optimizer.param_groups[0]["params"] = [cut, cut] if case == "more of them" else [cut]
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize("case", ["another shape", "more of them", "after a step"])
def test_an_exchange_that_is_not_understood_is_refused(rank_pool, case):
    words = (
        "w was replaced by another tensor after it was stepped" if case == "after a step" else "none of the parameters"
    )
    assert all(words in message for message in rank_pool.run(2, message_after_exchange, case))


def step_with_inf_on_one_rank():
    """Whether anything moved where a GradScaler found an overflow on rank 1 alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, (Shard(0),)))
    optimizer = largebatch.LAMB([weight], lr=0.1)
    weight.grad = distribute_tensor(torch.ones(6, 2), mesh, (Shard(0),))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(dist.get_rank() == 1))
    optimizer.step()
    return weight.full_tensor().detach(), optimizer.num_skipped_steps, float(optimizer.state[weight]["step"])


def test_an_overflow_on_one_rank_stops_all(rank_pool):
    for weight, num_skipped, step in rank_pool.run(2, step_with_inf_on_one_rank):
        assert torch.equal(weight, torch.ones(6, 2))
        assert (num_skipped, step) == (1, 0.0)


def message_of(case):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.ones(4, 4)
    if case == "unreduced":
        weight = nn.Parameter(DTensor.from_local(whole, mesh, (Partial(),)))
        weight.grad = DTensor.from_local(whole, mesh, (Partial(),))
    else:
        weight = nn.Parameter(distribute_tensor(whole, mesh, (Shard(0),)))
        weight.grad = distribute_tensor(whole, mesh, (Shard(0),))
    options = {"clip": dict(max_grad_norm=1.0), "bf16 state": dict(state_dtype="bf16"), "unreduced": {}}[case]
    with pytest.raises(RuntimeError) as error:
        largebatch.LAMB([weight], lr=0.1, **options).step()
    return str(error.value)


@pytest.mark.parametrize(
    "case, words",
    [
        ("clip", "torch.nn.utils.clip_grad_norm_"),
        ("bf16 state", "Set state_dtype to 'fp32'"),
        ("unreduced", "expected Shard and Replicate only"),
    ],
)
def test_what_is_refused(rank_pool, case, words):
    assert all(words in message for message in rank_pool.run(2, message_of, case))


def step_with_replicated_gradient():
    """A gradient placed unlike its parameter is moved there."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.arange(1.0, 13.0).reshape(6, 2), mesh, (Shard(0),)))
    optimizer = largebatch.LAMB([weight], lr=0.1)
    weight.grad = distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh, (Replicate(),))
    optimizer.step()
    return weight.full_tensor().detach()


def test_a_replicated_gradient_of_a_cut_layer(rank_pool):
    whole = nn.Parameter(torch.arange(1.0, 13.0).reshape(6, 2))
    whole.grad = torch.arange(12.0).reshape(6, 2)
    largebatch.LAMB([whole], lr=0.1).step()
    for found in rank_pool.run(2, step_with_replicated_gradient):
        assert relative_error([found], [whole]) < BOUND


def train_over_tensor_parallelism(algorithm, shape):
    """As train_network: fully_shard over parallelize_module, which cuts the same dimension twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 32, bias=False), nn.Linear(32, 5, bias=False))
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
    optimizer = getattr(largebatch, algorithm)(model.parameters(), lr=0.02, weight_decay=0.01)
    x, y = torch.randn(8, 13, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    ratios = [figures["trust_ratio"] for figures in optimizer.layer_stats().values()]
    return (
        losses,
        ratios,
        [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()],
    )


@pytest.mark.parametrize("algorithm", ["LAMB", "LARS"])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)], ids=str)
def test_fsdp2_over_tensor_parallelism(rank_pool, shape, algorithm):
    losses, ratios, expected = train_over_tensor_parallelism(algorithm, None)
    for found_losses, found_ratios, found in rank_pool.run(
        shape[0] * shape[1], train_over_tensor_parallelism, algorithm, shape
    ):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found_ratios == pytest.approx(ratios, rel=1e-5)
        assert relative_error(found, expected) < 1e-5
