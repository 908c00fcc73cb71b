"""Families of models for text with an encoder: encoder-decoders, and encoders with a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.family import NO_KV, SEQ2SEQ, T5, TEXT, VOCAB, Family, boxed, sentence, sequences

PAIRS = "Encoder-decoders"
ENCODERS = "Encoders"
PROPHET = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
XLNET = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
FUNNEL = {"vocab_size": VOCAB, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}


def _encoder_decoder(name: str, model: str, config: Mapping[str, Any] = SEQ2SEQ, **own: Any) -> Family:
    return Family(name, PAIRS, model, {**config, **own}, sequences)


def _encoder(name: str, model: str, config: Mapping[str, Any] = NO_KV, **own: Any) -> Family:
    return Family(name, ENCODERS, model, {**config, **own}, sentence)


FAMILIES = [
    _encoder_decoder("T5, Flan-T5", "T5ForConditionalGeneration", T5),
    _encoder_decoder("mT5", "MT5ForConditionalGeneration", T5),
    _encoder_decoder("UMT5", "UMT5ForConditionalGeneration", T5),
    _encoder_decoder("LongT5", "LongT5ForConditionalGeneration", T5, local_radius=4),
    _encoder_decoder(
        "Switch Transformers",
        "SwitchTransformersForConditionalGeneration",
        T5,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    _encoder_decoder("BART", "BartForConditionalGeneration"),
    _encoder_decoder("mBART", "MBartForConditionalGeneration"),
    _encoder_decoder("Pegasus", "PegasusForConditionalGeneration"),
    _encoder_decoder("PEGASUS-X", "PegasusXForConditionalGeneration", block_size=8, num_global_tokens=2),
    _encoder_decoder("BigBird-Pegasus", "BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    _encoder_decoder("Marian (OPUS-MT)", "MarianMTModel"),
    _encoder_decoder("M2M100, NLLB", "M2M100ForConditionalGeneration"),
    _encoder_decoder(
        "NLLB-MoE", "NllbMoeForConditionalGeneration", num_experts=2, encoder_sparse_step=1, decoder_sparse_step=1
    ),
    _encoder_decoder("Blenderbot", "BlenderbotForConditionalGeneration"),
    _encoder_decoder("PLBart", "PLBartForConditionalGeneration"),
    _encoder_decoder(
        "LED",
        "LEDForConditionalGeneration",
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        attention_window=4,
    ),
    _encoder_decoder("ProphetNet", "ProphetNetForConditionalGeneration", PROPHET),
    _encoder("BERT", "BertForSequenceClassification"),
    _encoder("RoBERTa", "RobertaForSequenceClassification", pad_token_id=1, bos_token_id=0),
    _encoder("XLM-RoBERTa, CamemBERT", "XLMRobertaForSequenceClassification", pad_token_id=1, bos_token_id=0),
    _encoder("DistilBERT", "DistilBertForSequenceClassification", hidden_dim=48, dim=32),
    _encoder("ALBERT", "AlbertForSequenceClassification", embedding_size=16),
    _encoder("ELECTRA", "ElectraForSequenceClassification", embedding_size=16),
    _encoder("DeBERTa", "DebertaForSequenceClassification", relative_attention=True, pos_att_type="c2p|p2c"),
    _encoder(
        "DeBERTa-v2, v3",
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type="c2p|p2c",
        position_buckets=8,
    ),
    _encoder("ModernBERT", "ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2, num_hidden_layers=2),
    _encoder("EuroBERT", "EuroBertForSequenceClassification", TEXT),
    _encoder("MPNet", "MPNetForSequenceClassification", pad_token_id=1),
    _encoder("XLNet", "XLNetForSequenceClassification", XLNET),
    _encoder("Longformer", "LongformerForSequenceClassification", attention_window=4, pad_token_id=1),
    _encoder("BigBird", "BigBirdForSequenceClassification", attention_type="original_full"),
    _encoder("ConvBERT", "ConvBertForSequenceClassification", embedding_size=16, head_ratio=2, conv_kernel_size=3),
    _encoder("RemBERT", "RemBertForSequenceClassification", input_embedding_size=16, output_embedding_size=16),
    _encoder("Funnel", "FunnelForSequenceClassification", FUNNEL),
    _encoder("FNet", "FNetForSequenceClassification", tpu_short_seq_length=12),
    _encoder(
        "MobileBERT",
        "MobileBertForSequenceClassification",
        embedding_size=16,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=1,
    ),
    _encoder("Megatron-BERT", "MegatronBertForSequenceClassification"),
    _encoder("RoFormer", "RoFormerForSequenceClassification", embedding_size=32),
    _encoder("ERNIE", "ErnieForSequenceClassification"),
    _encoder(
        "ESM-2", "EsmForSequenceClassification", pad_token_id=1, mask_token_id=32, position_embedding_type="rotary"
    ),
    _encoder("SqueezeBERT", "SqueezeBertForSequenceClassification", embedding_size=32),
    _encoder("Nystromformer", "NystromformerForSequenceClassification", num_landmarks=4, segment_means_seq_len=12),
    Family(
        "LayoutLM", ENCODERS, "LayoutLMForSequenceClassification", {**NO_KV, "max_2d_position_embeddings": 64}, boxed
    ),
    Family(
        "LiLT",
        ENCODERS,
        "LiltForSequenceClassification",
        {**NO_KV, "hidden_size": 48, "max_2d_position_embeddings": 64, "pad_token_id": 1},
        boxed,
    ),
]
