"""Shapes, parameter counts and initialisation that the docstrings promise."""

import sys

import pytest
import torch
from torch import nn

from largebatch.exclusion import identities, kinds_of
from largebatch.models.alexnet import LocalResponseNorm
from largebatch.models.auxiliary import loss_with_auxiliaries
from largebatch.models.catalogue import BUILDERS, TEXT_BUILDERS, build_model, check_model

IMAGENET = (3, 227, 227)
SMALL_SHAPES = (
    {"lenet": (1, 8, 8), "mlp": (1, 8, 8), "davidnet": (3, 16, 16)}
    | {name: (3, 64, 64) for name in ("alexnet", "alexnet_bn")}
    | {name: (3, 32, 32) for name in ("resnet50", "googlenet")}
)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, shape, classes, options, count",
    [
        ("lenet", (1, 28, 28), 10, {}, 3274634),
        ("mlp", (1, 8, 8), 10, {}, 6698),
        ("alexnet", IMAGENET, 1000, {}, 60965224),
        ("alexnet_bn", IMAGENET, 1000, {}, 60965224),
        ("alexnet_bn", IMAGENET, 1000, {"placement": "conv_output"}, 60966856),
        ("resnet50", (3, 224, 224), 1000, {}, 25557032),
        ("davidnet", (3, 32, 32), 10, {}, 6573120),
        ("googlenet", (3, 224, 224), 1000, {}, 6624904),
        ("googlenet", (3, 224, 224), 1000, {"aux_logits": True}, 13004888),
    ],
)
def test_parameter_count(name, shape, classes, options, count):
    with torch.device("meta"):
        model = build_model(name, image_shape=shape, num_classes=classes, options=options)
    assert num_parameters(model) == count
    assert f"{count:,}" in sys.modules[BUILDERS[name].__module__].__doc__


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_and_backward(name):
    shape = SMALL_SHAPES[name]
    model = build_model(name, image_shape=shape, num_classes=7)
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, 7)
    nn.functional.cross_entropy(logits, torch.arange(5)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_lenet_is_the_tutorial_network():
    model = build_model("lenet", image_shape=(1, 28, 28), num_classes=10)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == [
        (32, 1, 5, 5),
        (64, 32, 5, 5),
        (1024, 3136),
        (10, 1024),
    ]
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    assert model.dropout.p == 0.4
    bound = (6 / (3136 + 1024)) ** 0.5
    assert 0.99 * bound < model.fc1.weight.abs().max() <= bound  # Glorot-uniform


PAPER_NORMS = {
    # LARS paper (ICLR 2018 submission), Table 2, as printed; its ".b" and ".w" labels are exchanged
    "conv1": ("1.86", ".098"),
    "conv2": ("5.546", ".16"),
    "conv3": ("9.40", ".196"),
    "conv4": ("8.15", ".196"),
    "conv5": ("6.65", ".16"),
    "fc6": ("30.7", "6.4"),
    "fc7": ("20.5", "6.4"),
    "fc8": ("20.2", ".316"),
}


def test_alexnet_starts_with_the_norms_that_the_lars_paper_prints():
    model = build_model("alexnet", image_shape=IMAGENET, num_classes=1000)
    for name, (weight_norm, bias_norm) in PAPER_NORMS.items():
        layer = getattr(model, name)
        # the smallest layer has 34,848 random weights: its norm has a standard deviation of 0.4%
        assert layer.weight.norm().item() == pytest.approx(float(weight_norm), rel=0.01), name
        last_digit = 10.0 ** -len(bias_norm.split(".")[1])
        assert abs(layer.bias.norm().item() - float(bias_norm)) <= last_digit / 2, name
    assert [getattr(model, f"conv{i}").groups for i in (1, 2, 3, 4, 5)] == [1, 2, 1, 2, 2]


def test_alexnet_with_the_biases_of_bvlc():
    model = build_model("alexnet", image_shape=(3, 64, 64), num_classes=3, options={"bias_init": "bvlc"})
    constants = {n: p.unique().tolist() for n, p in model.named_parameters() if n.endswith("bias")}
    zero = {"conv1.bias", "conv3.bias", "fc8.bias"}
    assert constants == {n: pytest.approx([0.0 if n in zero else 0.1]) for n in constants}


def test_alexnet_response_normalisation_is_caffes():
    """Caffe: x / (1 + alpha / 5 * (sum of squares over 5 channels)) ** beta, channels beyond the border being zero."""
    norm = build_model("alexnet", image_shape=(3, 64, 64), num_classes=3).norms["after_relu1"]
    x = torch.randn(2, 9, 3, 3, dtype=torch.float64) * 50
    squares = torch.zeros_like(x)
    for channel in range(9):
        squares[:, channel] = x[:, max(0, channel - 2) : channel + 3].square().sum(1)
    assert torch.allclose(norm(x), x / (1 + 1e-4 / 5 * squares) ** 0.75, rtol=1e-12)


def test_alexnet_bn_has_no_response_normalisation():
    published = build_model("alexnet_bn", image_shape=(3, 64, 64), num_classes=3)
    assert {n: (type(m), m.num_features, m.affine, m.eps) for n, m in published.norms.items()} == {
        f"after_pool{i}": (nn.BatchNorm2d, c, False, 1e-4) for i, c in ((1, 96), (2, 256), (3, 384), (4, 384))
    }
    other = build_model("alexnet_bn", image_shape=(3, 64, 64), num_classes=3, options={"placement": "conv_output"})
    assert [m.num_features for m in other.norms.values()] == [96, 256, 384, 384, 256]
    assert all(m.affine for m in other.norms.values())
    assert [getattr(other, f"conv{i}").bias is None for i in (1, 2, 3, 4, 5)] == [True] * 4 + [False]


def test_resnet50_is_v1_5_with_zero_last_gamma():
    model = build_model("resnet50", image_shape=(3, 64, 64), num_classes=9, options={"classifier_std": 0.01})
    blocks = [m for m in model.modules() if type(m).__name__ == "Bottleneck"]
    assert len(blocks) == 16
    assert all(not b.bn3.weight.any() and b.bn1.weight.eq(1).all() for b in blocks)
    assert [b.conv2.stride for b in blocks].count((2, 2)) == 3 and all(b.conv1.stride == (1, 1) for b in blocks)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and not model.fc.bias.any()
    plain = build_model("resnet50", image_shape=(3, 64, 64), num_classes=9, options={"zero_init_last_gamma": False})
    assert all(m.weight.eq(1).all() for m in plain.modules() if isinstance(m, nn.BatchNorm2d))


def test_davidnet_follows_its_source():
    model = build_model("davidnet", image_shape=(3, 32, 32), num_classes=10)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert shapes == [
        (64, 3, 3, 3),
        (128, 64, 3, 3),
        (128, 128, 3, 3),
        (128, 128, 3, 3),
        (256, 128, 3, 3),
        (512, 256, 3, 3),
        (512, 512, 3, 3),
        (512, 512, 3, 3),
        (10, 512),
    ]
    assert not any(m.bias is not None for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    for layer in (model.layer3.conv, model.linear):
        bound = (layer.weight[0].numel()) ** -0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    scaled = model(images)
    model.logits_scale = 1.0
    assert torch.allclose(scaled, model(images) / 8)
    narrow = build_model("davidnet", image_shape=(3, 32, 32), num_classes=10, options={"width": 4})
    assert num_parameters(narrow) == 26340


def test_auxiliary_classifiers_count_at_three_tenths():
    model = build_model("googlenet", image_shape=(3, 32, 32), num_classes=4, options={"aux_logits": True})
    outputs = model(torch.randn(3, 3, 32, 32))
    labels = torch.tensor([0, 1, 3])
    losses = [nn.functional.cross_entropy(o, labels) for o in outputs]
    found = loss_with_auxiliaries(outputs, lambda logits: nn.functional.cross_entropy(logits, labels))
    assert len(losses) == 3 and torch.allclose(found, losses[0] + 0.3 * (losses[1] + losses[2]))
    model.eval()
    logits = model(torch.randn(3, 3, 32, 32))
    assert loss_with_auxiliaries(logits, torch.sum) == logits.sum()


@pytest.mark.parametrize(
    "name, shape, options",
    [
        ("resnet18", (3, 32, 32), {"zero_init_residual": True}),
        ("mobilenet_v3_small", (3, 32, 32), {"dropout": 0.1}),
        ("vit_b_32", (3, 64, 64), {}),
        ("googlenet", (3, 32, 32), {"aux_logits": True}),
        ("inception_v3", (3, 75, 75), {}),
    ],
)
def test_torchvision_by_name(name, shape, options):
    model = build_model(f"torchvision:{name}", image_shape=shape, num_classes=5, options=options)
    outputs = model(torch.randn(2, *shape))
    has_auxiliaries = options.get("aux_logits", False)
    assert isinstance(outputs, tuple) == has_auxiliaries
    assert (outputs[0] if has_auxiliaries else outputs).shape == (2, 5)
    if name == "resnet18":
        assert not model.layer1[0].bn2.weight.any()


def test_batch_normalisation_of_every_model_is_recognised_by_the_exclusion():
    for name, norm in (
        ("davidnet", "prep.bn.weight"),
        ("resnet50", "layer1.0.bn2.bias"),
        ("googlenet", "conv1.bn.bias"),
    ):
        with torch.device("meta"):
            model = build_model(name, image_shape=(3, 64, 64), num_classes=3)
        kinds = {identity.name: kinds_of(identity) for identity in identities(model).values()}
        assert "norm" in kinds[norm]
        assert sum("norm" in k for k in kinds.values()) == 2 * sum(
            isinstance(m, nn.BatchNorm2d) for m in model.modules()
        )


ILLEGAL = [
    ("lennet", (1, 8, 8), {}, r"did you mean 'lenet'\?"),
    (7, (1, 8, 8), {}, "largebatch.model is 7; expected one of 'lenet'"),
    ("lenet", (1, 30, 28), {}, "lenet got images of 30 x 28"),
    ("lenet", (1, 8, 8), {"droput": 0.1}, r"largebatch.model_options.droput is not an option of lenet; .*'dropout'\?"),
    ("mlp", (1, 8, 8), {"width": 3}, "expected none: it has no options"),
    ("alexnet", (3, 38, 64), {}, "alexnet got images of 38 x 64; expected at least 39 x 39"),
    ("alexnet", (3, 64, 64), {"dropout": 1.0}, "model_options.dropout is 1.0; expected a number >= 0 and < 1"),
    ("alexnet", (3, 64, 64), {"bias_init": "bvlv"}, r"model_options.bias_init is 'bvlv'.*'bvlc'\?"),
    ("alexnet_bn", (3, 64, 64), {"placement": "after"}, "model_options.placement is 'after'"),
    ("resnet50", (1, 64, 64), {}, "resnet50 got images of 1 x 64 x 64; expected 3 channels"),
    ("resnet50", (3, 64, 64), {"zero_init_last_gamma": 1}, "zero_init_last_gamma is 1; expected true or false"),
    ("davidnet", (3, 4, 8), {}, "davidnet got images of 4 x 8"),
    ("davidnet", (3, 8, 8), {"width": 1.5}, "model_options.width is 1.5; expected an integer >= 1"),
    ("googlenet", (3, 14, 20), {}, "googlenet got images of 3 x 14 x 20"),
    ("bert", (3, 64, 64), {}, 'set largebatch.data to "text"'),
    ("torchvision:resnet81", (3, 64, 64), {}, r"has no such classifier \(did you mean 'resnet18'\?\)"),
    ("torchvision:fcn_resnet50", (3, 64, 64), {}, "which is not an image classifier"),
    ("torchvision:inception_v3", (3, 32, 32), {}, "torchvision:inception_v3 cannot take images of 32 x 32: "),
    ("torchvision:resnet18", (1, 32, 32), {}, "takes images of 3 channels; these have 1"),
    ("torchvision:resnet18", (3, 32, 32), {"zero_init": True}, r"did you mean 'zero_init_residual'\?"),
    ("torchvision:densenet121", (3, 32, 32), {"growth_rate": 2}, "torchvision:densenet121 cannot be built with"),
]


@pytest.mark.parametrize("name, shape, options, message", ILLEGAL)
def test_unknown_models_options_and_shapes(name, shape, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_model(name, image_shape=shape, num_classes=10, options=options)


def test_check_model_builds_nothing(monkeypatch):
    def refuse(**arguments):
        raise AssertionError("built")

    for name in (*BUILDERS, *TEXT_BUILDERS):
        monkeypatch.setattr(nn.Module, "__init__", refuse)
        check_model(name, {})
    check_model("torchvision:vit_b_16", {"dropout": 0.1, "image_size": 224})


@pytest.mark.parametrize("size, beta", [(5, 0.75), (4, 0.75), (3, 0.5), (9, 1.0), (1, 0.75)])
def test_local_response_norm_is_torchs(size, beta):
    """Values and gradients in fp64, windows that are even or reach over both borders, both memory formats."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        for cls in (LocalResponseNorm, nn.LocalResponseNorm):
            torch.manual_seed(0)
            hidden = torch.randn(2, 7, 5, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
            hidden.requires_grad_(True)
            normalised = cls(size, alpha=0.5, beta=beta, k=1.5)(hidden)
            normalised.backward(torch.randn(2, 7, 5, 4, dtype=torch.float64))
            results.append((normalised, hidden.grad))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        assert results[0][0].is_contiguous(memory_format=memory_format)


def test_local_response_norm_in_bf16_is_rounded_once():
    torch.manual_seed(0)
    hidden, weights = (torch.randn(2, 7, 5, 4).bfloat16() for _ in range(2))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = hidden.to(dtype, copy=True).requires_grad_(True)
        y = LocalResponseNorm(5, alpha=0.5, beta=0.75, k=1.0)(x)
        y.backward(weights.to(dtype))
        results.append((y, x.grad))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=0)
