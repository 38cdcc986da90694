"""In which precision DeepSpeed adds up the gradients of micro-steps, and what it sends meanwhile."""

import pytest
import torch

from support import engine_runs

NUM_MICRO_STEPS = 256
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def micro_gradients(micro_step, rank, dtype):
    """Random gradients that the compute dtype holds exactly, another on each rank."""
    generator = torch.Generator().manual_seed(7919 * micro_step + rank)
    return [torch.randn(shape, generator=generator).to(dtype).float() for shape in engine_runs.SHAPES]


def accumulated_gradient_error(stage, dtype, extra, num_micro_steps=NUM_MICRO_STEPS):
    """Inside a rank: relative L2 error of what the optimizer gets against the fp64 mean of the micro-gradients."""
    import deepspeed
    import torch.distributed as dist

    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = engine_runs.ds_config("LAMB", stage, dtype, accumulation=num_micro_steps, extra=extra)
    if dtype == "fp16":
        # 2^8 x 1/256: the scaled loss of a micro-step has the scale of the gradients
        config["fp16"] = {"enabled": True, "loss_scale": 256.0}
    world, rank = dist.get_world_size(), dist.get_rank()
    seen, sent = {}, [0]
    with engine_runs.engine_for(config) as engine:
        optimizer = engine.basic_optimizer
        step = optimizer.step

        def watched_step(*args, **kwargs):
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    seen[tensor] = tensor.grad.detach().double().clone()
            return step(*args, **kwargs)

        optimizer.step = watched_step
        backend = deepspeed.comm.comm.cdb
        kinds = ("reduce", "gather", "broadcast", "all_to_all", "send")
        methods = [name for name in dir(backend) if name.startswith(kinds) or name.startswith("all_")]
        originals = {name: getattr(backend, name) for name in methods if callable(getattr(backend, name))}
        for micro_step in range(num_micro_steps):
            is_boundary = micro_step == num_micro_steps - 1
            for name, original in originals.items():
                setattr(backend, name, original if is_boundary else counted(original, sent))
            engine.backward(engine(micro_gradients(micro_step, rank, compute)))
            engine.step()
        exact = [torch.zeros(shape, dtype=torch.float64) for shape in engine_runs.SHAPES]
        for micro_step in range(num_micro_steps):
            for r in range(world):
                for total, g in zip(exact, micro_gradients(micro_step, r, compute), strict=True):
                    total += g.double() / (num_micro_steps * world)
        error, size = 0.0, 0.0
        names = {id(p): int(n.removeprefix("layer")) for n, p in engine.module.named_parameters()}
        for tensor, gradient in seen.items():
            partition = optimizer._table.partitions.get(tensor)
            if partition is None:
                pieces = [(gradient.reshape(-1), exact[names[id(tensor)]].reshape(-1))]
            else:
                pieces = [
                    (
                        gradient.reshape(-1)[s.start : s.stop],
                        exact[names[id(partition.parameters[s.layer])]].reshape(-1)[
                            s.layer_start : s.layer_start + s.numel
                        ],
                    )
                    for s in partition.layer_map.segments
                ]
            for found, wanted in pieces:
                error += (found - wanted).square().sum().item()
                size += wanted.square().sum().item()
    return error, size, sent[0]


def counted(original, sent):
    def call(*args, **kwargs):
        sent[0] += 1
        return original(*args, **kwargs)

    return call


def relative(results):
    return (sum(error for error, *_ in results) / sum(size for _, size, _ in results)) ** 0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_accumulation_as_the_trainer_sets_it(rank_pool, stage, dtype):
    assert relative(rank_pool.run(2, accumulated_gradient_error, stage, dtype, FP32)) < 1e-6


@pytest.mark.parametrize("dtype, loss", [("bf16", 3e-3), ("fp16", 4e-4)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_default_loses_digits(rank_pool, stage, dtype, loss):
    """Why the trainer sets it: without, the error is thousands of times larger. If this fails, the rule can go."""
    assert relative(rank_pool.run(2, accumulated_gradient_error, stage, dtype, {})) > loss


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32(rank_pool, stage):
    assert relative(rank_pool.run(2, accumulated_gradient_error, stage, "fp32", {}, 64)) < 1e-6


@pytest.mark.parametrize("extra", [{}, FP32], ids=["default", "fp32-accumulation"])
@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_stages_0_and_1_send_nothing_before_the_boundary(rank_pool, stage, dtype, extra):
    if stage == 0 and extra:
        pytest.skip("fp32 is what stage 0 accumulates fp32 gradients in anyway")
    for _, _, num_sent in rank_pool.run(2, accumulated_gradient_error, stage, dtype, extra, 16):
        assert num_sent == 0


def test_stages_2_and_3_send_at_every_micro_step(rank_pool):
    """The count above can be other than zero."""
    for stage in (2, 3):
        assert all(sent > 0 for *_, sent in rank_pool.run(2, accumulated_gradient_error, stage, "fp32", {}, 4))


@pytest.mark.parametrize("device", ["none", "cpu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_micro_batch_counts(rank_pool, stage, dtype, device):
    """Before DeepSpeed 0.19 stage 2 forgets some; see largebatch.engine.lost_micro_batches."""
    extra = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
    error = relative(rank_pool.run(2, accumulated_gradient_error, stage, dtype, extra, 3))
    assert error < (1e-6 if dtype == "fp32" else 2**-7)
