"""Families of models for audio, and for time series."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.support.family import HEAD, NO_KV, SEQ2SEQ, TEXT, VOCAB, Example, Family, language, noise, text, tokens

AUDIO = "Audio"
SERIES = "Time series"
PIECE = 60  # the token whose embeddings are replaced by those of a sound
WAV: dict[str, Any] = {
    **NO_KV,
    "num_hidden_layers": 1,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "classifier_proj_size": 16,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
ONE_LAYER = {**NO_KV, "num_hidden_layers": 1}
PATCHES = {"num_input_channels": 2, "context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
FORECAST: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 1,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def sound(number: int) -> Example:
    return {"input_values": noise(number, 800), "labels": torch.tensor(number % 2)}


def transcribed(number: int, samples: int = 800, length: int = 3) -> Example:
    return {"input_values": noise(number, samples), "labels": tokens(number, length)}


def longer(number: int) -> Example:
    return transcribed(number, 1600, 5)


def mel(*shape: int) -> Callable[[int], Example]:
    return lambda number: {"input_features": noise(number, *shape), "labels": tokens(number, 5)}


def masked_mel(number: int) -> Example:
    features = {"input_features": noise(number, 32, 16), "attention_mask": torch.ones(32).long()}
    return {**features, "labels": tokens(number, 2)}


def spectrogram(number: int) -> Example:
    return {"input_values": noise(number, 24, 16), "labels": torch.tensor(number % 2)}


def heard(pieces: int, **more: Any) -> Callable[[int], Example]:
    """Examples of a sound, encoded as `pieces` tokens, and a text after it."""

    def example(number: int) -> Example:
        ids = torch.cat([torch.tensor([1]), torch.full((pieces,), PIECE), tokens(number, 6)])
        labels = ids.masked_fill(ids == PIECE, -100)
        words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {**words, "input_features": noise(number, 8, 24), **more}

    return example


def pair(number: int) -> Example:
    return {**text(number), "input_features": noise(number, 1, 64, 16), "return_loss": True}


def music(number: int) -> Example:
    codes = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": codes, "labels": codes.t().contiguous()}


def series(number: int) -> Example:
    return {"past_values": noise(number, 16, 2), "future_values": noise(number + 50, 4, 2)}


def timed_series(number: int) -> Example:
    return {
        "past_values": noise(number, 15).abs(),
        "past_time_features": noise(number, 15, 1),
        "past_observed_mask": torch.ones(15),
        "future_values": noise(number + 50, 4).abs(),
        "future_time_features": noise(number, 4, 1),
    }


Examples = Callable[[int], Example]


def _audio_family(name: str, model: str, config: Mapping[str, Any] = WAV, on: Examples = sound, **own: Any) -> Family:
    return Family(name, AUDIO, model, {**config, **own}, on)


def _forecast_family(name: str, model: str, on: Examples, **config: Any) -> Family:
    return Family(name, SERIES, model, config, on)


FAMILIES = [
    _audio_family("Wav2Vec2", "Wav2Vec2ForCTC", on=transcribed),
    _audio_family("HuBERT", "HubertForSequenceClassification"),
    _audio_family("WavLM", "WavLMForSequenceClassification"),
    _audio_family("UniSpeech-SAT", "UniSpeechSatForSequenceClassification"),
    _audio_family(
        "data2vec (audio)", "Data2VecAudioForSequenceClassification", conv_pos_kernel_size=3, num_conv_pos_embeddings=2
    ),
    _audio_family("SEW", "SEWForSequenceClassification", squeeze_factor=2),
    _audio_family("SEW-D", "SEWDForSequenceClassification", squeeze_factor=2),
    _audio_family("Wav2Vec2-Conformer", "Wav2Vec2ConformerForCTC", on=transcribed),
    _audio_family(
        "Wav2Vec2-BERT",
        "Wav2Vec2BertForCTC",
        ONE_LAYER,
        mel(24, 8),
        feature_projection_input_dim=8,
        left_max_position_embeddings=4,
        right_max_position_embeddings=4,
        apply_spec_augment=False,
        layerdrop=0.0,
    ),
    _audio_family(
        "Whisper",
        "WhisperForConditionalGeneration",
        SEQ2SEQ,
        mel(8, 24),
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=16,
    ),
    _audio_family(
        "Speech2Text",
        "Speech2TextForConditionalGeneration",
        SEQ2SEQ,
        mel(24, 8),
        input_feat_per_channel=8,
        num_conv_layers=1,
        conv_kernel_sizes=[5],
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=64,
    ),
    _audio_family(
        "Audio Spectrogram Transformer",
        "ASTForAudioClassification",
        ONE_LAYER,
        spectrogram,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=24,
        num_mel_bins=16,
    ),
    _audio_family(
        "Moonshine",
        "MoonshineForConditionalGeneration",
        TEXT,
        longer,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        encoder_num_key_value_heads=4,
        decoder_num_key_value_heads=4,
        decoder_start_token_id=1,
    ),
    _audio_family(
        "SpeechT5",
        "SpeechT5ForSpeechToText",
        {**WAV, **SEQ2SEQ},
        transcribed,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    ),
    _audio_family(
        "CLAP",
        "ClapModel",
        {},
        pair,
        text_config={**NO_KV, "pad_token_id": 1, "projection_dim": 16},
        audio_config={
            "spec_size": 64,
            "num_mel_bins": 16,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "window_size": 4,
            "hidden_size": 32,
            "projection_dim": 16,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "patch_embeds_hidden_size": 16,
            "num_classes": 2,
        },
        projection_dim=16,
    ),
    _audio_family(
        "Qwen2-Audio",
        "Qwen2AudioForConditionalGeneration",
        {},
        heard(6, feature_attention_mask=torch.ones(24).long()),
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 12,
        },
        text_config={"model_type": "qwen2", **TEXT},
        audio_token_index=PIECE,
    ),
    _audio_family(
        "Parakeet (CTC)",
        "ParakeetForCTC",
        {},
        masked_mel,
        vocab_size=VOCAB,
        pad_token_id=0,
        encoder_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "conv_kernel_size": 5,
        },
    ),
    _audio_family(
        "Voxtral",
        "VoxtralForConditionalGeneration",
        {},
        heard(3),
        audio_config={
            "num_mel_bins": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "hidden_size": 32,
            "max_source_positions": 12,
        },
        text_config={"model_type": "llama", **HEAD},
        audio_token_id=PIECE,
    ),
    _audio_family(
        "MusicGen",
        "MusicgenForCausalLM",
        {},
        music,
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        ffn_dim=48,
        num_codebooks=2,
        pad_token_id=32,
        bos_token_id=32,
    ),
    replace(
        _audio_family(
            "VITS",
            "VitsModel",
            {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "ffn_dim": 48,
                "flow_size": 16,
                "spectrogram_bins": 16,
                "upsample_initial_channel": 16,
                "upsample_rates": [2, 2],
                "upsample_kernel_sizes": [4, 4],
                "resblock_kernel_sizes": [3],
                "resblock_dilation_sizes": [[1, 3]],
                "posterior_encoder_num_wavenet_layers": 1,
                "prior_encoder_num_wavenet_layers": 1,
                "prior_encoder_num_flows": 1,
                "depth_separable_num_layers": 1,
                "duration_predictor_num_flows": 1,
                "use_stochastic_duration_prediction": False,
            },
            language,
        ),
        limit="it has no training",
        error="Training of VITS is not supported yet",
    ),
    _forecast_family(
        "PatchTST",
        "PatchTSTForPrediction",
        series,
        **PATCHES,
        d_model=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
    ),
    _forecast_family(
        "PatchTSMixer",
        "PatchTSMixerForPrediction",
        series,
        **PATCHES,
        d_model=16,
        num_layers=1,
    ),
    _forecast_family("Time Series Transformer", "TimeSeriesTransformerForPrediction", timed_series, **FORECAST),
    _forecast_family("Informer", "InformerForPrediction", timed_series, **FORECAST),
    _forecast_family("Autoformer", "AutoformerForPrediction", timed_series, **FORECAST, label_length=4),
]
