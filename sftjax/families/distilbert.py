"""DistilBERT: a BERT of half the layers without token types and without a pooler of its own."""

from sftjax.families import bert, common
from sftjax.models.encoder import Config, Pooler

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
    attn = dict(q="q_lin", k="k_lin", v="v_lin", o="out_lin")
    rows = [
        (embed + "word_embeddings.weight", "embed/w", "v d -> v d"),
        (embed + "position_embeddings.weight", "positions/w", "p d -> p d"),
        *common.matrices(block + "attention.", "layers/attn", True, **attn),
        *common.matrices(block + "ffn.", "layers/mlp", up="lin1", down="lin2"),
        *common.layer_norm(embed + "LayerNorm", "embed_norm"),
        *common.layer_norm(block + "sa_layer_norm", "layers/attn_sum_norm"),
        *common.layer_norm(block + "output_layer_norm", "layers/mlp_sum_norm"),
    ]
    if c.head == "vocabulary":
        parts = ("transform", "layer_norm", "projector.bias", "projector.weight")
        return rows + bert.masked(c, "vocab_", *parts)
    return rows + bert.score(c, "pre_classifier")
