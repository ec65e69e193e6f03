"""A configuration of some ten thousand weights for any family that transformers has, made from its config class alone."""

import inspect

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

WIDTH, VOCABULARY, POSITIONS = 32, 96, 66
SIZES = {  # the size of every option of these names, where the family's own is larger
    WIDTH: "hidden_size d_model n_embd dim emb_dim embedding_size backbone_hidden_size embedding_dim entity_emb_size "
    "input_embedding_size output_embedding_size d_latents",
    VOCABULARY: "vocab_size entity_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    POSITIONS: "n_positions max_position_embeddings max_seq_len n_ctx context_length max_source_positions "
    "max_target_positions",
    48: "intermediate_size moe_intermediate_size d_inner ffn_dim decoder_ffn_dim encoder_ffn_dim hidden_dim dim_ff dff "
    "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size expert_ffn_hidden_size feed_forward_size "
    "dense_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_self_attends_per_block num_key_value_heads num_experts_per_tok moe_topk "
    "num_random_blocks moe_k swa_num_key_value_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts num_self_attention_heads num_cross_attention_heads swa_num_attention_heads linear_num_key_heads "
    "linear_num_value_heads index_n_heads num_latents linear_num_heads",
    8: "head_dim kv_channels q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim "
    "swa_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size d_head "
    "hidden_size_per_layer_input linear_head_dim dim_head o_lora_rank attention_head_size rotary_dim",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "eos_token_id": 3,
}
LATENT = {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4}  # as many key heads as heads
FOUR = {"num_hidden_layers": 4}  # the fourth is the first with attention
ROPE = {"rope_type": "default", "rope_theta": 1e4}
OWN = {  # what must fit together
    "bailing_hybrid": LATENT | FOUR | {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": None, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "dory": FOUR | {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4, "pad_token_id": 0},
    "esmc": {"vocab_size": VOCABULARY},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": FOUR
    | {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": (6, 11), "axial_pos_embds_dim": (16, 16), "attn_layers": ("local", "lsh")},
    "roc_bert": dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8)
    | dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 64),
    "xlstm": {"num_heads": 2, "hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "mamba"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "intermediate_size": 48, "n_mamba_heads": 8},
}
for options, names in (
    ({"head_dim": 8}, "hunyuan_v1_dense hunyuan_v1_moe ministral"),
    (FOUR, "lfm3 qwen3_5_text qwen3_5_moe_text qwen3_next"),
    (LATENT, "axk1 axk2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa minicpm3 youtu"),
):
    OWN |= {name: options for name in names.split()}


def tiny_config(model_type, **changes):
    """The family's configuration with small sizes; what it is made of is made small too."""
    return _tiny(CONFIG_MAPPING[model_type], changes)


def _tiny(config_class, changes):
    options = {}
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        default = parameter.default
        number = isinstance(default, int) and not isinstance(default, bool)
        if name in SMALL and (name.endswith("_token_id") or (number and default > SMALL[name])):
            options[name] = SMALL[name]
    options |= OWN.get(config_class.model_type, {}) | changes
    for name, part in (config_class.sub_configs or {}).items():
        if part is AutoConfig:
            part = type(getattr(config_class(), name, None))
        if name not in options and issubclass(part, PreTrainedConfig):
            options[name] = _tiny(part, {})
    return config_class(**options)
