"""RoBERTa and XLM-RoBERTa: a BERT whose positions begin after the padding's, and other heads.

A head of classes reads the first token through a layer of its own, with dropout before it and after it.
"""

from sftjax.errors import ModelError
from sftjax.families import bert, common
from sftjax.models.encoder import Config, Pooler

OTHERS = r"lm_head\..*|qa_outputs\..*|classifier\..*|(roberta\.)?pooler\..*"


def config(hf: dict) -> Config:
    """encoder.Config from the fields of a Hugging Face config.json."""
    pad = hf.get("pad_token_id")
    first = (pad if type(pad) is int and pad >= 0 else 1) + 1  # rows before it are never read
    if (size := hf.get("max_position_embeddings", 512)) <= first:
        raise ModelError(f"max_position_embeddings={size}: positions begin at {first}")
    document = Pooler(drop_before=True)
    return bert.config(
        hf,
        first_position=first,
        max_positions=size - first,
        poolers=(("", Pooler()), ("document", document), ("vocabulary", Pooler("gelu", True))),
    )


as_stored = bert.as_stored


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    rows = bert.body("roberta.")
    if c.head == "vocabulary":
        return rows + bert.masked(c, "lm_head.", dense="dense", norm="layer_norm")
    if c.head == "document":
        rows += common.linear("classifier.dense", "pooler", bert.POOLER)
        return rows + common.linear("classifier.out_proj", "score", "c d -> c d")
    return rows + bert.score(c, "roberta.pooler.dense")
