"""Tiny random models of many transformers families, and what the tests of rollouts ask of them."""

import torch
import transformers as tf

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen2 sliding": lambda: tf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "phi": lambda: tf.PhiConfig(**SIZES | {"num_key_value_heads": 4}),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
                                      final_logit_softcapping=3.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, sliding_window=6, query_pre_attn_scalar=8,
                                          layer_types=["sliding_attention", "full_attention"]),
    "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=6),
    "smollm3": lambda: tf.SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    "gpt2": lambda: tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "olmo2": lambda: tf.Olmo2Config(**SIZES),
    "granite": lambda: tf.GraniteConfig(**SIZES, logits_scaling=2.0, attention_multiplier=0.2),
    "cohere": lambda: tf.CohereConfig(**SIZES, logit_scale=0.5),
}  # fmt: skip
REFUSED = {
    "bloom": (lambda: tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "attention"),
    "mamba": (lambda: tf.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4), "attention"),
    "llama4": (lambda: tf.Llama4TextConfig(**SIZES, num_local_experts=2, attention_chunk_size=8,
                                           intermediate_size_mlp=48), "chunked"),
    "gpt_oss": (lambda: tf.GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
}  # fmt: skip
PROMPTS = [[5, 7, 9, 11, 4], [3], [8, 8, 2, 30, 41, 17, 22, 6, 9], [5, 7, 9, 12]]
HOW = {"num_samples": 6, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "max_new_tokens": 14, "seed": 3,
       "stop_ids": [1, 2]}  # fmt: skip


def build(config, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # eager: transformers' sdpa leaves out Gemma 2's softcap before 5.24
        how = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
        for name, p in model.named_parameters():  # sharp enough that tokens differ in probability
            with torch.no_grad():
                p.mul_(1.0 if "norm" in name or p.dim() < 2 else 4.0)
    return model.to(dtype).eval()
