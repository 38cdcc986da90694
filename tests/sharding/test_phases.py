"""Runs of several phases: weights and optimizer state go on, batch, data order and schedule begin anew; resumed anywhere."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import largebatch
from largebatch.engine.lr_schedulers import WarmupPolyLR
from largebatch.launch.data.in_memory import load_digits
from largebatch.launch.data.sample_order import SampleOrder
from largebatch.launch.recipe.resolved_run import make_phases, resolve
from largebatch.launch.recipe.section import phase_recipes
from largebatch.models.catalogue import build_model
from support import trainer_runs

RECIPE = {
    "largebatch": {
        "model": "mlp", "data": "digits", "seed": 3,
        "phases": [
            {"largebatch": {"steps": 4}, "train_batch_size": 96},
            {"largebatch": {"epochs": 0.1, "label_smoothing": 0.1}, "train_batch_size": 48,
             "optimizer": {"params": {"lr": 0.005, "weight_decay": 0.1}}, "scheduler": {"params": {"warmup_steps": 2}}},
        ],
    },
    "train_micro_batch_size_per_gpu": 12,
    "optimizer": {"type": "LAMB", "params": {"lr": 0.02, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupPolyLR", "params": {"total_steps": "auto", "warmup_steps": 1, "power": 1}},
    "gradient_clipping": 0.0,
    "tensorboard": {"enabled": False},
}  # fmt: skip


def phases_of(recipe):
    plans = [resolve(r, num_samples=1437, world_size=2, output="out") for r in phase_recipes(recipe)]
    return make_phases(plans)


def reference():
    """Plain PyTorch, whole batches, one process: final weights and (step, lr, loss) of each step."""
    torch.manual_seed(3)
    model = build_model("mlp", image_shape=(1, 8, 8), num_classes=10)
    data, trace, optimizer = load_digits(), [], None
    for phase in phases_of(RECIPE):
        params, section = phase.resolved.config["optimizer"]["params"], phase.resolved.section
        if optimizer is None:
            optimizer = largebatch.LAMB(model.parameters(), model=model, **params)
        else:
            for group in optimizer.param_groups:
                group.update(lr=params["lr"], weight_decay=params["weight_decay"])
        scheduler = WarmupPolyLR(optimizer, **phase.resolved.config["scheduler"]["params"])
        order = SampleOrder(1437, phase.seed)
        batch = phase.resolved.global_batch
        for step in range(phase.resolved.num_steps):
            indices = order.indices(step * batch, (step + 1) * batch)
            outputs = model(data.inputs(data.train.pixels[indices], torch.float32))
            loss = F.cross_entropy(outputs, data.train.labels[indices], label_smoothing=section["label_smoothing"])
            trace.append((len(trace) + 1, optimizer.param_groups[0]["lr"], loss.item()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model.state_dict(), trace


def arguments(folder, precision, zero_stage):
    path = folder / "recipe.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(RECIPE))
    options = ["--precision", precision, "--zero-stage", zero_stage]
    return ["--deepspeed_config", path, "--output", folder / "run", *options]


def events(folder, kind):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_lengths_and_orders():
    first, second = phases_of(RECIPE)
    assert (first.resolved.num_steps, second.resolved.num_steps) == (4, 3)
    assert (second.first_step, second.first_sample, second.total_steps) == (4, 4 * 96, 7)
    assert first.seed == 3 != second.seed and first.total_samples == 4 * 96 + 3 * 48


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_two_stages_are_what_plain_pytorch_would_train(rank_pool, tmp_path, zero_stage):
    weights, trace = reference()
    (found, step, _), _ = rank_pool.run(2, trainer_runs.run_trainer, arguments(tmp_path, "fp32", zero_stage))
    assert step == 7
    for (number, lr, loss), event in zip(trace, events(tmp_path, "step"), strict=True):
        assert event["step"] == number and event["lr"] == pytest.approx(lr, rel=1e-12)
        assert event["loss"] == pytest.approx(loss, rel=2e-5)
    (phase,) = events(tmp_path, "phase")
    assert phase["step"] == 4 and phase["config"]["train_batch_size"] == 48
    if zero_stage < 3:  # there the module holds pieces
        for name, value in found.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision, zero_stage", [("fp32", 1), ("bf16", 1), ("bf16", 3)])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_resumed_in_any_stage_and_between_them(rank_pool, tmp_path, precision, zero_stage, stop_after):
    """Stopped while step 1, 3 or 5 runs: in the first phase, at its end, in the second. The same bits as in one go."""
    whole = rank_pool.run(2, trainer_runs.run_trainer, arguments(tmp_path / "whole", precision, zero_stage))
    parted = arguments(tmp_path / "parted", precision, zero_stage)
    stopped = rank_pool.run(2, trainer_runs.run_trainer, parted, stop_after)
    assert stop_after <= stopped[0][1] <= min(stop_after + 2, 7)
    resumed = rank_pool.run(2, trainer_runs.run_trainer, [*parted, "--resume"])
    for (weights, *_), (others, *_) in zip(whole, resumed, strict=True):
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    for kind, keys in (("step", ("step", "loss", "lr")), ("phase", ("step",)), ("evaluation", ("step", "top1"))):
        trace = [[[e[key] for key in keys] for e in events(tmp_path / name, kind)] for name in ("whole", "parted")]
        assert trace[0] == trace[1]


@pytest.mark.parametrize(
    "phases, message",
    [
        ({}, "largebatch.phases is {}; expected null or a list of parts of a recipe"),
        ([], r"largebatch.phases is \[\]"),
        ([{"largebatch": {"phases": []}}], r"largebatch.phases\[0\] has phases of its own"),
        ([{"optimizer": {"type": "LARS"}}], r"largebatch.phases\[0\] sets optimizer.type, which all phases share"),
        (
            [{}, {"largebatch": {"model": "lenet"}}],
            r"largebatch.phases\[1\] sets largebatch.model, which all phases share",
        ),
        ([{"optimizer": 3}], r"largebatch.phases\[0\].optimizer is 3; expected a section"),
    ],
)
def test_illegal_phases(phases, message):
    recipe = copy.deepcopy(RECIPE)
    recipe["largebatch"]["phases"] = phases
    with pytest.raises((ValueError, TypeError), match=message):
        phase_recipes(recipe)


def test_a_stage_without_a_length():
    recipe = copy.deepcopy(RECIPE)
    del recipe["largebatch"]["phases"][0]["largebatch"]["steps"]
    with pytest.raises(ValueError, match="either epochs or steps"):
        phases_of(recipe)


def test_a_length_in_a_stage_takes_the_place_of_the_other_kind():
    recipe = copy.deepcopy(RECIPE)
    recipe["largebatch"]["epochs"] = 90
    recipe["scheduler"]["params"] = {"total_steps": "auto", "warmup_epochs": 5, "steps_per_epoch": "auto"}
    sections = [r["largebatch"] for r in phase_recipes(recipe)]
    assert (sections[0]["steps"], sections[0].get("epochs")) == (4, None) and sections[1]["epochs"] == 0.1
    assert phase_recipes(recipe)[1]["scheduler"]["params"]["warmup_steps"] == 2
    assert "warmup_epochs" not in phase_recipes(recipe)[1]["scheduler"]["params"]
