"""Shapes, parameter counts and initialisation that the docstrings promise."""

import pytest
import torch

from largebatch.models.registry import BUILDERS, build_model


@pytest.mark.parametrize("name, shape, count", [("lenet", (1, 28, 28), 3274634), ("mlp", (1, 8, 8), 6698)])
def test_parameter_count(name, shape, count):
    model = build_model(name, image_shape=shape, num_classes=10)
    found = sum(p.numel() for p in model.parameters())
    assert found == count
    assert f"{count:,}" in __import__(type(model).__module__, fromlist=["_"]).__doc__


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_and_backward(name):
    model = build_model(name, image_shape=(1, 8, 8), num_classes=7)
    logits = model(torch.randn(5, 1, 8, 8))
    assert logits.shape == (5, 7)
    logits.sum().backward()
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


def test_unknown_model_and_bad_shape():
    with pytest.raises(ValueError, match=r"did you mean 'lenet'\?"):
        build_model("lennet", image_shape=(1, 8, 8), num_classes=10)
    with pytest.raises(ValueError, match="lenet got images of 30 x 28"):
        build_model("lenet", image_shape=(1, 30, 28), num_classes=10)
