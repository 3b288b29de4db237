"""Decoders that read images: LLaVA, PaliGemma, Gemma 3, and Phi-4-reasoning-vision, a Phi-3 with a SigLIP 2.

Of LLaVA any decoder and any tower of the families here. PaliGemma, with a Gemma 1 or 2, reads images and prompt in both
directions; Gemma 3 an image, of which a token is the mean of some patches. Phi-4's files have no id for an image's
token, which is put in by its processor: here it is its first token without a use, as in vLLM.
"""

import math
from typing import Any

from sftjax.errors import ModelError
from sftjax.families import common, phi3, vit
from sftjax.models.decoder import Config as Decoder
from sftjax.models.vision_language import Config, with_vision

IMAGES = TEXTS = True
OTHERS = r"(.*\.)?vision_(model|tower)\.head\..*"
TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
PHI_IMAGE = 100256  # <|dummy_0|>
# What config.json leaves out: of a Llama's fields those of 7B, of a Gemma 3's transformers' defaults.
LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000)
GEMMA = dict(
    model_type="gemma3_text", vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, query_pre_attn_scalar=256,
)  # fmt: skip


def decoder_of(hf: dict) -> Any:
    """The family of a text_config."""
    from sftjax.hf.names import family_of  # which lists this family too

    return family_of(hf)


def config(hf: dict, preprocessor: dict | None = None) -> Config:
    """vision_language.Config from the fields of a config.json, and of preprocessor_config.json."""
    own = dict(hf.get("vision_config") or {})
    phi = hf["model_type"] == "phi4-siglip"
    usual = {"phi4-siglip": TOWERS[2:], "llava": TOWERS[:2]}
    towers = usual.get(hf["model_type"], TOWERS[1:2])
    own.setdefault("model_type", towers[0])
    if own["model_type"] not in towers:
        raise ModelError(f"vision_config.model_type {own['model_type']!r} is not supported; known: {', '.join(towers)}")
    if hf["model_type"] in ("paligemma", "gemma3"):
        return _gemma(hf, own, preprocessor)
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


def _gemma(hf, own, preprocessor) -> Config:
    """Of PaliGemma and Gemma 3: the whole tower is run, and what it gives goes through one matrix."""
    three, text = hf["model_type"] == "gemma3", dict(hf.get("text_config") or {})
    text = (GEMMA if three else {"model_type": "gemma"}) | text
    text |= {"use_bidirectional_attention": False}  # PaliGemma's files may say so of their prefix
    if text["model_type"] not in (("gemma3_text",) if three else ("gemma", "gemma2")):
        raise ModelError(f"text_config.model_type {text['model_type']!r} is no decoder of a {hf['model_type']}")
    tower, pool = vit.config(own, preprocessor), 1
    decoder, patches = decoder_of(text).config(text), (tower.image_size // tower.patch) ** 2
    if three:
        tokens = hf.get("mm_tokens_per_image", 256)
        pool = math.isqrt(patches // tokens) if type(tokens) is int and tokens > 0 else 0
        if patches != pool**2 * tokens or tower.image_size // tower.patch % (pool or 1):
            raise ModelError(f"mm_tokens_per_image={tokens!r:.99}: {patches} patches are not so many squares")
    windows = [k.window for k in decoder.kinds if k.window]
    if windows and patches // pool**2 > min(windows):
        raise ModelError(f"an image has {patches // pool**2} tokens, more than sliding_window={min(windows)}")
    more: Any = dict(whole=True, around=(hf.get("boi_token_index", 255999), hf.get("eoi_token_index", 256000)))
    token = hf.get("image_token_index", hf.get("image_token_id", 262144 if three else 256000))
    shared = dict(family=text["model_type"], image_token=token, left=0, tower_norm=True, projector="", pool=pool)
    own = more | dict(projector_bias=False, projector_norm=True) if three else dict(prefix=True)
    return with_vision(decoder, tower, **shared, **own)


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
    if c.projector_norm:
        own = "multi_modal_projector.mm_"
        rows += [(own + "input_projection_weight", "projector/up/w", "c d -> c d")]
        return text + rows + [(own + "soft_emb_norm.weight", "projector/norm/scale", "c -> c")]
    if not c.projector:
        return text + rows + common.linear("multi_modal_projector.linear", "projector/up", "d c -> c d")
    rows += common.linear(projector[0], "projector/up", "d c -> c d", c.projector_bias)
    return text + rows + common.linear(projector[1], "projector/down", "e d -> d e", c.projector_bias)
