"""A run goes from DeepSpeed to plain PyTorch in its middle, and the other way round, as if it had never moved."""

import pytest
import torch

from largebatch import checkpoint
from largebatch.__main__ import main
from support import checkpoint_runs, engine_runs
from support.checkpoint_runs import FIRST, REST
from support.problems import relative_error

BOUND = 3e-6
LAYOUTS = [
    (1, dict(stage=0)),
    (2, dict(stage=0, dtype="bf16")),
    (2, dict(stage=1, dtype="bf16", grad_accum="fp32")),
    (3, dict(stage=2, zero={"round_robin_gradients": True})),
    (3, dict(stage=3, dtype="fp16", zero={"sub_group_size": 700})),
]


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
@pytest.mark.parametrize("ranks, layout", LAYOUTS)
def test_from_deepspeed_to_plain_pytorch(rank_pool, tmp_path, ranks, layout, algorithm):
    rank_pool.run(ranks, checkpoint_runs.save_at, algorithm, layout, str(tmp_path), "step3", num_groups=2)
    assert main(["convert", str(tmp_path / "step3"), str(tmp_path / "plain.pt")]) == 0
    content = torch.load(tmp_path / "plain.pt", weights_only=True)
    first, last, ratios = checkpoint_runs.uninterrupted(algorithm, num_groups=2)
    model, optimizer = checkpoint_runs.plain(algorithm, num_groups=2)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    assert relative_error(model.layers, first) < BOUND
    assert (content["optimizer_class"], content["num_steps"]) == (algorithm, FIRST)
    state = optimizer.state[model.layers[0]]
    assert set(state) == {"LARS": {"momentum_buffer"}, "LAMB": {"exp_avg", "exp_avg_sq", "step"}}[algorithm]
    checkpoint_runs.train_plain(model, optimizer, algorithm, range(FIRST, FIRST + REST))
    assert relative_error(model.layers, last) < BOUND
    assert {name: figures["trust_ratio"] for name, figures in optimizer.layer_stats().items()} == ratios
    assert [group["weight_decay"] for group in optimizer.param_groups][1] == 0.0


@pytest.mark.parametrize("algorithm", ["LARS", "LAMB"])
def test_from_plain_pytorch_to_deepspeed(rank_pool, tmp_path, algorithm):
    model, optimizer = checkpoint_runs.plain(algorithm, num_groups=2)
    checkpoint_runs.train_plain(model, optimizer, algorithm, range(FIRST))
    names = checkpoint.names_in_optimizer(optimizer, model)
    whole = checkpoint.from_state_dicts(
        model.state_dict(), optimizer.state_dict(), algorithm, names=names, num_steps=FIRST
    )
    checkpoint.write_pytorch(whole, str(tmp_path / "plain.pt"))
    with pytest.raises(ValueError, match="exists"):
        checkpoint.write_pytorch(whole, str(tmp_path / "plain.pt"))
    command = ["convert", str(tmp_path / "plain.pt"), str(tmp_path / "step3"), "--names", str(tmp_path / "names.json")]
    (tmp_path / "names.json").write_text(str(names).replace("'", '"'))
    assert main(command) == 0
    assert (tmp_path / "step3" / "manifest.json").is_file() and (tmp_path / "latest").read_text() == "step3"
    _, last, ratios = checkpoint_runs.uninterrupted(algorithm, num_groups=2)
    for ranks, layout in LAYOUTS:
        resumed = rank_pool.run(ranks, resume_converted, algorithm, layout, str(tmp_path), "step3")
        assert relative_error(engine_runs.assemble([result["pieces"] for result in resumed]), last) < BOUND
        assert all(result["ratios"] == ratios and result["counts"] == (6, 0, 6) for result in resumed)


def resume_converted(algorithm, layout, folder, tag):
    """Without a schedule in the checkpoint, one of the test's own is set by hand; ours goes on by itself."""
    config = engine_runs.ds_config(algorithm, **layout)
    with engine_runs.engine_for(config, num_groups=2, num_steps=FIRST + REST) as engine:
        engine.load_checkpoint(folder, tag=tag)
        engine.lr_scheduler.load_state_dict({"applied": FIRST})
        for step in range(FIRST, FIRST + REST):
            engine_runs.take_step(engine, step)
        return checkpoint_runs.what_is_compared(engine)


def schedule_after_loading(folder, tag):
    scheduler = {"type": "WarmupPolyLR", "params": {"total_steps": 12, "warmup_steps": 4}}
    config = engine_runs.ds_config("LAMB", 1, extra={"scheduler": scheduler})
    import deepspeed

    model = engine_runs.LinearLoss()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=engine_runs.param_groups(model, 2), config=config)
    engine.load_checkpoint(folder, tag=tag)
    step, lr = engine.lr_scheduler.last_batch_iteration, engine.get_lr()[0]
    engine.destroy()
    return step, lr


def test_our_schedule_goes_on_from_the_step(rank_pool, tmp_path):
    model, optimizer = checkpoint_runs.plain("LAMB", num_groups=2)
    checkpoint_runs.train_plain(model, optimizer, "LAMB", range(FIRST))
    names = checkpoint.names_in_optimizer(optimizer, model)
    whole = checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "LAMB", names=names)
    checkpoint.write_deepspeed(whole, str(tmp_path / "converted"), "a test")
    for step, lr in rank_pool.run(2, schedule_after_loading, str(tmp_path), "converted"):
        assert step == FIRST and lr == pytest.approx(0.02 * FIRST / 4 + 0.02 / 4)


def test_a_peer_s_state_goes_into_an_engine(rank_pool, tmp_path):
    """timm's Lars in the middle of a run -> LARS under ZeRO, with the learning rate outside the momentum."""
    from timm.optim import Lars

    model = engine_runs.LinearLoss()
    optimizer = Lars(model.layers, lr=2.0, momentum=0.9, weight_decay=5e-3, always_adapt=True)
    checkpoint_runs.train_plain(model, optimizer, "LARS", range(FIRST))
    whole = checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "timm.Lars", num_steps=FIRST)
    checkpoint.write_deepspeed(checkpoint.convert(whole, "LARS"), str(tmp_path / "moved"), "timm.Lars")
    checkpoint_runs.train_plain(model, optimizer, "LARS", range(FIRST, FIRST + REST))
    options = {"preset": "timm", "adapt_undecayed": True, "momentum": 0.9, "weight_decay": 5e-3, "lr": 2.0}
    layout = dict(stage=3, extra={"optimizer": {"type": "LARS", "params": options}})
    resumed = rank_pool.run(2, resume_moved, layout, str(tmp_path))
    assert relative_error(engine_runs.assemble(resumed), [p.detach() for p in model.layers]) < BOUND
    layout["extra"]["optimizer"]["params"] = options | {"preset": "paper"}
    for message in rank_pool.run(2, refused, layout, str(tmp_path)):
        assert "the saved momentum was made with lr_in_momentum=False" in message


def resume_moved(layout, folder):
    config = engine_runs.ds_config("LARS", **layout)
    with engine_runs.engine_for(config, num_steps=FIRST + REST) as engine:
        engine.load_checkpoint(folder, tag="moved")
        engine.lr_scheduler.load_state_dict({"applied": FIRST})
        for step in range(FIRST, FIRST + REST):
            engine_runs.take_step(engine, step)
        return engine_runs.master_pieces(engine)


def refused(layout, folder):
    with engine_runs.engine_for(engine_runs.ds_config("LARS", **layout)) as engine:
        with pytest.raises(ValueError) as error:
            engine.load_checkpoint(folder, tag="moved")
    return str(error.value)


def test_a_pickled_optimizer_state_is_ours(rank_pool, tmp_path):
    """torch.load(weights_only=True) reads what is written: no code runs."""
    rank_pool.run(2, checkpoint_runs.save_at, "LAMB", dict(stage=1), str(tmp_path), "saved")
    whole = checkpoint.read_deepspeed(str(tmp_path / "saved"))
    checkpoint.write_pytorch(whole, str(tmp_path / "plain.pt"))
    again = checkpoint.read_pytorch(str(tmp_path / "plain.pt"))
    assert again.optimizer == "LAMB" and again.layers == whole.layers
    for name in whole.layers:
        assert torch.equal(again.weights[name], whole.weights[name])
        assert torch.equal(again.state[name]["exp_avg"], whole.state[name]["exp_avg"])
