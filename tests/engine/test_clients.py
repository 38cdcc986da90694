"""The examples, as examples/README.md says: each client steps our optimizer, with plain PyTorch's numbers on 1 and 2 ranks."""

import glob
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DistributedSampler

import largebatch
from largebatch.engine.lr_schedulers import WarmupPolyLR
from largebatch.launch.supervise.launcher import free_port, launcher_options
from support import engine_runs, launching

GLOBAL_BATCH = 512
NUM_EPOCHS = 4
NUM_STEPS = 12
BOUND = 1e-5
"""Largest error of a weight after 12 steps in fp32, relative to the largest of its layer: what summing in another order does."""


FSDP2 = pytest.param(
    "fsdp2",
    marks=pytest.mark.skipif(
        Version(torch.__version__).release < (2, 9),
        reason="on CPUs FSDP2 of torch 2.6 does not run (a CPU stream has no record_event), and that of 2.8 hands out the sum of the "
        "ranks' gradients, not their mean: to torch.optim.SGD, too",
    ),
)


@pytest.fixture
def example(monkeypatch):
    """Imports a module of examples/ by its name."""
    monkeypatch.syspath_prepend(str(launching.ROOT / "examples"))
    return importlib.import_module


def deepspeed(num_ranks, port, *arguments):
    launcher = shutil.which("deepspeed", path=launching.environment()["PATH"])
    return [launcher, *launcher_options(num_ranks, port), *arguments]


def torchrun(num_ranks, port, *arguments):
    run = [sys.executable, "-m", "torch.distributed.run"]
    return [*run, "--nproc_per_node", str(num_ranks), "--master_port", str(port), *arguments]


def run_on_1_and_2_ranks(command):
    """Standard output of both runs, side by side; ``command(num_ranks, port)`` gives the command line."""
    ports = {num_ranks: str(free_port()) for num_ranks in (1, 2)}
    processes = {
        num_ranks: subprocess.Popen(
            [str(word) for word in command(num_ranks, port)],
            cwd=launching.ROOT, env=launching.environment() | {"MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for num_ranks, port in ports.items()
    }  # fmt: skip
    outcomes = {num_ranks: launching.finish(process) for num_ranks, process in processes.items()}
    for port in ports.values():  # 66 MB a rank, which DeepSpeed leaves behind
        for path in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"):
            os.unlink(path)
    for code, out, err in outcomes.values():
        assert code == 0, out + err
    return {num_ranks: out for num_ranks, (_, out, _) in outcomes.items()}


def batches(seed=0):
    """[indices of a global batch], step by step: the order that torch's and Accelerate's samplers share."""
    for epoch in range(NUM_EPOCHS):
        sampler = DistributedSampler(range(NUM_STEPS // NUM_EPOCHS * GLOBAL_BATCH), num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        yield from torch.tensor(list(sampler)).split(GLOBAL_BATCH)


def train_in_one_process(model, optimizer, scheduler, loss_of, seed=0, max_norm=None):
    """{name: weight}, {name: trust ratio of the last step} of plain PyTorch, the whole batch at once."""
    start = [parameter.clone() for parameter in model.parameters()]
    for indices in batches(seed):
        loss_of(model, indices).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in zip(start, model.parameters(), strict=True))
    return model.state_dict(), {name: f["trust_ratio"] for name, f in optimizer.layer_stats().items()}


def digits_loss(example):
    (images, labels) = example("digits_data").digits()[0].tensors
    return lambda model, indices: cross_entropy(model(images[indices]), labels[indices])


def check(outputs, weights_of, expected, built, prefix=""):
    """Both runs ended with the expected weights and trust ratios, and name the class that stepped."""
    weights, ratios = expected
    for num_ranks, out in outputs.items():
        assert f"stepped by largebatch.optim.{built}" in out
        found = weights_of(num_ranks)
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert (found[name] - weight).abs().max() <= BOUND * weight.abs().max(), (num_ranks, name)
        if ratios is not None:
            found_ratios = {n: float(r) for n, r in re.findall(r"^(\S+) +trust ratio (\S+)$", out, flags=re.MULTILINE)}
            assert found_ratios == pytest.approx({prefix + n: r for n, r in ratios.items()}, rel=1e-3)


def weight_files(folder):
    return lambda num_ranks: torch.load(folder / f"{num_ranks}.pt", weights_only=True)


def lars(model, num_steps=NUM_STEPS):
    """The optimizer and schedule of ddp.py and lightning_strategy.py."""
    optimizer = largebatch.LARS(model.named_parameters(), lr=10.0, weight_decay=5e-4)
    return optimizer, PolynomialLR(optimizer, total_iters=num_steps, power=2)


def lamb(model):
    return largebatch.LAMB(
        model.parameters(), lr=0.04, weight_decay=0.01, exclude_from_adaptation=["bias", "norm"], model=model
    )


@pytest.mark.launcher
def test_an_unmodified_deepspeed_script(example, tmp_path):
    source = (launching.ROOT / "examples" / "deepspeed_script.py").read_text()
    assert "largebatch" not in source.split('"""')[2], "it knows nothing of us"
    outputs = run_on_1_and_2_ranks(
        lambda num_ranks, port: deepspeed(
            num_ranks, port, "--module", "largebatch", "examples/deepspeed_script.py", "--epochs", NUM_EPOCHS,
            "--deepspeed_config", "examples/deepspeed_script.json", "--output", tmp_path / f"{num_ranks}.pt",
        )
    )  # fmt: skip
    model = example("digits_data").build_model()
    optimizer = largebatch.LARS(model.parameters(), lr=10.0, momentum=0.9, weight_decay=5e-4)
    scheduler = WarmupPolyLR(optimizer, total_steps=60, warmup_steps=6, power=2)
    weights, _ = train_in_one_process(model, optimizer, scheduler, digits_loss(example))
    check(outputs, weight_files(tmp_path), (weights, None), "lars.LARS under DeepSpeedZeroOptimizer")


@pytest.mark.launcher
@pytest.mark.parametrize("is_with_deepspeed", [True, False], ids=["DeepSpeed", "DDP"])
def test_hugging_face_trainer(example, tmp_path, is_with_deepspeed):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which Trainer needs")
    from transformers import get_linear_schedule_with_warmup

    launcher = deepspeed if is_with_deepspeed else torchrun
    config = ["--deepspeed", "examples/hf_trainer.json"] if is_with_deepspeed else []
    outputs = run_on_1_and_2_ranks(
        lambda num_ranks, port: launcher(
            num_ranks, port, "examples/hf_trainer.py", *config,
            "--num_train_epochs", NUM_EPOCHS, "--per_device_train_batch_size", GLOBAL_BATCH // num_ranks,
            "--output_dir", tmp_path / str(num_ranks),
        )
    )  # fmt: skip
    hf_trainer = example("hf_trainer")
    model = hf_trainer.build_model()
    optimizer = largebatch.LAMB(
        model.parameters(), lr=hf_trainer.DEFAULTS["learning_rate"], weight_decay=0.01, eps=1e-6, model=model,
        exclude_from_adaptation=["bias", "norm"], exclude_from_weight_decay=["bias", "norm"],
    )  # fmt: skip
    scheduler = WarmupPolyLR(optimizer, total_steps=NUM_STEPS, warmup_steps=6, power=1)
    if not is_with_deepspeed:
        optimizer.param_groups[0]["lr"] = hf_trainer.DEFAULTS["learning_rate"]
        scheduler = get_linear_schedule_with_warmup(optimizer, 6, NUM_STEPS)
    images, labels = example("digits_data").digits()[0].tensors
    expected = train_in_one_process(
        model, optimizer, scheduler, seed=42, max_norm=1.0,
        loss_of=lambda m, i: m(pixel_values=images[i].view(-1, 1, 8, 8), labels=labels[i]).loss,
    )  # fmt: skip
    check(outputs, lambda n: type(model).from_pretrained(tmp_path / str(n)).state_dict(), expected, "lamb.LAMB")


@pytest.mark.launcher
@pytest.mark.parametrize("way", ["config", "code", "ddp", FSDP2])
def test_accelerate_plugin(example, tmp_path, way):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    is_plain = way in ("ddp", "fsdp2")
    launcher, option = (torchrun, ["--without_deepspeed", way]) if is_plain else (deepspeed, ["--optimizer_from", way])
    outputs = run_on_1_and_2_ranks(
        lambda num_ranks, port: launcher(
            num_ranks, port, "examples/accelerate_plugin.py", *option,
            "--epochs", NUM_EPOCHS, "--output", tmp_path / f"{num_ranks}.pt",
        )
    )  # fmt: skip
    model = example("digits_data").build_model()
    optimizer = lamb(model)
    scheduler = WarmupPolyLR(optimizer, total_steps=NUM_STEPS, warmup_steps=6, power=1)
    expected = train_in_one_process(model, optimizer, scheduler, digits_loss(example))
    check(outputs, weight_files(tmp_path), expected, "lamb.LAMB")


@pytest.mark.launcher
@pytest.mark.parametrize("optimizer_from", ["config", "code", "code, without DeepSpeed"])
def test_lightning_strategy(example, tmp_path, optimizer_from):
    pytest.importorskip("lightning", reason="lightning is not installed")
    config = ["--config", "examples/lightning_strategy.json"] if optimizer_from == "config" else []
    config += ["--without_deepspeed"] if "without" in optimizer_from else []
    outputs = run_on_1_and_2_ranks(
        lambda num_ranks, port: [
            sys.executable, "examples/lightning_strategy.py", *config, "--devices", num_ranks,
            "--epochs", NUM_EPOCHS, "--output", tmp_path / f"{num_ranks}.pt",
        ]
    )  # fmt: skip
    model = example("digits_data").build_model()
    optimizer, scheduler = lars(model)
    if optimizer_from == "config":
        optimizer = largebatch.LARS(model.named_parameters(), lr=10.0, weight_decay=5e-4)
        scheduler = WarmupPolyLR(optimizer, total_steps=60, warmup_steps=6, power=2)
    expected = train_in_one_process(model, optimizer, scheduler, digits_loss(example))
    check(outputs, weight_files(tmp_path), expected, "lars.LARS", prefix="network.")


@pytest.mark.launcher
@pytest.mark.parametrize("script", ["ddp", FSDP2])
def test_plain_pytorch(example, tmp_path, script):
    outputs = run_on_1_and_2_ranks(
        lambda num_ranks, port: torchrun(
            num_ranks, port, f"examples/{script}.py", "--epochs", NUM_EPOCHS, "--output", tmp_path / f"{num_ranks}.pt"
        )
    )
    model = example("digits_data").build_model()
    if script == "ddp":
        optimizer, scheduler = lars(model)
    else:
        optimizer = lamb(model)
        scheduler = PolynomialLR(optimizer, total_iters=NUM_STEPS, power=1)
    expected = train_in_one_process(model, optimizer, scheduler, digits_loss(example))
    check(outputs, weight_files(tmp_path), expected, {"ddp": "lars.LARS", "fsdp2": "lamb.LAMB"}[script])


def error_after_replacement():
    """What the engine says to another optimizer made from our param groups, as Accelerate makes it under CPU offload."""
    model = engine_runs.LinearLoss()
    ours = largebatch.LAMB(model.parameters(), lr=0.1)
    theirs = torch.optim.AdamW(ours.param_groups, lr=0.1)
    config = engine_runs.ds_config("LAMB", 1)
    del config["optimizer"]
    with pytest.raises(ValueError) as error, engine_runs.engine_for(config, model=model, optimizer=lambda _: theirs):
        pass
    return str(error.value)


def test_an_optimizer_in_the_place_of_ours_is_refused(rank_pool):
    (message,) = rank_pool.run(1, error_after_replacement)
    assert message.startswith("AdamW was put in the place of largebatch.LAMB")
    assert '"zero_force_ds_cpu_optimizer": false' in message
