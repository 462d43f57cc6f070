"""Tiny vision backbones."""

import keras
import keras_hub
import numpy as np

from backbones import BATCH, TOKENS, Tiny, random_inputs


def dense_pyramid():
    """A model for the one class that prescribes no architecture of its own."""
    images = keras.Input((4, 4, 4))
    return {"inputs": images, "outputs": keras.layers.Dense(8)(images)}


def hgnetv2():
    return {
        "depths": [1, 1],
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "stem_channels": [3, 8, 8],
        "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": [(8, 8, 8, 1, 1, 3), (8, 8, 8, 1, 1, 3)],
        "apply_downsample": [True, True],
        "use_lightweight_conv_block": [False, True],
        "image_shape": (32, 32, 3),
    }


def mit():
    return {
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [2, 1],
        "max_drop_path_rate": 0.0,
        "layerwise_patch_sizes": [3, 3],
        "layerwise_strides": [2, 2],
        "image_shape": (16, 16, 3),
        "hidden_dims": [8, 16],
    }


def resnet(stacks=2, image_shape=(16, 16, 3)):
    return {
        "input_conv_filters": [4],
        "input_conv_kernel_sizes": [3],
        "stackwise_num_filters": [64, *[8] * (stacks - 1)],  # KerasHub insists on the 64
        "stackwise_num_blocks": [1] * stacks,
        "stackwise_num_strides": [1, *[2] * (stacks - 1)],
        "block_type": "basic_block_vd",
        "image_shape": image_shape,
    }


def dinov2():
    return {
        "patch_size": 4,
        "num_layers": 2,
        "hidden_dim": 16,
        "num_heads": 2,
        "intermediate_dim": 24,
        "image_shape": (16, 16, 3),
        "position_embedding_shape": (16, 16, 3),
    }


def vit():
    return {
        "image_shape": (16, 16, 3),
        "patch_size": 4,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 24,
    }


def vit_det():
    return {
        "hidden_size": 16,
        "num_layers": 2,
        "intermediate_dim": 24,
        "num_heads": 2,
        "global_attention_layer_indices": [1],
        "image_shape": (16, 16, 3),
        "patch_size": 4,
        "num_output_channels": 32,
        "window_size": 2,
    }


def sam():
    return {
        "image_encoder": keras_hub.models.ViTDetBackbone(**vit_det()),
        "prompt_encoder": keras_hub.layers.SAMPromptEncoder(
            hidden_size=32,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=8,
        ),
        "mask_decoder": keras_hub.layers.SAMMaskDecoder(
            hidden_size=32,
            num_layers=1,
            intermediate_dim=24,
            num_heads=2,
            embedding_dim=32,
            iou_head_hidden_dim=16,
        ),
    }


def sam_inputs(model):
    """Random inputs, with one mask for each image, four times as large as its embedding."""
    return {**random_inputs(model), "masks": np.ones((BATCH, 1, 16, 16, 1), "float32")}


VISION = {
    "BASNetBackbone": Tiny(
        lambda: {
            "image_encoder": keras_hub.models.ResNetBackbone(**resnet(4, (None, None, 3))),
            "num_classes": 1,
            "image_shape": (32, 32, 3),
            "projection_filters": 4,  # those of the input_conv
        }
    ),
    "CSPNetBackbone": Tiny(
        lambda: {
            "stem_filters": 8,
            "stem_kernel_size": 3,
            "stem_strides": 2,
            "stackwise_depth": [1, 1],
            "stackwise_strides": [1, 2],
            "stackwise_num_filters": [8, 16],
            "block_type": "dark_block",
            "stage_type": "csp",
            "block_ratio": [0.5],
            "image_shape": (16, 16, 3),
        }
    ),
    "DFineBackbone": Tiny(
        lambda: {
            "backbone": keras_hub.models.HGNetV2Backbone(**hgnetv2()),
            "decoder_in_channels": [16],
            "encoder_hidden_dim": 16,
            "num_labels": 5,
            "num_denoising": 0,
            "learn_initial_query": False,
            "num_queries": 3,
            "anchor_image_size": (32, 32),
            "feat_strides": [16],
            "num_feature_levels": 1,
            "hidden_dim": 16,
            "encoder_in_channels": [8],
            "encode_proj_layers": [0],
            "num_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "num_encoder_layers": 1,
            "hidden_expansion": 0.5,
            "depth_multiplier": 0.34,
            "eval_idx": -1,
            "num_decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 24,
            "decoder_n_points": [2],
            "lqe_hidden_dim": 8,
            "num_lqe_layers": 2,
            "image_shape": (32, 32, 3),
        }
    ),
    "DINOV2Backbone": Tiny(lambda: {**dinov2(), "use_swiglu_ffn": True}),
    "DINOV3Backbone": Tiny(
        lambda: {
            "patch_size": 4,
            "num_layers": 1,
            "hidden_dim": 16,
            "num_heads": 2,
            "intermediate_dim": 24,
            "num_register_tokens": 1,
            "use_gated_mlp": True,
            "image_shape": (16, 16, 3),
        }
    ),
    "DeepLabV3Backbone": Tiny(
        lambda: {
            "image_encoder": keras_hub.models.ResNetBackbone(**resnet()),
            "spatial_pyramid_pooling_key": "P3",
            "upsampling_size": 2,
            "dilation_rates": [2],
            "low_level_feature_key": "P2",
            "projection_filters": 8,
            "image_shape": (16, 16, 3),
        }
    ),
    "DeiTBackbone": Tiny(
        lambda: {
            "image_shape": (16, 16, 3),
            "patch_size": 4,
            "num_layers": 1,
            "num_heads": 2,
            "hidden_dim": 16,
            "intermediate_dim": 24,
        }
    ),
    "DenseNetBackbone": Tiny(
        lambda: {
            "stackwise_num_repeats": [1, 1],
            "image_shape": (16, 16, 3),
            "growth_rate": 4,
        }
    ),
    "DepthAnythingBackbone": Tiny(
        lambda: {
            "image_encoder": keras_hub.models.DINOV2Backbone(**dinov2()),
            "reassemble_factors": [2, 1],
            "neck_hidden_dims": [8, 8],
            "fusion_hidden_dim": 8,
            "head_hidden_dim": 8,
            "head_in_index": -1,
            "feature_keys": ["stage1", "stage2"],
        }
    ),
    "EfficientNetBackbone": Tiny(
        lambda: {
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "stackwise_kernel_sizes": [3, 3],
            "stackwise_num_repeats": [1, 1],
            "stackwise_input_filters": [8, 8],
            "stackwise_output_filters": [8, 16],
            "stackwise_expansion_ratios": [2, 2],
            "stackwise_squeeze_and_excite_ratios": [0.25, 0.25],
            "stackwise_strides": [1, 2],
            "stackwise_block_types": ["fused", "unfused"],
            "dropout": 0.0,
            "num_features": 16,
            "input_shape": (16, 16, 3),
        }
    ),
    "FeaturePyramidBackbone": Tiny(dense_pyramid),
    "HGNetV2Backbone": Tiny(hgnetv2),
    "MiTBackbone": Tiny(mit),
    "MobileNetBackbone": Tiny(
        lambda: {
            "stackwise_expansion": [[16]],
            "stackwise_num_blocks": [1],
            "stackwise_num_filters": [[8]],
            "stackwise_kernel_size": [[3]],
            "stackwise_num_strides": [[2]],
            "stackwise_se_ratio": [[0.25]],
            "stackwise_activation": [["relu"]],
            "stackwise_padding": [[1]],
            "output_num_filters": 16,
            "depthwise_filters": 8,
            "depthwise_stride": 1,
            "depthwise_residual": True,
            "last_layer_filter": 16,
            "squeeze_and_excite": 0.5,
            "input_num_filters": 8,
            "image_shape": (16, 16, 3),
        }
    ),
    "MobileNetV5Backbone": Tiny(
        lambda: {
            "stackwise_block_types": [["er"], ["uir", "mqa"]],
            "stackwise_num_blocks": [1, 2],
            "stackwise_num_filters": [[8], [16, 16]],
            "stackwise_strides": [[2], [2, 1]],
            "stackwise_act_layers": [["gelu"], ["gelu", "gelu"]],
            "stackwise_exp_ratios": [[2.0], [2.0, 0.0]],
            "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
            "stackwise_dw_kernel_sizes": [[0], [3, 0]],
            "stackwise_dw_start_kernel_sizes": [[0], [0, 0]],
            "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
            "stackwise_exp_kernel_sizes": [[3], [0, 0]],
            "stackwise_pw_kernel_sizes": [[1], [0, 0]],
            "stackwise_num_heads": [[0], [0, 2]],
            "stackwise_key_dims": [[0], [0, 8]],
            "stackwise_value_dims": [[0], [0, 8]],
            "stackwise_kv_strides": [[0], [0, 1]],
            "stackwise_use_cpe": [[False], [False, False]],
            "stem_size": 8,
            "num_features": 16,
            "msfa_output_resolution": 2,
            "image_shape": (16, 16, 3),
        }
    ),
    "PARSeqBackbone": Tiny(
        lambda: {
            "image_encoder": keras_hub.models.ViTBackbone(**vit()),
            "vocabulary_size": TOKENS,
            "max_label_length": 12,
            "decoder_hidden_dim": 16,
            "num_decoder_layers": 1,
            "num_decoder_heads": 2,
            "decoder_mlp_dim": 24,
            "dropout_rate": 0.0,
            "attention_dropout": 0.0,
        }
    ),
    "ResNetBackbone": Tiny(resnet),
    "RetinaNetBackbone": Tiny(
        lambda: {
            "image_encoder": keras_hub.models.ResNetBackbone(**resnet()),
            "min_level": 2,
            "max_level": 3,
            "use_p5": False,
            "image_shape": (16, 16, 3),
        }
    ),
    "SAMBackbone": Tiny(sam, sam_inputs),
    "SegFormerBackbone": Tiny(
        lambda: {
            "image_encoder": keras_hub.models.MiTBackbone(**mit()),
            "projection_filters": 12,
        }
    ),
    "SwinTransformerBackbone": Tiny(
        lambda: {
            "image_shape": (16, 16, 3),
            "embed_dim": 8,
            "depths": (2, 1),
            "num_heads": (1, 2),
            "window_size": 2,
            "patch_size": 4,
            "drop_path": 0.0,
        }
    ),
    "VGGBackbone": Tiny(
        lambda: {
            "stackwise_num_repeats": [1, 1],
            "stackwise_num_filters": [8, 8],
            "image_shape": (16, 16, 3),
        }
    ),
    "ViTBackbone": Tiny(vit),
    "ViTDetBackbone": Tiny(vit_det),
    "VideoPrismBackbone": Tiny(
        lambda: {
            "num_frames": 2,
            "patch_size": 4,
            "hidden_dim": 16,
            "intermediate_dim": 24,
            "num_heads": 2,
            "num_spatial_layers": 1,
            "num_temporal_layers": 1,
            "num_auxiliary_layers": 1,
            "vocabulary_size": TOKENS,
            "num_text_layers": 1,
            "image_shape": (8, 8, 3),
        }
    ),
    "XceptionBackbone": Tiny(
        lambda: {
            "stackwise_conv_filters": [[8], [16], [16]],
            "stackwise_pooling": [False, True, False],
            "image_shape": (16, 16, 3),
        }
    ),
}
