"""Decoders that read images: LLaVA, and Phi-4-reasoning-vision, whose decoder is a Phi-3 and whose tower a SigLIP 2.

Of LLaVA any decoder and any tower of the families here. Phi-4's files have no id for an image's token, which is put in
by its processor: here it is its first token without a use, as in vLLM.
"""

from typing import Any

from sftjax.errors import ModelError
from sftjax.families import common, phi3, vit
from sftjax.models.decoder import Config as Decoder
from sftjax.models.vision_language import Config, with_vision

IMAGES = TEXTS = True
OTHERS = r"(.*\.)?vision_(model|tower)\.head\..*"
TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
PHI_IMAGE = 100256  # <|dummy_0|>
# What config.json leaves out of a Llama's fields where they are those of 7B.
LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000)


def decoder_of(hf: dict) -> Any:
    """The family of a text_config."""
    from sftjax.hf.names import family_of  # which lists this family too

    return family_of(hf)


def config(hf: dict, preprocessor: dict | None = None) -> Config:
    """vision_language.Config from the fields of a config.json, and of preprocessor_config.json."""
    own = dict(hf.get("vision_config") or {})
    phi = hf["model_type"] == "phi4-siglip"
    own.setdefault("model_type", "siglip2_vision_model" if phi else "clip_vision_model")
    towers = TOWERS[2:] if phi else TOWERS[:2]
    if own["model_type"] not in towers:
        raise ModelError(f"vision_config.model_type {own['model_type']!r} is not supported; known: {', '.join(towers)}")
    if phi:
        common.refuse(hf, mm_projector_type="mlp2x_gelu", use_s2=False, image_aspect_ratio="square")
        limits = dict(min_num_patches=hf.get("min_num_patches", 256), max_num_patches=hf.get("max_num_patches", 3600))
        tower = vit.config(own, limits | {k: v for k, v in (preprocessor or {}).items() if v is not None})
        return with_vision(phi3.config(hf), tower, image_token=hf.get("image_token_index", PHI_IMAGE))
    strategy = "vision_feature_select_strategy"
    common.refuse({strategy: "default"} | hf, **{strategy: "default" if own["model_type"] == TOWERS[0] else "full"})
    text = dict(hf.get("text_config") or {})
    text = (LLAMA if text.setdefault("model_type", "llama") == "llama" else {}) | text
    common.check(text)
    common.refuse(text, embedding_multiplier=1.0)  # transformers' would scale the images too
    decoder = None if hasattr(decoder_of(text), "IMAGES") else decoder_of(text).config(text)
    if type(decoder) is not Decoder:
        raise ModelError(f"text_config.model_type {text['model_type']!r} is no decoder of texts")
    tower, layer = vit.config(own, preprocessor), hf.get("vision_feature_layer", -2)
    if type(layer) is not int or not -tower.layers <= layer < -1:
        raise ModelError(f"vision_feature_layer={layer!r:.99} is not supported, only one from -2 to {-tower.layers}")
    return with_vision(
        decoder,
        tower,
        family=text["model_type"],
        image_token=hf.get("image_token_index", hf.get("image_token_id", 32000)),
        left=-1 - layer,
        projector=hf.get("projector_hidden_act", "gelu"),
        projector_bias=hf.get("multimodal_projector_bias", True),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    if c.vision.patches:
        text, own = phi3.names(c), "model."
        tower, projector = own + "vision_tower.vision_tower.", (own + "mm_projector.0", own + "mm_projector.2")
    else:
        family = decoder_of({"model_type": c.family})
        text = [(f"language_model.{name}", *rest) for name, *rest in family.names(c)]
        tower, projector = "vision_tower.", ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    rows = [(tower + name, f"tower/{path}", *rest) for name, path, *rest in vit.tower(c.vision)]
    rows += common.linear(projector[0], "projector/up", "d c -> c d", c.projector_bias)
    return text + rows + common.linear(projector[1], "projector/down", "e d -> d e", c.projector_bias)
