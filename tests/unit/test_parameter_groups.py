"""Which parameters of a baseline are not decayed, and which baselines are refused."""

import pytest
import torch

from largebatch.launch.recipe.baseline_options import check_baseline
from largebatch.launch.trainer.engines import parameter_groups


def small_model():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    )
    model[3].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "patterns, undecayed",
    [
        ([], []),
        (["bias"], ["0.bias", "1.bias"]),
        (["norm"], ["1.weight", "1.bias"]),
        (["bias", "norm"], ["0.bias", "1.weight", "1.bias"]),
        (["^3"], ["3.weight"]),
        (["weight", "bias"], ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]),
    ],
)
def test_groups_hold_every_trainable_parameter_once(patterns, undecayed):
    model = small_model()
    names = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, patterns)
    held = [p for group in groups for p in group["params"]]
    assert sorted(names[p] for p in held) == ["0.bias", "0.weight", "1.bias", "1.weight", "3.weight"]
    assert [names[p] for g in groups if g.get("weight_decay") == 0.0 for p in g["params"]] == undecayed
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {name: 0.0 if name in undecayed else 0.5 for name in decay}


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(
        ValueError, match="no_weight_decay has 'embed', which matches no parameter name; the names are 0.w"
    ):
        parameter_groups(small_model(), ["embed"])


@pytest.mark.parametrize(
    "optimizer, patterns, message",
    [
        ({"type": "LARS", "params": {"lr": 1}}, ["bias"], "for LARS write optimizer.params.exclude_from_weight_decay"),
        ({"type": "SGD", "params": {"lr": 1}}, ["bias"], "weight_decay is None; it has no effect without weight decay"),
        ({"type": "SGD", "params": {"weight_decay": 1}}, "bias", "no_weight_decay is 'bias'; expected a list of"),
        ({"type": "Adam", "params": {"lr": 1}}, [], '"adam_w_mode": false for Adam with L2 regularisation'),
        ({"type": "adam"}, [], "DeepSpeed would train AdamW"),
    ],
)
def test_refused(optimizer, patterns, message):
    with pytest.raises(ValueError) as caught:
        check_baseline({"optimizer": optimizer, "largebatch": {"no_weight_decay": patterns}})
    assert message in str(caught.value)


def test_accepted():
    for optimizer in (
        {"type": "SGD", "params": {"lr": 1, "weight_decay": 1e-4}},
        {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 1e-4}},
    ):
        check_baseline({"optimizer": optimizer, "largebatch": {"no_weight_decay": ["bias", "norm"]}})
