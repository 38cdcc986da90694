"""The study: which runs, in what order, what is done again, and what is made of their metrics. No training."""

import csv
import json
import math
import pathlib
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

import largebatch.ds_configs
from largebatch.launch.commands import study as study_command
from largebatch.launch.recipe.reading import load_recipes
from largebatch.launch.recipe.resolved_run import resolve
from largebatch.launch.recipe.section import phase_recipes
from largebatch.launch.study import grid, grid_study, plots, results, runner

RECIPES = pathlib.Path(largebatch.ds_configs.__file__).parent
PUBLISHED = pathlib.Path(__file__).parents[2] / "docs" / "results" / "mnist" / "runs.csv"
GRID = (
    "--model",
    "lenet",
    "--data-set",
    "mnist",
    "--batches",
    "1024,60000",
    "--optimizers",
    "sgd,lamb",
    "--seeds",
    "2",
)


def cell(optimizer, batch, folder=RECIPES):
    return grid.make_cell(str(folder), "lenet", "mnist", optimizer, batch)


def test_batches_are_named_as_in_the_recipes():
    assert [grid.batch_label(b) for b in (480, 512, 1000, 1024, 8192, 32768, 60000, 65536, 1500)] == [
        "480", "512", "1k", "1k", "8k", "32k", "60k", "64k", "1500"
    ]  # fmt: skip


def test_a_recipe_with_the_batch_is_taken_as_it_is():
    for name in ("sgd", "lars", "lamb", "adamw"):
        for batch, label in ((1024, "1k"), (8192, "8k"), (32768, "32k"), (60000, "60k")):
            found = cell(name, batch)
            assert found.origin == f"lenet_mnist_{name}_{label}"
            assert found.recipe == json.loads((RECIPES / f"{found.origin}.json").read_text())


def test_variants_of_recipes(tmp_path):
    for name in ("lars_1k", "lars_1k_author", "lars_2k_author", "sgd_4k", "lamb_1k_maxaug", "lamb_1k_minaug"):
        recipe = {"train_batch_size": 1024 * int(name.split("_")[1][0]), "largebatch": {}, "optimizer": {"params": {}}}
        (tmp_path / f"lenet_mnist_{name}.json").write_text(json.dumps(recipe))
    origin = lambda *names: grid.make_cell(str(tmp_path), "lenet", "mnist", *names).origin  # noqa: E731
    assert origin("lars", 1024) == "lenet_mnist_lars_1k"
    assert origin("lars", 2048, "author") == "lenet_mnist_lars_2k_author"
    assert origin("sgd", 4096, "author") == "lenet_mnist_sgd_4k", "which has no such variant"
    for variant in (None, "author"):
        with pytest.raises(ValueError, match="have variants only; expected one of maxaug, minaug"):
            origin("lamb", 1024, variant)


def test_phases_cannot_be_scaled():
    recipe = {"largebatch": {"phases": [{}]}, "train_batch_size": 512, "optimizer": {"params": {}}}
    with pytest.raises(ValueError, match="batch 1024 has no recipe, and the nearest, of 512, has phases"):
        grid.scaled_recipe(recipe, "lamb", 1024)


def test_a_stretched_or_phased_recipe_is_recognised(tmp_path):
    """What train.py records of a recipe against the recipe: filled in, stretched, its first phase."""
    plain = cell("lamb", 8192).recipe
    stretched = plain | {"largebatch": plain["largebatch"] | {"schedule_stretch": 1.5}}
    phases = [{"largebatch": {"epochs": 3}}, {"largebatch": {"epochs": 1}}]
    phased = plain | {"largebatch": plain["largebatch"] | {"phases": phases}}
    for number, recipe in enumerate((plain, stretched, phased)):
        recorded = resolve(phase_recipes(recipe)[0], num_samples=60000, world_size=2, output="out").config
        folder = tmp_path / str(number)
        write_metrics(folder, recorded)
        assert runner.differences(recipe, str(folder)) == []
        other = recipe | {"largebatch": recipe["largebatch"] | {"schedule_stretch": 2}}
        assert any("largebatch.epochs" in text for text in runner.differences(other, str(folder)))
    assert grid_study.Pace().samples_of(phase_recipes(stretched | {"largebatch": {"steps": 9}})[0]) == 9 * 8192


def test_runs_go_seed_by_seed():
    runs = grid.expand(
        str(RECIPES), model="lenet", data="mnist", optimizers=["sgd", "lars"], batches=[1024, 8192], seeds=[1, 2]
    )
    once = ["sgd_1k", "lars_1k", "sgd_8k", "lars_8k"]
    assert [run.name for run in runs] == [f"{name}_seed{seed}" for seed in (1, 2) for name in once]


@given(
    optimizer=st.sampled_from(["sgd", "lars", "lamb", "adamw"]),
    batch=st.integers(100, 200_000),
)
def test_scaling_keeps_rule_and_epochs(optimizer, batch):
    """The filled-in recipe of any batch against the rules, with the nearest recipe as the base."""
    found = cell(optimizer, batch)
    bases = {b: cell(optimizer, b).recipe for b in (1024, 8192, 32768, 60000)}
    if batch in bases:
        return
    base = min(bases, key=lambda b: (abs(math.log(b / batch)), b))
    one, other = (
        resolve(recipe, num_samples=60000, world_size=1, output="out") for recipe in (bases[base], found.recipe)
    )
    assert other.global_batch == batch and f"from {base:,} to {batch:,}" in found.origin
    lrs = [plan.config["optimizer"]["params"]["lr"] for plan in (one, other)]
    ratio = batch / base if optimizer == "sgd" else math.sqrt(batch / base)
    assert lrs[1] == pytest.approx(lrs[0] * ratio)
    epochs = [plan.num_steps * plan.global_batch / 60000 for plan in (one, other)]
    assert abs(epochs[1] - epochs[0]) <= 1.01 * max(base, batch) / 60000, "up to one step"
    warmups = [plan.config["scheduler"]["params"]["warmup_epochs"] for plan in (one, other)]
    if optimizer == "lamb":
        limit = (found.recipe["largebatch"].get("epochs") or math.inf) / 2
        assert warmups[1] == pytest.approx(min(limit, warmups[0] * batch / base))
    else:
        assert warmups[0] == warmups[1]


def test_a_recipe_that_counts_in_steps_is_scaled_in_steps():
    recipe = {
        "largebatch": {"steps": 1000, "lr_scaling": None, "expected": {"value": 0.5}},
        "train_batch_size": 256,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "scheduler": {"type": "WarmupStepLR", "params": {"warmup_steps": 100, "milestone_steps": [300, 600]}},
    }
    scaled, how = grid.scaled_recipe(recipe, "sgd", 1024)
    assert scaled["largebatch"] == {"steps": 250, "lr_scaling": {"rule": "linear", "base_lr": 0.1, "base_batch": 256}}
    assert scaled["scheduler"]["params"] == {"warmup_steps": 25, "milestone_steps": [75, 150]}
    assert scaled["optimizer"]["params"]["lr"] == "auto" and how == "learning rate: linear rule"
    assert recipe["train_batch_size"] == 256, "the given recipe stays"


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--optimizers", "lasr"], "no recipe lenet_mnist_lasr_<batch>.json in"),
        (["--optimizers", "lasr"], "(did you mean 'lenet_mnist_lars'?)"),
        (["--recipes", "nowhere"], "--recipes is 'nowhere', which is not a folder"),
        (["--epochs", "1", "--steps", "1"], "--epochs and --steps are both given"),
        (["--batches", "1000,8192,1024"], "--batches has 1000 and 1024, both called 1k"),
        (["--set", "nonsense"], "expected KEY=VALUE"),
        (["--set", "largebatch.seed=3"], "the grid sets that itself"),
    ],
)
def test_bad_requests(changes, message, tmp_path, capsys):
    assert study_command.main([*GRID, "--output", str(tmp_path), *changes]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [["--batches", "0"], ["--seeds", "-1"], ["--batches", "1024,1024"], ["--batch", "1"]]
)
def test_malformed_arguments(changes):
    with pytest.raises(SystemExit) as caught:
        study_command.main([*GRID, *changes])
    assert caught.value.code == 2


def write_metrics(folder, recipe, *, steps=4, losses=None, is_ended=True, num_samples=60000, top1=0.9):
    """What a run leaves behind, without the run."""
    batch = recipe["train_batch_size"]
    params = recipe["optimizer"]["params"] | {"lr": 0.5}
    filled = recipe | {"optimizer": recipe["optimizer"] | {"params": params}}
    events = [{"event": "start", "config": filled, "world_size": 2}]
    for step in range(1, steps + 1):
        loss = losses[step - 1] if losses else 1 / step
        events.append({"event": "step", "step": step, "epoch": step * batch / num_samples, "loss": loss, "lr": 0.5})
        layers = {name: {key: step + number for key, _ in plots.PANELS} for number, name in enumerate(("w", "bias"))}
        events.append({"event": "layers", "step": step, "layers": layers})
        events.append({"event": "evaluation", "step": step, "top1": top1 * step / steps, "top5": 0.99})
    if is_ended:
        events.append({"event": "end", "step": steps, "images_per_second": 1000.0, "top1": top1, "top5": 0.99})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


@pytest.fixture
def trained(monkeypatch):
    """Replaces the launcher by one that writes metrics at once; notes (run, state that it found)."""
    calls = []

    def train(launch, recipe, folder, *, lock):
        folder = pathlib.Path(folder)
        calls.append((folder.name, runner.state_of(str(folder))))
        if folder.name in train.failing:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.txt").write_text("largebatch: error: no memory left\nthe launcher's last words\n")
            return 1
        if folder.name == train.interrupted_at:
            raise KeyboardInterrupt
        number = sum(map(ord, folder.name))
        write_metrics(folder, recipe, top1=0.9 + number % 50 / 1000, losses=train.losses)
        return 0

    train.failing, train.interrupted_at, train.losses, train.calls = (), None, None, calls
    monkeypatch.setattr(runner, "train", train)
    return train


def study(tmp_path, *more):
    return study_command.main([*GRID, "--output", str(tmp_path), "--ranks", "2", *more])


def rows_of(tmp_path):
    with open(tmp_path / "runs.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


ALL = [f"{name}_seed{seed}" for seed in (1, 2) for name in ("sgd_1k", "lamb_1k", "sgd_60k", "lamb_60k")]


def test_a_whole_study(trained, tmp_path, capsys):
    assert study(tmp_path) == 0
    out = capsys.readouterr().out
    assert [name for name, _ in trained.calls] == ALL
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert len(lines) == 8 and lines[0].startswith("[1/8] sgd_1k_seed1: top1 0.9") and "left for 7 runs" in lines[0]
    assert [row["folder"] for row in rows_of(tmp_path)] == ALL
    row = rows_of(tmp_path)[3]
    assert (row["optimizer"], row["batch"], row["seed"], row["steps"], row["metric"]) == (
        "lamb",
        "60000",
        "1",
        "4",
        "top1",
    )
    values = [float(r["value"]) for r in rows_of(tmp_path) if r["folder"].startswith("lamb_60k")]
    table = (tmp_path / "table.md").read_text()
    assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} (2)" in table and table in out
    for name in ("value_by_batch.png", "value_by_step.png", "layers_sgd_60k_seed1.png", "layers_lamb_60k_seed1.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG"), name


def test_interrupted_and_called_again(trained, tmp_path, capsys):
    trained.interrupted_at = "sgd_60k_seed1"
    assert study(tmp_path, "--no-plots") == 130
    assert len(rows_of(tmp_path)) == 2 and "the same command goes on" in capsys.readouterr().out
    trained.interrupted_at = None
    assert study(tmp_path, "--no-plots") == 0
    assert [name for name, _ in trained.calls] == ALL[:3] + ALL[2:], "finished runs are not done again"
    assert "8 runs, 2 of them finished before" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 8


def test_a_failed_run_is_named_and_stops_nothing(trained, tmp_path, capsys):
    trained.failing = ("lamb_1k_seed1",)
    assert study(tmp_path, "--no-plots") == 1
    out = capsys.readouterr().out
    assert "[2/8] lamb_1k_seed1: FAILED: exit code 1, largebatch: error: no memory left" in out
    assert "failed: lamb_1k_seed1" in out.splitlines()[-1]
    assert len(trained.calls) == 8 and len(rows_of(tmp_path)) == 7


def test_a_diverged_run_counts(trained, tmp_path, capsys):
    trained.losses = [1.0, math.nan, math.nan, math.nan]
    assert study(tmp_path) == 0
    assert "the loss became non-finite" in capsys.readouterr().out
    assert {row["is_diverged"] for row in rows_of(tmp_path)} == {"True"} and len(rows_of(tmp_path)) == 8


def test_a_run_of_another_setting_is_not_taken(trained, tmp_path, capsys):
    assert study(tmp_path, "--no-plots") == 0
    assert study(tmp_path, "--no-plots", "--set", "optimizer.params.weight_decay=0.5") == 2
    assert (
        "holds a run with optimizer.params.weight_decay 0.0001, not 0.5; choose another --output"
        in capsys.readouterr().err
    )
    assert study(tmp_path, "--no-plots", "--set", 'largebatch.source="another word for it"') == 0
    assert len(trained.calls) == 8


def test_overrides_reach_the_recipes(trained, tmp_path):
    assert study(tmp_path, "--no-plots", "--epochs", "0.5", "--set", "gradient_clipping=1.5") == 0
    config = results.events_of(str(tmp_path / "sgd_60k_seed2"))[0]["config"]
    assert config["largebatch"]["epochs"] == 0.5 and config["largebatch"]["steps"] is None
    assert config["largebatch"]["seed"] == 2 and config["gradient_clipping"] == 1.5


def test_finished_runs_from_a_csv(trained, tmp_path, capsys):
    """The folders of an earlier study are gone, its table is there: only what it lacks is trained."""
    whole = results.read_csv(str(PUBLISHED))
    results.write_csv(str(tmp_path / "again.csv"), whole)
    assert (tmp_path / "again.csv").read_bytes() == PUBLISHED.read_bytes()
    earlier = [row for row in whole if row.folder in ALL[:3]]
    results.write_csv(str(tmp_path / "earlier.csv"), earlier)
    options = ("--finished", str(tmp_path / "earlier.csv"))
    assert study(tmp_path / "now", *options) == 0
    assert [name for name, _ in trained.calls] == ALL[3:]
    assert "8 runs, 3 of them finished before" in capsys.readouterr().out
    assert [row["folder"] for row in rows_of(tmp_path / "now")] == ALL
    assert results.read_csv(str(tmp_path / "now" / "runs.csv"))[:3] == earlier
    assert (tmp_path / "now" / "value_by_batch.png").exists() and (tmp_path / "now" / "value_by_step.png").exists()
    assert (tmp_path / "now" / "layers_sgd_60k_seed2.png").exists(), "seed 1 has no folder"
    assert study(tmp_path / "now", "--no-plots", *options) == 0 and len(trained.calls) == 5


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("recipe_digest", "0123456789ab", "--finished has a row sgd_1k_seed1 with recipe_digest '0123456789ab', not '"),
        ("recipe", "mine", "with recipe 'mine', not 'lenet_mnist_sgd_1k'"),
        ("metric", "top5", "with metric 'top5', not 'top1'"),
        ("batch", "many", "line 2: ValueError"),
        ("batch", None, "line 2: KeyError('batch'); expected the columns model, data,"),
    ],
)
def test_finished_runs_of_another_setting_are_refused(trained, tmp_path, capsys, column, value, message):
    row = {"model": "lenet", "data": "mnist", "optimizer": "sgd", "batch": 1024, "seed": 1, "lr": 0.08, "steps": 235,
           "epochs": 4.01067, "metric": "top1", "value": 0.98, "final_loss": 0.1, "is_diverged": False,
           "samples_per_second": 1.0, "ranks": 2, "recipe": "lenet_mnist_sgd_1k", "recipe_digest": results.digest(cell("sgd", 1024).recipe),
           "folder": "sgd_1k_seed1"}  # fmt: skip
    row[column] = value
    if value is None:
        del row[column]
    with open(tmp_path / "earlier.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    options = ["--finished", str(tmp_path / "earlier.csv"), "--metric", "top1", "--no-plots"]
    assert study(tmp_path, *options) == 2
    assert message in capsys.readouterr().err and not trained.calls


def test_the_digest_tells_what_was_set(trained, tmp_path, capsys):
    changed = ("--no-plots", "--set", "largebatch.batch_norm.momentum=0.5", "--set", "gradient_clipping=1")
    assert study(tmp_path / "one", *changed) == 0
    finished = ("--finished", str(tmp_path / "one" / "runs.csv"))
    assert study(tmp_path / "two", *changed, *finished) == 0
    assert len(trained.calls) == 8, "all taken from the CSV"
    assert study(tmp_path / "three", "--no-plots", *finished) == 2
    assert "sgd_1k_seed1 with recipe_digest" in capsys.readouterr().err
    assert study(tmp_path / "three", "--finished", str(tmp_path / "none.csv")) == 2
    assert "none.csv' cannot be read" in capsys.readouterr().err


def test_what_is_in_the_digest():
    recipe = cell("sgd", 1024).recipe

    def digest(section=None, **keys):
        return results.digest(recipe | keys | {"largebatch": recipe["largebatch"] | (section or {})})

    same = [{}, {"seed": 7}, {"source": "elsewhere"}, {"mixup": 0.0}, {"keep_last": 3}]
    assert {digest(section) for section in same} == {results.digest(recipe)}
    others = [
        digest({"mixup": 0.1}), digest({"batch_norm": {"momentum": 0.5}}), digest({"epochs": 5}), digest({"unknown": 0}),
        digest(gradient_clipping=2.0), digest(optimizer={"type": "SGD", "params": {"lr": 0.1}}),
    ]  # fmt: skip
    assert len({*others, results.digest(recipe)}) == len(others) + 1


def test_two_studies_cannot_share_a_folder(trained, tmp_path, capsys):
    arguments = study_command.parse_arguments([*GRID, "--output", str(tmp_path)])
    with grid_study.Study(arguments, []).locked():
        assert study(tmp_path) == 2
    assert "another study, or a run that it left, is at work" in capsys.readouterr().err and not trained.calls


def test_states(tmp_path):
    recipe = cell("sgd", 1024).recipe
    assert runner.state_of(str(tmp_path / "run")) == "new"
    write_metrics(tmp_path / "run", recipe, is_ended=False)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')  # killed while writing
    assert runner.state_of(str(tmp_path / "run")) == "begun"
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step4")
    assert runner.state_of(str(tmp_path / "run")) == "resumable"
    write_metrics(tmp_path / "run", recipe)
    assert runner.state_of(str(tmp_path / "run")) == "finished"


def test_the_metric_may_be_another(trained, tmp_path, capsys):
    assert study(tmp_path, "--no-plots", "--metric", "top5") == 0
    assert {row["value"] for row in rows_of(tmp_path)} == {"0.99"}
    assert study(tmp_path, "--metric", "top2") == 2
    assert "--metric is 'top2'; expected one of top1, top5" in capsys.readouterr().err


def test_layers_of_one_run(tmp_path, capsys):
    picture = tmp_path / "layers.png"
    recipe = cell("lars", 1024).recipe
    recipe["largebatch"]["seed"] = 1
    write_metrics(tmp_path / "run", recipe)
    assert plots.main(str(tmp_path / "run"), str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plots.main(str(tmp_path), str(picture)) == 2
    assert "no events 'layers' in" in capsys.readouterr().err


def test_durations():
    assert [grid_study.duration(s) for s in (4.4, 65, 3600 * 2 + 61)] == ["4 s", "1 min 05 s", "2 h 01 min"]


def test_renamed_keys_do_not_change_the_digest():
    """The rows of a study from before are taken for what they are."""
    recipe = load_recipes()["davidnet_cifar10_lars_512"]
    assert recipe["largebatch"]["batch_norm"] == {"ghost_batch_size": 512}
    earlier = recipe["largebatch"] | {"batch_norm": {"span": 512}}
    assert results.digest(recipe | {"largebatch": earlier}) == results.digest(recipe)
