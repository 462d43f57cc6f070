"""Tiny text backbones: encoders, decoders, encoder-decoders."""

from backbones import TOKENS, Tiny

SIZES = {"vocabulary_size": TOKENS, "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 24}
HEADS = {**SIZES, "num_heads": 2, "dropout": 0.0}
POSITIONS = {**HEADS, "max_sequence_length": 12}
GROUPED = {**SIZES, "num_query_heads": 4, "num_key_value_heads": 2, "dropout": 0.0}
DELTA_NET = {  # one layer with linear attention, then one with full attention
    **GROUPED,
    "num_layers": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}


def side(name, **sizes):
    """One side of T5Gemma, the encoder or the decoder: a layer that slides, one that does not."""
    arguments = {
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        **sizes,
    }
    return {f"{name}_{key}": value for key, value in arguments.items()}


def without(arguments, *names):
    """These arguments but for some."""
    return {key: value for key, value in arguments.items() if key not in names}


TEXT = {
    "AlbertBackbone": Tiny(lambda: {**POSITIONS, "num_layers": 2, "embedding_dim": 8}),
    "BartBackbone": Tiny(lambda: POSITIONS),
    "BertBackbone": Tiny(
        lambda: {
            "vocabulary_size": TOKENS,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 36,
            "max_sequence_length": 12,
        }
    ),
    "BloomBackbone": Tiny(lambda: HEADS),
    "ModernBertBackbone": Tiny(lambda: {**HEADS, "local_attention_window": 4}),
    "DebertaV3Backbone": Tiny(lambda: {**POSITIONS, "bucket_size": 4}),
    "DistilBertBackbone": Tiny(lambda: POSITIONS),
    "ESMBackbone": Tiny(lambda: POSITIONS),
    "EdRecBackbone": Tiny(
        lambda: {
            **without(HEADS, "vocabulary_size", "num_layers"),
            "vocab_size": TOKENS,
            "num_layers_enc": 1,
            "num_layers_dec": 1,
        }
    ),
    "ElectraBackbone": Tiny(
        lambda: {
            **without(POSITIONS, "vocabulary_size"),
            "vocab_size": TOKENS,
            "embedding_dim": 8,
        }
    ),
    "FNetBackbone": Tiny(lambda: without(POSITIONS, "num_heads")),
    "FalconBackbone": Tiny(lambda: {**SIZES, "num_attention_heads": 2}),
    "GPT2Backbone": Tiny(lambda: POSITIONS),
    "GPTNeoXBackbone": Tiny(lambda: POSITIONS),
    "GemmaBackbone": Tiny(
        lambda: {
            **GROUPED,
            "num_layers": 2,
            "head_dim": 6,
            "use_sliding_window_attention": True,
            "sliding_window_size": 4,
        }
    ),
    "GptOssBackbone": Tiny(lambda: {**GROUPED, "num_experts": 4}),
    "Llama3Backbone": Tiny(lambda: GROUPED),
    "LlamaBackbone": Tiny(lambda: GROUPED),
    "MistralBackbone": Tiny(lambda: {**GROUPED, "head_dim": 6}),
    "MixtralBackbone": Tiny(lambda: {**GROUPED, "num_experts": 4}),
    "OPTBackbone": Tiny(lambda: POSITIONS),
    "Phi3Backbone": Tiny(lambda: GROUPED),
    "Qwen3Backbone": Tiny(lambda: {**GROUPED, "head_dim": 6}),
    "Qwen3MoeBackbone": Tiny(
        lambda: {
            **GROUPED,
            "num_layers": 2,
            "head_dim": 6,
            "moe_intermediate_dim": 12,
            "num_experts": 4,
            "top_k": 2,
            "mlp_only_layers": [0],
        }
    ),
    "Qwen3_5Backbone": Tiny(lambda: DELTA_NET),
    "Qwen3_5MoeBackbone": Tiny(
        lambda: {
            **without(DELTA_NET, "intermediate_dim"),
            "moe_intermediate_dim": 12,
            "shared_expert_intermediate_size": 20,
            "num_experts": 4,
            "top_k": 2,
        }
    ),
    "QwenBackbone": Tiny(lambda: GROUPED),
    "QwenMoeBackbone": Tiny(  # all layers are of one kind: KerasHub gives each the index 0
        lambda: {
            **GROUPED,
            "moe_intermediate_dim": 12,
            "shared_expert_intermediate_dim": 20,
            "num_experts": 4,
            "top_k": 2,
        }
    ),
    "RWKV7Backbone": Tiny(
        lambda: {
            **without(SIZES, "hidden_dim"),
            "num_layers": 2,
            "hidden_size": 16,
            "head_size": 8,
            "gate_lora": 6,
            "mv_lora": 4,
            "aaa_lora": 4,
            "decay_lora": 4,
        }
    ),
    "RobertaBackbone": Tiny(lambda: POSITIONS),
    "RoformerV2Backbone": Tiny(lambda: {**HEADS, "head_size": 8}),
    "SmolLM3Backbone": Tiny(
        lambda: {
            **SIZES,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_layer_enabled_list": [True, False],
            "layer_types": ["attention", "attention"],
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-6,
            "max_position_embeddings": 12,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        }
    ),
    "T5Backbone": Tiny(lambda: {**HEADS, "num_layers": 2, "key_value_dim": 6}),
    "T5GemmaBackbone": Tiny(
        lambda: {
            "vocabulary_size": TOKENS,
            **side("encoder", hidden_dim=16, intermediate_dim=24),
            **side("decoder", hidden_dim=12, intermediate_dim=20),
            "sliding_window": 4,
        }
    ),
    "XLMRobertaBackbone": Tiny(lambda: POSITIONS),
    "XLNetBackbone": Tiny(lambda: HEADS),
}
