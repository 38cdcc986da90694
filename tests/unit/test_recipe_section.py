"""The recipe's "largebatch" section: illegal values, and the one knob that stretches a schedule."""

import copy
import json

import pytest

from largebatch.launch.data.options import filled_options
from largebatch.launch.recipe.flags import parse_arguments
from largebatch.launch.recipe.reading import apply_overrides, read_recipe
from largebatch.launch.recipe.resolved_run import resolve
from largebatch.launch.recipe.section import check_section

RECIPE = {
    "largebatch": {"model": "resnet50", "data": "imagenet", "epochs": 90},
    "train_batch_size": 1024,
    "optimizer": {"type": "LARS", "params": {"lr": 2.0}},
    "scheduler": {
        "type": "WarmupStepLR",
        "params": {"milestone_epochs": [30, 60, 80], "warmup_epochs": 5, "steps_per_epoch": "auto"},
    },
}


def recipe(**section):
    changed = copy.deepcopy(RECIPE)
    changed["largebatch"] |= section
    return changed


@pytest.mark.parametrize(
    "section, message",
    [
        ({"augmentation": "maximum"}, "largebatch.augmentation is 'maximum'; expected 'none', 'minimal', "),
        ({"augmentation": "davidnet"}, "for data 'imagenet'"),
        ({"data": "cifar", "model": "davidnet"}, "did you mean 'cifar10'?"),
        ({"data_options": {"image_sise": 64}}, "largebatch.data_options.image_sise is not an option of imagenet; expected one of 'image_size'"),
        ({"data_options": {"image_size": 0}}, "largebatch.data_options.image_size is 0; expected an integer >= 1"),
        ({"data_options": {"image_size": 64, "resize_size": 60}}, "resize_size is 60; expected a number >= image_size, which is 64"),
        ({"data_options": {"workers": "many"}}, "largebatch.data_options.workers is 'many'; expected an integer >= 0, or \"auto\""),
        ({"data_options": {"on_corrupt": "ignore"}}, "largebatch.data_options.on_corrupt is 'ignore'; expected one of 'replace', 'error'"),
        ({"data_options": []}, "largebatch.data_options is []; expected a section"),
        ({"data": "digits", "data_options": {"workers": 1}}, "largebatch.data_options.workers is not an option of digits"),
        ({"data": "synthetic", "data_options": {"image_shape": [3, 4]}}, "image_shape is [3, 4]; expected [channels, height, width]"),
        ({"mixup": -0.1}, "largebatch.mixup is -0.1; expected a number >= 0"),
        ({"label_smoothing": 1.0}, "largebatch.label_smoothing is 1.0"),
        ({"batch_norm": 64}, "largebatch.batch_norm is 64; expected a section such as"),
        ({"batch_norm": {"ghost_size": 64}}, "largebatch.batch_norm.ghost_size is not known (did you mean 'ghost_batch_size'?)"),
        ({"batch_norm": {"momentum": 1.0}}, "largebatch.batch_norm.momentum is 1.0; expected a number > 0 and < 1"),
        ({"batch_norm": {"momentum": "0.5"}}, "largebatch.batch_norm.momentum is '0.5'; expected a number > 0 and < 1"),
        ({"schedule_stretch": 0}, "largebatch.schedule_stretch is 0; expected a number > 0"),
        ({"epochs": None, "steps": 1.5}, "largebatch.steps is 1.5; expected"),
        ({"steps": 3}, "either epochs or steps, the length of training; it has both"),
        ({"epochs": None}, "either epochs or steps"),
        ({"layer_stats_every_steps": 0}, "largebatch.layer_stats_every_steps is 0"),
        ({"expected": {"metric": "top1"}}, "largebatch.expected is {'metric': 'top1'}; expected null or a section with metric, value"),
        ({"source": 3}, "largebatch.source is 3; expected null or a text"),
        ({"data": "text", "model": "bert", "mixup": 0.2}, "largebatch.mixup is 0.2 and has no effect on text"),
    ],
)  # fmt: skip
def test_illegal_sections(section, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        check_section(recipe(**section))
    assert message in str(caught.value)


def test_micro_batches_that_cannot_be():
    for changes, message in (
        ({"batch_norm": {"ghost_batch_size": 48}}, "largebatch.batch_norm.ghost_batch_size is 48"),
        ({"mixup": 0.2}, "train_micro_batch_size_per_gpu is 1 and largebatch.mixup 0.2; expected an even number"),
    ):
        changed = recipe(**changes) | {"train_micro_batch_size_per_gpu": 1 if "mixup" in changes else 32}
        with pytest.raises(ValueError) as caught:
            resolve(changed, num_samples=10_000, world_size=1, output="out")
        assert message in str(caught.value)


def test_resize_size_follows_image_size():
    assert filled_options("imagenet", {})["resize_size"] == 256
    assert filled_options("imagenet", {"image_size": 64})["resize_size"] == 73


@pytest.mark.parametrize("stretch", [1, 2, 0.5])
def test_one_knob_stretches_length_warm_up_and_milestones(stretch):
    plan = resolve(recipe(schedule_stretch=stretch), num_samples=102_400, world_size=2, output="out")
    params = plan.config["scheduler"]["params"]
    assert plan.num_steps == 9000 * stretch and plan.section["schedule_stretch"] == 1
    assert params["milestone_epochs"] == [30 * stretch, 60 * stretch, 80 * stretch]
    assert params["warmup_epochs"] == 5 * stretch and params["steps_per_epoch"] == 100
    again = resolve(plan.config, num_samples=102_400, world_size=2, output="out")
    assert again.num_steps == plan.num_steps, "a plan made from a plan is not stretched twice"


def test_stretching_a_number_of_steps():
    changed = recipe(schedule_stretch=1.5, epochs=None, steps=10)
    changed["scheduler"] = {
        "type": "WarmupPolyLR",
        "params": {"total_steps": "auto", "warmup_steps": 3, "constant_steps": 2},
    }
    plan = resolve(changed, num_samples=102_400, world_size=2, output="out")
    lengths = {"total_steps": 15, "warmup_steps": 4.5, "constant_steps": 3.0}
    assert plan.num_steps == 15 and plan.config["scheduler"]["params"] == lengths
    changed["scheduler"]["type"] = "WarmupLR"
    with pytest.raises(
        ValueError, match="schedule_stretch is 1.5 and scheduler.type 'WarmupLR'; expected one of WarmupPolyLR"
    ):
        resolve(changed, num_samples=102_400, world_size=2, output="out")


def test_keys_that_had_other_names(tmp_path, capsys):
    """Taken from a file and from --set, in the recipe and in its phases; both names at once are an error."""
    earlier = {"batch_norm": {"span": 8}, "stages": [{"largebatch": {"batch_norm": {"span": 4}}}]}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"largebatch": earlier}))
    section = read_recipe(str(path))["largebatch"]
    phase = {"largebatch": {"batch_norm": {"ghost_batch_size": 4}}}
    assert section == {"batch_norm": {"ghost_batch_size": 8}, "phases": [phase]}
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "largebatch: note: largebatch.stages is called largebatch.phases now",
        "largebatch: note: largebatch.batch_norm.span is called largebatch.batch_norm.ghost_batch_size now",
    ]
    arguments = parse_arguments(["--deepspeed_config", "x", "--set", "largebatch.batch_norm.span=16"])
    assert apply_overrides({}, arguments)["largebatch"]["batch_norm"] == {"ghost_batch_size": 16}
    with pytest.raises(ValueError, match="batch_norm.span is an earlier name of .*; keep ghost_batch_size"):
        apply_overrides({"largebatch": {"batch_norm": {"ghost_batch_size": 4}}}, arguments)
