"""Which parameters are left out, by module type and by name."""

import pytest
import torch
import torchvision
from torch import nn

import largebatch
from largebatch.exclusion import ParameterIdentity, identities, kinds_of


class OddlyNamed(nn.Module):
    """Modules whose parameter names do not say what they are."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.normal = nn.Linear(4, 4)  # a name that only begins like a norm
        self.scale = LlamaRMSNorm()
        self.rnn = nn.GRU(4, 4)


class LlamaRMSNorm(nn.Module):
    """A class outside torch.nn, as in transformers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def names_of_kind(model, kind):
    return {i.name for i in identities(model).values() if kind in i.kinds}


def test_by_module_type():
    model = OddlyNamed()
    assert names_of_kind(model, "norm") == {"shortcut.1.weight", "shortcut.1.bias", "scale.weight"}
    assert names_of_kind(model, "bias") == {
        "shortcut.0.bias", "shortcut.1.bias", "normal.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0",
    }  # fmt: skip


def test_resnet50_excludes_53_norms_and_the_bias_of_the_classifier():
    model = torchvision.models.resnet50()
    optimizer = largebatch.LARS(model.parameters(), lr=1.0, preset="mlperf", model=model)
    assert len(optimizer.layers) == 161
    assert len(optimizer.excluded_layers) == 2 * 53 + 1
    assert all(not policy.is_adapted and not policy.is_decayed for policy in optimizer.excluded_layers)


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("layer1.0.bn2.weight", {"norm"}),
        ("layer1.0.bn2.bias", {"norm", "bias"}),
        ("encoder.layer.3.attention.output.LayerNorm.weight", {"norm"}),
        ("h.0.ln_1.weight", {"norm"}),
        ("ln_f.bias", {"norm", "bias"}),
        ("post_attention_layernorm.weight", {"norm"}),
        ("fc.bias", {"bias"}),
        ("rnn.bias_ih_l0", {"bias"}),
        ("conv1.weight", set()),
        ("normal.weight", set()),
        ("biases_table.weight", set()),
        ("downsample.1.weight", set()),  # a batch norm that its name does not show: pass model=
    ],
)
def test_by_name(name, kinds):
    assert kinds_of(ParameterIdentity(name)) == kinds


def test_named_parameters_are_enough_and_regular_expressions_work():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = largebatch.LAMB(
        model.named_parameters(),
        exclude_from_adaptation=["bias"],
        exclude_from_weight_decay=[r"^1\."],
        weight_decay=0.1,
    )
    treatment = {p.name: (p.is_adapted, p.is_decayed) for p in optimizer.layers}
    assert treatment == {
        "0.weight": (True, True), "0.bias": (False, True), "1.weight": (True, False), "1.bias": (False, False),
    }  # fmt: skip


def test_nothing_is_excluded_unless_asked_for():
    model = torchvision.models.resnet18()
    assert largebatch.LARS(model.parameters(), lr=1.0, model=model).excluded_layers == []


def test_a_pattern_that_matches_nothing_is_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"exclude_from_weight_decay has 'embeding', which matches no parameter name"):
        largebatch.LAMB(model.named_parameters(), exclude_from_weight_decay=["embeding"])


def test_excluded_layers_really_are_not_adapted_or_decayed():
    model = nn.Linear(4, 4)
    optimizer = largebatch.LARS(model.parameters(), lr=1.0, weight_decay=0.1, preset="mlperf", model=model)
    model(torch.randn(8, 4)).square().sum().backward()
    bias, grad = model.bias.detach().clone(), model.bias.grad.clone()
    optimizer.step()
    assert torch.equal(model.bias, bias - grad)
    stats = optimizer.layer_stats()
    assert stats["bias"]["trust_ratio"] == 1.0 and stats["bias"]["weight_decay"] == 0.0
    assert stats["weight"]["trust_ratio"] != 1.0 and stats["weight"]["weight_decay"] == 0.1


class GatedNorm(nn.Module):
    """Called norm in the model, by its class alone no norm."""

    def __init__(self, ndim=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*(4,) * ndim))


def named(name, base=GatedNorm):
    return type(name, (base,), {})


def model_with(attribute, module):
    model = nn.Module()
    model.mixer = nn.Module()
    model.mixer.linear = nn.Linear(4, 4)
    setattr(model.mixer, attribute, module)
    return model


@pytest.mark.parametrize(
    "attribute, module, is_norm",
    [
        ("norm", named("MambaRMSNormGated")(), True),
        ("scale", named("MambaRMSNormGated")(), True),
        ("scale", named("RMSNormGated")(), True),
        ("scale", named("LayerNormWithoutBias")(), True),
        ("scale", named("Qwen3NextRMSNormGated")(), True),
        ("scale", named("LayerNormalization")(), True),
        ("norm", named("Gate")(), True),
        ("ln_1", named("Gate")(), True),
        ("gate", named("Gate")(), False),
        ("norm", nn.Linear(4, 4), False),
        ("norm", named("Gate")(ndim=2), False),
        ("scale", named("NormalizedLinear")(), False),
        ("scale", named("NormalPrior")(), False),
        ("scale", named("WeightNormLinear")(), False),
        ("scale", named("SpectralNormConv")(), False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_norms_by_type_or_by_name(attribute, module, is_norm):
    """A class of anybody's own is a norm if its name says so, or its module's name; a matrix is none."""
    model = model_with(attribute, module)
    optimizer = largebatch.LAMB(model.parameters(), model=model, exclude_from_adaptation=["norm"])
    excluded = {policy.name for policy in optimizer.excluded_layers}
    assert (f"mixer.{attribute}.weight" in excluded) == is_norm
    assert "mixer.linear.weight" not in excluded


def test_a_likely_norm_that_stays_in_is_named(caplog):
    model = model_with("prenormalizer", named("Gate")())
    with caplog.at_level("WARNING", logger="largebatch"):
        largebatch.LAMB(model.parameters(), model=model, exclude_from_weight_decay=["norm"])
    assert "exclude_from_weight_decay has 'norm', and mixer.prenormalizer.weight stayed in" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="largebatch"):
        largebatch.LAMB(model.parameters(), model=model)
        largebatch.LAMB(model.parameters(), model=model, exclude_from_weight_decay=["bias"])
    assert not caplog.text


class LayerNormLinear(nn.Linear):
    """As in TransformerEngine: a norm and a matrix in one module."""

    def __init__(self):
        super().__init__(4, 5)
        self.layer_norm_weight, self.layer_norm_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))


class NormLinear(nn.Linear):
    """A linear layer with normalised weights."""


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))


def excluded_names(model, kinds=("norm",), by_name=False):
    given = model.named_parameters() if by_name else model.parameters()
    more = {} if by_name else {"model": model}
    optimizer = largebatch.LAMB(given, exclude_from_adaptation=list(kinds), **more)
    return {layer.name for layer in optimizer.layers if not layer.is_adapted}


@pytest.mark.parametrize(
    "module, expected",
    [
        (LayerNormLinear(), {"0.layer_norm_weight", "0.layer_norm_bias"}),
        (NormLinear(4, 5), set()),
        (OwnNorm(), {"0.gain", "0.shift"}),
        (nn.LayerNorm((3, 4)), {"0.weight", "0.bias"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_matrix_in_a_module_whose_class_says_norm_stays_in(module, expected):
    assert excluded_names(nn.Sequential(module, nn.Linear(5, 2))) == expected


def test_by_names_a_matrix_stays_in_and_is_told(caplog):
    model = nn.ModuleDict({"norm_proj": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    with caplog.at_level("WARNING", logger="largebatch"):
        assert excluded_names(model, by_name=True) == {"norm_proj.bias", "norm.weight", "norm.bias"}
    assert "norm_proj.weight stayed in" in caplog.text


@pytest.mark.parametrize("is_nested", [True, False])
def test_a_parametrized_norm_is_one(is_nested):
    norm = nn.LayerNorm(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    model = nn.ModuleDict({"a": norm}) if is_nested else norm
    prefix = "a." if is_nested else ""
    assert excluded_names(model) == {f"{prefix}bias", f"{prefix}parametrizations.weight.original"}
    linear = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(linear, "bias", nn.Identity())
    assert excluded_names(linear, kinds=("bias",)) == {"parametrizations.bias.original"}


class WithTemperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.1))
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))


def left_out(model, exclusions, parameters=None):
    optimizer = largebatch.LARS(
        parameters or model.named_parameters(),
        lr=0.1,
        exclude_from_adaptation=exclusions,
        model=None if parameters else model,
    )
    return [layer.name for layer in optimizer.layers if not layer.is_adapted]


def test_by_number_of_dimensions():
    model = WithTemperature()
    assert left_out(model, ["ndim<=1"]) == ["temperature", "scale", "layer.bias"]
    assert left_out(model, ["ndim==1"]) == ["scale", "layer.bias"]
    assert left_out(model, ["ndim<=1"], list(model.named_parameters())) == ["temperature", "scale", "layer.bias"]
    assert left_out(model, ["ndim==1", "^layer.weight$"]) == ["scale", "layer.weight", "layer.bias"]


def test_the_dimensions_are_the_layers_where_zero_3_has_cut_it():
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert left_out(model, ["ndim<=1"]) == ["bias"]


def test_a_parameter_without_a_shape_has_no_dimensions():
    with pytest.raises(ValueError, match="weight has no shape yet, so .*'ndim<=1'.* cannot be matched"):
        left_out(nn.LazyLinear(3), ["ndim<=1"])
