"""Fields that a config.json leaves out, or names as it was once done, mean what they mean to
transformers: its own config class fills them in, and both must give one decoder.Config."""

import copy
import json

import pytest
import transformers

from sftjax import hf as hf_lib

SIZES = dict(
    vocab_size=100, hidden_size=512, intermediate_size=64, num_hidden_layers=7,
    num_attention_heads=32,
)  # fmt: skip
OWN = {
    "gpt2": dict(vocab_size=100, n_embd=64, n_layer=3, n_head=4),
    "t5": dict(vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4),
    "bart": dict(
        vocab_size=100, d_model=64, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=96,
        decoder_ffn_dim=80, encoder_attention_heads=4, decoder_attention_heads=8,
    ),
    "deberta-v2": SIZES | dict(
        relative_attention=True, position_buckets=64, pos_att_type=["c2p", "p2c"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    # As the published files, which leave out what transformers has as a default.
    "gemma3": dict(
        text_config=dict(
            model_type="gemma3_text", hidden_size=64, intermediate_size=96, num_hidden_layers=7, sliding_window=1024,
        ),
        vision_config=dict(model_type="siglip_vision_model", hidden_size=48, num_attention_heads=4, patch_size=14),
    ),
    "paligemma": dict(
        text_config=SIZES | {"model_type": "gemma"}, projection_dim=512,
        vision_config=dict(model_type="siglip_vision_model", hidden_size=48, num_attention_heads=4),
    ),
    "llava": dict(text_config=SIZES | {"model_type": "llama"}, vision_config={"model_type": "clip_vision_model"}),
}  # fmt: skip
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=1024)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)
OTHERS = ("iquest", "timm", "phi4-siglip")  # these transformers has not
KINDS = [k for k in hf_lib.FAMILIES if not k.startswith(OTHERS)]
OLD = [
    ("llama", dict(rope_theta=5e5)),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0), rope_theta=1e5)),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0))),
    ("llama", dict(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 512})),
    ("llama", dict(rope_scaling=None, pretraining_tp=1, head_dim=8, num_key_value_heads=8)),
    ("mistral", dict(rope_theta=1e6, sliding_window=None)),
    ("qwen2", dict(rope_scaling=YARN, rope_theta=1e6, max_position_embeddings=4096)),
    ("qwen2", dict(use_sliding_window=False, sliding_window=128, max_window_layers=3)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=128, max_window_layers=3)),
    ("qwen3", dict(rope_scaling=None, rope_theta=1e6, head_dim=16, num_key_value_heads=8)),
    ("qwen3_moe", dict(num_local_experts=16, num_experts=8)),
    ("qwen3_moe", dict(rope_theta=1e6, num_experts=8, decoder_sparse_step=1, mlp_only_layers=[])),
    ("gemma", dict(hidden_act="gelu", hidden_activation=None)),
    ("gemma", dict(hidden_act="gelu_pytorch_tanh", rope_theta=1e4, head_dim=16)),
    ("gemma2", dict(hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")),
    ("gemma2", dict(query_pre_attn_scalar=144, sliding_window_size=128)),
    ("gemma3_text", dict(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=3)),
    ("gemma3_text", dict(rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=512)),
    ("phi3", dict(rope_scaling=LONG, original_max_position_embeddings=64)),
    ("phi3", dict(rope_scaling=LONG, max_position_embeddings=8192)),
    ("phi3", dict(partial_rotary_factor=0.5, rope_theta=5e4, sliding_window=2047)),
    ("smollm3", dict(no_rope_layer_interval=3, rope_theta=5e6)),
    ("smollm3", dict(no_rope_layers=[1, 1, 0, 1, 1, 0, 1])),
    ("olmo2", dict(rope_theta=5e5, rope_scaling=None, num_key_value_heads=8)),
    ("gpt_neox", dict(rotary_pct=0.5, rotary_emb_base=5000)),
    ("gpt_neox", dict(rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu_new")),
    ("gpt_neox", dict(rope_scaling=dict(type="linear", factor=2.0), rotary_pct=0.5)),
    ("granite", dict(rope_theta=1e7, logits_scaling=8.0, embedding_multiplier=12)),
    ("mixtral", dict(rope_theta=1e6, sliding_window=None, output_router_logits=False)),
    ("gpt_oss", dict(rope_theta=150000, rope_scaling=YARN | {"rope_type": "yarn"})),
    ("modernbert", dict(global_rope_theta=1e5, local_rope_theta=5e3, local_attention=16)),
    ("modernbert", dict(global_attn_every_n_layers=2, classifier_pooling="mean")),
    ("t5", dict(feed_forward_proj="gated-gelu", num_decoder_layers=2, dropout_rate=0.2)),
    ("bart", dict(scale_embedding=True, activation_function="relu", dropout=0.3)),
    ("deberta-v2", dict(pos_att_type="c2p|p2c", max_relative_positions=200, type_vocab_size=2)),
    ("llava", dict(image_token_index=7, vision_feature_layer=-3, projector_hidden_act="relu")),
    ("llava", dict(text_config=SIZES | {"model_type": "qwen2"}, multimodal_projector_bias=False)),
    ("llava", dict(vision_config={"model_type": "siglip_vision_model"}, vision_feature_select_strategy="full")),
    ("llava", dict(vision_config={"model_type": "clip_vision_model", "hidden_size": 128, "num_attention_heads": 8})),
    ("gpt2", dict(n_ctx=1024, n_inner=None, activation_function="gelu_new")),
]


def ours(tmp_path, hf):
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return hf_lib.load_model(tmp_path).config


@pytest.mark.parametrize("kind, fields", [(k, {}) for k in KINDS] + OLD, ids=str)
def test_fields_mean_what_transformers_makes_of_them(kind, fields, tmp_path):
    hf = copy.deepcopy(OWN.get(kind, SIZES) | fields)
    found = ours(tmp_path, hf | {"model_type": kind})
    filled = transformers.AutoConfig.for_model(kind, **hf).to_dict()  # writes into the dicts of hf
    assert found == ours(tmp_path, filled)


@pytest.mark.parametrize("act", ["gelu", "silu", None])
def test_gemma_2_reads_its_activation_from_one_field_alone(act, tmp_path):
    """In Gemma 1, hidden_act "gelu" means the approximation; here another field says what it is."""
    hf = SIZES | {"model_type": "gemma2", "hidden_act": "relu", "hidden_activation": act}
    assert ours(tmp_path, hf).activation == (act or "gelu_pytorch_tanh")
