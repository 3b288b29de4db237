"""ModernBERT: rotary embedding, gated GELU, norms before each half, local and global layers.

In a local layer a token sees so many tokens on either side; the first layer reads the normalised embedding as it is.
Every head reads a layer of its own; a document is its first token, or the mean of all (classifier_pooling).
"""

from sftjax.errors import ModelError
from sftjax.families import bert, common
from sftjax.models.decoder import Kind
from sftjax.models.encoder import Config, Pooler

OTHERS = r"head\..*|classifier\..*|decoder\..*"
THETAS = {common.FULL: ("global_rope_theta", 160_000.0), common.SLIDING: ("local_rope_theta", 1e4)}


def config(hf: dict) -> Config:
    """encoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, embedding_dropout=0.0, mlp_dropout=0.0)
    pooling = hf.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ModelError(f"classifier_pooling={pooling!r}, expected 'cls' or 'mean'")
    pooler = Pooler(hf.get("classifier_activation", "gelu"), norm=True, bias=hf.get("classifier_bias", False))
    heads = ("document", "token", "span", "vocabulary")
    return bert.config(
        {"max_position_embeddings": 8192} | hf,
        kinds=_kinds(hf),
        norm_bias=hf.get("norm_bias", False),
        norm_eps=hf.get("norm_eps", 1e-5),
        norms="pre",
        final_norm=True,
        learned_positions=False,
        token_types=0,
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        gated=True,
        activation=hf.get("hidden_activation", "gelu"),
        poolers=tuple((head, pooler) for head in heads),
        pooling="mean" if pooling == "mean" else "first",
        vocab_bias=hf.get("decoder_bias", True),
        dropout=0.0,
        head_dropout=hf.get("classifier_dropout") or 0.0,
    )


def _kinds(hf) -> tuple[Kind, ...]:
    """A Kind for each layer; the first layer's attention has no norm before it."""
    every, depth = hf.get("global_attn_every_n_layers", 3), hf["num_hidden_layers"]
    types = hf.get("layer_types") or [common.SLIDING if i % every else common.FULL for i in range(depth)]
    ropes, width = hf.get("rope_parameters") or {}, bert.head_dim(hf)
    known = {}
    for name, (field, theta) in THETAS.items():
        of = ropes.get(name) or {"rope_type": "default"}
        rope = common.rope({}, width, hf.get(field) or theta, of=of)
        window = hf.get("local_attention", 128) // 2 + 1 if name == common.SLIDING else 0
        known[name] = Kind(window, rope)
    for name in types:
        if name not in known:
            raise ModelError(f"layer type {name!r} is not supported; known: {', '.join(known)}")
    first = Kind(known[types[0]].window, known[types[0]].rope, attn_norm=False)
    return (first, *(known[name] for name in types[1:]))


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    block, n, f = "model.layers.{}.", c.heads, c.mlp
    rows: list[tuple] = [("model.embeddings.tok_embeddings.weight", "embed/w", "v d -> v d")]
    rows += common.matrices(block, "layers/attn", c.out_bias, o="attn.Wo")
    rows += common.matrices(block, "layers/mlp", c.mlp_bias, down="mlp.Wo")
    rows += common.fused(block + "attn.Wqkv", "layers/attn", c.qkv_bias, q=n, k=n, v=n)
    rows += common.fused(block + "mlp.Wi", "layers/mlp", c.mlp_bias, gate=f, up=f)
    norms = {
        "model.embeddings.norm": "embed_norm",
        block + "attn_norm": "layers/attn_norm",
        block + "mlp_norm": "layers/mlp_norm",
        "model.final_norm": "norm",
    }
    norms |= {"head.norm": "pooler_norm"} if c.pooler else {}
    for file, path in norms.items():
        rows += common.layer_norm(file, path, c.norm_bias)
    if c.pooler:
        rows += common.linear("head.dense", "pooler", bert.POOLER, c.pooler.bias)
    if c.classes:
        rows += common.linear("classifier", "score", "c d -> c d")
    if c.head == "vocabulary":
        rows += [("decoder.bias", "vocab_bias/b", "v -> v")] * c.vocab_bias
        rows += [("decoder.weight", "head/w", "v d -> v d")] * (not c.tied)
    return rows
