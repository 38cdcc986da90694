"""Parameter shapes of real networks, and of the two extremes."""

from __future__ import annotations

import math

Shape = tuple[int, ...]


def numel(shapes: list[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def resnet50() -> list[Shape]:
    """25,557,032 parameters in 161 tensors."""
    import torchvision

    return [tuple(p.shape) for p in torchvision.models.resnet50().parameters()]


def lenet() -> list[Shape]:
    from largebatch.models.catalogue import build_model

    model = build_model("lenet", image_shape=(1, 28, 28), num_classes=10)
    return [tuple(p.shape) for p in model.parameters()]


def alexnet() -> list[Shape]:
    """The grouped network of the LARS paper: 60,965,224 parameters in 16 tensors."""
    weights = [(96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3)]
    weights += [(4096, 9216), (4096, 4096), (1000, 4096)]
    return [shape for weight in weights for shape in (weight, weight[:1])]


def davidnet() -> list[Shape]:
    """The ResNet-9 of the DAWNBench CIFAR-10 entry: 6,573,120 parameters in 25 tensors."""
    widths = [(64, 3), (128, 64), (128, 128), (128, 128), (256, 128), (512, 256), (512, 512), (512, 512)]
    return [shape for out, in_ in widths for shape in ((out, in_, 3, 3), (out,), (out,))] + [(10, 512)]


def bert_large() -> list[Shape]:
    """Encoder, embeddings and pooler: 335,141,888 parameters in 391 tensors."""
    hidden, inner = 1024, 4096
    layer = [(hidden, hidden), (hidden,)] * 4 + [(hidden,), (hidden,)]
    layer += [(inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,)]
    embeddings = [(30522, hidden), (512, hidden), (2, hidden), (hidden,), (hidden,)]
    return embeddings + layer * 24 + [(hidden, hidden), (hidden,)]


def tiny_tensors() -> list[Shape]:
    """10,000 tensors of 500 to 1,499 elements."""
    return [(500 + i * 617 % 1000,) for i in range(10000)]


SHAPES = {
    "lenet": lenet,
    "davidnet": davidnet,
    "resnet50": resnet50,
    "alexnet": alexnet,
    "bert-large": bert_large,
    "tiny": tiny_tensors,
}
