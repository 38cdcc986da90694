"""Barlow Twins (arXiv:2103.03230) on CIFAR-10 with LARS, a linear probe beside it; small enough for two CPU ranks and some minutes.

Run it: torchrun --nproc_per_node 2 examples/self_supervised.py --data DIR

DIR holds cifar-10-batches-py or cifar-10-python.tar.gz; --download fetches it. The loss compares the samples of a batch with each
other: here those of one rank, as the batch statistics are, so two ranks of 256 train another objective than one of 512. The same
holds for gradient accumulation, which the script therefore does not have: --batch is what a rank's loss sees.
"""

import argparse
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import CIFAR10

import largebatch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="folder of CIFAR-10")
parser.add_argument("--download", action="store_true")
parser.add_argument("--optimizer", choices=["lars", "adamw", "none"], default="lars", help="none: random weights")
parser.add_argument("--lr", type=float, help="peak, for a global batch of 256; default 0.2 (LARS), 1e-3 (AdamW)")
parser.add_argument("--batch", type=int, default=256, help="images a rank and step")
parser.add_argument("--images", type=int, default=50_000, help="of the training set, for pretraining and probe")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--probe_epochs", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

LAMBDA = 0.005
"""Weight of the off-diagonal terms, as in the paper."""


class Encoder(nn.Module):
    """Four convolutions of stride 2; 32 x 32 images -> 128 features, and a projector to 256."""

    def __init__(self):
        super().__init__()
        widths, layers = (3, 32, 64, 128, 128), []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(
            nn.Linear(128, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256, bias=False)
        )

    def forward(self, images):
        return self.projector(self.features(images))


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random view of each: crop of at least 40% of the area, flip, colours of each channel scaled and shifted, some grey."""
    n = len(images)

    def uniform(low, high):
        return torch.rand(n, generator=generator) * (high - low) + low

    side = uniform(0.4, 1.0).sqrt()
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    boxes = torch.zeros(n, 2, 3)
    boxes[:, 0, 0], boxes[:, 1, 1] = side * flip, side
    boxes[:, 0, 2], boxes[:, 1, 2] = uniform(-1, 1) * (1 - side), uniform(-1, 1) * (1 - side)
    grid = nn.functional.affine_grid(boxes, list(images.shape), align_corners=False)
    views = nn.functional.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    gain = torch.rand(n, 3, 1, 1, generator=generator) * 0.8 + 0.6
    shift = torch.rand(n, 3, 1, 1, generator=generator) * 0.4 - 0.2
    views = views * gain + shift
    grey = views.mean(dim=1, keepdim=True).expand_as(views)
    return torch.where((uniform(0, 1) < 0.2)[:, None, None, None], grey, views)


def barlow_twins(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Cross-correlation of the two views over the batch, pulled towards the identity."""
    n = len(first)
    first, second = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (first, second))
    correlation = first.T @ second / n
    on_diagonal = (torch.diagonal(correlation) - 1).square().sum()
    off_diagonal = correlation.square().sum() - torch.diagonal(correlation).square().sum()
    return on_diagonal + LAMBDA * off_diagonal


def tensors(is_training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    data = CIFAR10(arguments.data, train=is_training, download=arguments.download)
    images = torch.as_tensor(data.data).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return images, torch.as_tensor(data.targets)


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    # what is left out has a learning rate of its own, as in the authors' code
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights}, {"params": rest, "lr": lr * 0.0048 / 0.2}]
    return largebatch.LARS(groups, lr=lr, weight_decay=1e-6, preset="barlow_twins", model=model)


def pretrain(images: torch.Tensor) -> nn.Module:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(arguments.seed)
    model = Encoder()
    if arguments.optimizer == "none":
        return model
    parallel = DistributedDataParallel(model)
    base = arguments.lr or {"lars": 0.2, "adamw": 1e-3}[arguments.optimizer]
    optimizer = build_optimizer(model, base * arguments.batch * world / 256)
    steps_per_epoch = len(images) // (arguments.batch * world)
    num_steps = steps_per_epoch * arguments.epochs
    scheduler = largebatch.WarmupCosineDecayLR(
        optimizer, total_steps=num_steps, warmup_steps=max(1, num_steps // 10), end_factor=0.001
    )
    order = torch.Generator().manual_seed(arguments.seed)
    views = torch.Generator().manual_seed(1000 * arguments.seed + rank)
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        indices = torch.randperm(len(images), generator=order)[rank::world]
        for step in range(steps_per_epoch):
            batch = images[indices[step * arguments.batch : (step + 1) * arguments.batch]]
            loss = barlow_twins(parallel(augmented(batch, views)), parallel(augmented(batch, views)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.2f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model


@torch.no_grad()
def features_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model.features(part) for part in images.split(1000)])


def probe(model: nn.Module, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of the test images that a linear classifier of the frozen features gets right."""
    (x, y), (x_test, y_test) = ((features_of(model, images), labels) for images, labels in (train, test))
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, x_test = (x - mean) / std, (x_test - mean) / std
    torch.manual_seed(arguments.seed)
    head = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    num_steps = arguments.probe_epochs * math.ceil(len(x) / 1000)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(arguments.probe_epochs):
        for part in torch.randperm(len(x)).split(1000):
            optimizer.zero_grad()
            cross_entropy(head(x[part]), y[part]).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        return (head(x_test).argmax(1) == y_test).float().mean().item()


dist.init_process_group("gloo")
(images, labels), test_set = tensors(True), tensors(False)
images, labels = images[: arguments.images], labels[: arguments.images]
model = pretrain(images)
if dist.get_rank() == 0:
    accuracy = probe(model, (images, labels), test_set)
    print(f"{arguments.optimizer}: linear probe, test accuracy {accuracy:.4f}")
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
# gloo's threads may abort an interpreter that ends by itself: "terminate called without an active exception"
os._exit(0)
