"""DistilBERT: a BERT of half the layers without token types and without a pooler of its own."""

from sftjax.families import bert, common
from sftjax.models.encoder import Config, Model, Pooler

__all__ = ["Config", "Model", "config", "names"]

OTHERS = r"vocab_(transform|layer_norm|projector)\..*|qa_outputs\..*|(pre_)?classifier\..*"
FIELDS = dict(  # BERT's names of what DistilBERT has
    hidden_size="dim",
    num_hidden_layers="n_layers",
    num_attention_heads="n_heads",
    intermediate_size="hidden_dim",
    hidden_act="activation",
    hidden_dropout_prob="dropout",
    classifier_dropout="seq_classif_dropout",
)


def config(hf: dict) -> Config:
    """encoder.Config from the fields of a Hugging Face config.json.

    sinusoidal_pos_embds says how positions were first made; they are stored as any others.
    """
    named = {name: hf[own] for name, own in FIELDS.items() if own in hf}
    masked = Pooler(hf.get("activation", "gelu"), norm=True)
    return bert.config(
        {"classifier_dropout": 0.2} | hf | {"intermediate_size": 3072} | named,
        token_types=0,
        norm_eps=1e-12,
        poolers=(("document", Pooler("relu")), ("vocabulary", masked)),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    embed, block = "distilbert.embeddings.", "distilbert.transformer.layer.{}."
    rows = [
        (embed + "word_embeddings.weight", "embed/w", "v d -> v d"),
        (embed + "position_embeddings.weight", "positions/w", "p d -> p d"),
        (block + "attention.out_lin.weight", "layers/attn/o/w", "d (n h) -> n h d"),
        (block + "attention.out_lin.bias", "layers/attn/o/b", "d -> d"),
        *common.linear(block + "ffn.lin1", "layers/mlp/up", "f d -> d f"),
        *common.linear(block + "ffn.lin2", "layers/mlp/down", "d f -> f d"),
        *common.layer_norm(embed + "LayerNorm", "embed_norm"),
        *common.layer_norm(block + "sa_layer_norm", "layers/attn_sum_norm"),
        *common.layer_norm(block + "output_layer_norm", "layers/mlp_sum_norm"),
    ]
    for name in ("q", "k", "v"):
        rows += bert.vectors(f"{block}attention.{name}_lin", name)
    if c.head == "vocabulary":
        own = "transform layer_norm projector.bias projector.weight"
        rows += bert.masked(c, *(f"vocab_{x}" for x in own.split()))
    elif c.head == "document":
        rows += common.linear("pre_classifier", "pooler", "p d -> d p")
    return rows + bert.score(c)
