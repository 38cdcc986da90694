"""Names that people bring along from other optimizers: one line that says what to write here."""

import re

import pytest
import torch

import largebatch
from largebatch.config import OTHERS_OPTIONS, UnknownOptionError
from largebatch.engine.config_checks.combinations import OTHERS_TYPES, check_optimizer_type
from largebatch.optim.layerwise import option_names

CLASSES = [largebatch.LARS, largebatch.LAMB, largebatch.NLAMB, largebatch.NNLAMB, largebatch.LANS]


@pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", OTHERS_OPTIONS)
@pytest.mark.parametrize("way", ["constructor", "json"])
def test_an_option_of_another_package(optimizer_class, name, way):
    model = torch.nn.Linear(2, 2)
    given = {"lr": 0.1, name: 0.25}
    with pytest.raises(UnknownOptionError) as caught:
        if way == "json":
            optimizer_class.from_json_params(model.parameters(), given, model)
        else:
            optimizer_class(model.parameters(), **given)
    message = str(caught.value)
    where = "optimizer.params" if way == "json" else optimizer_class.__name__
    assert message.startswith(f"{where}.{name} is not known; ") and "\n" not in message
    assert "ours is" in message or "delete it" in message
    if "ours is" in message:
        assert re.search(r"ours is (\w+)", message)[1] in option_names(optimizer_class.__init__)


def test_the_value_is_shown_as_json():
    with pytest.raises(
        UnknownOptionError, match=r"max_coeff is not known; ours is trust_ratio_bounds: \[min_coeff, 10.0\]"
    ):
        largebatch.LAMB([torch.ones(1, requires_grad=True)], max_coeff=10.0)
    with pytest.raises(UnknownOptionError, match="use_nvlamb is not known; ours is adapt_undecayed: true$"):
        largebatch.LAMB([torch.ones(1, requires_grad=True)], use_nvlamb=True)


def test_what_is_advised_exists():
    """Every option that an advice names is one of ours."""
    ours = {name for cls in CLASSES for name in option_names(cls.__init__)}
    for name, advice in OTHERS_OPTIONS.items():
        assert name not in ours
        if advice.startswith("ours is "):
            assert advice.removeprefix("ours is ").partition(":")[0].partition(",")[0] in ours, advice


@pytest.mark.parametrize("name", ["OneBitLamb", "FusedLAMB", "LARC", "fusedlamb", "NVLAMB", "LAMBW"])
def test_an_optimizer_type_of_another_package(name):
    with pytest.raises(ValueError, match=f"optimizer.type is '{name}'; write LA(MB|RS)") as caught:
        check_optimizer_type(name)
    assert "\n" not in str(caught.value)


def test_types_of_ours_and_of_deepspeed_pass():
    largebatch.register()
    for name in ("LAMB", "lars", "NLamb", "AdamW", "Adam", "SGD", "Adagrad"):
        check_optimizer_type(name)
        assert name.lower() not in OTHERS_TYPES
