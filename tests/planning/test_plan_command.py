"""largebatch plan: what it prints, refuses and writes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from largebatch.launch.commands import plan as plan_command
from largebatch.launch.recipe.reading import load_recipes
from largebatch.launch.recipe.resolved_run import resolve
from largebatch.launch.sizing import scaled_recipe
from largebatch.planning.activations import probe

MLP = ("--recipe", "lenet_digits_lamb_480", "--gpus", "2", "--throughput", "1000")


def run(capsys, *arguments):
    code = plan_command.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def planned(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_what_is_written_is_what_the_trainer_runs(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, *MLP, "--global-batch", 960, "--output", path)
    assert code == 0 and f"wrote {path}" in out
    config = json.loads(path.read_text())
    plan = resolve(config, num_samples=1437, world_size=2, output="runs")
    assert (plan.global_batch, plan.micro_batch, plan.accumulation_steps) == (960, 240, 2)
    at_480 = resolve(load_recipes()["lenet_digits_lamb_480"], num_samples=1437, world_size=2, output="runs").config
    assert config["optimizer"]["params"]["lr"] == pytest.approx(at_480["optimizer"]["params"]["lr"] * 2**0.5, rel=1e-5)
    assert "auto" not in json.dumps(plan.config)


def test_as_many_samples_at_every_batch(capsys):
    """35 steps of 60,000 are 64 of 32,768; the learning rate follows the rule."""
    found = planned(capsys, "--recipe", "lenet_mnist_lamb_60k", "--gpus", 1, "--global-batch", 32768, "--throughput", 1)
    recipe = load_recipes()["lenet_mnist_lamb_60k"]["largebatch"]
    samples = recipe["steps"] * 60000 if recipe.get("steps") else recipe["epochs"] * 60000
    assert abs(found["num_steps"] * 32768 - samples) < 32768
    assert found["accumulation_steps"] * found["micro_batch"] == 32768


@pytest.mark.parametrize(
    ("recipe", "batch", "lr"),
    [("lenet_mnist_sgd_1k", 2048, 2.0), ("lenet_mnist_lamb_1k", 4096, 2.0), ("lenet_mnist_adamw_1k", 4096, 2.0)],
)
def test_each_optimizer_has_its_papers_rule(capsys, recipe, batch, lr):
    at_1k = planned(capsys, "--recipe", recipe, "--gpus", 1, "--throughput", 1)["lr"]
    found = planned(capsys, "--recipe", recipe, "--gpus", 1, "--global-batch", batch, "--throughput", 1)
    assert found["lr"] == pytest.approx(lr * at_1k, rel=1e-5)


def test_a_batch_that_does_not_divide_becomes_the_nearest_that_does(capsys):
    found = planned(capsys, *MLP[:2], "--gpus", 3, "--global-batch", 1000, "--throughput", 1)
    assert found["global_batch"] == 1008 and found["micro_batch"] * found["accumulation_steps"] * 3 == 1008
    assert found["notes"][0] == (
        "a global batch of 1,000 does not divide over 3 ranks; planned is the nearest multiple of 24, 1,008 (the next is 984)"
    )


def test_the_nearest_recipe_is_named(capsys):
    found = planned(capsys, "--model", "lenet", "--data-set", "mnist", "--optimizer", "lamb", "--global-batch", 9000,
                    "--gpus", 1, "--throughput", 1)  # fmt: skip
    assert found["recipe"] == "lenet_mnist_lamb_8k"
    assert found["notes"][0] == "starting from the recipe lenet_mnist_lamb_8k, the nearest in batch"


def test_lars_between_recipes_starts_from_the_papers():
    """At 3,000 the nearest recipe is MLPerf's, whose other settings don't go with the paper's table."""
    assert scaled_recipe.nearest_recipe("resnet50", "imagenet", "LARS", 3000)[0] == "resnet50_imagenet_lars_8k_maxaug"
    assert scaled_recipe.nearest_recipe("resnet50", "imagenet", "LARS", 4096)[0] == "resnet50_imagenet_lars_4k_nus"


def test_little_memory_makes_a_smaller_micro_batch(capsys):
    mnist = ("--recipe", "lenet_mnist_lamb_32k", "--gpus", 2, "--throughput", 1)
    free, tight = (planned(capsys, *mnist, *more)["micro_batch"] for more in ((), ("--gpu-memory", "80MB")))
    assert tight < free
    code, _, err = run(capsys, *mnist, "--gpu-memory", "20MB")
    assert code == 2 and "20 MB a GPU, 8% of it in reserve, is too little" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --recipe, or --model"),
        (("--recipe", "lenet_mnist_lamb_8k", "--data-set", "mnist"), "--data-set goes with --model"),
        (("--recipe", "lenet_mnist_lam_8k", "--gpus", "1"), "did you mean 'lenet_mnist_lamb_8k'"),
        (("--model", "lenet", "--data-set", "imagenet", "--gpus", "1"), "there is no recipe for lenet, imagenet"),
        ((*MLP, "--zero-stage", "4"), "--zero-stage is '4'; expected 0, 1, 2, 3 or auto"),
        ((*MLP, "--micro-batch", "7"), "--micro-batch 7 does not divide 480 samples.*the nearest that do: 6 and 8"),
        ((*MLP, "--rule", "table"), "--rule table is of the LARS paper"),
        ((*MLP, "--network", "10gbe"), "--network is between nodes and there is one"),
        ((*MLP, "--nodes", "2", "--network", "10gb"), "expected one of 1gbe"),
        ((*MLP, "--recipe-phase", "1"), "has no phases; leave it out"),
        (("--recipe", "bert_text_lamb_32k", "--gpus", "1"), "has 2 phases, each a plan of its own"),
        (("--recipe", "lenet_mnist_lars_8k", "--gpus", "1", "--global-batch", "4096"), "no table for 'lenet'.*--rule sqrt"),
        (
            ("--recipe", "resnet50_imagenet_lars_4k_mlperf", "--gpus", "1", "--global-batch", "2048"),
            "the LARS paper's table goes with its own settings, and the recipe is from 'MLPerf",
        ),
        (("--recipe", "lenet_digits_sgd_480", "--gpus", "1", "--offload", "optimizer", "--zero-stage", "0"), "no plan"),
    ],
)  # fmt: skip
def test_refusals(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("largebatch: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to count")
def test_without_a_gpu_their_number_is_asked_for(capsys):
    code, _, err = run(capsys, "--recipe", "lenet_digits_lamb_480")
    assert code == 2 and "say with --gpus how many" in err


def test_published_systems_are_printed(capsys):
    code, out, _ = run(capsys, "--published")
    assert code == 0
    for text in ("512 KNL", "2,048 KNL", "1,024 Skylake", "64K/32K, 1,024 TPUv3", "128 TPUv3", "calibrates", "32,768"):
        assert text in out
    found = json.loads(run(capsys, "--published", "--json")[1])
    assert all((row["error"] is None) == row["calibrates"] for row in found["runs"])


class Squares(nn.Module):
    """Saves exactly its [batch, 1000] hidden layer and its input for backward."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(100, 1000, bias=False)

    def forward(self, inputs):
        return self.dense(inputs).square().sum()


def test_probe_counts_what_a_hand_can_count():
    """fp32: inputs 100 and hidden 1,000 per sample are saved; at the peak their squares' gradient is there, too."""
    found = probe(Squares(), lambda model, n: model(torch.randn(n, 100)), micro_batches=(50, 100, 200))
    per_sample = [(b - a) / 50 for a, b in zip(found.saved, found.saved[1:], strict=False)][0]
    assert per_sample == 4 * 1100
    assert found.largest_misfit < 1e-6 and found.bytes_per_sample >= 4 * 2100
    assert found.activations(400) == pytest.approx(found.activations(200) + 200 * found.bytes_per_sample)


def test_probe_frees_what_dies():
    """A chain of relus keeps one copy a layer, not one an operation."""

    def loss(model, n):
        hidden = torch.randn(n, 1000)
        with torch.no_grad():
            for _ in range(50):
                hidden = hidden + 1
        return F.relu(model(hidden)).sum()

    found = probe(nn.Linear(1000, 1), loss, micro_batches=(10, 20))
    assert found.bytes_per_sample < 4 * 1000 * 4


def test_probe_needs_two_micro_batches():
    with pytest.raises(ValueError, match="expected two or more different ones"):
        probe(Squares(), lambda model, n: model(torch.randn(n, 100)), micro_batches=(4, 4))
