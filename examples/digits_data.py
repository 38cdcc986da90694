"""scikit-learn's 8x8 digits and a small network: what the examples train on. Nothing is downloaded."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

NUM_TRAIN = 1536
"""The first 1,536 of 1,797 images are for training: three batches of 512."""


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of (image [64] fp32 in 0..1, label [] int64)."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return TensorDataset(images[:NUM_TRAIN], labels[:NUM_TRAIN]), TensorDataset(images[NUM_TRAIN:], labels[NUM_TRAIN:])


def build_model() -> nn.Module:
    """64 -> 256 -> 10, the same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10))


def accuracy(model: nn.Module, test_set: TensorDataset) -> float:
    """Share of the test set that the model gets right."""
    images, labels = test_set.tensors
    device = next(model.parameters()).device
    with torch.no_grad():
        return (model(images.to(device)).argmax(dim=1).cpu() == labels).float().mean().item()


def report(optimizer: torch.optim.Optimizer) -> None:
    """One line with the optimizer's class, then one for each layer of its last step."""
    print(f"stepped by {type(optimizer).__module__}.{type(optimizer).__name__}")
    for name, figures in optimizer.layer_stats().items():
        print(f"{name:<40} trust ratio {figures['trust_ratio']:.6g}")
