"""Tiny random models and a tokenizer for them, made in memory."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEXT = [
    "The mother tongue of Danielle Darrieux is French. Marcel Maupoint speaks English very well.",
    "Autonomous University of Madrid is located in Spain, and Ebro, which is located in Sweden.",
    "Because I saw the old tower, you and I walked home; therefore nobody waited.",
    "Miles Davis plays the trumpet. The instrument that Thelonious Monk plays is the piano.",
]
KINDS = ("gpt2", "gptj", "llama")
SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


def make_tokenizer(bos: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """Byte-level BPE; with `bos`, `<s>` is put before every text as Llama's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side=side
    )


def make_model(kind: str, dtype: torch.dtype = torch.float32, layers: int = 4, seed: int = 0) -> torch.nn.Module:
    """A random model with rows large enough for its outputs to depend on everything."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=400, n_embd=32, n_layer=layers, n_head=4, n_positions=128, n_inner=64, **SPECIAL)
        model = GPT2LMHeadModel(config)
    elif kind == "gptj":
        config = GPTJConfig(
            vocab_size=400, n_embd=32, n_layer=layers, n_head=4, n_positions=128, n_inner=64, rotary_dim=4, **SPECIAL
        )
        model = GPTJForCausalLM(config)
    else:
        config = LlamaConfig(
            vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, **SPECIAL,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()
