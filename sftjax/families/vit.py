"""Vision transformers: ViT, and the image tower of SigLIP.

ViT has a class token, which a head reads; of SigLIP a head reads the mean of all patches. SigLIP's text tower and the
pooling of its contrastive head are left out.
"""

from typing import Any

from sftjax.errors import ModelError
from sftjax.families import bert, common, pixels
from sftjax.models.vision import Config

IMAGES = True
OTHERS = r"(vit\.)?pooler\..*|(vision_model\.)?head\..*|text_model\..*|logit_(scale|bias)"
OTHERS += r"|classifier\..*|decoder\..*|(vit\.)?embeddings\.mask_token"


def config(hf: dict, preprocessor: dict | None = None) -> Config:
    """vision.Config from the fields of a config.json and, for its pixels, preprocessor_config.json.

    Raises: ModelError for sizes that do not fit one another.
    """
    siglip = hf["model_type"] == "siglip"
    own = (hf.get("vision_config") or {}) if siglip else hf
    common.check(own)
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    own = base | {"intermediate_size": 3072} | own
    said = pixels.fields(preprocessor or {})
    side, patch = own.get("image_size", 224), own.get("patch_size", 16)
    if said.pop("image_size", side) != side or side % patch:
        raise ModelError(
            f"image_size={side}, of patches of {patch}: {pixels.FILE} must ask for images of that"
            " size, and patches divide it"
        )
    return Config(
        vocab=1,  # it has none
        width=own["hidden_size"],
        layers=own["num_hidden_layers"],
        heads=own["num_attention_heads"],
        kv_heads=own["num_attention_heads"],
        head_dim=bert.head_dim(own),
        mlp=own["intermediate_size"],
        norm_eps=own.get("layer_norm_eps", 1e-6 if siglip else 1e-12),
        activation=own.get("hidden_act", "gelu_pytorch_tanh" if siglip else "gelu"),
        init_std=own.get("initializer_range", 0.02),
        dropout=own.get("hidden_dropout_prob", 0.0),
        qkv_bias=own.get("qkv_bias", True),
        channels=own.get("num_channels", 3),
        image_size=side,
        patch=patch,
        class_token=not siglip,
        **said,
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    table = _vit(c) if c.class_token else _siglip()
    return table + (common.linear("classifier", "score", "c d -> c d") if c.classes else [])


def _vit(c) -> list[tuple]:
    embed, block = "vit.embeddings.", "vit.encoder.layer.{}."
    first = {"a": (0, 1), "b": (0, 1)}
    qkv: Any = dict(q="attention.query", k="attention.key", v="attention.value")
    return [
        (embed + "cls_token", "class_token/w", "a b d -> d", first),
        (embed + "position_embeddings", "positions/w", "a n d -> n d", {"a": (0, 1)}),
        *common.linear(embed + "patch_embeddings.projection", "patches", "d c p q -> p q c d"),
        *common.matrices(block + "attention.", "layers/attn", c.qkv_bias, **qkv),
        *common.matrices(block + "attention.", "layers/attn", o="output.dense"),
        *common.matrices(block, "layers/mlp", up="intermediate.dense", down="output.dense"),
        *common.layer_norm(block + "layernorm_before", "layers/attn_norm"),
        *common.layer_norm(block + "layernorm_after", "layers/mlp_norm"),
        *common.layer_norm("vit.layernorm", "norm"),
    ]


def _siglip() -> list[tuple]:
    embed, block = "vision_model.embeddings.", "vision_model.encoder.layers.{}."
    return [
        (embed + "position_embedding.weight", "positions/w", "n d -> n d"),
        *common.linear(embed + "patch_embedding", "patches", "d c p q -> p q c d"),
        *common.matrices(block + "self_attn.", "layers/attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
        *common.matrices(block, "layers/mlp", up="mlp.fc1", down="mlp.fc2"),
        *common.layer_norm(block + "layer_norm1", "layers/attn_norm"),
        *common.layer_norm(block + "layer_norm2", "layers/mlp_norm"),
        *common.layer_norm("vision_model.post_layernorm", "norm"),
    ]
