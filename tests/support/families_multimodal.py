"""Families of models for images and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.support.families_vision import VIT, picture
from tests.support.family import (
    HEAD,
    LENGTH,
    NO_KV,
    SEQ2SEQ,
    SIDE,
    TEXT,
    VOCAB,
    Example,
    Family,
    boxed,
    language,
    noise,
    text,
    tokens,
)

MULTIMODAL = "Vision and language"
PIECE = 60  # the token whose embeddings are replaced by those of an image
OPT = {"model_type": "opt", **NO_KV, "ffn_dim": 48, "word_embed_proj_dim": 32}
QWEN_TOKENS = {"image_token_id": PIECE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def _part(kind: str, config: Mapping[str, Any] = VIT, **own: Any) -> dict[str, Any]:
    return {"model_type": kind, **config, **own}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


# Training examples


def with_words(number: int, pieces: int) -> Example:
    """Token ids: `pieces` tokens that stand for an image, then a text, whose tokens are the labels."""
    ids = torch.cat([torch.tensor([1]), torch.full((pieces,), PIECE), tokens(number, 6)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == PIECE, -100)}


def seen(pieces: int = 16, **more: Any) -> Callable[[int], Example]:
    """Examples of an image, encoded as `pieces` tokens, and a text after it."""
    return lambda number: {**with_words(number, pieces), **picture(number), **more}


def typed(pieces: int, of_text: int) -> Callable[[int], Example]:
    """As `seen`, with token types: `of_text` for text, the other number for the image."""

    def example(number: int) -> Example:
        words = seen(pieces)(number)
        return {**words, "token_type_ids": ((words["input_ids"] != PIECE) == of_text).long()}

    return example


def in_tiles(number: int) -> Example:
    return {**with_words(number, 4), "pixel_values": noise(number, 1, 3, SIDE, SIDE)}


def in_tiles_of_next(number: int) -> Example:
    """An image and one tile of it, with a token after each of its four lines."""
    size = torch.tensor([SIDE, SIDE])
    return {**with_words(number, 36), "pixel_values": noise(number, 2, 3, SIDE, SIDE), "image_sizes": size}


def in_patches(number: int) -> Example:
    words = with_words(number, 4)
    types = (words["input_ids"] == PIECE).int()
    patches = noise(number, 16, 3 * 2 * 8 * 8)
    return {**words, "pixel_values": patches, "image_grid_thw": torch.tensor([1, 4, 4]), "mm_token_type_ids": types}


def flattened(number: int) -> Example:
    patches = noise(number, 6, 2 + 48).abs()
    return {"flattened_patches": patches, "attention_mask": torch.ones(6), "labels": tokens(number, 5)}


def pair(number: int) -> Example:
    return {**text(number), **picture(number), "return_loss": True}


def captioned(number: int) -> Example:
    return {**picture(number), "labels": tokens(number, 6)}


def described(number: int) -> Example:
    return {**language(number), **picture(number)}


def asked(number: int) -> Example:
    return {**text(number), **picture(number), "labels": torch.tensor([1.0, 0.0])}


def instructed(number: int) -> Example:
    words = {"qformer_input_ids": tokens(number, 5), "qformer_attention_mask": torch.ones(5).long()}
    return {**seen(4)(number), **words}


def sized(number: int) -> Example:
    return {**seen(4)(number), "image_sizes": torch.tensor([SIDE, SIDE])}


def page(number: int) -> Example:
    return {**boxed(number), **picture(number)}


def crossed(number: int) -> Example:
    """An image that the model reads by cross-attention; it has no tokens in the text."""
    return {
        **language(number),
        "pixel_values": noise(number, 1, 1, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.tensor([1]),
        "aspect_ratio_mask": torch.tensor([[1]]),
        "cross_attention_mask": torch.ones(LENGTH, 1, 1).long(),
    }


Examples = Callable[[int], Example]


def _family(name: str, model: str, example: Examples, **config: Any) -> Family:
    return Family(name, MULTIMODAL, model, config, example)


FAMILIES = [
    _family(
        "CLIP",
        "CLIPModel",
        pair,
        text_config={**NO_KV, "projection_dim": 16},
        vision_config={**VIT, "projection_dim": 16},
        projection_dim=16,
    ),
    _family("SigLIP", "SiglipModel", pair, text_config=NO_KV, vision_config=VIT),
    _family(
        "AltCLIP",
        "AltCLIPModel",
        pair,
        text_config={**NO_KV, "pad_token_id": 1, "project_dim": 16},
        vision_config=VIT,
        projection_dim=16,
    ),
    _family("Chinese-CLIP", "ChineseCLIPModel", pair, text_config=NO_KV, vision_config=VIT, projection_dim=16),
    _family(
        "BLIP",
        "BlipForConditionalGeneration",
        described,
        text_config={**NO_KV, "encoder_hidden_size": 32, "is_decoder": True, "sep_token_id": 2},
        vision_config=VIT,
        projection_dim=16,
    ),
    _family(
        "BLIP-2",
        "Blip2ForConditionalGeneration",
        seen(4),
        qformer_config={**NO_KV, "encoder_hidden_size": 32},
        vision_config=VIT,
        text_config=OPT,
        num_query_tokens=4,
        image_token_index=PIECE,
    ),
    _family(
        "InstructBLIP",
        "InstructBlipForConditionalGeneration",
        instructed,
        qformer_config={**NO_KV, "encoder_hidden_size": 32},
        vision_config=VIT,
        text_config=OPT,
        num_query_tokens=4,
        image_token_index=PIECE,
    ),
    _family("GIT", "GitForCausalLM", described, **NO_KV, vision_config=VIT),
    _family("ViLT", "ViltForQuestionAnswering", asked, **{**NO_KV, **VIT}),
    _family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        seen(),
        vision_config=_part("clip_vision_model", num_hidden_layers=2),
        text_config=_part("llama", TEXT),
        image_token_index=PIECE,
    ),
    _family(
        "VipLLaVA",
        "VipLlavaForConditionalGeneration",
        seen(),
        vision_config=_part("clip_vision_model"),
        text_config=_part("llama", TEXT),
        image_token_index=PIECE,
        vision_feature_layers=[-1],
    ),
    _family(
        "LLaVA-NeXT",
        "LlavaNextForConditionalGeneration",
        in_tiles_of_next,
        vision_config=_part("clip_vision_model", num_hidden_layers=2),
        text_config=_part("llama", TEXT),
        image_token_index=PIECE,
        image_grid_pinpoints=[[SIDE, SIDE]],
    ),
    _family(
        "PaliGemma",
        "PaliGemmaForConditionalGeneration",
        typed(16, 1),
        vision_config=_part("siglip_vision_model"),
        text_config=_part("gemma", HEAD),
        image_token_index=PIECE,
        projection_dim=32,
        hidden_size=32,
    ),
    _family(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        typed(4, 0),
        vision_config=_part("siglip_vision_model"),
        text_config=_part("gemma3_text", HEAD),
        image_token_index=PIECE,
        mm_tokens_per_image=4,
    ),
    _family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        in_patches,
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
        },
        text_config={**TEXT, **_rope(1, 1, 2)},
        **QWEN_TOKENS,
    ),
    _family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        in_patches,
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [0],
        },
        text_config={**TEXT, **_rope(1, 1, 2)},
        **QWEN_TOKENS,
    ),
    _family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        in_patches,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 8,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        text_config={**HEAD, **_rope(2, 1, 1)},
        **QWEN_TOKENS,
    ),
    _family(
        "Idefics 2",
        "Idefics2ForConditionalGeneration",
        in_tiles,
        vision_config=VIT,
        text_config=_part("mistral", TEXT),
        perceiver_config={
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
            "hidden_size": 32,
        },
        image_token_id=PIECE,
    ),
    _family(
        "Idefics 3, SmolVLM",
        "Idefics3ForConditionalGeneration",
        in_tiles,
        vision_config=VIT,
        text_config=_part("llama", TEXT),
        scale_factor=2,
        image_token_id=PIECE,
    ),
    _family(
        "SmolVLM 2",
        "SmolVLMForConditionalGeneration",
        in_tiles,
        vision_config=VIT,
        text_config=_part("llama", TEXT),
        scale_factor=2,
        image_token_id=PIECE,
    ),
    _family(
        "InternVL",
        "InternVLForConditionalGeneration",
        seen(4),
        vision_config={**VIT, "image_size": [SIDE, SIDE], "patch_size": [8, 8]},
        text_config=_part("qwen2", TEXT),
        image_token_id=PIECE,
        downsample_ratio=0.5,
    ),
    _family(
        "Aya Vision",
        "AyaVisionForConditionalGeneration",
        seen(4),
        vision_config=_part("siglip_vision_model"),
        text_config=_part("cohere2", TEXT),
        image_token_index=PIECE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    ),
    _family(
        "Mistral 3 (Pixtral)",
        "Mistral3ForConditionalGeneration",
        sized,
        vision_config={"model_type": "pixtral", **VIT},
        text_config=_part("mistral", HEAD),
        image_token_index=PIECE,
        spatial_merge_size=2,
    ),
    _family(
        "Florence-2",
        "Florence2ForConditionalGeneration",
        seen(17),
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "projection_dim": 32,
        },
        text_config={"model_type": "bart", **SEQ2SEQ},
        image_token_id=PIECE,
    ),
    _family(
        "Pix2Struct",
        "Pix2StructForConditionalGeneration",
        flattened,
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "patch_embed_hidden_size": 48,
            "d_ff": 48,
            "d_kv": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "seq_len": 16,
        },
    ),
    _family(
        "LayoutLMv3",
        "LayoutLMv3ForSequenceClassification",
        page,
        **{
            **NO_KV,
            "max_2d_position_embeddings": 64,
            "pad_token_id": 1,
            "input_size": SIDE,
            "patch_size": 8,
            "coordinate_size": 5,
            "shape_size": 6,
            "num_hidden_layers": 1,
        },
    ),
    _family(
        "Mllama (Llama 3.2 Vision)",
        "MllamaForConditionalGeneration",
        crossed,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_size": 48,
            "image_size": SIDE,
            "patch_size": 8,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1]],
        },
        text_config={**TEXT, "cross_attention_layers": [1]},
        image_token_index=PIECE,
    ),
    _family(
        "TrOCR, Donut, ViT-GPT2",
        "VisionEncoderDecoderModel",
        captioned,
        encoder=_part("vit"),
        decoder={
            "model_type": "trocr",
            **SEQ2SEQ,
            "cross_attention_hidden_size": 32,
            "is_decoder": True,
            "add_cross_attention": True,
        },
        decoder_start_token_id=2,
        pad_token_id=0,
    ),
]
