"""Families of models that generate text: decoders, mixtures of experts, state-space models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.family import HEAD, MOE, NO_KV, TEXT, VOCAB, Family, language

DECODERS = "Decoders"
EXPERTS = "Mixtures of experts"
STATES = "State-space and hybrid models"

MAMBA: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def _decoder(name: str, model: str, config: Mapping[str, Any] = TEXT, **own: Any) -> Family:
    return Family(name, DECODERS, model, {**config, **own}, language)


def _experts(name: str, model: str, config: Mapping[str, Any] = MOE, **own: Any) -> Family:
    return Family(name, EXPERTS, model, {**config, **own}, language)


def _states(name: str, model: str, config: Mapping[str, Any] = TEXT, **own: Any) -> Family:
    return Family(name, STATES, model, {**config, **own}, language)


DEEPSEEK = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
FAMILIES = [
    _decoder("Llama 1, 2, 3", "LlamaForCausalLM"),
    _decoder("Mistral", "MistralForCausalLM"),
    _decoder(
        "Ministral", "MinistralForCausalLM", HEAD, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    _decoder("Qwen2, Qwen2.5", "Qwen2ForCausalLM", tie_word_embeddings=True),
    _decoder("Qwen3", "Qwen3ForCausalLM", HEAD),
    _decoder("Gemma", "GemmaForCausalLM", HEAD),
    _decoder("Gemma 2", "Gemma2ForCausalLM", HEAD),
    _decoder("Gemma 3 (text)", "Gemma3ForCausalLM", HEAD),
    _decoder("Phi 1, 1.5, 2", "PhiForCausalLM"),
    _decoder("Phi 3, 4", "Phi3ForCausalLM"),
    _decoder("Cohere (Command R)", "CohereForCausalLM"),
    _decoder("Cohere 2 (Command A)", "Cohere2ForCausalLM"),
    _decoder("OLMo", "OlmoForCausalLM"),
    _decoder("OLMo 2", "Olmo2ForCausalLM"),
    _decoder("OLMo 3", "Olmo3ForCausalLM"),
    _decoder("Granite", "GraniteForCausalLM"),
    _decoder("SmolLM3", "SmolLM3ForCausalLM"),
    _decoder("StableLM", "StableLmForCausalLM"),
    _decoder("StarCoder2", "Starcoder2ForCausalLM"),
    _decoder("Falcon", "FalconForCausalLM", NO_KV),
    _decoder("GLM-4 (2024)", "GlmForCausalLM", HEAD),
    _decoder("GLM-4 (0414)", "Glm4ForCausalLM", HEAD),
    _decoder("Nemotron", "NemotronForCausalLM"),
    _decoder("EXAONE 4", "Exaone4ForCausalLM"),
    _decoder("Helium", "HeliumForCausalLM", HEAD),
    _decoder("ERNIE 4.5", "Ernie4_5ForCausalLM", HEAD),
    _decoder("Apertus", "ApertusForCausalLM"),
    _decoder("Arcee", "ArceeForCausalLM"),
    _decoder("Hunyuan", "HunYuanDenseV1ForCausalLM", HEAD),
    _decoder("Seed-OSS", "SeedOssForCausalLM", HEAD),
    _decoder("BitNet", "BitNetForCausalLM"),
    _decoder("ModernBERT decoder", "ModernBertDecoderForCausalLM", NO_KV, cls_token_id=1, sep_token_id=2),
    _decoder("GPT-2", "GPT2LMHeadModel", NO_KV),
    _decoder("GPT-Neo", "GPTNeoForCausalLM", NO_KV, attention_types=[[["global", "local"], 1]]),
    _decoder("GPT-NeoX (Pythia)", "GPTNeoXForCausalLM", NO_KV),
    _decoder("GPT-J", "GPTJForCausalLM", NO_KV, rotary_dim=4),
    _decoder("GPTBigCode (StarCoder)", "GPTBigCodeForCausalLM", NO_KV),
    _decoder("CodeGen", "CodeGenForCausalLM", NO_KV, rotary_dim=4),
    _decoder("OPT", "OPTForCausalLM", NO_KV, ffn_dim=48, word_embed_proj_dim=32),
    _decoder("BLOOM", "BloomForCausalLM", NO_KV),
    _decoder("MPT", "MptForCausalLM", NO_KV),
    _decoder("BioGPT", "BioGptForCausalLM", NO_KV),
    _decoder("XGLM", "XGLMForCausalLM", NO_KV, ffn_dim=48),
    _experts("Mixtral", "MixtralForCausalLM"),
    _experts("Qwen1.5-MoE, Qwen2-MoE", "Qwen2MoeForCausalLM", shared_expert_intermediate_size=16),
    _experts("Qwen3-MoE", "Qwen3MoeForCausalLM", head_dim=8),
    _experts("OLMoE", "OlmoeForCausalLM"),
    _experts("DeepSeek-V2", "DeepseekV2ForCausalLM", **DEEPSEEK),
    _experts("DeepSeek-V3, R1", "DeepseekV3ForCausalLM", **DEEPSEEK),
    _experts("GPT-OSS", "GptOssForCausalLM", head_dim=8, sliding_window=8),
    _experts("Granite MoE", "GraniteMoeForCausalLM"),
    _experts("Phi-3.5-MoE", "PhimoeForCausalLM"),
    _experts("Llama 4 (text)", "Llama4ForCausalLM", head_dim=8, intermediate_size_mlp=48),
    _experts(
        "GLM-4.5 MoE",
        "Glm4MoeForCausalLM",
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        head_dim=8,
    ),
    _experts("ERNIE 4.5 MoE", "Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2),
    _experts(
        "dots.llm1", "Dots1ForCausalLM", n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=8
    ),
    _experts("Hunyuan MoE", "HunYuanMoEV1ForCausalLM", moe_topk=2, head_dim=8),
    _experts("MiniMax", "MiniMaxForCausalLM", head_dim=8, layer_types=["linear_attention", "full_attention"]),
    _experts("FlexOlmo", "FlexOlmoForCausalLM"),
    _states("Mamba", "MambaForCausalLM", MAMBA),
    _states("Mamba 2", "Mamba2ForCausalLM", MAMBA, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    _states("Falcon Mamba", "FalconMambaForCausalLM", MAMBA),
    _states("RWKV", "RwkvForCausalLM", MAMBA, attention_hidden_size=32, context_length=64),
    _states("xLSTM", "xLSTMForCausalLM", MAMBA, num_heads=2, chunk_size=16, qk_dim_factor=0.5),
    _states(
        "RecurrentGemma", "RecurrentGemmaForCausalLM", TEXT, num_hidden_layers=3, lru_width=32, attention_window_size=8
    ),
    _states(
        "Jamba",
        "JambaForCausalLM",
        MOE,
        mamba_d_state=8,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=4,
    ),
    _states(
        "Bamba",
        "BambaForCausalLM",
        TEXT,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        attn_layer_indices=[1],
    ),
    _states(
        "Zamba",
        "ZambaForCausalLM",
        TEXT,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        mamba_d_state=8,
        use_mamba_kernels=False,
        n_mamba_heads=2,
        num_key_value_heads=4,
        mamba_dt_rank=4,
    ),
    _states(
        "Zamba 2",
        "Zamba2ForCausalLM",
        TEXT,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"],
        num_key_value_heads=4,
        use_mem_rope=False,
    ),
    _states(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        TEXT,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    _states(
        "Granite 4 (hybrid)",
        "GraniteMoeHybridForCausalLM",
        MOE,
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        shared_intermediate_size=16,
    ),
    _states(
        "Nemotron-H",
        "NemotronHForCausalLM",
        TEXT,
        hybrid_override_pattern="M*-",
        num_hidden_layers=3,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        chunk_size=8,
        n_groups=1,
        head_dim=8,
        use_mamba_kernels=False,
    ),
    _states("LFM2", "Lfm2ForCausalLM", TEXT, layer_types=["conv", "full_attention"]),
    _states(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        MOE,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        shared_expert_intermediate_size=16,
    ),
    _states(
        "Qwen3.5 (text)",
        "Qwen3_5ForCausalLM",
        TEXT,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
]
