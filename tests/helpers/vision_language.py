"""Small decoders that read images, texts with images for them, and transformers' own of the same files."""

import io
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file
from vision import fill

from sftjax import hf as hf_lib
from sftjax.data.packing.images import ImageTextRows, Patches

TOKEN = 90  # of an image
TEXT = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
TOWER = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=4)
LLAVA = dict(model_type="llava", architectures=["LlavaForConditionalGeneration"], image_token_index=TOKEN)
CASES = {
    "llava-clip": LLAVA | dict(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | dict(model_type="clip_vision_model", image_size=16, projection_dim=8),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    ),
    "llava-siglip": LLAVA | dict(
        text_config=TEXT | {"model_type": "qwen2", "tie_word_embeddings": True},
        vision_config=TOWER | dict(model_type="siglip_vision_model", image_size=12),
        vision_feature_layer=-3, vision_feature_select_strategy="full", multimodal_projector_bias=False,
        projector_hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
    ),
    "paligemma": dict(
        model_type="paligemma", architectures=["PaliGemmaForConditionalGeneration"], image_token_index=TOKEN,
        text_config=TEXT | {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
        vision_config=TOWER | dict(model_type="siglip_vision_model", image_size=12, vision_use_head=False),
        projection_dim=32, hidden_size=32,
    ),
    "gemma3": dict(
        model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], image_token_index=TOKEN,
        text_config=TEXT | {
            "model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
        },
        vision_config=TOWER | dict(model_type="siglip_vision_model", image_size=16, vision_use_head=False),
        mm_tokens_per_image=4, boi_token_index=91, eoi_token_index=92,
    ),
    "phi4-siglip": TEXT | dict(
        model_type="phi4-siglip", architectures=["Phi4ForCausalLMV"], original_max_position_embeddings=256,
        vision_config=TOWER | dict(model_type="siglip2_vision_model", num_patches=9),
        mm_projector_type="mlp2x_gelu", mm_hidden_size=24, min_num_patches=6, max_num_patches=20,
    ),
}  # fmt: skip
PIXELS = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
SIZES = ((13, 30), (9, 8), (40, 61), (16, 16))  # height and width of images, not those of a model


def write(name, directory) -> Path:
    """The case's directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CASES[name]))
    (directory / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    fill(name, directory)
    return directory


def loaded(name, directory, **changes):
    """(model, params) of a case; the image's token is TOKEN in each, and not 100256 of a large vocabulary."""
    return hf_lib.load_pretrained(write(name, directory), image_token=TOKEN, **changes)


def png(height, width, seed=0) -> bytes:
    """The file of an image of noise."""
    rng, out = np.random.default_rng([seed, height, width]), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(out, "png")
    return out.getvalue()


def patches_of(model) -> Patches:
    v = model.config.vision
    return Patches(v.image_size, v.patch, v.channels, v.patches, model.config.pool**2)


class Doc(NamedTuple):
    """A text with images; its arrays are those of an example."""

    tokens: np.ndarray
    weights: np.ndarray
    files: list


def doc(model, *parts, seed=0) -> Doc:
    """A document of parts: n is so many tokens of text, (height, width) an image."""
    rng, tokens, files = np.random.default_rng([zlib.crc32(repr(parts).encode()), seed]), [], []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(3, TOKEN, part).tolist()
        else:
            files.append(png(*part, seed))
            tokens += [TOKEN] * patches_of(model).tokens(files[-1])
    tokens = np.array(tokens, np.int32)
    weights = np.float32(tokens != TOKEN)
    if model.config.prefix:  # what is trained are the last few tokens
        weights[: max(len(tokens) - 3, np.flatnonzero(tokens == TOKEN).max(initial=-1) + 1, 1)] = 0
    return Doc(tokens, weights, files)


def packed(model, rows, width) -> dict:
    """The batch of rows of documents."""
    layout = ImageTextRows(patches=patches_of(model))
    docs = [d for row in rows for d in row]
    examples = [
        (d.tokens, d.weights, np.frombuffer(b"".join(d.files), np.uint8), np.array([len(f) for f in d.files], np.int32))
        for d in docs
    ]
    batch = {k: np.zeros(f.shape, f.dtype) for k, f in layout.spec(len(rows), width).items()}
    at = 0
    for r, row in enumerate(rows):
        pieces = [(at + i, 0, len(d.tokens)) for i, d in enumerate(row)]
        layout.fill({k: v[r] for k, v in batch.items()}, examples, pieces)
        at += len(row)
    return batch


def docs(model) -> list:
    """Texts with two images, one, none, and with an image at the end and one at the beginning."""
    a, b, c, d = SIZES
    return [doc(model, 2, a, 1, b, 3), doc(model, 4, c, 5), doc(model, 7), doc(model, d, 2, b)]


def stored(directory) -> dict:
    """{name: tensor} of a directory."""
    return {k: x for file in Path(directory).glob("*.safetensors") for k, x in load_file(file).items()}


def renamed(directory, out, change) -> Path:
    """The same directory with its tensors under other names; change: gives the new name, or "" for none."""
    out = Path(out)
    out.mkdir(parents=True)
    for file in Path(directory).glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    tensors = {new: x for k, x in stored(directory).items() if (new := change(k))}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
