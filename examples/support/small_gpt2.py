"""A small untrained GPT-2 with a tokenizer of its own, for where no preset is at hand."""

import json

import keras_hub
import tokenizers

END = "<|endoftext|>"


def small_gpt2(
    texts,
    sequence_length: int,
    vocabulary_size: int = 1500,
    num_layers: int = 2,
    num_heads: int = 4,
    hidden_dim: int = 128,
):
    """A KerasHub GPT-2 language model for texts like these.

    Args:
        texts: list of str, which its tokenizer is made for.
        sequence_length: int, the most tokens that it reads or writes.
        vocabulary_size: int, at least 257: all bytes and the end token.
        num_layers, num_heads, hidden_dim: ints, of its backbone.
    """
    tokenizer = byte_pair_tokenizer(texts, vocabulary_size)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        intermediate_dim=4 * hidden_dim,
        max_sequence_length=sequence_length,
        # It sees its texts a few times only.
        dropout=0.0,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=sequence_length
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=preprocessor)


def byte_pair_tokenizer(texts, vocabulary_size: int):
    """A GPT-2 tokenizer with merges learned from texts; it can write any other text as well."""
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocabulary_size - 1, show_progress=False)
    learned = json.loads(trainer.to_str())["model"]
    vocabulary = learned["vocab"]
    # Last, as GPT-2 has it. KerasHub pads with token 0, at which generation would stop at once.
    vocabulary[END] = len(vocabulary)
    return keras_hub.models.GPT2Tokenizer(
        vocabulary=vocabulary, merges=[" ".join(merge) for merge in learned["merges"]]
    )
