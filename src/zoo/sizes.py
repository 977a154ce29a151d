"""How the zoo makes configurations small: sizes by the names of fields, and what single architectures need besides."""

from __future__ import annotations

from typing import Any

VOCAB = 256
DEPTH = -1  # stands for the number of layers

# Size: fields that get it where a configuration has them with an integer as default. "depth" is the number of layers.
TINY: dict[str, int] = {}
for _line in """\
depth: num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_encoder_layers num_decoder_layers
depth: num_layers_per_stack
64: hidden_size d_model n_embd emb_dim embedding_dim embed_dim lru_width attention_hidden_size hidden_size_per_layer_input
64: backbone_hidden_size embedding_size input_embedding_size output_embedding_size word_embed_proj_dim qk_dim ple_embed_dim
64: d_embed rnn_hidden_size codebook_size
128: intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner dim_ff ffn_hidden_size feed_forward_size
128: d_ff mlp_dim shared_intermediate_size dense_intermediate_size intermediate_size_mlp mamba_d_ssm ngram_vocab_size_base
256: vocab_size n_token decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size
256: pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab max_position_embeddings n_positions n_ctx
256: max_seq_len context_length max_target_positions seq_length max_sequence_length
32: moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
32: router_hidden_size moe_latent_size q_lora_rank num_buckets relative_attention_num_buckets prompt_mid_dim base_channels
28: image_size crop_size
16: head_dim dim_head d_head d_kv attention_head_size global_head_dim swa_head_dim swa_v_head_dim attention_head_dim
16: kv_lora_rank v_head_dim qk_head_dim index_head_dim index_topk o_lora_rank sliding_window attention_window_size
16: local_attention window_size attention_chunk_size keep_window_size query_pre_attn_scalar mamba_d_state state_size
16: ssm_state_size mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size chunk_size linear_key_head_dim
16: linear_value_head_dim num_mel_bins
14: patch_size
8: qk_rope_head_dim qk_nope_head_dim index_block_size rotary_dim gated_norm_rank block_size mamba_n_heads mamba_num_heads
8: n_mamba_heads laurel_rank make_ngram_vocab_size_divisible_by num_filters
4: num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads num_encoder_attention_heads
4: num_decoder_attention_heads attention_heads swa_num_attention_heads linear_attn_num_heads num_experts n_routed_experts
4: num_local_experts moe_num_experts mamba_dt_rank time_step_rank linear_num_value_heads linear_conv_kernel_dim
3: mask_token_id unk_token_id
2: num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads swa_num_key_value_heads num_query_groups
2: index_n_heads index_topk_blocks o_groups num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts num_experts_per_token
2: n_group zero_expert_num expert_layer_period attn_layer_period mamba_n_groups mamba_ngroups n_groups linear_num_key_heads
2: altup_num_inputs split_ngram_parts num_codebooks pooling_kernel_size eos_token_id sep_token_id forced_eos_token_id
1: topk_group first_k_dense_replace n_shared_experts moe_layer_interval decoder_sparse_step num_dense_layers
1: expert_layer_offset attn_layer_offset moe_layer_freq interleave_moe_layer_step audio_channels bos_token_id
1: decoder_start_token_id cls_token_id forced_bos_token_id
0: num_kv_shared_layers moe_layer_start_index num_nextn_predict_layers pad_token_id
""".splitlines():
    _width, _, _names = _line.partition(": ")
    TINY |= dict.fromkeys(_names.split(), DEPTH if _width == "depth" else int(_width))

SET_IF_NONE = {"num_key_value_heads", "head_dim"}  # None means: as the large one
KEPT_IF = {  # value of the default → fields that keep it: switched off, or grouped by one
    0: {"first_k_dense_replace", "num_dense_layers"},
    1: {"n_group", "topk_group", "num_kv_heads", "kv_n_heads"},
}
# fmt: off
IN_TOWERS = {  # vision and audio towers are built and not trained
    "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "depth", "num_heads", "image_size",
    "patch_size", "num_layers", "crop_size", "num_mel_bins",
}
TEXT_PARTS = {
    "text_config", "attn_config", "ffn_config", "decoder", "depth_decoder_config", "decoder_config", "encoder_config",
    "global_config", "patcher_config",
}
PER_LAYER = {
    "layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers", "attention_layers", "indexer_types",
}
# fmt: on
DROPOUT = ("dropout", "pdrop", "drop_rate", "layerdrop", "jitter")

# What the table does not say of an architecture; "part.field" is a field of a nested configuration, "depth" the number of layers.
# fmt: off
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_config.hidden_size_global": 128, "decoder_config.hidden_size_global": 128, "global_config.hidden_size": 128,
            "global_config.head_dim": 32},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"],
                            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"v_head_dim": 8},  # less wide than keys, as in its checkpoints
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"audio_config.adapter_input_size": 64, "audio_config.adapter_out_dim": 64,
                   "vision_config.adapter_in_dim": 64, "vision_config.adapter_out_dim": 64},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_head_dim": 16, "swa_v_head_dim": 16, "swa_num_key_value_heads": 4,
                        "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8,
                        "num_key_value_heads": 4, "shared_experts_intermediate_size": 32},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4,
                 "attn_layers": ["local", "lsh"], "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"depth": 3, "attention_hidden_size": 128, "attention_head_dim": 32,
              "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on


def _rope(kind: str, **how: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **how}}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama+llama3": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "llama+dynamic": _rope("dynamic", factor=2.0),
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "llama+tied": {"tie_word_embeddings": True},
    "qwen2+yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "qwen2+sliding": {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3+longrope": {"original_max_position_embeddings": 64}
    | _rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=64),
    "mistral+sliding": {"sliding_window": 16},
    "cohere+qknorm": {"use_qk_norm": True},
    "glm4_moe+qknorm": {"use_qk_norm": True},
    "stablelm+parallel": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    "phi+qknorm": {"qk_layernorm": True},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon+alibi": {"alibi": True},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "doge+moe": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "mixtral+router_loss": {"output_router_logits": True},
    "granitemoeshared+shared": {"shared_intermediate_size": 64},
    "falcon_h1+norm": {"mamba_rms_norm": True},
}
