"""A tiny random model of any decoder of the installed transformers.

One set of small numbers serves every configuration, each number where the configuration has a field of that name;
`OVERRIDES` has what a type needs besides, as data. The vocabulary has 400 tokens, like those of `tiny_tokenizer` and of
the tests; TOKENS of them stand in no text: they are the bytes that UTF-8 does not use.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

try:
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
except ImportError:  # a transformers without them
    AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = None, {}

WINDOW = 5  # shorter than prompts
TOKENS = range(180, 191)  # bytes 0xF5 to 0xFF
MOST_PARAMETERS = 10_000_000  # a larger model has a size that no small number reaches
SPREAD = 0.16  # standard deviation of the entries of matrices: large enough for outputs to depend on everything

TEXT = dict(
    vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.02, init_std=0.02,
    hidden_size=32, n_embd=32, d_model=32, word_embed_proj_dim=32, embedding_size=32, emb_dim=32, embedding_dim=32,
    intermediate_size=64, ffn_dim=64, ffn_hidden_size=64, n_inner=64, dim_ff=64, dff=64, decoder_ffn_dim=64,
    encoder_ffn_dim=64, expansion_ratio=2, shared_intermediate_size=64,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, attention_heads=4, decoder_attention_heads=4,
    encoder_attention_heads=4, num_key_value_heads=2, num_kv_heads=2, head_dim=8, attention_head_dim=8,
    d_kv=8, dim_head=8, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2,
    max_position_embeddings=128, n_positions=128, n_ctx=128, max_seq_len=128, context_length=128,
    sliding_window=WINDOW, sliding_window_size=WINDOW, window_size=WINDOW, attention_window_size=WINDOW,
    local_attention=2 * WINDOW, use_sliding_window=True, max_window_layers=2, query_pre_attn_scalar=8, rotary_dim=4,
    logits_scaling=2.5, logit_scale=0.5, embedding_multiplier=1.5, residual_multiplier=0.7, attention_multiplier=0.4,
    lm_head_multiplier=0.6, final_logit_softcapping=5.0, logits_soft_cap=5.0, attn_logit_softcapping=4.0,
    hidden_size_per_layer_input=4, vocab_size_per_layer_input=400, num_kv_shared_layers=0, laurel_rank=4,
    q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, index_head_dim=8,
    index_n_heads=2, index_topk=64, type_vocab_size=2,
    mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8, mamba_d_conv=3, mamba_expand=1, mamba_n_groups=1,
    mamba_chunk_size=8, mamba_ngroups=1, n_mamba_heads=2, mamba_num_heads=4, mamba_head_dim=8, mamba_dt_rank=4,
    ssm_state_size=8, state_size=8, conv_kernel=3, expand=1, n_groups=1, chunk_size=8, time_step_rank=4, lru_width=32,
    use_mamba_kernels=False, conv1d_width=3, conv_L_cache=3, block_auto_adjust_ff_dim=False, adapter_rank=4,
    linear_conv_kernel_dim=3, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2,
    moe_k=2, moe_topk=2, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
    dropout=0.0, attention_dropout=0.0, hidden_dropout=0.0, hidden_dropout_prob=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    attn_pdrop=0.0, attention_probs_dropout_prob=0.0, activation_dropout=0.0, residual_dropout=0.0, emb_pdrop=0.0,
    embedding_dropout=0.0, resid_dropout=0.0, embed_dropout=0.0, mlp_dropout=0.0, layerdrop=0.0,
    is_decoder=True, use_cache=True,
)  # fmt: skip
"""Fields of a text model's configuration, in small."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
"""Fields that say how many blocks there are."""

VISION = dict(
    hidden_size=16, embed_dim=16, d_model=16, intermediate_size=32, mlp_dim=32, num_hidden_layers=2, depth=2,
    num_attention_heads=2, num_heads=2, attention_heads=2, head_dim=8, num_key_value_heads=2, image_size=16,
    patch_size=8, num_channels=3, in_channels=3, in_chans=3, spatial_merge_size=2, temporal_patch_size=2,
    out_hidden_size=32, projection_dim=32, num_position_embeddings=16, deepstack_visual_indexes=[0],
    fullatt_block_indexes=[0], output_dim=32, initializer_range=0.02, vocab_size=64, max_position_embeddings=64,
    num_global_layers=1, vision_output_dim=32, intermediate_layers_indices=[0], encoder_hidden_size=32,
    query_num=4, cross_attention_frequency=1, num_mel_bins=8, hidden_dim=16,
)  # fmt: skip
"""Fields of configurations of other parts: vision and audio towers, projectors."""

_TOKEN_FIELDS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id",
    "audio_token_index", "vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id",
    "boi_token_index", "eoi_token_index", "boa_token_id", "eoa_token_id", "eoa_token_index", "cls_token_id",
    "sep_token_id", "decoder_start_token_id", "eod_token_id", "image_start_token_id", "image_end_token_id",
    "video_start_token_id", "video_end_token_id", "audio_start_token_id", "audio_end_token_id", "mask_token_id",
    "im_start_id", "im_end_id",
)  # fmt: skip
"""Fields that name a token of their own: they get ids that no text has."""

_EVERY_OTHER = ("linear_attention", "full_attention")
_WINDOWS = dict(layer_types=("sliding_attention", "full_attention"))
_LLAMA_TEXT = dict(model_type="llama")
OVERRIDES: Mapping[str, dict[str, Any]] = {
    # Windows on every other layer.
    **{kind: _WINDOWS for kind in (
        "gemma2", "gemma3_text", "gemma3n_text", "cohere2", "olmo3", "exaone4",
        "ministral", "smollm3", "vaultgemma", "modernbert-decoder", "gpt_oss", "cwm", "qwen2", "qwen3")},
    # Hybrids.
    "bamba": dict(attn_layer_indices=[1, 3]),
    "jamba": dict(num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1),
    "falcon_h1": dict(mlp_multipliers=[0.8, 1.2], ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 1.0], key_multiplier=0.9),
    "zamba": dict(layers_block_type=("mamba", "hybrid"), num_key_value_heads=4, attention_head_dim=16),
    "zamba2": dict(layers_block_type=("mamba", "hybrid"), num_key_value_heads=4, use_long_context=False),
    "nemotron_h": dict(layers_block_type=("mamba", "mlp", "attention", "mlp")),
    "lfm2": dict(layer_types=("conv", "full_attention")),
    "recurrent_gemma": dict(block_types=("recurrent", "attention"), num_key_value_heads=1),
    "qwen3_next": dict(layer_types=_EVERY_OTHER, num_experts=0, mlp_only_layers=[0, 1, 2, 3]),
    "qwen3_5_text": dict(layer_types=_EVERY_OTHER),
    "olmo_hybrid": dict(layer_types=_EVERY_OTHER),
    "granitemoehybrid": dict(layer_types=("mamba", "attention"), num_local_experts=0),
    # Latent attention has as many keys as queries; mrope's sections are halves of the rotated dimensions.
    **{kind: dict(num_key_value_heads=4) for kind in (
        "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
        "youtu", "mistral4", "mistral_large4_text", "dots3_note_text", "glm5_next_text")},
    **{kind: dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5,
                                       mrope_section=[1, 1, 0]))
       for kind in ("glm4v_text", "glm4v_moe_text", "glm_ocr_text")},
    # Others. A value in the last block reaches the loss of no prompt that goes on behind its subject: experts not there
    # alone.
    "beam": dict(mlp_layer_types=("dense", "sparse")),
    "gemma4_text": dict(_WINDOWS, num_experts=None, global_head_dim=8),
    "gemma4_unified_text": dict(_WINDOWS, num_experts=None, global_head_dim=8),
    "cohere_compass_text": dict(_WINDOWS, rope_parameters={
        kind: dict(rope_type="default", rope_theta=10000.0) for kind in _WINDOWS["layer_types"]}),
    "hunyuan_v1_dense": dict(head_dim=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "smollm3": dict(_WINDOWS, no_rope_layers=(1, 0)),
    "falcon": dict(multi_query=True, parallel_attn=True),
    "stablelm": dict(use_qkv_bias=True),
    "opt": dict(max_position_embeddings=128),
    "nemotron": dict(head_dim=8),
    # Multimodal: parts whose type is a matter of the checkpoint.
    "gemma3": dict(mm_tokens_per_image=4, vision_config=dict(model_type="siglip_vision_model")),
    "mistral3": dict(text_config=dict(model_type="mistral"), vision_config=dict(model_type="pixtral")),
    "llava": dict(text_config=_LLAMA_TEXT, vision_config=dict(model_type="clip_vision_model"), image_seq_length=4),
    "qwen2_vl_vision": dict(hidden_size=32),  # of the text model
    **{kind: dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
       for kind in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "paddleocr_vl_text", "cosmos3_edge_text",
                    "qwen2_5_omni_text")},
    "hunyuan_vl_text": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, xdrope_section=[1, 1, 1, 1])),
    "molmo2_vision": dict(image_size=[16, 16]),
    "molmo2_adapter": dict(vision_feature_layer=[1, 0]),
    "qwen2_5_omni_audio_encoder": dict(encoder_attention_heads=2),
    "kimi_linear": dict(layer_types=_EVERY_OTHER, num_key_value_heads=4),
}  # fmt: skip
"""Type of a configuration -> fields that replace or complete the small numbers; tuples are repeated over the layers."""


def decoder_types() -> tuple[str, ...]:
    """Every type of a causal language model, and of a model of images and text, that transformers names."""
    return tuple(dict.fromkeys((*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)))


def _fields(config_class: type) -> set[str]:
    """Names that a configuration takes."""
    names = itertools.chain.from_iterable(
        inspect.signature(each.__init__).parameters for each in config_class.__mro__ if "__init__" in vars(each)
    )
    return set(names) - {"self", "kwargs"}


def _parts(config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig]]:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield name, value


def _values(config_class: type, layers: int, small: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration in small, without its parts."""
    fields = _fields(config_class)
    tokens = dict(zip((name for name in _TOKEN_FIELDS if name in fields), itertools.cycle(TOKENS), strict=False))
    depths = {} if small is VISION else dict.fromkeys(DEPTHS, layers)
    chosen = {name: value for name, value in {**small, **depths, **tokens}.items() if name in fields}
    for name, value in overrides.items():
        chosen[name] = list(itertools.islice(itertools.cycle(value), layers)) if isinstance(value, tuple) else value
    return chosen


def tiny_config(
    model_type: str, layers: int = 4, small: Mapping[str, Any] = TEXT, **overrides: Any
) -> PretrainedConfig:
    """The configuration of a type with small numbers, its parts too.

    Raises:
        Exception: whatever the configuration's class says to these numbers; KeyError for an unknown type.
    """
    config_class = CONFIG_MAPPING[model_type]
    overrides = {**OVERRIDES.get(model_type, {}), **overrides}
    given = {name: dict(value) for name, value in overrides.items() if isinstance(value, dict) and "config" in name}
    parts: dict[str, Any] = {}
    for name, part in _parts(config_class()):
        if part.model_type not in CONFIG_MAPPING:  # fields in a group: MPT's attention
            continue
        values = given.pop(name, {})
        kind = values.pop("model_type", part.model_type)
        text = name in ("text_config", "decoder", "attn_config", "ffn_config", "decoder_config")
        parts[name] = tiny_config(kind, layers, TEXT if text else VISION, **values)
    plain = {name: value for name, value in overrides.items() if name not in parts}
    return config_class(**_values(config_class, layers, small, plain), **parts)


def tiny_decoder(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 4, **overrides: Any
) -> PreTrainedModel:
    """A random model of a type, its attention computed eagerly, with rows large enough for outputs to depend on all.

    In float64 windows are longer than prompts: transformers' softmax is of float32, and gives NaN where padding has
    nothing in its window. `overrides` are fields of the configuration.

    Raises:
        ValueError: no such type, or a model of more than 10 million parameters.
        Exception: whatever transformers says to the configuration.
    """
    if model_type not in decoder_types():
        raise ValueError(f"{model_type!r} is no decoder of the installed transformers")
    config = tiny_config(model_type, layers, **overrides)
    if dtype == torch.float64:
        for part in (config, *(part for _, part in _parts(config))):
            if getattr(part, "sliding_window", None):
                part.sliding_window = 64
    several = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if several else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config, attn_implementation="eager").parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters: a size that no small number reaches")
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.endswith("A_log"):
                parameter.normal_(0, SPREAD)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def tiny_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 400 tokens, trained on texts; its ids 0, 1 and 2 are `<s>`, `</s>` and `<pad>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT["vocab_size"], special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
