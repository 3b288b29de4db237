"""A small model of every family, exercising each of its features; shared by the tests.

`write` makes its Hugging Face directory with numpy alone: the weights follow from the tensor names,
so that stored golden numbers (tests/golden/make.py) need no stored weights.
"""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sftjax import hf as hf_lib
from sftjax import params as params_lib
from sftjax.hf import names as names_lib

BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
ODD = dict(
    hidden_size=27, head_dim=10, num_attention_heads=3, num_key_value_heads=1, intermediate_size=45,
    vocab_size=67,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=24,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32,
    beta_fast=8.0, beta_slow=1.0,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.1], long_factor=[1.5, 3.0], rope_theta=1e4,
    partial_rotary_factor=0.5,
)  # fmt: skip
GPT2 = dict(
    vocab_size=64, n_positions=256, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
SOFT = dict(query_pre_attn_scalar=12, final_logit_softcapping=3.0, attn_logit_softcapping=2.0)
ROPES = dict(
    full_attention=dict(rope_type="linear", factor=2.0, rope_theta=1e5),
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
)


def case(model_type, base=BASE, **fields):
    return {"model_type": model_type, **base, **fields}


CASES = {
    "llama": case("llama", rms_norm_eps=1e-5),
    "llama-mha": case("llama", num_key_value_heads=4),
    "llama-tied": case("llama", tie_word_embeddings=True),
    "llama-biases": case("llama", attention_bias=True, mlp_bias=True),
    "llama-odd": case("llama", **ODD, attention_bias=True),
    "llama-linear": case(
        "llama", rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)
    ),
    "llama-llama3": case("llama", rope_parameters=LLAMA3),
    "llama-yarn": case("llama", rope_parameters=YARN),
    "llama-dynamic": case(
        "llama",
        max_position_embeddings=32,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
    ),
    "mistral": case("mistral", sliding_window=9, head_dim=10),
    "qwen2": case("qwen2", tie_word_embeddings=True),
    "qwen2-window": case("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": case("qwen3", head_dim=10),
    "qwen3-odd": case("qwen3", **ODD, attention_bias=True, tie_word_embeddings=True),
    "gemma": case("gemma", head_dim=10, tie_word_embeddings=True),
    "gemma2": case(
        "gemma2", head_dim=10, num_hidden_layers=5, sliding_window=9, tie_word_embeddings=True,
        **SOFT,
    ),
    "gemma3": case(
        "gemma3_text", head_dim=10, num_hidden_layers=7, sliding_window=9, tie_word_embeddings=True,
        query_pre_attn_scalar=12, rope_parameters=ROPES,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
    ),
    "phi3": case("phi3", sliding_window=30),
    "phi3-longrope": case(
        "phi3", original_max_position_embeddings=40, rope_parameters=LONGROPE
    ),
    "smollm3": case("smollm3", num_hidden_layers=5, tie_word_embeddings=True),
    "smollm3-window": case(
        "smollm3", no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=9
    ),
    "olmo2": case("olmo2"),
    "gpt_neox": case(
        "gpt_neox",
        rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, rope_theta=1e4),
    ),
    "gpt_neox-serial": case(
        "gpt_neox", use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "granite": case(
        "granite", embedding_multiplier=3.0, logits_scaling=1.7, residual_multiplier=0.6,
        attention_multiplier=0.2, attention_bias=True,
    ),
    "mixtral": case("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "qwen3_moe": case(
        "qwen3_moe", head_dim=10, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
        norm_topk_prob=False,
    ),
    "gpt_oss": case(
        "gpt_oss", head_dim=10, num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=9, swiglu_limit=1.0, rope_parameters=YARN | {"truncate": False},
    ),
    "gpt2": case("gpt2", GPT2),
    "gpt2-untied": case("gpt2", GPT2, n_inner=40, tie_word_embeddings=False),
    "iquest": case("iquestcoder"),
    "iquest-loop": case("iquestloopcoder", loop_num=2, loop_window_size=9),
}  # fmt: skip

BERT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0,
    pad_token_id=0,
)  # fmt: skip
DISTIL = dict(
    vocab_size=64, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=128,
    dropout=0.1, attention_dropout=0.0, pad_token_id=0,
)  # fmt: skip
DEBERTA = BERT | dict(
    type_vocab_size=0, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm",
    share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, pooler_dropout=0,
    max_relative_positions=-1, layer_norm_eps=1e-7, pooler_hidden_act="gelu",
    max_position_embeddings=20, pooler_hidden_size=32,
)  # fmt: skip
MODERN = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    max_position_embeddings=128, local_attention=10, global_attn_every_n_layers=3, pad_token_id=0,
    bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, attention_dropout=0.0,
)  # fmt: skip
ENCODERS = {
    "bert": case("bert", BERT, architectures=["BertModel"]),
    "bert-classes": case(
        "bert", BERT, architectures=["BertForSequenceClassification"],
        id2label={"0": "no", "1": "maybe", "2": "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2},
    ),
    "roberta": case(
        "roberta", BERT, pad_token_id=1, type_vocab_size=1, max_position_embeddings=130,
        layer_norm_eps=1e-5, architectures=["RobertaModel"],
    ),
    "xlm-roberta": case(
        "xlm-roberta", BERT, pad_token_id=1, type_vocab_size=1, max_position_embeddings=130,
        layer_norm_eps=1e-5, architectures=["XLMRobertaModel"],
    ),
    "distilbert": case(
        "distilbert", DISTIL, architectures=["DistilBertModel"], seq_classif_dropout=0.0
    ),
    "deberta": case("deberta-v2", DEBERTA, architectures=["DebertaV2Model"]),
    "modernbert": case(
        "modernbert", MODERN, architectures=["ModernBertModel"], layer_types=None,
    ),
    "modernbert-biases": case(
        "modernbert", MODERN, architectures=["ModernBertModel"], norm_bias=True, mlp_bias=True,
        attention_bias=True, classifier_bias=True, decoder_bias=False, classifier_pooling="mean",
    ),
}  # fmt: skip
T5 = dict(
    vocab_size=64, d_model=32, d_kv=10, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.1,
    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    architectures=["T5ForConditionalGeneration"],
)  # fmt: skip
BART = dict(
    vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, max_position_embeddings=128,
    dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, scale_embedding=True,
    pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    forced_eos_token_id=None, architectures=["BartForConditionalGeneration"],
)  # fmt: skip
PAIRED = {
    "t5": case("t5", T5),
    "t5-gated": case("t5", T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": case("bart", BART),
}
ALL = CASES | ENCODERS | PAIRED


# Every encoder, and the labels of the heads of classes that it is tested with.
BODIES = ("bert", "roberta", "distilbert", "deberta", "modernbert", "modernbert-biases")
HEADS = {"document": ("a", "b", "c"), "token": ("a", "b", "c"), "span": None, "vocabulary": None}


def headed(name, head, directory):
    """(model, params) of an encoder with this head, no part of it at its neutral."""
    path = write(name, directory)
    model, params = hf_lib.load_pretrained(path, labels=HEADS[head], head=head)
    key = jax.random.key(3)
    return model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params)


def said(model, params, batch):
    """What a head says at every token: [B, S, C], or [B, S, V]."""
    hidden = model.hidden(params, batch)
    if model.config.head != "vocabulary":
        return model.class_logits(params, hidden, segments=batch["segments"])
    bias = model.vocab_bias(params)
    logits = jnp.einsum("bsd,vd->bsv", hidden, model.head(params))[..., : model.config.vocab]
    return logits if bias is None else logits + bias[: model.config.vocab]


def write(name, directory, dtype=np.float32) -> Path:
    """The case's config.json and random weights, as large as trained ones, none at its neutral."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(ALL[name]))
    model = hf_lib.load_model(directory)
    abstract, shapes = params_lib.flatten(model.abstract), {}
    for path, files, layout in names_lib.tensors(model):
        p, lead = abstract[path], len(next(iter(files)))
        for file in files.values():
            shapes[file] = (layout.file_shape(p.shape[lead:]), path, p.shape[lead:])
    tensors = {}
    for file, (shape, path, own) in shapes.items():
        rng = np.random.default_rng(zlib.crc32(f"{name} {file}".encode()))
        one = path.endswith("norm/scale") and model.config.norm != "rms_plus_one"
        std = 0.1 if len(own) == 1 or path.endswith("/b") else 0.7 * model.config.width**-0.5
        tensors[file] = (one + std * rng.normal(size=shape)).astype(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
