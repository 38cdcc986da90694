"""Every recipe is parsed, filled in, built, and steps a small model once; the command line is checked."""

import argparse
import functools
import json
import pathlib

import pytest
import torch

import largebatch.ds_configs
from largebatch.ds_configs.tables.entries import batch_name
from largebatch.ds_configs.tables.files import all_recipes, by_source, text_of
from largebatch.ds_configs.tables.readme import with_rows
from largebatch.engine.baselines import Adagrad
from largebatch.engine.lr_schedulers import SCHEDULERS
from largebatch.launch.data.options import NUM_SAMPLES
from largebatch.launch.recipe.flags import parse_arguments
from largebatch.launch.recipe.reading import apply_overrides, read_recipe, set_entry
from largebatch.launch.recipe.resolved_run import resolve
from largebatch.launch.recipe.section import phase_recipes
from largebatch.launch.trainer.engines import parameter_groups
from largebatch.models.bert import build_bert
from largebatch.models.catalogue import build_model
from largebatch.optim.registry import OPTIMIZERS

FOLDER = pathlib.Path(largebatch.ds_configs.__file__).parent
RECIPES = sorted(FOLDER.glob("*.json"))
SHAPES = {
    "imagenet": ((3, 224, 224), 1000),
    "cifar10": ((3, 32, 32), 10),
    "mnist": ((1, 28, 28), 10),
    "digits": ((1, 8, 8), 10),
}
SUFFIXES = ("_minaug", "_maxaug", "_mlperf", "_nus", "_author", "_small", "_narrow")
WORLD_SIZE = 2


def plans_of(path):
    """One for each stage."""
    recipe = read_recipe(str(path))
    num_samples = NUM_SAMPLES.get(recipe["largebatch"]["data"], 1_000_000)
    return [
        resolve(stage, num_samples=num_samples, world_size=WORLD_SIZE, output="out") for stage in phase_recipes(recipe)
    ]


def plan_of(path):
    (plan,) = plans_of(path)
    return plan


def test_there_are_recipes():
    assert len(RECIPES) >= 100


@functools.cache
def built_on_meta(model, options, data):
    """Parameters of the model without their values: large networks cost no memory and no time."""
    with torch.device("meta"):
        if data == "text":
            return build_bert(vocab_size=30522, sequence_length=512, **json.loads(options))
        image_shape, num_classes = SHAPES[data]
        return build_model(model, image_shape=image_shape, num_classes=num_classes, options=json.loads(options))


def optimizer_for(config, model):
    params, name = config["optimizer"]["params"], config["optimizer"]["type"]
    if name.lower() in OPTIMIZERS:
        return OPTIMIZERS[name.lower()].from_json_params(model.parameters(), params, model)
    params = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode")}
    groups = parameter_groups(model, config["largebatch"]["no_weight_decay"])
    return (Adagrad if name == "Adagrad" else getattr(torch.optim, name))(groups, **params)


def small_network():
    """Every kind of layer that an exclusion can name; fp64, so that a step at the foot of a warm-up is not rounded away."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    ).double()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_complete_and_fits_its_model(path):
    for plan in plans_of(path):
        config, section = plan.config, plan.section
        assert "auto" not in json.dumps(config)
        assert plan.micro_batch * plan.accumulation_steps * WORLD_SIZE == plan.global_batch
        assert "gradient_clipping" in config, "DeepSpeed clips at 1.0 when the JSON says nothing"
        if section["data"] == "text":
            pytest.importorskip("transformers", reason="BERT is built by transformers, which is optional")
        model = built_on_meta(section["model"], json.dumps(section["model_options"]), section["data"])
        optimizer = optimizer_for(config, model)  # an exclusion that matches nothing is refused
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_steps_and_its_schedule_ends_with_it(path):
    lr_at_the_end = 0.0
    for plan in reversed(plans_of(path)):
        model = small_network()
        optimizer = optimizer_for(plan.config, model)
        scheduler = SCHEDULERS[plan.config["scheduler"]["type"]](optimizer, **plan.config["scheduler"]["params"])
        peak = scheduler.peak_lrs[0]
        if plan.config["scheduler"]["type"] == "WarmupStepLR":
            assert max(scheduler.milestones) < plan.num_steps
        else:
            assert scheduler.num_warmup_steps < plan.num_steps
            if scheduler.num_steps == plan.num_steps:
                lr_at_the_end = plan.config["scheduler"]["params"].get("end_lr", 0.0)
            # else the next stage begins where this one ends
            assert peak * scheduler.factor(plan.num_steps) == pytest.approx(lr_at_the_end, abs=1e-9)
        lr_at_the_end = peak
        before = [p.detach().clone() for p in model.parameters()]
        loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8).double()), torch.arange(8) % 5)
        loss.backward()
        optimizer.step()
        scheduler.step()
        after = list(model.parameters())
        assert all(torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(after, before, strict=True))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_names_and_sections_say_what_is_inside(path):
    recipe = read_recipe(str(path))
    section, batch = recipe["largebatch"], recipe["train_batch_size"]
    suffix = next((s for s in SUFFIXES if path.stem.endswith(s)), "")
    batches = {str(batch), f"{batch / 1024:g}k", f"{batch / 1000:g}k"}
    if phases := [phase["train_batch_size"] for phase in section.get("phases") or [] if "train_batch_size" in phase]:
        batches = {"_".join(map(batch_name, phases))}
    prefix = f"{section['model']}_{section['data']}_{recipe['optimizer']['type'].lower()}_"
    assert path.stem in {prefix + b + suffix for b in batches}
    assert len(section["source"]) > 10
    assert "hardware" in section and "expected" in section
    if section["expected"] is not None:
        assert set(section["expected"]) == {"metric", "value", "band", "is_approximate"}
        assert 0 < section["expected"]["band"] < section["expected"]["value"] < 1
    if suffix == "_maxaug":
        assert section["augmentation"] == "maximal"


def test_the_files_are_those_of_the_tables():
    for name, config in all_recipes().items():
        path = FOLDER / f"{name}.json"
        assert path.read_text() == text_of(config), f"{name}: python -m largebatch.ds_configs.tables"
    readme = (FOLDER / "README.md").read_text()
    assert with_rows(readme, by_source()) == readme, "python -m largebatch.ds_configs.tables"


def test_every_recipe_has_its_row_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    assert [p.stem for p in RECIPES if f"`{p.stem}`" not in readme] == []


# As printed in the sources' tables.
TABLED_RATES = {
    "resnet50_imagenet_lamb_{}": {b: 4 / (2**k * 100) for b, k in (("512", 3), ("1k", 2.5), ("2k", 2), ("4k", 1.5), ("8k", 1), ("16k", 0.5), ("32k", 0))},
    "resnet50_imagenet_lars_{}_nus": {b: 2**k for b, k in (("512", 2), ("1k", 2.5), ("4k", 3.5), ("8k", 4), ("16k", 4.5), ("32k", 5))},
    "bert_text_lamb_{}": {b: 5 / (2**k * 1000) for b, k in (("512", 3), ("1k", 2.5), ("2k", 2), ("4k", 1.5), ("8k", 1), ("16k", 0.5), ("32k", 0))},
    "resnet50_imagenet_sgd_{}": {"256": 0.1, "512": 0.2, "1k": 0.4, "2k": 0.8, "4k": 1.6, "8k": 3.2},
}  # fmt: skip


@pytest.mark.parametrize("pattern", TABLED_RATES)
def test_the_scaling_rules_give_the_tables_learning_rates(pattern):
    for batch, lr in TABLED_RATES[pattern].items():
        plan, *_ = plans_of(FOLDER / f"{pattern.format(batch)}.json")
        assert plan.config["optimizer"]["params"]["lr"] == pytest.approx(lr, rel=1e-12)


def learning_rates(name, steps):
    plan = plan_of(FOLDER / f"{name}.json")
    optimizer = optimizer_for(plan.config, small_network())
    scheduler = SCHEDULERS[plan.config["scheduler"]["type"]](optimizer, **plan.config["scheduler"]["params"])
    return plan.num_steps, [scheduler.peak_lrs[0] * scheduler.factor(step) for step in steps]


def test_schedules_of_the_papers():
    # MLPerf 32K: 58 epochs of 39.1 steps; 21.2 at the end of 16 epochs, then (1 - t/T)^2 down to 1e-4
    num_steps, rates = learning_rates("resnet50_imagenet_lars_32k_mlperf", (0, 624, 1446, 2268))
    assert num_steps == 2268
    assert rates == pytest.approx(
        [21.2 / 626, 21.2 * 625 / 626, 21.1999 * (1 - 820 / 1642) ** 2 + 1e-4, 1e-4], rel=1e-9
    )
    # LAMB authors: 3,519 steps, 0.04 after 782, then linear
    num_steps, rates = learning_rates("resnet50_imagenet_lamb_32k_author", (0, 781, 782, 3518))
    assert num_steps == 3519
    assert rates == pytest.approx([0.04 / 782, 0.04, 0.04, 0.04 / 2737], rel=1e-12)
    # LARS paper, AlexNet 16K: 7,800 steps (78 an epoch in Caffe, 78.2 here); g0 (1 - t/T)^2 from the first step
    num_steps, rates = learning_rates("alexnet_imagenet_lars_16k", (0, 156, 3910))
    assert num_steps == 7820
    assert rates == pytest.approx([14 / 156, 14 * (1 - 156 / 7820) ** 2, 3.5], rel=1e-9)
    # BERT 32K: 15,625 steps in all, warm-up 3,125, 0.005 (1 - t/T) through both stages
    rates = []
    for plan in plans_of(FOLDER / "bert_text_lamb_32k.json"):
        scheduler = SCHEDULERS["WarmupPolyLR"](
            optimizer_for(plan.config, small_network()), **plan.config["scheduler"]["params"]
        )
        rates += [scheduler.peak_lrs[0] * scheduler.factor(step) for step in range(plan.num_steps)]
    assert len(rates) == 15625 and rates[3124] == 0.005
    assert rates[3125:] == pytest.approx([0.005 * (1 - t / 15625) for t in range(3125, 15625)], rel=1e-12)
    # Goyal 8K: from 0.1 to 3.2 in five epochs, x0.1 at 30, 60, 80
    num_steps, rates = learning_rates("resnet50_imagenet_sgd_8k", (0, 781, 782, 4692, 9384, 12512, 14075))
    assert num_steps == 14076
    assert rates == pytest.approx([0.1 + 3.1 / 782, 3.2, 3.2, 0.32, 0.032, 0.0032, 0.0032], rel=1e-3)


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
        (["largebatch.model=lenett"], "largebatch.model is 'lenett'; expected one of 'lenet', 'mlp'"),
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
        resolve(with_entries(*assignments), num_samples=1437, world_size=2, output="out")
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
        ["--deepspeed_config", "x.json", "--seed", "9", "--steps", "7", "--zero-stage", "0", "--precision", "bf16",
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
        config = resolve(recipe, num_samples=1437, world_size=2, output="out").config
        assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
        own = with_entries(f"{precision}.enabled=true", 'data_types.grad_accum_dtype="bf16"')
        assert (
            resolve(own, num_samples=1437, world_size=2, output="out").config["data_types"]["grad_accum_dtype"]
            == "bf16"
        )
        with pytest.raises(
            ValueError, match="zero_optimization.stage is 0 with bf16 or fp16 and 12 accumulation steps"
        ):
            stage_0 = with_entries(f"{precision}.enabled=true", "zero_optimization.stage=0")
            resolve(stage_0, num_samples=1437, world_size=2, output="out")
    assert "data_types" not in resolve(with_entries(), num_samples=1437, world_size=2, output="out").config


def test_micro_batch_auto_is_the_largest_divisor_up_to_256():
    recipe = with_entries('train_micro_batch_size_per_gpu="auto"', "train_batch_size=60000")
    plan = resolve(recipe, num_samples=60000, world_size=2, output="out")
    assert (plan.micro_batch, plan.accumulation_steps) == (250, 120)


def test_micro_batch_auto_is_the_ghost_batch_size_where_it_can_be():
    """A ghost batch costs more than torch's own kernels over the whole micro-batch."""
    for ghost_batch_size, micro_batch in ((128, 128), (64, 64), (512, 256), (1024, 512), ("micro_batch", 256)):
        recipe = read_recipe("resnet50_imagenet_lars_32k_mlperf")
        recipe["largebatch"]["batch_norm"]["ghost_batch_size"] = ghost_batch_size
        plan = resolve(recipe, num_samples=1000, world_size=2, output="out")
        assert plan.micro_batch == micro_batch, ghost_batch_size
