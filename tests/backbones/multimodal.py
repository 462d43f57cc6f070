"""Tiny backbones of several modalities, of audio, and for diffusion."""

import keras
import keras_hub
import numpy as np
from keras_hub.src.models.mobilenetv5.mobilenetv5_builder import convert_arch_def_to_stackwise
from keras_hub.src.models.stable_diffusion_3.t5_encoder import T5Encoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

from backbones import BATCH, LENGTH, TOKENS, Tiny, random_inputs

LAYERS = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 36}
TEXT_ENCODER = {
    **LAYERS,
    "vocabulary_size": TOKENS,
    "embedding_dim": 16,
    "max_sequence_length": LENGTH,  # SigLIP takes no shorter texts
}
VISION_ENCODER = {**LAYERS, "patch_size": 4, "image_shape": (8, 8, 3)}


def encoders(family):
    """The vision and the text encoder of a CLIP-like family."""
    models = keras_hub.models
    return {
        "vision_encoder": getattr(models, f"{family}VisionEncoder")(**VISION_ENCODER),
        "text_encoder": getattr(models, f"{family}TextEncoder")(**TEXT_ENCODER),
    }


# The Gemma family writes the tokens of images, here one token each and LENGTH images per text,
# over the text's tokens at given positions; those given position 0 are dropped.
POSITIONS = np.tile(np.arange(LENGTH, dtype="int32"), (BATCH, 1))
ODD = POSITIONS % 2


def gemma3_vision_encoder(output_dim):
    return keras_hub.models.Gemma3VisionEncoder(
        **LAYERS, image_size=8, patch_size=4, pool_size=2, output_dim=output_dim
    )


def blip2():
    models = keras_hub.models
    qformer = models.BLIP2QFormer(
        num_query_tokens=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=28,
        vision_dim=16,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    qformer.query_tokens.assign(keras.random.normal((1, 3, 12), seed=5))  # zeros, which hide layers
    return {
        "vision_encoder": models.BLIP2VisionEncoder(
            **LAYERS,
            image_size=8,
            patch_size=4,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
        ),
        "qformer": qformer,
        "language_model": models.BLIP2CustomOPT(
            **LAYERS,
            vocabulary_size=TOKENS,
            num_query_tokens=3,
            dropout=0.0,
            max_sequence_length=12,
            qformer_hidden_dim=12,
        ),
    }


def gemma3_inputs(model):
    images = {"vision_indices": POSITIONS * ODD}
    if "vision_mask" in model.input:
        images["vision_mask"] = ODD
    return {**random_inputs(model), **images}


def gemma3n():
    return {
        "text_vocab_size": TOKENS,
        "text_hidden_size": 16,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 2,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": [36] * 2,
        "hidden_activation": "gelu_approximate",
        "sliding_window": 4,
        "rope_theta": 10000.0,
        "max_position_embeddings": 12,
        "vocab_size_per_layer_input": 11,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 4,
        "altup_correct_scale": False,  # it starts at zero, which hides layers
        "laurel_rank": 4,
        "vision_encoder_config": {
            **convert_arch_def_to_stackwise([["er_r1_k3_s1_e1_c16"]]),
            "num_features": 16,
            "image_shape": (4, 4, 3),
            "use_msfa": False,
        },
        "vision_hidden_size": 16,
        "vision_vocab_offset": 11,
        "vision_vocab_size": 3,
        "image_token_id": 12,
        "audio_encoder_config": {
            "hidden_size": 12,
            "input_feat_size": 8,
            "sscp_conv_channel_size": [4, 4],
            "sscp_conv_kernel_size": [(3, 3), (3, 3)],
            "sscp_conv_stride_size": [(2, 2), (2, 2)],
            "sscp_conv_group_norm_eps": 1e-3,
            "num_hidden_layers": 1,
            "rms_norm_eps": 1e-6,
            "gradient_clipping": 1e10,
            "residual_weight": 0.5,
            "num_attention_heads": 2,
            "attention_chunk_size": 2,
            "num_attention_context_right": 0,
            "num_attention_context_left": 3,
            "attention_logit_cap": 50.0,
            "conv_kernel_size": 3,
            "reduction_factor": 1,
        },
        "audio_hidden_size": 12,
        "audio_vocab_offset": 14,
        "audio_vocab_size": 3,
        "audio_soft_tokens_per_image": 2,
        "audio_token_id": 15,
    }


def gemma3n_inputs(model):
    _, padding, images, audio, mask = random_inputs(model)
    tokens = np.tile(np.array([5, 12, 15, 15, 12, 7], "int32"), (BATCH, 1))
    return [tokens, padding, images, audio, np.zeros_like(mask)]  # that mask: true where padded


def gemma4():
    return {
        "vocabulary_size": TOKENS,
        "image_size": 4,
        "num_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True,
        "num_query_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "hidden_dim": 16,
        "intermediate_dim": 36,
        "head_dim": 8,
        "global_head_dim": 12,
        "hidden_size_per_layer_input": 4,
        "enable_moe_block": True,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "expert_intermediate_dim": 20,
        "is_embedding_model": True,
        "pooling_intermediate_dim": 20,
        "embedding_dim": 8,
        "vision_encoder": keras_hub.models.Gemma4VisionEncoder(
            **LAYERS,
            image_size=4,
            patch_size=2,
            pool_size=2,
            head_dim=8,
            output_dim=16,
            position_embedding_size=2,
        ),
        "audio_encoder": keras_hub.models.Gemma4AudioEncoder(
            input_feat_size=8,
            hidden_size=12,
            num_heads=2,
            num_layers=1,
            chunk_size=2,
            context_left=3,
            conv_kernel_size=3,
            sscp_conv_channels=(4, 4),
            output_proj_dims=20,
            output_dim=16,
        ),
        "num_audio_tokens_per_clip": 2,
    }


def gemma4_inputs(model):
    """Text, audio, image, audio, image, audio; the audio is the second tokens of three clips."""
    inputs = random_inputs(model)
    patches = (BATCH, LENGTH, 4)
    return {
        **inputs,
        "position_ids": POSITIONS,
        "pixel_values": np.random.default_rng(4).uniform(size=(*patches, 12)).astype("float32"),
        "pixel_position_ids": np.resize([0, 0, 1, 0, 0, 1, 1, 1], (*patches, 2)).astype("int32"),
        "vision_indices": POSITIONS * (1 - ODD),
        "vision_mask": (1 - ODD) * (POSITIONS > 0),
        "audio_mel": inputs["audio_mel"][:, : LENGTH // 2],
        "audio_mel_mask": inputs["audio_mel_mask"][:, : LENGTH // 2],
        "audio_indices": POSITIONS * ODD,
        "audio_mask": ODD,
    }


def sam3():
    layers = keras_hub.layers
    image = {"image_shape": (16, 16, 3), "patch_size": 4}
    detr = {"num_layers": 1, "num_heads": 4, "hidden_dim": 16, "intermediate_dim": 36}
    return {
        "vision_encoder": layers.SAM3VisionEncoder(
            **LAYERS,
            **image,
            fpn_hidden_dim=16,
            fpn_scale_factors=[2.0, 1.0, 0.5],
            pretrain_image_shape=(8, 8, 3),
            window_size=2,
            global_attn_indexes=[],
        ),
        "text_encoder": layers.SAM3TextEncoder(**TEXT_ENCODER),
        "geometry_encoder": layers.SAM3GeometryEncoder(**detr, roi_size=2),
        "detr_encoder": layers.SAM3DetrEncoder(**detr),
        "detr_decoder": layers.SAM3DetrDecoder(**detr, **image, num_queries=3),
        "mask_decoder": layers.SAM3MaskDecoder(num_upsampling_stages=1, hidden_dim=16, num_heads=2),
    }


def sam3_inputs(model):
    """As many images as boxes + 1, since KerasHub takes a mask of that shape for a square one."""
    # On torch, no boxes: KerasHub takes them with torchvision only.
    batch = 1 if keras.config.backend() == "torch" else BATCH
    inputs = {name: value[:batch] for name, value in random_inputs(model).items()}
    boxes = inputs["boxes"][:, : batch - 1]
    boxes[..., 0] = np.arange(batch)[:, None]  # the image that the box is in
    return {**inputs, "boxes": boxes, "box_labels": np.ones_like(boxes[..., 0], "int32")}


@keras.saving.register_keras_serializable()
class T5(T5Encoder, keras_hub.models.Backbone):
    """The T5 of Stable Diffusion 3, which torch refuses unless it is a Backbone."""


def stable_diffusion3():
    models = keras_hub.models
    clip = {**TEXT_ENCODER, "intermediate_output_index": -1}
    return {
        "mmdit_patch_size": 1,
        "mmdit_hidden_dim": 16,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 4,
        "mmdit_qk_norm": "rms_norm",
        "mmdit_dual_attention_indices": (0,),
        "vae": VAEBackbone([32] * 4, [1] * 4, [32] * 4, [1] * 4, "mode", sample_channels=8),
        "clip_l": models.CLIPTextEncoder(**clip, name="clip_l"),
        "clip_g": models.CLIPTextEncoder(**clip, name="clip_g"),
        "t5": T5(TOKENS, 1, 2, hidden_dim=36, intermediate_dim=44, dropout=0.0),
        "latent_channels": 4,
        "image_shape": (16, 16, 3),
    }


# What the Gemmas have in common, without the encoders of images and sound.
GEMMA = {
    "vocabulary_size": TOKENS,
    "image_size": 8,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 20,
    "intermediate_dim": 36,
    "head_dim": 8,
}

MULTIMODAL = {
    "BLIP2Backbone": Tiny(blip2),
    "CLIPBackbone": Tiny(lambda: {**encoders("CLIP"), "projection_dim": 12}),
    "CLIPTextEncoder": Tiny(lambda: TEXT_ENCODER),
    "CLIPVisionEncoder": Tiny(lambda: VISION_ENCODER),
    "FluxBackbone": Tiny(
        lambda: {
            "input_channels": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "axes_dim": [4, 2, 2],
            "theta": 10000,
            "use_bias": True,
            "guidance_embed": True,
            "image_shape": (4, 8),
            "text_shape": (3, 12),
            "image_ids_shape": (4, 3),
            "text_ids_shape": (3, 3),
            "y_shape": (20,),
        }
    ),
    "DiffusionGemmaBackbone": Tiny(lambda: {**GEMMA, "num_layers": 2}),
    "EmbeddingGemma2Backbone": Tiny(lambda: {**GEMMA, "num_layers": 2, "embedding_dim": 12}),
    "Gemma3Backbone": Tiny(
        lambda: {
            "vocabulary_size": TOKENS,
            "image_size": 8,
            "num_layers": 1,
            "num_query_heads": 2,
            "num_key_value_heads": 1,
            "hidden_dim": 20,
            "intermediate_dim": 36,
            "head_dim": 8,
            "vision_encoder": gemma3_vision_encoder(20),
            "is_embedding_model": True,
            "pooling_intermediate_dim": 28,
            "embedding_dim": 8,
        },
        gemma3_inputs,
    ),
    "Gemma3nBackbone": Tiny(gemma3n, gemma3n_inputs),
    "Gemma4Backbone": Tiny(gemma4, gemma4_inputs),
    "MetaCLIP2Backbone": Tiny(lambda: {**encoders("MetaCLIP2"), "projection_dim": 12}),
    "MetaCLIP2TextEncoder": Tiny(lambda: TEXT_ENCODER),
    "MetaCLIP2VisionEncoder": Tiny(lambda: VISION_ENCODER),
    "MoonshineBackbone": Tiny(
        lambda: {
            "vocabulary_size": TOKENS,
            "filter_dim": 16,
            "encoder_num_layers": 1,
            "decoder_num_layers": 1,
            "hidden_dim": 16,
            "intermediate_dim": 12,
            "encoder_num_heads": 2,
            "decoder_num_heads": 2,
        },
        lambda model: {
            **random_inputs(model),
            "encoder_input_values": np.sin(np.arange(BATCH * 2048, dtype="float32")).reshape(
                BATCH, 2048, 1
            ),
            "encoder_padding_mask": np.ones((BATCH, 2048), bool),
        },
    ),
    "PaliGemmaBackbone": Tiny(
        lambda: {
            "vocabulary_size": TOKENS,
            "image_size": 8,
            "num_layers": 1,
            "num_query_heads": 2,
            "num_key_value_heads": 1,
            "hidden_dim": 20,
            "intermediate_dim": 36,
            "head_dim": 8,
            "vit_patch_size": 4,
            "vit_num_heads": 2,
            "vit_hidden_dim": 16,
            "vit_num_layers": 1,
            "vit_intermediate_dim": 28,
        }
    ),
    "SAM3PromptableConceptBackbone": Tiny(sam3, sam3_inputs),
    "SigLIPBackbone": Tiny(lambda: encoders("SigLIP")),
    "SigLIPTextEncoder": Tiny(lambda: TEXT_ENCODER),
    "SigLIPVisionEncoder": Tiny(lambda: VISION_ENCODER),
    "StableDiffusion3Backbone": Tiny(
        stable_diffusion3,
        lambda model: {**random_inputs(model), "num_steps": np.full(BATCH, 4, "int32")},
    ),
    "T5Gemma2Backbone": Tiny(
        lambda: {
            "vocabulary_size": TOKENS,
            "encoder_hidden_dim": 20,
            "encoder_intermediate_dim": 36,
            "encoder_num_layers": 1,
            "encoder_num_attention_heads": 2,
            "encoder_num_key_value_heads": 1,
            "encoder_head_dim": 8,
            "encoder_layer_types": ["full_attention"],
            "decoder_hidden_dim": 20,
            "decoder_intermediate_dim": 36,
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_num_key_value_heads": 1,
            "decoder_head_dim": 8,
            "decoder_layer_types": ["full_attention"],
            "vision_encoder": gemma3_vision_encoder(20),
            "eoi_token_index": TOKENS - 1,
        },
        gemma3_inputs,
    ),
    "WhisperBackbone": Tiny(
        lambda: {
            **LAYERS,
            "vocabulary_size": TOKENS,
            "num_mels": 8,
            "max_encoder_sequence_length": 12,
            "max_decoder_sequence_length": 12,
        }
    ),
}
