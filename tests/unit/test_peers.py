"""Optimizer state of other packages: a run that changes over to ours, or back, goes on as if it had not.

apex is not on PyPI and DeepSpeed's FusedLamb needs a GPU to step. Their state_dicts are laid out here as their sources do it
(apex/optimizers/fused_lamb.py, apex/parallel/LARC.py; deepspeed/ops/lamb/fused_lamb.py, whose class is used where it is there).
"""

import inspect
import json

import pytest
import torch
from torch import nn

import largebatch
from largebatch import checkpoint
from largebatch.__main__ import main
from support.problems import as_parameters, random_gradients, random_layers, relative_error, run_optimizer

FIRST, REST = 6, 6
GRADS = random_gradients(FIRST + REST)
NAMES = [f"layer{i}" for i in range(8)]
CONSTANT = [0.01] * (FIRST + REST)
CHANGING = [0.01 * (1 + i / 4) for i in range(FIRST)] + [0.02 / (1 + i) for i in range(REST)]


def timm_lamb(parameters, **options):
    from timm.optim import Lamb

    return Lamb(parameters, lr=0.01, **{"weight_decay": 0.02} | options)


def timm_lars(parameters, **options):
    from timm.optim import Lars

    return Lars(parameters, lr=0.01, **{"momentum": 0.9, "weight_decay": 1e-3} | options)


def apex_larc(parameters):
    """torch.optim.SGD as LARC drives it: the ratio enters the gradient, decay is LARC's own."""
    return LARC(parameters, lr=0.01, momentum=0.9)


class LARC(torch.optim.SGD):
    """apex/parallel/LARC.py with clip=True, trust_coefficient 0.02, weight decay 1e-3."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                ratio = 0.02 * p.detach().norm() / (p.grad.norm() + 1e-3 * p.detach().norm() + 1e-8)
                p.grad = (p.grad + 1e-3 * p.detach()) * min(ratio / group["lr"], 1)
        return super().step(closure)


def train(optimizer, parameters, steps, lrs=CHANGING):
    return run_optimizer(optimizer, parameters, [GRADS[i] for i in steps], [lrs[i] for i in steps])


def started(make, lrs=CHANGING, dtype=torch.float64):
    """(parameters, optimizer) after the first steps."""
    parameters = as_parameters(random_layers(), dtype)
    optimizer = make(parameters)
    train(optimizer, parameters, range(FIRST), lrs)
    return parameters, optimizer


def whole_of(parameters, optimizer, kind, **options):
    model = {name: p.detach().clone() for name, p in zip(NAMES, parameters, strict=True)}
    return checkpoint.from_state_dicts(model, optimizer.state_dict(), kind, **options)


def continued(whole, make, lrs=CHANGING):
    """The weights at the end, from a state that another optimizer has left."""
    parameters = [nn.Parameter(whole.weights[name].clone()) for name in NAMES]
    optimizer = make(parameters)
    optimizer.load_state_dict(checkpoint.torch_state_dict(whole))
    return train(optimizer, parameters, range(FIRST, FIRST + REST), lrs)


PAIRS = {
    "timm.Lamb": (timm_lamb, "LAMB", lambda p: largebatch.LAMB(p, lr=0.01, preset="timm", weight_decay=0.02)),
    "timm.Lars": (timm_lars, "LARS", lambda p: largebatch.LARS(p, lr=0.01, preset="timm", weight_decay=1e-3)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_run_changes_over_and_back(kind):
    theirs, ours, make = PAIRS[kind]
    expected = train(*reversed(started(theirs)), range(FIRST, FIRST + REST))
    whole = whole_of(*started(theirs), kind)
    assert whole.num_steps == (FIRST if kind == "timm.Lamb" else None)
    mine = checkpoint.convert(whole, ours)
    assert relative_error(continued(mine, make), expected) < 1e-12
    back = checkpoint.convert(whole_of(*started(make), ours), kind)
    assert relative_error(continued(back, theirs), expected) < 1e-12
    assert not [line for line in checkpoint.changed_options(whole, mine) if "clips all" not in line]


def test_apex_larc():
    expected = train(*reversed(started(apex_larc)), range(FIRST, FIRST + REST))
    options = {"preset": "apex", "weight_decay": 1e-3, "momentum": 0.9}
    whole = checkpoint.convert(whole_of(*started(apex_larc), "apex.LARC"), "LARS", weight_decay=1e-3)
    assert whole.groups[0]["larc_clip"] and not whole.groups[0]["lr_in_momentum"]
    assert relative_error(continued(whole, lambda p: largebatch.LARS(p, lr=0.01, **options)), expected) < 1e-12


def test_learning_rate_inside_the_momentum():
    """Under a constant learning rate, LARS is the same inside and outside; converted, the run is the same, too."""
    inside = lambda p: largebatch.LARS(p, lr=0.01, weight_decay=1e-3, eps=1e-8)  # noqa: E731
    outside = lambda p: largebatch.LARS(p, lr=0.01, weight_decay=1e-3, eps=1e-8, lr_in_momentum=False)  # noqa: E731
    expected = train(*reversed(started(inside, CONSTANT)), range(FIRST, FIRST + REST), CONSTANT)
    whole = whole_of(*started(inside, CONSTANT), "LARS")
    taken_out = checkpoint.convert(whole, "LARS", lr_in_momentum=False)
    assert relative_error(continued(taken_out, outside, CONSTANT), expected) < 1e-12
    put_in = checkpoint.convert(whole_of(*started(outside, CONSTANT), "LARS"), "LARS", lr_in_momentum=True)
    assert relative_error(continued(put_in, inside, CONSTANT), expected) < 1e-12
    with pytest.raises(ValueError, match="the saved momentum was made with lr_in_momentum=True"):
        continued(whole, outside, CONSTANT)
    timm = checkpoint.convert(whole, "timm.Lars")
    assert relative_error(continued(timm, lambda p: timm_lars(p, always_adapt=True), CONSTANT), expected) < 1e-12


def test_what_cannot_be_converted():
    whole = whole_of(*started(PAIRS["timm.Lars"][2]), "LARS")
    still = whole_of(*started(lambda p: largebatch.LARS(p, lr=0.01)), "LARS")
    still.groups[0]["lr"] = 0.0
    other = whole_of(*started(lambda p: largebatch.LARS(p, lr=0.01, formulation="2019")), "LARS")
    damped = whole_of(*started(lambda p: timm_lars(p, dampening=0.5)), "timm.Lars")
    decayed = whole_of(*started(lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)), "torch.Adam")
    largest = whole_of(*started(lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True)), "torch.AdamW")
    for state, kind, options, words in (
        (whole, "LAMB", {}, "LARS keeps a momentum and LAMB two moments"),
        (whole, "timm.lars", {}, "did you mean 'timm.Lars'"),
        (whole, "LARS", {"lr_in_momentun": True}, "did you mean 'lr_in_momentum'"),
        (whole, "LARS", {"momentum": 2.0}, "momentum is 2.0; expected"),
        (whole, "timm.Lars", {"trust": 1}, "timm.Lars has no option 'trust'"),
        (still, "timm.Lars", {}, "the learning rate is 0 and lies inside the momentum"),
        (other, "LARS", {"formulation": "2017"}, "one momentum holds scaled steps"),
        (other, "torch.SGD", {}, 'formulation is "2019"'),
        (damped, "LARS", {}, "timm.Lars has dampening=0.5"),
        (decayed, "LAMB", {}, "the moments hold wd w"),
        (largest, "LAMB", {}, "torch.AdamW has amsgrad=True"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoint.convert(state, kind, **options)


def test_apex_fused_lamb():
    """step counts in the group, as an int; without grad_averaging the first moment is 1 / (1 - beta1) times as large."""
    parameters, optimizer = started(timm_lamb)
    averaged = whole_of(parameters, optimizer, "timm.Lamb")
    theirs = checkpoint.convert(averaged, "apex.FusedLAMB")
    (group,) = theirs.groups
    assert set(group) == {
        "lr", "bias_correction", "betas", "eps", "weight_decay", "grad_averaging", "max_grad_norm", "step", "params"
    }  # fmt: skip
    assert group["step"] == FIRST and type(group["step"]) is int and group["weight_decay"] == 0.02
    assert set(theirs.state["layer0"]) == {"exp_avg", "exp_avg_sq"}
    ours = checkpoint.convert(theirs, "LAMB")
    assert all(float(ours.state[name]["step"]) == FIRST for name in NAMES)
    plain = whole_of(*started(lambda p: timm_lamb(p, grad_averaging=False)), "timm.Lamb")
    plain.optimizer = "apex.FusedLAMB"
    found = checkpoint.convert(plain, "LAMB")
    for name in ("layer0", "layer4"):  # both saw the same gradients in their first step
        assert relative_error([found.state[name]["exp_avg_sq"]], [plain.state[name]["exp_avg_sq"]]) == 0
        assert relative_error([found.state[name]["exp_avg"]], [0.1 * plain.state[name]["exp_avg"]]) < 1e-12
    back = checkpoint.convert(found, "apex.FusedLAMB", grad_averaging=False)
    assert relative_error([back.state["layer0"]["exp_avg"]], [plain.state["layer0"]["exp_avg"]]) < 1e-12


def test_gradients_enter_the_moments_alike():
    """In the first step: exp_avg of timm without averaging is the gradient, of ours 1 - beta1 of it."""
    grads = [torch.tensor(g) for g in GRADS[0]]
    found = {}
    for kind, options in (
        ("whole", {"grad_averaging": False, "max_grad_norm": None}),
        ("averaged", {"max_grad_norm": None}),
    ):
        parameters = as_parameters(random_layers(), torch.float64)
        optimizer = timm_lamb(parameters, **options)
        train(optimizer, parameters, range(1))
        found[kind] = checkpoint.convert(whole_of(parameters, optimizer, "timm.Lamb"), "LAMB")
    for name, grad in zip(NAMES, grads, strict=True):
        for whole in found.values():
            assert relative_error([whole.state[name]["exp_avg"]], [0.1 * grad]) < 1e-12


def test_deepspeed_fused_lamb(monkeypatch):
    """The real class takes the converted state; its kernel, which only a GPU has, is not called."""
    from deepspeed.ops.lamb import fused_lamb

    monkeypatch.setattr(fused_lamb, "FusedLambBuilder", lambda: type("Builder", (), {"load": lambda self: None})())
    make = lambda p: largebatch.LAMB(p, lr=0.01, preset="deepspeed", weight_decay=0.02)  # noqa: E731
    expected = train(*reversed(started(make)), range(FIRST, FIRST + REST))
    theirs = checkpoint.convert(whole_of(*started(make), "LAMB"), "deepspeed.FusedLamb")
    parameters = [nn.Parameter(theirs.weights[name]) for name in NAMES]
    peer = fused_lamb.FusedLamb(parameters, lr=0.01)
    assert set(theirs.groups[0]) == set(peer.param_groups[0])
    defaults = {k: p.default for k, p in inspect.signature(fused_lamb.FusedLamb.__init__).parameters.items()}
    assert all(defaults[k] == v for k, v in checkpoint.peers.PEERS["deepspeed.FusedLamb"].defaults.items())
    peer.load_state_dict(checkpoint.torch_state_dict(theirs))
    assert peer.state[parameters[0]]["step"] == FIRST and type(peer.state[parameters[0]]["step"]) is int
    assert (peer.param_groups[0]["min_coeff"], peer.param_groups[0]["max_coeff"]) == (0.01, 10.0)
    back = checkpoint.convert(whole_of(parameters, peer, "deepspeed.FusedLamb"), "LAMB")
    assert relative_error(continued(back, make), expected) < 1e-12


@pytest.mark.parametrize("kind", ["torch.AdamW", "torch.Adam", "torch.SGD", "timm.Lamb", "timm.Lars"])
def test_options_are_those_of_the_real_class(kind):
    import timm.optim

    package = torch.optim if kind.startswith("torch.") else timm.optim
    options = {"momentum": 0.9} if kind in ("torch.SGD", "timm.Lars") else {}
    parameters, optimizer = started(lambda p: getattr(package, kind.split(".")[1])(p, lr=0.01, **options))
    peer = checkpoint.peers.PEERS[kind]
    group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "step")}
    assert set(group) == set(peer.defaults)
    changed = {"lr", "momentum", "max_lr_snapshot"}
    assert all(group[k] == v for k, v in peer.defaults.items() if k not in changed)
    ours = checkpoint.convert(whole_of(parameters, optimizer, kind), peer.ours)
    again = checkpoint.convert(ours, kind)
    fresh = getattr(package, kind.split(".")[1])(as_parameters(random_layers(), torch.float64), lr=0.01, **options)
    fresh.load_state_dict(checkpoint.torch_state_dict(again))
    for p, q in zip(parameters, fresh.param_groups[0]["params"], strict=True):
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(fresh.state[q][name]), torch.as_tensor(value)), name


def test_the_command(tmp_path, capsys):
    parameters, optimizer = started(timm_lars, dtype=torch.float32)
    model = {name: p.detach() for name, p in zip(NAMES, parameters, strict=True)}
    torch.save({"net": model, "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    source, ours, back = (str(tmp_path / name) for name in ("theirs.pt", "ours.pt", "back.pt"))
    arguments = ["convert", source, ours, "--model-key", "net", "--from-optimizer", "timm.Lars"]
    assert main([*arguments, "--to-optimizer", "LARS", "--option", "lr_in_momentum=true"]) == 0
    assert "note: the next update is another: lr_in_momentum False becomes True" in capsys.readouterr().out
    assert main(["convert", ours, back, "--to-optimizer", "timm.Lars"]) == 0
    found = torch.load(back, weights_only=True)
    assert found["optimizer_class"] == "timm.Lars"
    for i, p in enumerate(parameters):
        buffer = optimizer.state[p]["momentum_buffer"]
        assert relative_error([found["optimizer"]["state"][i]["momentum_buffer"]], [buffer]) < 1e-6
    (tmp_path / "names.json").write_text(json.dumps(NAMES[:-1]))
    for wrong, words in (
        (arguments, "exists; choose another name"),
        (["convert", str(tmp_path / "none.pt"), back + ".pt"], "does not exist"),
        (["convert", source, back + ".pt"], "expected 'model'"),
        (["convert", source, back + ".pt", "--model-key", "net"], "name it with --from-optimizer"),
        (
            [*arguments[:2], back + ".pt", *arguments[3:], "--names", str(tmp_path / "names.json")],
            "7 names were given for 8",
        ),
        ([*arguments[:2], back + ".pt", *arguments[3:], "--option", "eps"], "expected KEY=VALUE"),
        (["convert", str(tmp_path), back + ".pt"], "is no checkpoint that says where its layers lie"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err, wrong


def test_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = largebatch.LARS([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=0.1)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="which is which cannot be told"):
        checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "LARS")
    names = checkpoint.names_in_optimizer(optimizer, model)
    assert names == ["0.weight", "2.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    whole = checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "LARS", names=names)
    assert torch.equal(whole.state["1.bias"]["momentum_buffer"], optimizer.state[others[2]]["momentum_buffer"])
    assert [group["weight_decay"] for group in whole.groups] == [0.1, 0.0]
    with pytest.raises(ValueError, match="another order"):
        checkpoint.from_state_dicts(model.state_dict(), optimizer.state_dict(), "LARS", names=names[::-1])
    named = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    named.step()
    whole = checkpoint.from_state_dicts(model.state_dict(), named.state_dict(), "torch.SGD")
    assert whole.layers == [name for name, _ in model.named_parameters()]
