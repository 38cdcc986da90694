"""Conversions to plain PyTorch and back, in one process: every layer and its state comes back, whatever the model is like."""

import argparse
import subprocess
import sys

import pytest
import torch
from torch import nn

import largebatch
from largebatch import checkpoint
from largebatch.launch.commands import convert as convert_command


class Model(nn.Module):
    """Any of: a weight with two names, a frozen one, a buffer that looks like a parameter, batch norm."""

    def __init__(self, *kinds):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        if "buffer" in kinds:
            self.register_buffer("mask", torch.ones(3, 3))
        self.body = nn.Linear(3, 3)
        if "frozen" in kinds:
            self.frozen = nn.Linear(3, 3)
            self.frozen.requires_grad_(False)
        if "norm" in kinds:
            self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        if "tied" in kinds:
            self.head.weight = self.embedding.weight


KINDS = [(), ("tied",), ("frozen",), ("buffer",), ("norm",), ("tied", "frozen", "buffer", "norm")]


def trained(kinds, optimizer_class=largebatch.LAMB):
    torch.manual_seed(0)
    model = Model(*kinds)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizer_class(named, lr=0.1)
    for _ in range(2):
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("optimizer_class", [largebatch.LAMB, largebatch.LARS], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kinds", KINDS, ids=lambda k: "+".join(k) or "plain")
def test_there_and_back(tmp_path, capsys, kinds, optimizer_class):
    """A file of the caller's own -> a folder -> a file -> a folder -> a file: the last is the first."""
    model, optimizer = trained(kinds, optimizer_class)
    first = tmp_path / "first.pt"
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_class": optimizer_class.__name__,
    }
    torch.save(content | {"num_steps": 2}, first)
    places = [first, tmp_path / "folder", tmp_path / "second.pt", tmp_path / "other", tmp_path / "third.pt"]
    for source, target in zip(places, places[1:], strict=False):
        assert convert_command.main([str(source), str(target)]) == 0, capsys.readouterr().err
    third = torch.load(tmp_path / "third.pt")
    assert third["model"].keys() == content["model"].keys()
    for name, value in content["model"].items():
        assert torch.equal(third["model"][name], value), name
    copies, other = trained(kinds, optimizer_class)
    copies.load_state_dict(third["model"])
    other.load_state_dict(third["optimizer"])
    for a, b in zip(model.parameters(), copies.parameters(), strict=True):
        for name, value in optimizer.state.get(a, {}).items():
            assert torch.equal(other.state[b][name], value)


def test_names_are_guessed_where_a_weight_is_tied():
    """Of a file of somebody else's, without names: a second name of a weight is no second parameter."""
    model, _ = trained(("tied",))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole = checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "torch.AdamW")
    assert whole.layers == [name for name, _ in model.named_parameters()]


def test_a_module_is_run_as_a_script_is(tmp_path):
    """``deepspeed --module largebatch package.module``: registered, with its own arguments, from the folder where one stands."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(
        "import sys\n"
        "from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS\n"
        "print(__name__, sys.argv[1:], 'lars' in DEEPSPEED_OPTIMIZERS)\n"
    )
    command = [sys.executable, "-m", "largebatch", "--local_rank=0"]
    run = subprocess.run([*command, "pkg.train", "--x", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "__main__ ['--local_rank=0', '--x', '1'] True"
    run = subprocess.run([*command, "pkg.missing"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "'pkg.missing' is neither a file nor a module" in run.stderr


@pytest.mark.parametrize("content", ["object", "text"])
def test_a_file_that_is_not_of_plain_values_is_one_line(tmp_path, content, capsys):
    path = tmp_path / "x.pt"
    if content == "object":
        torch.save({"model": {}, "optimizer": {}, "args": argparse.Namespace(a=1)}, path)
    else:
        path.write_bytes(b"hello")
    assert convert_command.main([str(path), str(tmp_path / "y.pt")]) == 2
    said = capsys.readouterr().err
    assert "cannot be read with weights_only=True" in said and said.count("\n") == 1


def test_a_wrapped_models_names_are_explained(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = largebatch.LAMB(model.named_parameters())
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="its names begin with 'module.' there, from DistributedDataParallel"):
        largebatch.checkpoint.from_state_dicts(weights, optimizer.state_dict(), "LAMB")
