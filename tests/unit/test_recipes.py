"""Every recipe is parsed, filled in, built, and steps a small model once; the command line is checked."""

import argparse
import json
import pathlib

import pytest
import torch

import largebatch.ds_configs
from largebatch.launch.arguments import apply_overrides, make_plan, parse_arguments, read_recipe, set_entry
from largebatch.launch.inputs.in_memory import load_digits
from largebatch.lr_schedulers import SCHEDULERS
from largebatch.models.registry import build_model
from largebatch.register import OPTIMIZERS

FOLDER = pathlib.Path(largebatch.ds_configs.__file__).parent
RECIPES = sorted(FOLDER.glob("*.json"))
NUM_SAMPLES = {"digits": 1437, "mnist": 60000}


def plan_of(path, world_size=2):
    recipe = read_recipe(str(path))
    return make_plan(recipe, num_samples=NUM_SAMPLES[recipe["largebatch"]["data"]], world_size=world_size, output="out")


def test_there_are_recipes():
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_complete_and_steps(path):
    plan = plan_of(path)
    assert "auto" not in json.dumps(plan.config)
    assert plan.micro_batch * plan.accumulation_steps * 2 == plan.global_batch
    assert "gradient_clipping" in plan.config, "DeepSpeed clips at 1.0 when the JSON says nothing"
    assert path.stem.startswith(
        f"{plan.section['model']}_{plan.section['data']}_{plan.config['optimizer']['type'].lower()}_"
    )
    model = build_model(plan.section["model"], image_shape=(1, 8, 8), num_classes=10)
    params = plan.config["optimizer"]["params"]
    name = plan.config["optimizer"]["type"]
    if name.lower() in OPTIMIZERS:
        optimizer = OPTIMIZERS[name.lower()].from_json_params(model.parameters(), params, model)
    else:
        optimizer = getattr(torch.optim, name)(model.parameters(), **params)
    scheduler = SCHEDULERS[plan.config["scheduler"]["type"]](optimizer, **plan.config["scheduler"]["params"])
    assert scheduler.factor(plan.num_steps) == pytest.approx(0, abs=1e-12), "the schedule ends with the training"
    data = load_digits()
    before = [p.detach().clone() for p in model.parameters()]
    torch.nn.functional.cross_entropy(
        model(data.inputs(data.train.pixels[:32], torch.float32)), data.train.labels[:32]
    ).backward()
    optimizer.step()
    scheduler.step()
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
    )


def test_every_recipe_has_its_row_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    assert [p.stem for p in RECIPES if f"`{p.stem}`" not in readme] == []


RECIPE = FOLDER / "lenet_digits_lars_480.json"


def with_entries(*assignments):
    recipe = read_recipe(str(RECIPE))
    for assignment in assignments:
        set_entry(recipe, assignment)
    return recipe


@pytest.mark.parametrize(
    "assignments, message",
    [
        (["train_batch_size=481"], "train_batch_size is 481, and 2 ranks with micro-batches of 20 make multiples of 40; nearest: 480 or 520"),
        (["train_batch_size=7", 'train_micro_batch_size_per_gpu="auto"'], "expected a multiple of 2, such as 6 or 8"),
        (["train_batch_size=0"], "train_batch_size is 0; expected an integer >= 1"),
        (["train_micro_batch_size_per_gpu=0"], "train_micro_batch_size_per_gpu is 0"),
        (["gradient_accumulation_steps=5"], "gradient_accumulation_steps is 5; expected 12 = train_batch_size 480 / (micro-batch 20 x 2 ranks)"),
        (["largebatch.model=lenett"], "largebatch.model is 'lenett'; expected one of 'lenet', 'mlp' (did you mean 'lenet'?)"),
        (["largebatch.data=mnits"], "did you mean 'mnist'?"),
        (["largebatch.epoch=3"], "largebatch.epoch is not known (did you mean 'epochs'?)"),
        (["largebatch.steps=3"], "largebatch needs either epochs or steps"),
        (["largebatch.epochs=-3"], "largebatch.epochs is -3; expected a number > 0"),
        (["largebatch.seed=-1"], "largebatch.seed is -1"),
        (["gradient_cliping=1"], "gradient_cliping is not a key of a ds_config (did you mean 'gradient_clipping'?)"),
        (["optimizer={}"], 'has no "optimizer"'),
        (["largebatch.lr_scaling=null"], 'optimizer.params.lr is "auto" and largebatch.lr_scaling is None'),
        (["optimizer.params.lr=1.0"], "largebatch.lr_scaling has no effect while optimizer.params.lr is 1.0"),
    ],
)  # fmt: skip
def test_illegal_recipes(assignments, message):
    with pytest.raises(ValueError) as caught:
        make_plan(with_entries(*assignments), num_samples=1437, world_size=2, output="out")
    assert message in str(caught.value)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist \(did you mean 'lenet_digits_lars_480.json'\?\)"):
        read_recipe(str(FOLDER / "lenet_digits_lar_480.json"))
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list; expected a JSON object")):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(str(tmp_path / "broken.json"))


def test_the_command_line_overrides_the_recipe():
    arguments = parse_arguments(
        ["--deepspeed_config", "x.json", "--seed", "9", "--steps", "7", "--zero_stage", "0", "--precision", "bf16",
         "--set", "optimizer.params.momentum=0.5", "--set", "optimizer.type=SGD"]
    )  # fmt: skip
    recipe = apply_overrides(read_recipe(str(RECIPE)), arguments)
    assert recipe["largebatch"]["seed"] == 9 and recipe["largebatch"]["steps"] == 7
    assert recipe["zero_optimization"]["stage"] == 0 and recipe["bf16"] == {"enabled": True}
    assert recipe["optimizer"]["params"]["momentum"] == 0.5 and recipe["optimizer"]["type"] == "SGD"
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        apply_overrides({}, argparse.Namespace(**(vars(arguments) | {"set": ["nonsense"]})))


def test_gradients_accumulate_in_fp32():
    for precision in ("bf16", "fp16"):
        recipe = with_entries(f"{precision}.enabled=true")
        config = make_plan(recipe, num_samples=1437, world_size=2, output="out").config
        assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
        own = with_entries(f"{precision}.enabled=true", 'data_types.grad_accum_dtype="bf16"')
        assert (
            make_plan(own, num_samples=1437, world_size=2, output="out").config["data_types"]["grad_accum_dtype"]
            == "bf16"
        )
        with pytest.raises(
            ValueError, match="zero_optimization.stage is 0 with bf16 or fp16 and 12 accumulation steps"
        ):
            stage_0 = with_entries(f"{precision}.enabled=true", "zero_optimization.stage=0")
            make_plan(stage_0, num_samples=1437, world_size=2, output="out")
    assert "data_types" not in make_plan(with_entries(), num_samples=1437, world_size=2, output="out").config


def test_micro_batch_auto_is_the_largest_divisor_up_to_256():
    recipe = with_entries('train_micro_batch_size_per_gpu="auto"', "train_batch_size=60000")
    plan = make_plan(recipe, num_samples=60000, world_size=2, output="out")
    assert (plan.micro_batch, plan.accumulation_steps) == (250, 120)
