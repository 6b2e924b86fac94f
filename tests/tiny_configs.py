"""A tiny configuration of any of transformers' families, made from its default one by the names of its numbers."""

import re
from typing import Any

VOCABULARY, WINDOW, POSITIONS = 61, 6, 64
# what a number becomes, by its name: the first that fits. A number that fits none stays
RULES: list[tuple[str, int]] = [
    (r"type_vocab_size|segment_types|prompt_types", 2),
    (r"vocab|n_positions_max", VOCABULARY),
    (r"ngram_size|ngram$|heads_per_ngram|split_ngram_parts", 2),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 16),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"attention_head_dim", 16),
    (r"head_dim|kv_channels|d_head|dim_head|attention_head_size", 8),
    (r"index_topk_blocks|index_local_blocks", 1),
    (r"index_topk", WINDOW),
    (r"topk_group|n_group$|num_expert_group|n_groups|ngroups", 1),
    (r"per_tok|topk|top_k|moe_k", 2),
    (r"num_.*experts|n_routed_experts|zero_expert_num", 4),
    (r"attention_chunk_size|index_block_size|block_size|chunk_length", 8),
    (r"local_attention$", 2 * WINDOW),
    (r"sliding_window$|sliding_window_size|window_size|local_attention_window_len", WINDOW),
    (r"position|n_ctx|max_seq_len|context_length|model_max_length|rel_extent", POSITIONS),
    (r"chunk_?size|chunksize|block_multiple_of", 8),
    (r"intermediate_size|ffn_dim|ffn_hidden|^dff$|dim_ff|d_inner|feed_forward_size|round_up", 48),
    (r"attention_hidden_size|mamba_d_ssm", 64),
    (r"hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim|embedding_size|embed_proj_dim|lru_width|model_base", 32),
    (r"rank|d_rel", 8),
    (r"state_size|d_state", 4),
    (r"heads|n_head$", 4),
]  # fmt: skip
LAYERS = re.compile(r"num_hidden_layers|n_layers?$|num_layers$|(en|de)coder_layers$|num_blocks$|layers_per_stack")
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KEPT = ("model_type", "mamba_expand", "expand", "num_mem_blocks", "n_langs")
NONE = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
        "n_shared_experts": 1, "sliding_window": WINDOW}  # fmt: skip
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "num_kv_shared_layers": 2, "per_layer_config": None}  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {  # what the rules can't know of a family
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")}},
    "cpmant": {"position_bias_num_buckets": 512, "position_bias_max_distance": 2048, "segment_types": 32,
               "prompt_types": 32},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dory": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3,
             "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots3_note_text": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": SHARED | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": 48},
    "gemma4_text": SHARED,
    "lfm2": {"full_attn_idxs": None, "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """Return a family's tiny configuration: as many layers as it has kinds of them, windows of six tokens."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    small = _small(kind().to_dict())
    for name in ("use_sliding_window", "is_decoder"):
        if name in small:
            small[name] = True
    small |= {name: value for name, value in NONE.items() if small.get(name, 0) is None}
    return kind.from_dict(small | EXTRA.get(family, {}) | changes)


def _small(config: dict[str, Any]) -> dict[str, Any]:
    depths = [v for k, v in config.items() if LAYERS.search(k) and isinstance(v, int)]
    chosen = _distinct_layers(config, max(depths, default=2))
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in KEPT or isinstance(value, bool):
            out[name] = value
        elif name == "per_layer_config":
            numbers = {old: f"{new:02}" for new, old in enumerate(chosen)}
            out[name] = {numbers[int(i)]: _small(of) for i, of in (value or {}).items() if int(i) in numbers}
        elif isinstance(value, dict):
            out[name] = _small(value) if name.endswith(("config", "coder", "rope_parameters")) else value
        elif isinstance(value, list) and depths and len(value) == max(depths):
            out[name] = [value[i] for i in chosen]
        elif isinstance(value, int):
            out[name] = _number(name, value, config, len(chosen))
        else:
            out[name] = value
    return out


def _distinct_layers(config: dict[str, Any], depth: int) -> list[int]:
    """Return the numbers of two to four layers that differ in what the configuration says of each."""
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == depth]
    seen: dict[str, int] = {}
    for i in range(depth):
        seen.setdefault(str([of[i] for of in lists]), i)
    chosen = sorted(seen.values())[:4]
    return chosen if len(chosen) > 1 else list(range(min(depth, 2)))


def _number(name: str, value: int, config: dict[str, Any], layers: int) -> int:
    if name.endswith(("_token_id", "_index")):
        return value if value < VOCABULARY else TOKENS.get(name, 3)
    if LAYERS.search(name):
        return layers
    if re.search(r"key_value_heads|kv_heads|query_groups", name):
        heads = config.get("num_attention_heads", value)
        return 4 if value == heads else 1 if value == 1 else 2
    for pattern, small in RULES:
        if re.search(pattern, name):
            return min(value, small)
    return value
