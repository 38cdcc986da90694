"""Steps that the Triton kernels take by themselves: clipping, counts and statistics over several calls, against the reference."""

import pytest
import torch

import largebatch
from support.backends import device_of, using

pytest.importorskip("triton", reason="triton is not installed")

CLASSES = [largebatch.LARS, largebatch.LAMB, largebatch.LANS]
each_optimizer = pytest.mark.parametrize("optimizer_class", CLASSES)


def made(kernels, optimizer_class, **options):
    """Three calls, of two param groups and two dtypes; a layer of them has no elements, and one has more chunks than a block."""
    device, generator = device_of("triton"), torch.Generator().manual_seed(0)
    shapes = [((33, 7), torch.float32), ((0, 3), torch.float32), ((8193,), torch.float16), ((5,), torch.float32)]
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, d)) for s, d in shapes]
    groups = [{"params": weights[:3]}, {"params": weights[3:], "weight_decay": 0.0}]
    return weights, optimizer_class(groups, lr=0.1, weight_decay=0.01, kernels=kernels, **options)


def give_gradients(weights, step, bad=()):
    generator = torch.Generator().manual_seed(step)
    for i, weight in enumerate(weights):
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = torch.full_like(weight, torch.nan) if i in bad else gradient.to(weight.device, weight.dtype)


def counts(optimizer, weights):
    steps = [float(optimizer.state[w]["step"]) for w in weights if "step" in optimizer.state[w]]
    return steps, optimizer.num_skipped_steps, optimizer.num_skipped_layers


def assert_alike(weights, others):
    """Up to the rounding of fp32 sums, and of fp16 weights four units in the last place: one in each step."""
    for a, b in zip(weights, others, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=max(1e-5, eps / 8))


@each_optimizer
@pytest.mark.parametrize("bad", [(), (0,), (3,), (0, 2), (0, 1, 2, 3)], ids=str)
def test_a_step_is_counted_as_the_reference_counts_it(optimizer_class, bad):
    """Also where all layers of one call are left alone and those of another are not."""
    found = []
    for backend in ("reference", "triton"):
        with using(backend) as kernels:
            weights, optimizer = made(kernels, optimizer_class)
            for step in range(4):
                give_gradients(weights, step, bad if step % 2 else ())
                optimizer.step()
            found.append((counts(optimizer, weights), weights))
    (wanted, others), (is_counted, weights) = found
    assert is_counted == wanted
    assert_alike(weights, others)


@each_optimizer
@pytest.mark.parametrize("bound", [0.5, 1e6], ids=["clips", "clips nothing"])
@pytest.mark.parametrize("is_scaled", [False, True], ids=["", "scaler"])
def test_the_norm_of_all_calls_is_what_is_clipped(optimizer_class, bound, is_scaled):
    found = []
    for backend in ("reference", "triton"):
        with using(backend) as kernels:
            weights, optimizer = made(kernels, optimizer_class, max_grad_norm=bound)
            if is_scaled:
                optimizer.grad_scale = torch.full((), 4.0, device=weights[0].device)
                optimizer.found_inf = torch.zeros((), device=weights[0].device)
            for step in range(3):
                give_gradients(weights, step)
                optimizer.step()
            found.append((weights, optimizer.layer_stats()))
    (weights, stats), (others, other_stats) = found
    assert_alike(weights, others)
    for name, figures in stats.items():
        assert other_stats[name] == pytest.approx(figures, rel=1e-5), name


@each_optimizer
def test_more_chunks_and_layers_than_a_block_has(monkeypatch, optimizer_class):
    """The last program adds up more partial sums than it loads at once; after it, the counters are as before."""
    from largebatch.kernels import triton_gpu

    monkeypatch.setattr(triton_gpu, "ROW_BLOCK", 2)
    found = []
    for backend in ("reference", "triton"):
        with using(backend) as kernels:
            generator = torch.Generator().manual_seed(0)
            shapes = ((3 * triton_gpu.CHUNK_NUMEL + 5,), (7,), (3,), (1,))
            weights = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device_of("triton"))) for s in shapes]
            optimizer = optimizer_class(weights, lr=0.1, weight_decay=0.01, max_grad_norm=0.5, kernels=kernels)
            for step in range(2):
                give_gradients(weights, step, bad=(3,) if step else ())
                optimizer.step()
            found.append((weights, optimizer.layer_stats(), counts(optimizer, weights)))
    (call,) = next(iter(optimizer._plans.values())).calls
    assert not call.segments.prepared["triton"].arrivals.any()
    (weights, stats, counted), (others, other_stats, others_counted) = found
    assert counted == others_counted
    assert_alike(weights, others)
    for name, figures in stats.items():
        assert other_stats[name] == pytest.approx(figures, rel=1e-5), name


@each_optimizer
def test_kept_launches_follow_what_changes(optimizer_class):
    """Tensors that are added, options that choose other code, a bound for the norm, other counters: as without kept launches."""

    def trained(keeps):
        with using("triton") as kernels:
            weights, optimizer = made(kernels, optimizer_class)
            for step in range(6):
                if step == 2:
                    weights[1].grad = None
                    optimizer.param_groups[0]["trust_ratio_bounds"] = (0.01, 0.02)
                if step == 3:
                    optimizer.max_grad_norm = 0.5
                if step == 4:
                    optimizer._num_skipped = optimizer._num_skipped.clone()
                    more = torch.nn.Parameter(torch.ones(9, device=weights[0].device))
                    optimizer.add_param_group({"params": [more]})
                    weights.append(more)
                give_gradients(weights, step, bad=(0,) if step == 4 else ())
                if not keeps:
                    forget_launches(optimizer)
                optimizer.step()
            return [*weights, *(v for w in weights for v in optimizer.state[w].values())], counts(optimizer, weights)

    (kept, kept_counts), (anew, counts_anew) = trained(True), trained(False)
    assert kept_counts == counts_anew
    assert all(torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


def forget_launches(optimizer):
    for plan in optimizer._plans.values():
        for call in plan.calls:
            if "triton" in call.segments.prepared:
                call.segments.prepared["triton"].steps = None
