"""Every backend, option and dtype against the rules in fp64; and what a backend may not depend on."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import largebatch
from largebatch.kernels import dispatch
from largebatch.kernels.interface import Before, Decisions, Segments, Span
from largebatch.rules.rule import Layers
from support.backends import BACKENDS, OPTION_SETS, device_of, name_of, threads, using
from support.problems import relative_error

NUM_STEPS = 6
SHAPES = ((37, 13), (1,), (0, 3), (203, 3), (4, 3, 5, 5), (8193,), (64,))
SMALL_SHAPES = ((5, 3), (1,), (40,))

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fast_backend = pytest.mark.parametrize("backend", BACKENDS[1:])
each_algorithm = pytest.mark.parametrize(
    "optimizer_class, options",
    [(largebatch.LARS, {}), (largebatch.LARS, {"formulation": "2019"})]
    + [(cls, {}) for cls in (largebatch.LAMB, largebatch.NLAMB, largebatch.NNLAMB, largebatch.LANS)],
    ids=["lars", "lars2019", "lamb", "nlamb", "nnlamb", "lans"],
)


def tensors(seed, shapes, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale * (0.1 + i)
        for i, shape in enumerate(shapes)
    ]


def trained(
    kernels, optimizer_class, options, *, dtype, device="cpu", shapes=SHAPES, num_steps=NUM_STEPS, seed=0, **more
):
    """Parameters and optimizer after some steps from fp32-exact (or ``dtype``-exact) values."""
    exact = dtype if dtype != torch.float64 else torch.float32
    exact = more.pop("exact", exact)
    weights = [w.to(exact).to(device, dtype) for w in tensors(seed, shapes, 0.3)]
    parameters = [(f"w{i}", torch.nn.Parameter(w)) for i, w in enumerate(weights)]
    optimizer = optimizer_class(parameters, lr=0.5, kernels=kernels, **options, **more)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (step + 1)
        for (_, parameter), grad in zip(parameters, tensors(seed + 100 + step, shapes, 0.05), strict=True):
            parameter.grad = grad.to(exact).to(device, dtype)
        optimizer.step()
    return [p for _, p in parameters], optimizer


def states_of(optimizer, parameters):
    return [v for p in parameters for name, v in optimizer.state[p].items() if name != "step"]


@each_fast_backend
@pytest.mark.parametrize("optimizer_class, options", OPTION_SETS, ids=name_of)
def test_error_budget_in_fp32(backend, optimizer_class, options):
    """Against fp64, a backend may be off by four times what plain torch in fp32 is off by.

    Four, because it may round each product where torch rounds it, divide by reciprocals, and add in another order;
    each of these is at most one more unit in the last place at a place where torch has one.
    """
    shapes = SMALL_SHAPES if backend == "triton" and device_of(backend) == "cpu" else SHAPES
    run = {"optimizer_class": optimizer_class, "options": options, "shapes": shapes}
    expected, oracle = trained("reference", dtype=torch.float64, **run)
    plain, plain_optimizer = trained("reference", dtype=torch.float32, **run)
    with using(backend) as kernels:
        found, optimizer = trained(kernels, dtype=torch.float32, device=device_of(backend), **run)
    unit = torch.finfo(torch.float32).eps / 2
    for pick in (lambda o, p: p, states_of):
        budget = 4 * max(relative_error(pick(plain_optimizer, plain), pick(oracle, expected)), unit)
        assert relative_error(pick(optimizer, found), pick(oracle, expected)) <= budget
    for name, figures in oracle.layer_stats().items():
        assert optimizer.layer_stats()[name] == pytest.approx(figures, rel=1e-5), name


@each_fast_backend
@pytest.mark.parametrize("optimizer_class, options", OPTION_SETS, ids=name_of)
def test_fp64_is_exact_to_its_rounding(backend, optimizer_class, options):
    run = {"optimizer_class": optimizer_class, "options": options, "shapes": SMALL_SHAPES, "dtype": torch.float64}
    expected, oracle = trained("reference", **run)
    with using(backend) as kernels:
        found, optimizer = trained(kernels, device=device_of(backend), **run)
    assert relative_error(found, expected) < 1e-13
    assert relative_error(states_of(optimizer, found), states_of(oracle, expected)) < 1e-13


@each_fast_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_algorithm
def test_half_precision_parameters(backend, optimizer_class, options, dtype):
    """State is as exact as with fp32 parameters; the parameter is off by one rounding of one step."""
    options = options | {"weight_decay": 0.01}
    run = {"optimizer_class": optimizer_class, "options": options, "num_steps": 1, "shapes": SMALL_SHAPES}
    expected, oracle = trained("reference", dtype=torch.float64, exact=dtype, **run)
    with using(backend) as kernels:
        found, optimizer = trained(kernels, dtype=dtype, device=device_of(backend), **run)
    assert relative_error(found, expected) < torch.finfo(dtype).eps
    assert relative_error(states_of(optimizer, found), states_of(oracle, expected)) < 1e-6
    assert all(state.dtype == torch.float32 for state in states_of(optimizer, found))


def test_every_half_precision_number_survives_the_compiled_conversions():
    """All 65,536 bf16 and fp16 numbers as weights, moved by nothing: the bits come back."""
    with using("cpp-portable") as kernels:
        for dtype in (torch.bfloat16, torch.float16):
            everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
            weight = torch.nn.Parameter(torch.where(torch.isfinite(everything), everything, 0.0))
            before = weight.detach().clone()
            weight.grad = torch.zeros_like(weight)
            largebatch.LARS([weight], lr=0.1, kernels=kernels).step()
            assert torch.equal(weight.view(torch.int16) & 0x7FFF, before.view(torch.int16) & 0x7FFF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_compiled_rounding_is_torchs(dtype):
    """w - lr g for values over the whole range, ties and subnormal results included, rounded as torch rounds."""
    with using("cpp-portable") as kernels:
        generator = torch.Generator().manual_seed(3)
        exponents = torch.randint(-26, 15, (40000,), generator=generator)
        grads = torch.ldexp(torch.randint(0, 2**12, (40000,), generator=generator).float() / 2**12, exponents).to(dtype)
        weight = torch.nn.Parameter(torch.zeros(40000, dtype=dtype))
        weight.grad = grads
        largebatch.LARS([weight], lr=0.8125, momentum=0.0, kernels=kernels).step()  # zero norm: ratio 1
        expected = (-(0.8125 * grads.float())).to(dtype)
        assert torch.equal(weight.detach(), expected)


@each_algorithm
def test_instruction_sets_give_the_same_bits(optimizer_class, options):
    results = []
    for backend in ("cpp-portable", "cpp-avx2", "cpp-avx512"):
        with using(backend) as kernels:
            parameters, optimizer = trained(
                kernels, optimizer_class, options | {"weight_decay": 0.01}, dtype=torch.float32
            )
        results.append([*parameters, *states_of(optimizer, parameters)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@each_backend
@each_algorithm
def test_same_input_same_bits(backend, optimizer_class, options):
    with using(backend) as kernels:
        run = {"options": options | {"weight_decay": 0.01}, "dtype": torch.float32, "device": device_of(backend)}
        shapes = SMALL_SHAPES if backend == "triton" else SHAPES
        first, again = (trained(kernels, optimizer_class, shapes=shapes, **run)[0] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_does_not_matter(num_threads):
    shapes = ((300, 301), (7,), (120000,), (64, 3, 3, 3), (33000,))
    run = {"options": {"weight_decay": 0.01}, "dtype": torch.float32, "shapes": shapes, "num_steps": 2}
    results = []
    with using("cpp-portable") as kernels:
        for n in (1, num_threads):
            with threads(n):
                results.append(trained(kernels, largebatch.LAMB, **run)[0])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB, largebatch.NNLAMB, largebatch.LANS])
def test_strides_do_not_matter(backend, optimizer_class):
    """Weight and gradient in every combination of memory formats, and weights with gaps, against contiguous ones."""
    values, grads = tensors(1, [(4, 3, 5, 2)]), tensors(2, [(4, 3, 5, 2)])

    def contiguous(x):
        return x.contiguous()

    def channels_last(x):
        return x.to(memory_format=torch.channels_last)

    def with_gaps(x):
        return torch.empty(*x.shape, 3, dtype=x.dtype, device=x.device)[..., 1].copy_(x)

    def transposed(x):
        return x.transpose(0, 2).contiguous().transpose(0, 2)

    results = []
    with using(backend) as kernels:
        for lay_out, lay_out_grad in itertools.product((contiguous, channels_last, with_gaps, transposed), repeat=2):
            weight = torch.nn.Parameter(lay_out(values[0].float().to(device_of(backend))))
            optimizer = optimizer_class([weight], lr=0.1, weight_decay=0.01, kernels=kernels)
            for _ in range(2):
                weight.grad = lay_out_grad(grads[0].float().to(device_of(backend)))
                optimizer.step()
            results.append(weight.detach().clone().contiguous())
    for result in results[1:]:
        assert relative_error([result], [results[0]]) < 1e-6


@each_fast_backend
@pytest.mark.parametrize("shape, strides", [((6, 5, 1, 1), (5, 1, 5, 5)), ((1, 7, 3), (1, 3, 1)), ((4, 1), (1, 9))])
def test_the_stride_of_a_dimension_of_size_1_does_not_matter(backend, shape, strides):
    """cuDNN's gradients of 1x1 convolutions: other strides, same places. They are taken as they are, not copied."""
    values, grads = tensors(1, [shape]), tensors(2, [shape])
    results = []
    with using(backend) as kernels:
        for lay_out in (torch.Tensor.contiguous, lambda x: torch.empty_strided(shape, strides).copy_(x)):
            weight = torch.nn.Parameter(values[0].float().to(device_of(backend)))
            optimizer = largebatch.LAMB([weight], lr=0.1, kernels=kernels, overwrite_grads=True)
            weight.grad = lay_out(grads[0].float()).to(device_of(backend))
            before = weight.grad.clone()
            optimizer.step()
            results.append(weight.detach().clone())
            if backend.startswith("cpp"):  # which leave the update in gradients that need no copy
                assert not torch.equal(weight.grad, before)
            else:
                (call,) = next(iter(optimizer._plans.values())).calls
                assert call.segments.prepared["triton"].copies == {}
    assert torch.equal(*results)


@each_fast_backend
def test_a_weight_that_changes_its_layout_between_steps(backend):
    """``model.to(memory_format=...)`` after the first step: the state still has the old strides."""
    grad = tensors(2, [(4, 3, 5, 2)])[0].float().to(device_of(backend))
    weights = [torch.nn.Parameter(tensors(1, [(4, 3, 5, 2)])[0].float().to(device_of(backend))) for _ in range(2)]
    with using(backend) as kernels:
        for i, weight in enumerate(weights):
            optimizer = largebatch.LAMB([weight], lr=0.1, kernels=kernels)
            for step in range(3):
                if i == 1 and step == 1:
                    weight.data = weight.data.to(memory_format=torch.channels_last)
                weight.grad = grad.clone()
                optimizer.step()
    assert relative_error([weights[1]], [weights[0]]) < 1e-6


@each_fast_backend
@each_algorithm
def test_a_flat_partition_is_the_same_as_whole_parameters(backend, optimizer_class, options):
    """One buffer cut in two between ranks, the sums added, against the layers as whole tensors: the same ratios."""
    layers = tensors(5, [(700,), (1,), (333,), (2000,)], 0.3)
    grads = tensors(6, [(700,), (1,), (333,), (2000,)], 0.05)
    device = device_of(backend)
    whole = [torch.nn.Parameter(w.float().to(device)) for w in layers]
    options = options | {"weight_decay": 0.01}
    with using(backend) as kernels_name:
        optimizer = optimizer_class(whole, lr=0.1, kernels=kernels_name, **options)
        for weight, grad in zip(whole, grads, strict=True):
            weight.grad = grad.float().to(device)
        optimizer.step()
        ratios = [figures["trust_ratio"] for figures in optimizer.layer_stats().values()]
        kernels = dispatch.choose(device, kernels_name)
        rule = optimizer.make_rule(optimizer._group_options(optimizer.param_groups[0]))
        flat, flat_grad = (torch.cat([x.float() for x in t]).to(device) for t in (layers, grads))
        cut = 901  # inside the third layer
        calls = []
        for begin, end in ((0, cut), (cut, len(flat))):
            call = Segments(rule, flat.device, torch.float32, lr=0.1)
            call.weights, call.grads = [flat[begin:end].clone()], [flat_grad[begin:end].clone()]
            call.states = [tuple(torch.zeros_like(call.weights[0]) for _ in rule.elementwise_state)]
            call.steps = [torch.zeros((), device=device)] if rule.counts_steps else []
            offset = 0
            for row, layer in enumerate(layers):
                first, last = max(offset, begin), min(offset + layer.numel(), end)
                if first < last:
                    call.spans.append(Span(0, first - begin, last - first, row, first - offset))
                offset += layer.numel()
            call.weight_decays, call.decoupled_weight_decays = [0.01] * 4, [0.0] * 4
            call.are_adapted, call.seeds = [True] * 4, [0] * 4
            calls.append(call)
            call.rows = [4]
        decay = torch.full((4,), 0.01, dtype=torch.float64, device=device)
        before, norms_before = None, ()
        if rule.norms_before:
            norms_before = tuple(sum(kernels.sums_before(call, grad_scale=None) for call in calls).sqrt().unbind(1))
            everywhere = torch.ones(4, dtype=torch.bool, device=device)
            before = Before(torch.stack(norms_before).float(), decay.new_zeros(0, 4), everywhere)
        sums = sum(kernels.accumulate_(call, grad_scale=None, before=before) for call in calls)
        weight_norm, *norms = sums.sqrt().unbind(1)
        layers = Layers(weight_norm, tuple(norms), norms_before, (), 0.1, decay, lambda: None)
        found = torch.stack(rule.trust_ratio(layers)).float()
        assert found[0].tolist() == ratios
        decisions = Decisions(found, decay, None, torch.ones(4, dtype=torch.bool, device=device), before)
        for call in calls:
            kernels.advance_(call, grad_scale=None, decisions=decisions)
    together = torch.cat([call.weights[0] for call in calls])
    assert torch.equal(together, torch.cat([w.detach() for w in whole]))


@each_backend
@each_algorithm
def test_scratch_memory_is_never_read(backend, optimizer_class, options, monkeypatch):
    """torch.empty hands out NaN inside the package."""
    real_empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = real_empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(77)

    with using(backend) as kernels:
        run = {"options": options | {"weight_decay": 0.01}, "dtype": torch.float32, "device": device_of(backend)}
        expected, _ = trained(kernels, optimizer_class, shapes=SMALL_SHAPES, **run)
        monkeypatch.setattr(torch, "empty", poisoned)
        found, _ = trained(kernels, optimizer_class, shapes=SMALL_SHAPES, **run)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.lists(st.integers(0, 70), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5))
@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB])
def test_random_shapes(optimizer_class, shapes):
    run = {"options": {"weight_decay": 0.01}, "shapes": tuple(shapes), "num_steps": 2}
    expected, _ = trained("reference", optimizer_class, dtype=torch.float64, **run)
    plain, _ = trained("reference", optimizer_class, dtype=torch.float32, **run)
    with using("cpp-portable") as kernels:
        found, _ = trained(kernels, optimizer_class, dtype=torch.float32, **run)
    unit = torch.finfo(torch.float32).eps / 2
    assert relative_error(found, expected) <= 4 * max(relative_error(plain, expected), unit)


@each_backend
@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB, largebatch.NLAMB])
def test_learning_rate_as_a_tensor(backend, optimizer_class):
    results = []
    with using(backend) as kernels:
        for lr in (0.125, torch.tensor(0.125)):
            weight = torch.nn.Parameter(tensors(1, [(50,)])[0].float().to(device_of(backend)))
            optimizer = optimizer_class([weight], lr=lr, weight_decay=0.01, kernels=kernels)
            for step in range(2):
                weight.grad = tensors(step, [(50,)])[0].float().to(device_of(backend))
                optimizer.step()
            results.append(weight.detach().clone())
    assert torch.equal(*results)


PLAIN_OPTIONS = ({}, {"weight_decay": 0.01}, {"weight_decay": 5e-4})
SCHEDULED = [
    pytest.param(backend, optimizer_class, options, id=f"{backend}-{name_of(optimizer_class)}-{name_of(options)}")
    for backend in BACKENDS
    for optimizer_class, options in OPTION_SETS
    if backend != "triton" or options in PLAIN_OPTIONS  # its interpreter is slow, and its tables are always the same
]


@pytest.mark.parametrize("backend, optimizer_class, options", SCHEDULED)
def test_options_that_a_schedule_changes(backend, optimizer_class, options):
    """Decay, betas, momentum and bounds that change from step to step: the same bits as planning each step anew."""
    results = []
    with using(backend) as kernels:
        for is_planned_anew in (False, True):
            named = [
                (f"w{i}", torch.nn.Parameter(w.float().to(device_of(backend))))
                for i, w in enumerate(tensors(1, SMALL_SHAPES))
            ]
            optimizer = optimizer_class(named, lr=0.1, kernels=kernels, **options)
            for step in range(4):
                for (_, parameter), grad in zip(named, tensors(step, SMALL_SHAPES), strict=True):
                    parameter.grad = grad.float().to(device_of(backend))
                group = optimizer.param_groups[0]
                for name in ("weight_decay", "eps", "momentum", "trust_coefficient"):
                    if group.get(name):
                        group[name] *= 0.5
                if "betas" in group:
                    group["betas"] = tuple(0.5 * beta for beta in group["betas"])
                if step == 2 and not group["nesterov" if "nesterov" in group else "trust_ratio_bounds"]:
                    group["trust_ratio_bounds"] = (0.01, 0.5)
                if is_planned_anew:
                    optimizer._plans.clear()
                optimizer.step()
            results.append([*(p for _, p in named), *states_of(optimizer, [p for _, p in named])])
            results[-1] += [torch.tensor(list(f.values())) for f in optimizer.layer_stats().values()]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_backend
def test_figures_of_a_layer_that_did_not_move_are_those_of_its_last_step(backend):
    """Also when the optimizer has planned anew since; and a layer that has never moved shows what was found."""
    with using(backend) as kernels:
        named = [(f"w{i}", torch.nn.Parameter(torch.full((4,), 2.0, device=device_of(backend)))) for i in range(3)]
        optimizer = largebatch.LARS(named, lr=0.1, kernels=kernels)

        def step(*gradients):
            for (_, parameter), gradient in zip(named, gradients, strict=True):
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
            return [figures["direction_norm"] for figures in optimizer.layer_stats().values()]

        nan = float("nan")
        assert step(1.0, 2.0, nan)[:2] == [2.0, 4.0]
        assert optimizer.layer_stats()["w2"]["weight_norm"] == 4.0
        assert step(nan, 3.0, 5.0) == [2.0, 6.0, 10.0]
        optimizer._plans.clear()
        assert step(1.0, nan, nan) == [2.0, 6.0, 10.0]
        assert step(4.0, 4.0, 4.0) == [8.0, 8.0, 8.0]


# --- bf16 state ---------------------------------------------------------------------------------------------------------


@each_fast_backend
@each_algorithm
def test_bf16_state_is_rounded_with_the_same_bits_by_all(backend, optimizer_class, options):
    """From equal values, every backend draws the same random bits; so at most one unit apart where fp32 values differ."""
    run = {"options": options | {"weight_decay": 0.01}, "dtype": torch.float32, "num_steps": 1, "state_dtype": "bf16"}
    expected, oracle = trained("reference", optimizer_class, **run)
    shapes_run = run | {"device": device_of(backend)}
    with using(backend) as kernels:
        found, optimizer = trained(kernels, optimizer_class, **shapes_run)
    num_different = num_elements = 0
    for a, b in zip(states_of(optimizer, found), states_of(oracle, expected), strict=True):
        assert a.dtype == torch.bfloat16
        a, b = a.cpu().view(torch.int16).int(), b.view(torch.int16).int()
        assert (a - b).abs().max() <= 1 if a.numel() else True
        num_different += (a != b).sum()
        num_elements += a.numel()
    assert num_different <= 0.001 * num_elements
    assert relative_error(found, expected) < 1e-2


def test_stochastic_rounding_is_right_on_average_and_plain_rounding_is_not():
    """A second moment that grows by a thousandth of itself a step: bf16 to nearest would stand still."""
    weight = torch.nn.Parameter(torch.ones(20000))
    optimizer = largebatch.LAMB([weight], lr=0.0, betas=(0.9, 0.999), state_dtype="bf16", kernels="reference")
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    expected = 1 - 0.999**200
    mean = optimizer.state[weight]["exp_avg_sq"].double().mean().item()
    assert mean == pytest.approx(expected, rel=2e-3)
    to_nearest = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(200):
        to_nearest = (0.999 * to_nearest.float() + 0.001).to(torch.bfloat16)
    assert abs(to_nearest.item() - expected) > 0.05 * expected


def test_bf16_state_survives_a_state_dict():
    weights = [torch.nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = largebatch.LARS([weights[0]], lr=0.1, state_dtype="bf16")
    weights[0].grad = torch.linspace(-1, 1, 300)
    optimizer.step()
    restored = largebatch.LARS([weights[1]], lr=0.1, state_dtype="bf16")
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights[1].data.copy_(weights[0])
    for weight, o in zip(weights, (optimizer, restored), strict=True):
        weight.grad = torch.linspace(1, -1, 300)
        o.step()
    assert torch.equal(*weights)
    assert torch.equal(optimizer.state[weights[0]]["momentum_buffer"], restored.state[weights[1]]["momentum_buffer"])


# --- memory and choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [largebatch.LARS, largebatch.LAMB])
def test_a_step_allocates_less_than_a_hundredth_of_the_parameters(optimizer_class):
    """Counted by torch's profiler and by the process's own high-water mark."""

    def high_water_mark():
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

    weights = [torch.nn.Parameter(torch.randn(1500, 2000)) for _ in range(4)]  # 48 MB
    with using("cpp-portable") as kernels:
        optimizer = optimizer_class(weights, lr=0.1, kernels=kernels)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # the mark goes down to what is held now: tests before this one may have held more
        before = high_water_mark()
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        after = high_water_mark()
    numel = sum(w.numel() for w in weights)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 0.01 * numel * 4
    assert after - before < 0.02 * numel * 4 + 2**22  # the profiler itself takes memory


def test_a_backend_that_does_not_fit_the_device_is_an_error():
    with pytest.raises(dispatch.UnavailableKernelsError, match="'cpp' work on cpu tensors, not on cuda ones"):
        dispatch.choose("cuda", "cpp")


def test_auto_says_once_what_it_took(caplog):
    import logging

    dispatch.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="largebatch"):
        for _ in range(2):
            weight = torch.nn.Parameter(torch.ones(3))
            weight.grad = torch.ones(3)
            largebatch.LAMB([weight], lr=0.1).step()
    assert [r.message for r in caplog.records if "kernels: auto took" in r.message] == [
        "kernels: auto took 'cpp' for cpu tensors"
    ]


def test_without_a_compiler_auto_takes_the_reference_and_says_why(monkeypatch, tmp_path, caplog):
    from largebatch.kernels import build

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches = (build.cpu_kernels, build.openmp_flags, dispatch.choose)
    for cache in caches:
        cache.cache_clear()
    try:
        assert dispatch.choose("cpu", "auto").name == "reference"
        assert "auto took 'reference' (slower)" in caplog.text and "there is no C++ compiler" in caplog.text
        with pytest.raises(dispatch.UnavailableKernelsError, match="cannot be built: there is no C.. compiler"):
            dispatch.choose("cpu", "cpp")
        assert not list(tmp_path.rglob("*.so"))
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.fixture
def nothing_chosen():
    """No backend chosen yet, during the test and after it."""
    from largebatch.kernels import build

    caches = (build.cpu_kernels, build.openmp_flags, dispatch.choose)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def in_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/x")


def in_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))


def with_a_damaged_library(monkeypatch, tmp_path):
    from largebatch.kernels import build

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.cache_folder().mkdir(parents=True)
    (build.cache_folder() / f"{build.NAME}.so").write_bytes(b"no library")


def with_a_compiler_that_is_no_program(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cxx").write_text("#!/no/such/interpreter\n")
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))


@pytest.mark.parametrize(
    "spoil",
    [in_a_folder_that_cannot_be_made, in_a_file, with_a_damaged_library, with_a_compiler_that_is_no_program],
    ids=lambda f: f.__name__,
)
def test_whatever_keeps_the_compiled_kernels_away_leaves_the_reference(
    nothing_chosen, monkeypatch, tmp_path, caplog, spoil
):
    """By "auto" with a word in the log, and a step is taken; an explicit request is one clear error in one line."""
    spoil(monkeypatch, tmp_path)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    largebatch.LAMB([weight], lr=0.1).step()
    assert not torch.equal(weight, torch.ones(3))
    assert "auto took 'reference' (slower) for cpu tensors, because kernels 'cpp' cannot be built" in caplog.text
    with pytest.raises(dispatch.UnavailableKernelsError, match="kernels 'cpp' cannot be built: ") as caught:
        largebatch.LAMB([weight], lr=0.1, kernels="cpp").step()
    assert "\n" not in str(caught.value)


def test_a_failed_build_leaves_nothing_half_done(monkeypatch, tmp_path):
    from largebatch.kernels import build

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-no-such-flag-at-all",))
    for cache in (build.cpu_kernels, build.openmp_flags):
        cache.cache_clear()
    try:
        with pytest.raises(build.CannotBuildError, match="failed"):
            build.cpu_kernels()
        assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.o"))
    finally:
        monkeypatch.undo()
        for cache in (build.cpu_kernels, build.openmp_flags):
            cache.cache_clear()


def test_the_oracle_of_this_file_can_fail():
    run = {"optimizer_class": largebatch.LAMB, "shapes": SMALL_SHAPES}
    expected, _ = trained("reference", dtype=torch.float64, options={"weight_decay": 0.01}, **run)
    wrong, _ = trained("reference", dtype=torch.float64, options={"weight_decay": 0.010001}, **run)
    assert relative_error(wrong, expected) > 1e-9
    assert np.isfinite(relative_error(wrong, expected))
