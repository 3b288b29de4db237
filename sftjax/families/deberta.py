"""DeBERTa v2 and v3: a BERT without positions, whose scores know the distances of tokens.

Only attention "xla" computes these, so long rows cost their square. hidden_dropout_prob is applied but to the
embeddings of distances; attention_probs_dropout_prob is not, see encoder.py.
"""

from typing import Any

from sftjax.errors import ModelError
from sftjax.families import bert, common
from sftjax.models.encoder import Config, Pooler

OTHERS = (
    r"cls\..*|(lm|mask)_predictions\..*|classifier\..*|qa_outputs\..*|pooler\..*"
    r"|(deberta\.)?embeddings\.position_embeddings\..*"
)


def config(hf: dict) -> Config:
    """encoder.Config from the fields of a Hugging Face config.json."""
    width = hf["hidden_size"]
    common.refuse(
        hf, relative_attention=True, share_att_key=True, norm_rel_ebd="layer_norm", legacy=True,
        position_biased_input=False, conv_kernel_size=0, embedding_size=width,
        attention_head_size=bert.head_dim(hf), pooler_hidden_size=width,
    )  # fmt: skip
    kinds = hf.get("pos_att_type") or []
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    if {x.strip() for x in kinds} != {"c2p", "p2c"} or not hf.get("relative_attention"):
        raise ModelError(f"pos_att_type {kinds} is not supported, only c2p and p2c")
    furthest, buckets = hf.get("max_relative_positions", -1), hf.get("position_buckets", -1)
    furthest = hf.get("max_position_embeddings", 512) if furthest < 1 else furthest
    if not 4 <= buckets < 2 * (furthest - 1):
        raise ModelError(f"position_buckets={buckets} is not supported: 4 to {2 * furthest - 3}")
    activation, pooled = hf.get("hidden_act", "gelu"), hf.get("pooler_hidden_act", "gelu")
    more: dict[str, Any] = dict(
        learned_positions=False,
        norm_eps=hf.get("layer_norm_eps", 1e-7),
        token_types=hf.get("type_vocab_size", 0),
        attn_scale=(3 * bert.head_dim(hf)) ** -0.5,
        relative=2 * buckets,
        furthest=furthest,
        attention="xla",
        poolers=(("document", Pooler(pooled)), ("vocabulary", Pooler(activation, True))),
        head_dropout=hf.get("cls_dropout", hf.get("hidden_dropout_prob", 0.1)),
    )
    return bert.config(hf, **more)


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    rows = []
    for file, *rest in bert.body("deberta."):
        for part in ("query", "key", "value"):
            file = file.replace(f"self.{part}.", f"self.{part}_proj.")
        if "position_embeddings" not in file and (c.token_types or "token_type" not in file):
            rows.append((file, *rest))
    rows.append(("deberta.encoder.rel_embeddings.weight", "relative/w", "r d -> r d"))
    rows += common.layer_norm("deberta.encoder.LayerNorm", "relative_norm")
    return rows + (bert.masked(c) if c.head == "vocabulary" else bert.score(c, "pooler.dense"))
