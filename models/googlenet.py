"""GoogLeNet for the appendix rows of the LARS paper: torchvision's, which is not quite the paper's.

Source: arXiv:1409.4842 through torchvision. Where torchvision's differs from the paper and from BVLC Caffe's (which the LARS
paper used): batch normalisation (eps 1e-3) after every convolution instead of two local response normalisations and
biases; 3x3 where the inception blocks should have 5x5 convolutions (github.com/pytorch/vision issue 906); dropout 0.2
instead of 0.4; weights normal with standard deviation 0.01 instead of Glorot's. With batch normalisation it is the easier
network to train at large batches, so the paper's figures are a guide and not an expectation.
Input: [batch, 3, height, width], at least 15 x 15; ImageNet's is 224 x 224.
Parameters at 1,000 classes: 6,624,904; with the two auxiliary classifiers 13,004,888.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import googlenet

from largebatch.config import boolean, number

DROPOUT = number("a number >= 0 and < 1", lambda x: 0 <= x < 1)


def build_googlenet(
    image_shape: tuple[int, int, int] = (3, 224, 224),
    num_classes: int = 1000,
    aux_logits: bool = False,
    dropout: float = 0.2,
    dropout_aux: float = 0.7,
) -> nn.Module:
    """torchvision's ``googlenet`` without pre-trained weights.

    Args:
        aux_logits: whether the two auxiliary classifiers are there; in training the model then returns a tuple, whose
            loss is in largebatch.models.auxiliary.
        dropout, dropout_aux: >= 0 and < 1, before the classifier and in the auxiliary ones.

    Raises:
        ValueError, TypeError: an option is illegal, or the images have the wrong shape.
    """
    boolean("model_options.aux_logits", aux_logits)
    DROPOUT("model_options.dropout", dropout)
    DROPOUT("model_options.dropout_aux", dropout_aux)
    channels, height, width = image_shape
    if channels != 3 or min(height, width) < 15:
        raise ValueError(
            f"googlenet got images of {channels} x {height} x {width}; expected 3 channels, at least 15 x 15"
        )
    return googlenet(
        weights=None,
        num_classes=num_classes,
        aux_logits=aux_logits,
        init_weights=True,
        dropout=dropout,
        dropout_aux=dropout_aux,
    )
