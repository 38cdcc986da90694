"""What only a GPU can show: values behind a busy stream, captured steps, waits, tensors beyond 2**31 elements, the real apex."""

import contextlib
import gc
import warnings

import pytest
import torch

import largebatch
from largebatch.kernels import dispatch
from support.problems import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ALGORITHMS = [
    pytest.param(largebatch.LARS, {}, id="lars"),
    pytest.param(largebatch.LARS, {"formulation": "2019"}, id="lars2019"),
    pytest.param(largebatch.LAMB, {}, id="lamb"),
    pytest.param(largebatch.NLAMB, {}, id="nlamb"),
    pytest.param(largebatch.NNLAMB, {}, id="nnlamb"),
    pytest.param(largebatch.LANS, {}, id="lans"),
]
each_algorithm = pytest.mark.parametrize("optimizer_class, options", ALGORITHMS)
SHAPES = ((300, 70), (70,), (64, 3, 7, 7), (1,), (8193,))
CYCLES_OF_A_TENTH_OF_A_SECOND = 200_000_000


def made(optimizer_class, kernels="triton", device="cuda", lr=0.02, **options):
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s, device=device, generator=generator)) for s in SHAPES]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, device=device, generator=generator) * 0.1
    named = [(f"w{i}", w) for i, w in enumerate(weights)]
    return weights, optimizer_class(named, lr=lr, weight_decay=0.01, kernels=kernels, **options)


def everything(optimizer, weights):
    """Weights, state and figures, for a comparison of bits."""
    states = [v for w in weights for v in optimizer.state[w].values()]
    return [*weights, *states, *(torch.tensor(list(f.values())) for f in optimizer.layer_stats().values())]


def assert_same_bits(first, second):
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), i


@contextlib.contextmanager
def waits_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- values -------------------------------------------------------------------------------------------------------------


@each_algorithm
@pytest.mark.parametrize("clip", [None, 0.5], ids=["no clip", "clip"])
def test_values_with_new_gradients_behind_a_busy_stream(optimizer_class, options, clip):
    """All steps are enqueued while the device sleeps, each with gradients elsewhere: none may see another's addresses."""
    results = []
    for kernels, sleeps in (("reference", False), ("triton", True)):
        weights, optimizer = made(optimizer_class, kernels, max_grad_norm=clip, **options)
        generator = torch.Generator("cuda").manual_seed(1)
        gradients = [[torch.randn(w.shape, device="cuda", generator=generator) for w in weights] for _ in range(8)]
        optimizer.step()
        torch.cuda.synchronize()
        if sleeps:
            torch.cuda._sleep(CYCLES_OF_A_TENTH_OF_A_SECOND)
        for step, each in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            for weight, gradient in zip(weights, each, strict=True):
                weight.grad = gradient
            optimizer.step()
        torch.cuda.synchronize()
        results.append((weights, optimizer.layer_stats()))
    assert relative_error(results[1][0], results[0][0]) < 2e-6
    for name, figures in results[0][1].items():
        assert results[1][1][name] == pytest.approx(figures, rel=1e-5), name


@each_algorithm
def test_the_same_bits_from_run_to_run(optimizer_class, options):
    runs = []
    for _ in range(3):
        weights, optimizer = made(optimizer_class, state_dtype="bf16", **options)
        for _ in range(4):
            optimizer.step()
        runs.append(everything(optimizer, weights))
    for other in runs[1:]:
        assert_same_bits(runs[0], other)


@each_algorithm
def test_a_step_on_a_second_stream(optimizer_class, options):
    (weights, optimizer), (others, other) = (made(optimizer_class, **options) for _ in range(2))
    stream = torch.cuda.Stream()
    for _ in range(4):
        other.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES_OF_A_TENTH_OF_A_SECOND // 20)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(everything(optimizer, weights), everything(other, others))


def test_channels_last_convolutions_need_no_copies():
    """Gradients as cuDNN makes them, 1x1 convolutions among them, against the reference kernels."""
    results = []
    for kernels in ("reference", "triton"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 1, bias=False), torch.nn.Conv2d(32, 4, 1)
        ).to("cuda", memory_format=torch.channels_last)
        optimizer = largebatch.LAMB(model.parameters(), lr=0.01, weight_decay=0.01, kernels=kernels)
        inputs = torch.randn(4, 8, 12, 12, device="cuda").to(memory_format=torch.channels_last)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
                model(inputs).square().mean().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    (call,) = next(iter(optimizer._plans.values())).calls
    assert call.segments.prepared["triton"].copies == {}
    assert relative_error(results[1], results[0]) < 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_algorithm
def test_tensors_on_another_device_than_the_current_one(optimizer_class, options):
    (weights, optimizer), (others, other) = (made(optimizer_class, device=d, **options) for d in ("cuda:1", "cuda:0"))
    with torch.no_grad():
        for weight, one in zip(weights, others, strict=True):
            weight.copy_(one)
            weight.grad.copy_(one.grad)
    assert torch.cuda.current_device() == 0
    for _ in range(3):
        optimizer.step(), other.step()
    assert_same_bits([x.cpu() for x in everything(optimizer, weights)], [x.cpu() for x in everything(other, others)])


@pytest.mark.parametrize("num_elements", [2**31 + 1000])
def test_offsets_beyond_32_bits(num_elements):
    if torch.cuda.mem_get_info()[0] < 20 * num_elements:
        pytest.skip(f"needs {20 * num_elements / 2**30:.0f} GiB of free GPU memory")
    weight = torch.nn.Parameter(torch.ones(num_elements, device="cuda"))
    weight.grad = torch.full_like(weight, 0.5)
    largebatch.LARS([weight], lr=1.0, momentum=0.0, trust_coefficient=0.25, kernels="triton").step()
    # ratio = 0.25 * ||w|| / ||g|| = 0.5: every element becomes 1 - 0.5 * 0.5
    assert weight[-1].item() == pytest.approx(0.75) and weight[0].item() == pytest.approx(0.75)


# --- waits --------------------------------------------------------------------------------------------------------------


@each_algorithm
@pytest.mark.parametrize("kind", ["plain", "clip", "scaler", "lr tensor"])
def test_a_step_does_not_wait_for_the_device(optimizer_class, options, kind):
    lr = torch.full((), 0.02, device="cuda") if kind == "lr tensor" else 0.02
    clip = 0.5 if kind in ("clip", "scaler") else None
    weights, optimizer = made(optimizer_class, lr=lr, max_grad_norm=clip, **options)
    if kind == "scaler":
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    optimizer.step()
    with waits_are_errors():
        for step in range(3):
            for weight in weights:
                weight.grad = weight.grad.clone()  # new addresses
            optimizer.param_groups[0]["weight_decay"] = 0.02 * (step + 1)
            optimizer.step()


@each_algorithm
def test_the_number_of_launches_does_not_grow_with_the_layers(optimizer_class, options):
    counts = []
    for num_layers in (5, 200):
        weights = [torch.nn.Parameter(torch.randn(100, device="cuda")) for _ in range(num_layers)]
        optimizer = optimizer_class(weights, lr=0.01, kernels="triton", **options)
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


# --- CUDA graphs --------------------------------------------------------------------------------------------------------


@each_algorithm
@pytest.mark.parametrize("kind", ["plain", "clip", "scaler", "bf16 state"])
def test_a_captured_step_replays_as_an_ordinary_one(optimizer_class, options, kind):
    """Six replays under a changing learning rate and decay; a layer of NaN in one, and everything of NaN in another; a scaler's
    overflow in a third. Memory that was freed since the capture is overwritten in between."""
    lr = torch.full((), 0.02, device="cuda")
    more = {"max_grad_norm": 0.5} if kind == "clip" else {"state_dtype": "bf16"} if kind == "bf16 state" else {}
    (captured, graphed), (plain, ordinary) = (made(optimizer_class, lr=lr, **options, **more) for _ in range(2))
    found_inf = torch.zeros((), device="cuda")
    for optimizer in (graphed, ordinary):
        if kind == "scaler":
            optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0, device="cuda"), found_inf
        for _ in range(3):
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    before = [w.detach().clone() for w in captured]
    with torch.cuda.graph(graph):
        graphed.step()
    assert_same_bits(before, captured)  # capturing runs nothing
    for replay in range(6):
        gc.collect()
        torch.cuda.empty_cache()
        poison = [torch.full((1 << n,), torch.nan, device="cuda") for n in range(4, 20)]
        torch.cuda.synchronize()
        del poison
        lr.fill_(0.01 * (replay + 1))
        found_inf.fill_(float(kind == "scaler" and replay == 4))
        for i, (a, b) in enumerate(zip(captured, plain, strict=True)):
            gradient = torch.randn_like(a)
            if replay == 3 or (replay == 1 and i == 2):
                gradient.view(-1)[0] = torch.nan
            a.grad.copy_(gradient)
            b.grad.copy_(gradient)
        graph.replay()
        ordinary.step()
        assert_same_bits(everything(graphed, captured), everything(ordinary, plain))
        assert graphed.num_skipped_steps == ordinary.num_skipped_steps
        assert graphed.num_skipped_layers == ordinary.num_skipped_layers


def test_a_replay_follows_options_that_an_ordinary_step_has_written():
    lr = torch.full((), 0.02, device="cuda")
    (captured, graphed), (plain, ordinary) = (made(largebatch.LAMB, lr=lr) for _ in range(2))
    for optimizer in (graphed, ordinary):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for optimizer in (graphed, ordinary):
        optimizer.param_groups[0]["weight_decay"] = 0.5
        optimizer.step()
    graph.replay()
    ordinary.step()
    assert_same_bits(everything(graphed, captured), everything(ordinary, plain))


def test_what_cannot_be_captured_is_an_error():
    weights, optimizer = made(largebatch.LAMB, lr=torch.full((), 0.02, device="cuda"))
    optimizer.step()
    weights[0].grad = weights[0].grad.clone()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()


# --- memory, and apex ---------------------------------------------------------------------------------------------------


def test_the_search_for_a_micro_batch_survives_a_real_lack_of_memory(monkeypatch):
    """Of a model that takes 32 MiB a sample, with a gigabyte to use: found, memory given back, and training goes on."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    import torch.distributed as dist

    from largebatch.launch.trainer import micro_batch

    device = torch.device("cuda", torch.cuda.current_device())
    share = 2**30 / torch.cuda.get_device_properties(device).total_memory
    monkeypatch.setattr(micro_batch, "SHARE_OF_MEMORY", share)

    class Engine(torch.nn.Linear):
        def __init__(self):
            super().__init__(1, 2**23, bias=False, device=device)
            self.optimizer = largebatch.LARS(self.parameters(), lr=0.1)

        def set_gradient_accumulation_boundary(self, is_last):
            self.is_last = is_last

        def backward(self, loss):
            loss.backward()

        def step(self):
            if self.is_last:
                self.optimizer.step()
                self.optimizer.zero_grad()

        def destroy(self):
            pass

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        trial = micro_batch.Trial(
            Engine,
            lambda n: torch.ones(n, 1, device=device),
            lambda engine, batch: engine(batch).square().mean(),
            lambda engine, n: None,
            device,
        )
        found = micro_batch.largest_that_fits([2**i for i in range(9)], trial.fits, world_size=1)
        trial.release()
    finally:
        dist.destroy_process_group()
    assert 2 <= found <= 16
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**26  # cuBLAS keeps a workspace
    assert torch.ones(2**28, device=device).sum().item() == 2**28  # as much as the limit, which is gone


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
