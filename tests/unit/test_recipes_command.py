"""``largebatch recipes``: the list, its filters, and one recipe with nothing left open."""

import json
import os
import sys

import pytest

from largebatch.__main__ import main
from largebatch.launch.recipe.reading import find_recipe, load_recipes, read_recipe, recipe_paths


def run(capsys, *arguments):
    """(exit code, standard output, standard error)."""
    code = main(["recipes", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def names(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, [row["name"] for row in json.loads(out)]


def test_the_list_has_a_line_for_every_recipe(capsys):
    code, out, _ = run(capsys)
    header, *lines = out.splitlines()
    assert code == 0 and header.split() == "name model data optimizer lr batch expected source".split()
    assert [line.split()[0] for line in lines] == list(recipe_paths())
    line = next(line for line in lines if line.startswith("resnet50_imagenet_lars_8k_nus "))
    assert line.split()[:8] == [
        "resnet50_imagenet_lars_8k_nus",
        "resnet50",
        "imagenet",
        "LARS",
        "16",
        "8,192",
        "top1",
        "0.7714",
    ]


def test_filters_go_together(capsys):
    code, found = names(capsys, "--model", "ResNet50", "--optimizer", "lars", "--batch", "32k")
    assert code == 0 and found == [f"resnet50_imagenet_lars_32k_{s}" for s in ("maxaug", "minaug", "mlperf", "nus")]
    assert names(capsys, "--batch", "58880") == (0, ["resnet50_imagenet_lars_58880_mlperf"])
    assert names(capsys, "--data-set", "cifar10", "--optimizer", "Adam") == (0, ["davidnet_cifar10_adam_512"])
    assert names(capsys, "--text", "1706.02677", "BEYOND")[1] == [
        "resnet50_imagenet_sgd_16k",
        "resnet50_imagenet_sgd_32k",
    ]
    assert names(capsys, "--paper", "TPU-v3-512") == (0, ["resnet50_imagenet_lars_64k_mlperf"])
    code, _, err = run(capsys, "--model", "lenet", "--text", "tpu-v3-512")
    assert code == 1 and "no recipe matches all of this" in err


def test_json_says_what_the_list_says(capsys):
    _, out, _ = run(capsys, "--batch", "1632", "--json")
    (row,) = json.loads(out)
    assert (row["lr"], row["batch"], row["expected"]["value"]) == (7.4, 1632, 0.759)
    assert row["hardware"].startswith("8 GPUs")


def test_show_fills_in_everything(capsys):
    code, out, _ = run(capsys, "show", "resnet50_imagenet_sgd_4k", "--ranks", "8", "--json")
    config = json.loads(out)
    assert code == 0 and '"auto"' not in out and "tensorboard" not in config
    micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    assert micro * accumulation * 8 == config["train_batch_size"] == 4096
    assert config["optimizer"]["params"]["lr"] == pytest.approx(1.6)
    assert config["scheduler"]["params"]["steps_per_epoch"] == 1_281_167 / 4096
    code, out, _ = run(capsys, "show", "alexnet_imagenet_lars_16k.json", "--num-samples", "163840")
    assert "1,000 steps (100 epochs) of 16,384 = 256 x 64 accumulation steps x 1 ranks, LARS lr 14" in out


def test_show_prints_every_stage(capsys):
    code, out, _ = run(capsys, "show", "bert_text_lamb_64k_32k", "--num-samples", "1000000")
    assert code == 0 and "7,037 steps" in out and "1,562 steps" in out
    first, second = json.loads(out[out.index("\n[\n") :])
    assert (first["train_batch_size"], second["train_batch_size"]) == (65536, 32768)
    assert first["optimizer"]["params"]["lr"] == pytest.approx(0.005 * 2**0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "alexnt"], "--model is 'alexnt'; the recipes have alexnet, alexnet_bn, bert"),
        (["--model", "alexnt"], "(did you mean 'alexnet'?)"),
        (["--optimizer", "lam"], "(did you mean 'lamb'?)"),
        (["--batch", "31k"], "--batch is '31k', and no recipe has it; the nearest are 13056, 16384, 32768, 49152"),
        (["--batch", "many"], "--batch is 'many'; expected a number such as 32768 or 32k"),
        (["show", "davidnet_cifar10_lamb_521"], "'davidnet_cifar10_lamb_521' is not a recipe (did you mean 'davidnet_cifar10_lamb_512'?)"),
        (["show", "davidnet_cifar10_lamb_512", "--ranks", "3"], "train_batch_size is 512 and there are 3 ranks"),
        (["show", "davidnet_cifar10_lamb_512", "--ranks", "0"], "--ranks is 0; expected a number >= 1"),
        (["show", "davidnet_cifar10_lamb_512", "--num-samples", "0"], "--num-samples is 0; expected a number >= 1"),
        (["show", "bert_text_lamb_512"], "bert_text_lamb_512 needs --num-samples: the size of its training set (text) is yours"),
    ],
)  # fmt: skip
def test_errors(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.startswith("largebatch: error: ") and message in err and err.count("\n") == 1


def test_the_trainer_takes_a_recipe_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("lenet_mnist_lars_8k") == load_recipes()["lenet_mnist_lars_8k"]
    with pytest.raises(ValueError, match="'lenet_mnist_lars_9k' is not a recipe .did you mean 'lenet_mnist_lars_.k'"):
        read_recipe("lenet_mnist_lars_9k")
    (tmp_path / "lenet_mnist_lars_8k").write_text("{}")  # a file of that name is meant first
    assert read_recipe("lenet_mnist_lars_8k") == {}
    assert find_recipe("lenet_mnist_lars_8k").suffix == ".json"


def test_a_closed_pipe_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["recipes"]) == 0
