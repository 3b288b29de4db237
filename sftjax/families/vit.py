"""Vision transformers: ViT and SigLIP's image tower; and those that decoders read images by: CLIP's, SigLIP 2's.

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
SIGLIP = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
CLIP = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, patch_size=32)
CLIP_PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
DEFAULTS = {"siglip": SIGLIP, "siglip2": SIGLIP, "clip": CLIP, "vit": dict(hidden_act="gelu", layer_norm_eps=1e-12)}


def config(hf: dict, preprocessor: dict | None = None) -> Config:
    """vision.Config from the fields of a config.json and, for its pixels, preprocessor_config.json.

    hf may be that of a tower alone, as other models hold it. Raises: ModelError for sizes that do not fit one another.
    """
    kind = hf["model_type"].removesuffix("_vision_model")
    own = (hf.get("vision_config") or {}) if hf["model_type"] == "siglip" else hf
    common.check(own)
    base: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    own = base | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16} | DEFAULTS[kind] | own
    said, patch = pixels.fields(preprocessor or {}), own["patch_size"]
    if kind == "siglip2":
        own["image_size"] = round(own.get("num_patches", 256) ** 0.5) * patch
    side, limits = own["image_size"], said.pop("patches", ())
    if said.pop("image_size", side) != side or side % patch:
        raise ModelError(
            f"image_size={side}, of patches of {patch}: {pixels.FILE} must ask for images of that size, and patches"
            " divide it"
        )
    return Config(
        vocab=1,  # it has none
        width=own["hidden_size"],
        layers=own["num_hidden_layers"],
        heads=own["num_attention_heads"],
        kv_heads=own["num_attention_heads"],
        head_dim=bert.head_dim(own),
        mlp=own["intermediate_size"],
        norm_eps=own["layer_norm_eps"],
        activation=own["hidden_act"],
        init_std=own.get("initializer_range", 0.02),
        dropout=own.get("hidden_dropout_prob", 0.0),
        qkv_bias=own.get("qkv_bias", True),
        channels=own.get("num_channels", 3),
        image_size=side,
        patch=patch,
        class_token=kind in ("vit", "clip"),
        embed_norm=kind == "clip",
        patch_bias=kind != "clip",
        patches=(limits or (1, 256)) if kind == "siglip2" else (),
        **(CLIP_PIXELS if kind == "clip" else {}) | said,
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    table = _vit(c) if c.class_token else tower(c)
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


def tower(c: Config) -> list[tuple]:
    """The rows of a tower of SigLIP's or CLIP's form."""
    embed, block = "vision_model.embeddings.", "vision_model.encoder.layers.{}."
    clip: Any = [
        (embed + "class_embedding", "class_token/w", "d -> d"),
        *common.layer_norm("vision_model.pre_layrnorm", "embed_norm"),
    ]
    layout = "d (p q c) -> p q c d" if c.patches else "d c p q -> p q c d"
    return clip * c.class_token + [
        (embed + "position_embedding.weight", "positions/w", "n d -> n d"),
        *common.linear(embed + "patch_embedding", "patches", layout, c.patch_bias),
        *common.matrices(block + "self_attn.", "layers/attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
        *common.matrices(block, "layers/mlp", up="mlp.fc1", down="mlp.fc2"),
        *common.layer_norm(block + "layer_norm1", "layers/attn_norm"),
        *common.layer_norm(block + "layer_norm2", "layers/mlp_norm"),
        *common.layer_norm("vision_model.post_layernorm", "norm"),
    ]
