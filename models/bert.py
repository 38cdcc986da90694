"""BERT with its two pre-training heads: masked language model and next sentence.

Source: arXiv:1810.04805, built by Hugging Face transformers (``BertForPreTraining``; parameter names are the same), which is
an optional dependency. Initialisation: weights normal with standard deviation 0.02, biases zero; the output embedding is
the input embedding. The vocabulary's logits are computed at the masked positions alone, as in Google's code.
Input: token ids [batch, length], length up to ``max_positions``.
Parameters at a vocabulary of 30,522 and 512 positions: bert-base 110,106,428; bert-large 336,226,108.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from largebatch.config import number, one_of, reject

PRESETS: dict[str, dict[str, int]] = {
    "bert-base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "bert-large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
}
"""arXiv:1810.04805, section 3. The feed-forward layers are four times as wide as the hidden size."""

INSTALL = "pip install 'largebatch[bert]'"


class BertPreTraining(nn.Module):
    """The encoder and the heads of a ``transformers.BertForPreTraining``.

    Args:
        network: the transformers model.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.bert, self.cls, self.config = network.bert, network.cls, network.config

    def forward(
        self, tokens: Tensor, segments: Tensor, attention_mask: Tensor | None, masked_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of the masked tokens and of the pair.

        Args:
            tokens: [batch, length] int64, [CLS] A [SEP] B [SEP] and padding.
            segments: [batch, length] int64, 0 for A and 1 for B.
            attention_mask: [batch, length], 0 for padding, else 1; None: no padding.
            masked_positions: [batch, num_masked] int64, where tokens are to be predicted.

        Returns:
            [batch, num_masked, vocab_size] and [batch, 2] logits (0: B follows A, 1: B is from elsewhere).
        """
        if attention_mask is not None and attention_mask.device.type != "cpu":
            attention_mask = mask_of_pairs(attention_mask)
        outputs = self.bert(tokens, attention_mask=attention_mask, token_type_ids=segments)
        hidden, pooled = outputs.last_hidden_state, outputs.pooler_output
        positions = masked_positions.unsqueeze(2).expand(-1, -1, hidden.shape[2])
        return self.cls(hidden.gather(1, positions), pooled)


def mask_of_pairs(attention_mask: Tensor) -> Tensor:
    """[batch, 1, length, length] bool, which tokens each may look at: what transformers makes of a mask that hides something.

    It looks first whether the mask does, and on a GPU has to wait for the answer at each forward pass; one of this shape
    it takes as it is.

    Args:
        attention_mask: [batch, length], 0 for padding.
    """
    return attention_mask.bool()[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)


def build_bert(
    vocab_size: int,
    sequence_length: int,
    preset: str = "bert-base",
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 512,
    dropout: float = 0.1,
    initializer_range: float = 0.02,
) -> BertPreTraining:
    """A freshly initialised BERT, fp32, on the CPU.

    Args:
        vocab_size: tokens of the vocabulary.
        sequence_length: tokens of the longest input.
        preset: "bert-base" or "bert-large"; sizes given beside it win.
        hidden_size: a multiple of ``num_heads``.
        intermediate_size: of the feed-forward layers; None: 4 x hidden_size.
        max_positions: of the position embedding, at least sequence_length; keep it over the stages of a mixed-batch run.
        dropout: >= 0 and < 1, of hidden units and of attention.
        initializer_range: > 0, standard deviation of the weights.

    Raises:
        ValueError, TypeError: an option is illegal, or sequences are longer than max_positions.
        RuntimeError: transformers is not installed.
    """
    one_of(*PRESETS)("model_options.preset", preset)
    given = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
    sizes = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    sizes["intermediate_size"] = 4 * sizes["hidden_size"] if intermediate_size is None else intermediate_size
    for name, value in (sizes | {"max_positions": max_positions}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            reject(f"model_options.{name}", value, "an integer >= 1")
    if sizes["hidden_size"] % sizes["num_heads"]:
        expected = f"a multiple of num_heads, which is {sizes['num_heads']}"
        reject("model_options.hidden_size", sizes["hidden_size"], expected)
    if sequence_length > max_positions:
        reject("model_options.max_positions", max_positions, f"at least the sequence length, {sequence_length}")
    number("a number >= 0 and < 1", lambda x: 0 <= x < 1)("model_options.dropout", dropout)
    number("a number > 0", lambda x: x > 0)("model_options.initializer_range", initializer_range)
    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=sizes["intermediate_size"],
        max_position_embeddings=max_positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=initializer_range,
    )
    return BertPreTraining(transformers.BertForPreTraining(config))


def import_transformers() -> Any:
    """The optional dependency.

    Raises:
        RuntimeError: it is not installed; says how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(f"BERT needs the package transformers ({error}); install it: {INSTALL}") from None
    return transformers
