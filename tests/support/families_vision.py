"""Families of models for images and videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.support.family import (
    SIDE,
    Example,
    Family,
    noise,
)

VISION = "Vision"
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 8,
}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_channels": 3}
SWIN = {"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
DETECTION: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
}


def _part(kind: str, config: Mapping[str, Any] = VIT, **own: Any) -> dict[str, Any]:
    return {"model_type": kind, **config, **own}


# Training examples


def picture(number: int) -> Example:
    return {"pixel_values": noise(number, 3, SIDE, SIDE)}


def labelled_picture(number: int) -> Example:
    return {**picture(number), "labels": torch.tensor(number % 2)}


def segmented_picture(number: int) -> Example:
    return {**picture(number), "labels": (noise(number, SIDE, SIDE) > 0).long()}


def depth_picture(number: int) -> Example:
    return {**picture(number), "labels": noise(number, SIDE, SIDE).abs()}


def boxed_picture(number: int) -> Example:
    label = {"class_labels": torch.tensor([number % 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])}
    return {**picture(number), "labels": label}


def film(number: int) -> Example:
    return {"pixel_values": noise(number, 4, 3, SIDE, SIDE), "labels": torch.tensor(number % 2)}


Examples = Callable[[int], Example]


def _vision_family(
    name: str, model: str, config: Mapping[str, Any] = VIT, on: Examples = labelled_picture, **own: Any
) -> Family:
    return Family(name, VISION, model, {**config, **own}, on)


FAMILIES = [
    _vision_family("ViT", "ViTForImageClassification"),
    _vision_family("DeiT", "DeiTForImageClassification"),
    _vision_family("BEiT", "BeitForImageClassification"),
    _vision_family("data2vec (vision)", "Data2VecVisionForImageClassification"),
    _vision_family("DINOv2", "Dinov2ForImageClassification", mlp_ratio=2),
    _vision_family("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", mlp_ratio=2),
    _vision_family("ViT-MSN", "ViTMSNForImageClassification"),
    _vision_family(
        "ViT-MAE",
        "ViTMAEForPreTraining",
        on=picture,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
    ),
    _vision_family("I-JEPA", "IJepaForImageClassification"),
    _vision_family("Swin", "SwinForImageClassification", SWIN),
    _vision_family("Swin v2", "Swinv2ForImageClassification", SWIN),
    _vision_family("ConvNeXT", "ConvNextForImageClassification", STAGES, num_stages=2),
    _vision_family("ConvNeXT v2", "ConvNextV2ForImageClassification", STAGES, num_stages=2),
    _vision_family("ResNet", "ResNetForImageClassification", STAGES, embedding_size=16, layer_type="basic"),
    _vision_family("RegNet", "RegNetForImageClassification", STAGES, embedding_size=16, groups_width=8),
    _vision_family("BiT", "BitForImageClassification", STAGES, embedding_size=16, num_groups=8),
    _vision_family(
        "MobileNet v2", "MobileNetV2ForImageClassification", {"image_size": SIDE, "depth_multiplier": 0.25}
    ),
    _vision_family("PVT v2", "PvtV2ForImageClassification", {**PYRAMID, "image_size": SIDE}),
    _vision_family(
        "Hiera",
        "HieraForImageClassification",
        {
            "image_size": [SIDE, SIDE],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "mlp_ratio": 2.0,
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "num_query_pool": 1,
        },
    ),
    _vision_family(
        "FocalNet",
        "FocalNetForImageClassification",
        {
            "image_size": SIDE,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
        },
    ),
    _vision_family(
        "PoolFormer",
        "PoolFormerForImageClassification",
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "num_encoder_blocks": 2,
        },
    ),
    _vision_family(
        "SegFormer", "SegformerForSemanticSegmentation", {**PYRAMID, "decoder_hidden_size": 32}, segmented_picture
    ),
    replace(
        _vision_family(
            "DPT",
            "DPTForDepthEstimation",
            on=depth_picture,
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            is_hybrid=False,
        ),
        limit="it has no loss for depth",
        error="Training is not implemented yet",
    ),
    replace(
        _vision_family("GLPN", "GLPNForDepthEstimation", {**PYRAMID, "decoder_hidden_size": 16}, depth_picture),
        limit="Trainer changes its loss in place, which autograd refuses",
        error="output 0 of Sqrt, is at version 1",
    ),
    replace(
        _vision_family(
            "SAM",
            "SamModel",
            {
                "vision_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": SIDE,
                    "patch_size": 8,
                    "mlp_dim": 48,
                    "global_attn_indexes": [0],
                    "window_size": 2,
                    "num_pos_feats": 8,
                },
                "prompt_encoder_config": {
                    "hidden_size": 16,
                    "image_size": SIDE,
                    "patch_size": 8,
                    "mask_input_channels": 4,
                },
                "mask_decoder_config": {
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "mlp_dim": 32,
                    "iou_head_hidden_dim": 16,
                    "iou_head_depth": 2,
                },
            },
            picture,
        ),
        limit="it has no loss",
        error="did not return a loss",
    ),
    _vision_family(
        "YOLOS", "YolosForObjectDetection", on=boxed_picture, num_detection_tokens=4, image_size=[SIDE, SIDE]
    ),
    _vision_family(
        "DETR",
        "DetrForObjectDetection",
        dict(
            **DETECTION,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config={
                "model_type": "resnet",
                **STAGES,
                "embedding_size": 16,
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
        ),
        boxed_picture,
    ),
    _vision_family(
        "UPerNet",
        "UperNetForSemanticSegmentation",
        {
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "auxiliary_channels": 8,
            "auxiliary_in_channels": 32,
            "auxiliary_loss_weight": 0.4,
            "backbone_config": {
                "model_type": "convnext",
                "hidden_sizes": [8, 16, 32, 32],
                "depths": [1, 1, 1, 1],
                "num_stages": 4,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
        },
        segmented_picture,
    ),
    _vision_family("VideoMAE", "VideoMAEForVideoClassification", on=film, num_frames=4),
    _vision_family("TimeSformer", "TimesformerForVideoClassification", on=film, num_frames=4),
    _vision_family("ViViT", "VivitForVideoClassification", on=film, num_frames=4, tubelet_size=[2, 8, 8]),
]
