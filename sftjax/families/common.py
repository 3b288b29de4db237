"""What the families share in reading a Hugging Face config.json."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from sftjax.errors import ModelError
from sftjax.models.decoder import Kind
from sftjax.ops.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"


def _number(x) -> bool:
    return type(x) in (int, float) and abs(x) < 2**63 and math.isfinite(x)


def _entries(x) -> list:
    return x if isinstance(x, list) else [x]


# {what is expected: (its test, the fields)}; a field with a "?" may be null.
EXPECTED: dict[str, tuple[Callable, str]] = {
    "a positive whole number": (
        lambda x: type(x) is int and 0 < x < 2**63,
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads? head_dim? intermediate_size"
        " max_position_embeddings original_max_position_embeddings? n_embd n_layer n_head n_inner? n_positions loop_num"
        " loop_window_size n_layers n_heads dim hidden_dim local_attention global_attn_every_n_layers"
        " sliding_window_pattern? _sliding_window_pattern? no_rope_layer_interval? num_labels? d_model d_kv d_ff"
        " num_layers num_decoder_layers? num_heads encoder_layers decoder_layers encoder_attention_heads"
        " decoder_attention_heads encoder_ffn_dim decoder_ffn_dim relative_attention_num_buckets"
        " relative_attention_max_distance embedding_size num_channels patch_size image_size in_chans"
        " num_patches min_num_patches max_num_patches",
    ),
    "a whole number": (
        lambda x: type(x) is int and 0 <= x < 2**63,
        "type_vocab_size sliding_window? max_window_layers num_experts num_local_experts"
        " num_experts_per_tok moe_intermediate_size decoder_start_token_id? num_classes image_token_index"
        " image_token_id",
    ),
    "a positive number": (
        lambda x: _number(x) and x > 0,
        "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps rope_theta? rope_local_base_freq? global_rope_theta?"
        " local_rope_theta? rotary_emb_base? rotary_pct? partial_rotary_factor? factor? low_freq_factor?"
        " high_freq_factor? beta_fast? beta_slow? attention_factor? query_pre_attn_scalar attn_logit_softcapping?"
        " final_logit_softcapping? embedding_multiplier attention_multiplier residual_multiplier logits_scaling"
        " swiglu_alpha swiglu_limit",
    ),
    "a number from 0 to below 1": (
        lambda x: _number(x) and 0 <= x < 1,
        "hidden_dropout_prob pooler_dropout cls_dropout? classifier_dropout? dropout seq_classif_dropout dropout_rate",
    ),
    "a number of 0 or more": (lambda x: _number(x) and x >= 0, "initializer_range init_std mscale? mscale_all_dim?"),
    "true or false": (
        lambda x: type(x) is bool,
        "tie_word_embeddings attention_bias mlp_bias use_parallel_residual norm_topk_prob use_sliding_window? truncate?"
        " is_decoder? add_cross_attention? norm_bias classifier_bias decoder_bias scale_embedding?"
        " sinusoidal_pos_embds multimodal_projector_bias",
    ),
    "a name": (
        lambda x: isinstance(x, str),
        "model_type hidden_act? hidden_activation? activation_function type rope_type activation classifier_activation"
        " classifier_pooling feed_forward_proj architecture layer_type classifier projector_hidden_act",
    ),
    "a list of names": (
        lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x),
        "architectures? layer_types? label_names?",
    ),
    "a list of positive whole numbers": (
        lambda x: isinstance(x, list) and all(type(y) is int and 0 < y < 2**24 for y in x) and x,
        "depths hidden_sizes input_size",
    ),
    "a token's id, or a list of them": (
        lambda x: all(type(y) is int and abs(y) < 2**63 for y in _entries(x)),
        "bos_token_id? eos_token_id? pad_token_id?",
    ),
    "a list of numbers": (
        lambda x: isinstance(x, list) and all(isinstance(y, bool) or _number(y) for y in x),
        "short_factor long_factor no_rope_layers? mean std image_mean? image_std?",
    ),
    "an object": (
        lambda x: isinstance(x, dict),
        "rope_parameters? rope_scaling? full_attention? sliding_attention? quantization_config?"
        " id2label? label2id? pretrained_cfg? vision_config? text_config?",
    ),
}
# The most that a size may be. No model comes near; what a config.json asks for beyond it would be laid out, layer by
# layer and name by name, before the weights' files could contradict it.
_MOST = {
    2**10: "loop_num",
    2**12: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers num_experts"
    " num_local_experts relative_attention_num_buckets",
    2**14: "image_size",
    2**16: "num_attention_heads n_head num_key_value_heads head_dim d_kv num_heads encoder_attention_heads"
    " decoder_attention_heads",
    2**20: "num_classes num_labels",
    2**24: "hidden_size intermediate_size moe_intermediate_size n_embd n_inner n_heads dim hidden_dim d_model d_ff"
    " encoder_ffn_dim decoder_ffn_dim",
    2**31: "vocab_size max_position_embeddings n_positions",
}
MOST = {field: most for most, fields in _MOST.items() for field in fields.split()}
PARAMETERS = 10**13  # of a whole model
_FIELDS = {field: (expected, test) for expected, (test, fields) in EXPECTED.items() for field in fields.split()}


def check(hf: dict, where: str = "") -> None:
    """Raise ModelError naming the first field that does not hold what EXPECTED says of it.

    where: the fields that hold `hf`, "rope_parameters."; "" for the whole.
    """
    for field, value in hf.items():
        expected, ok = _FIELDS.get(field) or _FIELDS.get(field + "?") or ("", lambda x: True)
        if not ok(value) and not (value is None and field + "?" in _FIELDS):
            raise ModelError(f"{where}{field} is {_short(value)}, expected {expected}")
        if not where and type(value) is int and value > MOST.get(field, value):
            raise ModelError(f"{field} is {_short(value)}, expected at most {MOST[field]:,}")
        if field in ("rope_parameters", "rope_scaling", FULL, SLIDING) and value:
            check(value, f"{where}{field}.")
        elif where and any(isinstance(x, (list, dict)) for x in _entries(value)):
            raise ModelError(f"{where}{field} is {_short(value)}, expected a plain value")
    depth = hf.get("num_hidden_layers")
    for field in ("layer_types", "no_rope_layers"):
        if depth and len(hf.get(field) or ()) not in (0, depth):
            raise ModelError(f"{field} has {len(hf[field])} entries, num_hidden_layers is {depth}")


def _short(value):
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**70 else "a huge number"
    return text if len(text) <= 200 else f"{text[:199]}…"


def refuse(hf: dict, **plain: Any) -> None:
    """Raise ModelError for a field whose value is none of those of the plain model.

    plain: {field: value}; an absent or null field is plain.
    """
    for field, value in plain.items():
        if hf.get(field) not in (None, value):
            raise ModelError(f"{field}={hf[field]!r} is not supported, only {value!r}")


def rope(hf: dict, head_dim: int, theta: float = 10_000.0, partial: float = 1.0, of: dict | None = None) -> Rope:
    """The Rope of a config: rope_parameters (transformers 5), or rope_scaling and rope_theta.

    theta, partial: the family's defaults. of: the settings of one layer type, where each has its own.
    """
    fields = of or hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if FULL in fields or SLIDING in fields:
        raise ModelError("rope_parameters of each layer type: all layers of this model share one")
    s = {("rope_type" if k == "type" else k): v for k, v in fields.items()}
    theta = s.pop("rope_theta", None) or hf.get("rope_theta") or theta
    share = s.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or partial
    longest, original = "max_position_embeddings", "original_max_position_embeddings"
    s |= {k: hf[k] for k in (longest, original) if k in hf}
    if s.get("rope_type") in ("yarn", "longrope") and longest in hf:
        s.setdefault(original, hf[longest])
    s = {k: tuple(v) if isinstance(v, list) else v for k, v in s.items()}
    if s.get("rope_type", "default") == "default":
        s = {}
    dim = int(head_dim * share)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ModelError(
            f"rotary embedding of {dim} dimensions ({share:g} of a head's {head_dim}); expected an"
            " even number of them (head_dim, partial_rotary_factor)"
        )
    return Rope(float(theta), 0 if dim == head_dim else dim, tuple(sorted(s.items())))


def alternating(depth: int, period: int = 2) -> list[str]:
    """The types of `depth` layers, of which the last of each period is a global one."""
    return [FULL if i % period == 0 else SLIDING for i in range(1, depth + 1)]


def kinds(hf: dict, types: Sequence[str], rope: Rope | None) -> tuple[Kind, ...]:
    """A Kind for each layer type: the window is that of the sliding ones."""
    known = {FULL: 0, SLIDING: hf.get("sliding_window") or 0}
    for name in types:
        if name not in known:
            raise ModelError(f"layer type {name!r} is not supported; known: {', '.join(known)}")
    out = tuple(Kind(known[name], rope) for name in types)
    return out[:1] if len(set(out)) == 1 else out


# How most files hold the matrices of a layer, by the names of the parameters.
LAYOUTS = {
    "q": "(n h) d -> d n h",
    "k": "(k h) d -> d k h",
    "v": "(k h) d -> d k h",
    "o": "d (n h) -> n h d",
    "gate": "f d -> d f",
    "up": "f d -> d f",
    "down": "d f -> f d",
}


def linear(file: str, path: str, layout: str, bias: bool = True, *part: dict) -> list[tuple]:
    """Rows as in llama.names of a matrix of this layout, and of its bias, where it has one."""
    out = re.findall(r"\(.*?\)|\w", layout)[0]  # the file's first dimension is the output's
    own = " ".join(letter for letter in layout.split("->")[1].split() if letter in out)
    rows = [(file + ".weight", path + "/w", layout, *part)]
    return rows + [(file + ".bias", path + "/b", f"{out} -> {own}", *part)] * bias


def matrices(prefix: str, path: str, bias: bool = True, **files: str) -> list[tuple]:
    """Rows of matrices of a layer, and of their biases. files: of each key of LAYOUTS."""
    rows = (linear(prefix + file, f"{path}/{name}", LAYOUTS[name], bias) for name, file in files.items())
    return [*itertools.chain.from_iterable(rows)]


def fused(file: str, path: str, bias: bool, **sizes: int) -> list[tuple]:
    """Rows of matrices that lie in one, one after the other. sizes: of each key of LAYOUTS."""
    out, start = list[tuple](), 0
    for name, size in sizes.items():
        part = {LAYOUTS[name].strip("(")[0]: (start, sum(sizes.values()))}
        out += linear(file, f"{path}/{name}", LAYOUTS[name], bias, part)
        start += size
    return out


def layer_norm(file: str, path: str, bias: bool = True) -> list[tuple]:
    """Rows as in llama.names of a LayerNorm: its scale and, where it has one, its bias."""
    rows = [(file + ".weight", path + "/scale", "d -> d")]
    return rows + [(file + ".bias", path + "/b", "d -> d")] * bias
