"""A tiny LLaMA made on the spot: random weights, byte-level BPE tokenizer trained on a few lines."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatloom.config import RandomSource

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
TRAINING_LINES = (
    "The quick brown fox jumps over the lazy dog while the teacher writes a short letter about the weather.",
    "Please explain how to make tea, and then list three things that you can do with the answer.",
    "system user assistant question answer yes no the and of to in is that it for on with as",
    "你好，世界。请用一句话解释这个问题，然后写出三点建议。今天天气很好，我们去公园散步。",
)


def random_llama(source: RandomSource) -> tuple[Any, Any]:
    """Model (float32) and tokenizer; the same for the same `source`."""
    tokenizer = byte_level_tokenizer(source.vocab_size)
    config = LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=2 * source.hidden_size,
        num_hidden_layers=source.num_layers,
        num_attention_heads=source.num_heads,
        num_key_value_heads=max(source.num_heads // 2, 1),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(source.seed)
        return LlamaForCausalLM(config), tokenizer


def byte_level_tokenizer(vocab_size: int) -> Any:
    """Reads any text; its vocabulary is never larger than `vocab_size` (256 bytes and the special tokens at least)."""
    assert vocab_size >= 256 + len(SPECIAL_TOKENS), "a byte-level vocabulary has at least 260 tokens"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TRAINING_LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<file_sep>"
    )
