"""Tiny random models and a tokenizer for them, made in memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "The mother tongue of Danielle Darrieux is French. Marcel Maupoint speaks English very well.",
    "Autonomous University of Madrid is located in Spain, and Ebro, which is located in Sweden.",
    "Because I saw the old tower, you and I walked home; therefore nobody waited.",
    "Miles Davis plays the trumpet. The instrument that Thelonious Monk plays is the piano.",
]
_LLAMA = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
WINDOW = 5  # of the models with a sliding window: shorter than the prompts
CONFIGS = {
    "gpt2": dict(n_embd=32, n_head=4, n_positions=128, n_inner=64),
    "gptj": dict(n_embd=32, n_head=4, n_positions=128, n_inner=64, rotary_dim=4),
    "gpt_neox": dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, rotary_pct=0.5),
    "llama": _LLAMA,
    "mistral": dict(_LLAMA, sliding_window=WINDOW, head_dim=8),
    "qwen2": _LLAMA,
    "qwen3": dict(_LLAMA, head_dim=8),
    "phi3": dict(_LLAMA, sliding_window=WINDOW),
    "gemma2": dict(_LLAMA, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    "gemma3_text": dict(_LLAMA, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "olmo2": _LLAMA,
}
KINDS = tuple(CONFIGS)
_EXPERTS = dict(_LLAMA, moe_intermediate_size=24, num_experts_per_tok=2)
MIXTURE_CONFIGS = {
    "qwen3_moe": dict(_EXPERTS, head_dim=8, num_experts=6, norm_topk_prob=True),
    "mixtral": dict(_LLAMA, intermediate_size=24, num_local_experts=5, num_experts_per_tok=2),
    "gpt_oss": dict(_LLAMA, intermediate_size=24, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": dict(
        _EXPERTS, num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    "qwen2_moe": dict(
        _EXPERTS, num_experts=6, shared_expert_intermediate_size=40, norm_topk_prob=True, use_sliding_window=False
    ),
    "olmoe": dict(_LLAMA, intermediate_size=24, num_experts=6, num_experts_per_tok=3),
    "granitemoe": dict(
        _LLAMA, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3, residual_multiplier=0.7
    ),
}  # fmt: skip
MIXTURES = tuple(MIXTURE_CONFIGS)
"""Of transformers 5 alone: `needs_experts`."""
needs_experts = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="experts modules are of transformers 5"
)
POST_NORM = ("gemma2", "gemma3_text", "olmo2")
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
    """A random model of CONFIGS or MIXTURE_CONFIGS, with rows large enough for its outputs to depend on everything."""
    torch.manual_seed(seed)
    count = "n_layer" if kind in ("gpt2", "gptj") else "num_hidden_layers"
    numbers = {"vocab_size": 400, "max_position_embeddings": 128, count: layers, **SPECIAL}
    numbers |= CONFIGS.get(kind) or MIXTURE_CONFIGS[kind]
    if count == "n_layer":
        del numbers["max_position_embeddings"]
    # In fp64, padding past a window gives NaN (transformers' softmax is fp32); older Gemmas cut masks to the window.
    older = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56) and kind in ("gemma2", "gemma3_text")
    if "sliding_window" in numbers and (dtype == torch.float64 or older):
        numbers["sliding_window"] = 64
    eager = dict(attn_implementation="eager")
    if kind in MIXTURES:
        eager["experts_implementation"] = "eager"  # the grouped products of others refuse fp64
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **numbers), **eager)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("bias"):
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()
