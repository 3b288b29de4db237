"""Hugging Face directories in and out: every bit, on any mesh, by slices; and bad ones.

The checkpoints are written by the `safetensors` library, and read back by it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import sftjax
from sftjax import hf as hf_lib
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.hf import layout
from sftjax.hf import names as names_lib
from sftjax.hf.safetensors_io import Reader, WeightsError

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / num_attention_heads
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "x_note": "a field that sftjax does not know",
}
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Q = "model.layers.1.self_attn.q_proj.weight"


def shapes(hf):
    """The tensors of a Llama checkpoint as transformers names them, written out by hand."""
    D, F, V, H = (hf[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    N, K = hf["num_attention_heads"] * H, hf["num_key_value_heads"] * H
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not hf["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    for i in range(hf["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for name, shape in {"q": (N, D), "k": (K, D), "v": (K, D), "o": (D, N)}.items():
            layer[f"self_attn.{name}_proj.weight"] = shape
            if hf.get("attention_bias"):
                layer[f"self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
            layer[f"mlp.{name}_proj.weight"] = shape
        out |= {f"model.layers.{i}.{k}": v for k, v in layer.items()}
    return out


def random_tensor(rng, shape, dtype):
    """Every finite bit pattern may come up: subnormal numbers and -0 too."""
    word = np.dtype(f"u{np.dtype(dtype).itemsize}")
    bits = rng.integers(0, 2 ** (8 * word.itemsize), shape, dtype=word)
    top = word.type(1 << (8 * word.itemsize - 2))  # cleared: not infinite, not NaN
    return (bits & ~top).view(dtype)


def checkpoint(directory, kinds=("F32",), shards=1, change=None, **fields):
    """A directory with config.json and random weights; change(tensors) may spoil them."""
    hf = {k: v for k, v in (HF | fields).items() if v is not None}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    rng = np.random.default_rng(0)
    tensors = {
        name: random_tensor(rng, shape, KINDS[kinds[i % len(kinds)]])
        for i, (name, shape) in enumerate(sorted(shapes(hf).items()))
    }
    if change:
        change(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    where = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: x for n, x in tensors.items() if where[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def stored(directory):
    """{name: (dtype, shape, bytes)} of all the directory's files, by the safetensors library."""
    out = {}
    for file in directory.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            out[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return out


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def refused(directory, message, error=WeightsError, **how):
    with pytest.raises(error, match=message) as e:
        sftjax.load_pretrained(directory, **how)
    assert str(directory) in str(e.value)  # which one, whatever it is
    return str(e.value)


# ---- in and out ----------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kinds", [("F32",), ("F16",), ("BF16",), ("BF16", "F32", "F16")], ids=str)
def test_every_tensor_and_dtype_is_reproduced_bit_for_bit(tmp_path, kinds, shards):
    source = checkpoint(tmp_path / "in", kinds, shards)
    model, params = sftjax.load_pretrained(source)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    sftjax.save_pretrained(tmp_path / "out", model, params)
    assert stored(tmp_path / "out") == stored(source)
    assert {entry[0] for entry in stored(source).values()} == set(kinds)


def test_weights_land_where_the_names_say(tmp_path):
    source = checkpoint(tmp_path / "in", ("BF16",))
    _, params = sftjax.load_pretrained(source, dtype=jnp.bfloat16)
    with safetensors.safe_open(source / "model.safetensors", "np") as f:
        q, o, down = (
            f.get_tensor(f"model.layers.1.{n}.weight").view(ml_dtypes.bfloat16)
            for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
        )
    layer = jax.tree.map(lambda x: np.asarray(x[1]), params["layers"]["0-2"])
    np.testing.assert_array_equal(layer["attn"]["q"]["w"], q.T.reshape(16, 4, 8))
    np.testing.assert_array_equal(layer["attn"]["o"]["w"], o.T.reshape(4, 8, 16))
    np.testing.assert_array_equal(layer["mlp"]["down"]["w"], down.T)


def test_sharded_export_equals_single_export(tmp_path):
    source = checkpoint(tmp_path / "in", ("BF16", "F32"))
    model, params = sftjax.load_pretrained(source)
    out, limit = tmp_path / "out", 3000
    sftjax.save_pretrained(out, model, params, max_shard_bytes=limit)
    files = sorted(f.name for f in out.glob("*.safetensors"))
    n = len(files)
    assert n > 3 and files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert stored(out) == stored(source)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(source).keys()
    total = 0
    for file in files:
        entries = safetensors.deserialize((out / file).read_bytes())
        assert {name for name, _ in entries} == {k for k, f in index["weight_map"].items() if f == file}
        size = sum(len(e["data"]) for _, e in entries)
        assert size <= limit or len(entries) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    equal(sftjax.load_pretrained(out)[1], params)
    sftjax.save_pretrained(out, model, params)  # one file again: nothing stale is left
    assert [f.name for f in out.glob("model*")] == ["model.safetensors"]
    assert stored(out) == stored(source)


def test_a_split_stack_loads_and_exports_the_same_file(tmp_path):
    source = checkpoint(tmp_path / "in", ("BF16", "F16"))
    _, whole = sftjax.load_pretrained(source)
    model, params = sftjax.load_pretrained(source, split=(1,))
    assert list(params["layers"]) == ["0-0", "1-2"]
    parts = params["layers"].values()
    equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole["layers"]["0-2"])
    sftjax.save_pretrained(tmp_path / "out", model, params)
    assert stored(tmp_path / "out") == stored(source)


# ---- on a mesh, by slices ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_reads_every_byte_once_and_only_its_slices(tmp_path, monkeypatch, sizes):
    source = checkpoint(tmp_path / "in", ("BF16", "F32"))
    model, plain = sftjax.load_pretrained(source)
    read, reads = Reader.read, {}

    def counted(self, name, *how):
        x = read(self, name, *how)
        reads.setdefault(name, []).append(x.nbytes)
        return x

    monkeypatch.setattr(Reader, "read", counted)
    mesh = parallel.make_mesh(sizes)
    _, params = sftjax.load_pretrained(source, mesh=mesh)
    equal(params, plain)
    expected = parallel.param_shardings(mesh, model.abstract)
    assert jax.tree.map(lambda x: x.sharding, params) == expected
    parts = sizes["fsdp"] * sizes["tensor"]
    for name, (_, shape, data) in stored(source).items():
        assert sum(reads[name]) == len(data), name  # replicas share what was read
        if len(shape) == 2:
            assert max(reads[name]) == len(data) // parts, name
    sftjax.save_pretrained(tmp_path / "out", model, params)
    assert stored(tmp_path / "out") == stored(source)


def test_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "in")
    _, whole = sftjax.load_pretrained(source)
    largest, read = [], Reader.read
    monkeypatch.setattr(layout, "BLOCK_BYTES", 256)
    monkeypatch.setattr(Reader, "read", lambda *a: largest.append(read(*a).nbytes) or read(*a))
    equal(sftjax.load_pretrained(source)[1], whole)
    assert max(largest) == 8 * 16 * 4  # one head of a projection: 8 rows
    equal(sftjax.load_pretrained(source, mesh=parallel.make_mesh({"fsdp": 8}))[1], whole)


# ---- what is beside the weights ------------------------------------------------------------


def test_config_fields_are_kept_and_stop_ids_collected(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "<pad>": 0, "<end>": 7}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    source = checkpoint(tmp_path / "in", eos_token_id=[2, 5])
    generation = {"eos_token_id": [2, 3], "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    model, params = sftjax.load_pretrained(source)
    sftjax.save_pretrained(tmp_path / "out", model, params, tokenizer, stop_ids=[9, 2])
    out = {f.name: json.loads(f.read_text()) for f in (tmp_path / "out").glob("*config.json")}
    assert out["config.json"] == json.loads((source / "config.json").read_text())
    expected = generation | {"bos_token_id": 1, "pad_token_id": 0}
    expected["eos_token_id"] = [2, 3, 5, 9, 7]  # generation config, config, given, tokenizer
    assert out["generation_config.json"] == expected
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template and again.eos_token_id == 7
    assert not (tmp_path / "out" / ".tmp").exists()

    sftjax.save_pretrained(tmp_path / "plain", model.replace(remat="full"), params)
    plain = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert plain["eos_token_id"] == [2, 3, 5] and "pad_token_id" not in plain


def test_a_model_made_here_is_exported_in_the_dtype_it_has(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF | {"torch_dtype": "float16"}))
    model = hf_lib.load_model(tmp_path / "config.json")
    rng = np.random.default_rng(0)
    params = params_lib.map_named(lambda _, p: jnp.float32(rng.normal(size=p.shape)), model.abstract)
    sftjax.save_pretrained(tmp_path / "out", model, params)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["dtype"] == "float32" and "torch_dtype" not in hf
    equal(sftjax.load_pretrained(tmp_path / "out")[1], params)


@pytest.mark.parametrize("tied", [True, False])
def test_the_tied_state_is_kept(tmp_path, tied):
    source = checkpoint(tmp_path / "in", tie_word_embeddings=tied)
    model, params = sftjax.load_pretrained(source)
    assert ("head" in params) is not tied
    sftjax.save_pretrained(tmp_path / "out", model, params)
    assert stored(tmp_path / "out") == stored(source)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["tie_word_embeddings"] is tied


def test_a_tied_checkpoint_may_hold_its_head_and_rotary_tables(tmp_path):
    def more(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        for i in range(3):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    bare = checkpoint(tmp_path / "bare", tie_word_embeddings=True)
    model, params = sftjax.load_pretrained(checkpoint(tmp_path / "in", change=more, tie_word_embeddings=True))
    equal(params, sftjax.load_pretrained(bare)[1])
    sftjax.save_pretrained(tmp_path / "out", model, params)
    kept = {k: v for k, v in stored(tmp_path / "in").items() if "rotary" not in k}
    assert stored(tmp_path / "out") == kept and "lm_head.weight" in kept

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    other = checkpoint(tmp_path / "other", change=untie, tie_word_embeddings=True)
    refused(other, "lm_head.weight differs from model.embed_tokens.weight in rows 0 to 31")


def test_a_tied_checkpoint_may_hold_its_head_alone(tmp_path):
    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    kinds = ("BF16",)
    bare = checkpoint(tmp_path / "bare", kinds, tie_word_embeddings=True)
    source = checkpoint(tmp_path / "in", kinds, change=rename, tie_word_embeddings=True)
    model, params = sftjax.load_pretrained(source)
    equal(params, sftjax.load_pretrained(bare)[1])
    # Everybody reads the embedding under its own name, and not everybody under the head's.
    sftjax.save_pretrained(tmp_path / "out", model, params)
    assert stored(tmp_path / "out") == stored(bare)
    labelled, _ = sftjax.load_pretrained(source, labels=("a", "b"))
    assert labelled.config.classes == 2
    untied = checkpoint(tmp_path / "untied", change=rename)
    refused(untied, "missing model.embed_tokens.weight")


def test_other_safetensors_beside_model_safetensors_are_not_read(tmp_path):
    source = checkpoint(tmp_path / "in")
    save_file({"lora": np.ones(3, np.float32)}, source / "adapter_model.safetensors")
    sftjax.load_pretrained(source)


# ---- host memory ---------------------------------------------------------------------------

# Loads a small model of the family first: what importing and compiling takes is not counted.
MEASURE = """
import sys
import jax, sftjax
from sftjax import params, parallel

def kib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field))

small, large, fsdp = *sys.argv[1:3], int(sys.argv[3])
mesh = parallel.make_mesh({"fsdp": fsdp}) if fsdp > 1 else None
sftjax.load_pretrained(small, mesh=mesh)
before = kib("VmRSS")
_, loaded = sftjax.load_pretrained(large, mesh=mesh)
print(1024 * (kib("VmHWM") - before), params.nbytes(loaded))
"""
WIDE = dict(
    hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, head_dim=64, pad_token_id=0,
    max_position_embeddings=64,
)  # fmt: skip
LARGE = {  # 161 to 218 MB; the largest parameter is 1.5 to 4 times the largest tensor
    "llama": dict(num_hidden_layers=4, intermediate_size=3072, vocab_size=3000, **WIDE),
    "phi3": dict(num_hidden_layers=3, intermediate_size=3072, vocab_size=2000, **WIDE),
    "mixtral": dict(num_hidden_layers=2, intermediate_size=3072, vocab_size=2000, num_local_experts=2, **WIDE),
}


def written(directory, hf, shards):
    """(directory, bytes of the largest tensor) of a checkpoint of any family."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    model = hf_lib.load_model(directory)
    abstract, shapes = params_lib.flatten(model.abstract), {}
    for path, files, one in names_lib.tensors(model):
        shape = one.file_shape(abstract[path].shape[len(next(iter(files))) :])
        shapes |= dict.fromkeys(files.values(), shape)
    names, rng, where = sorted(shapes), np.random.default_rng(0), {}
    for i in range(shards):
        tensors = {n: rng.random(shapes[n], np.float32) for n in names[i::shards]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, directory / file)
        where |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory, max(4 * math.prod(s) for s in shapes.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", LARGE)
def test_loading_takes_its_own_part_and_not_a_tensor_more(tmp_path, family):
    """Peak of resident memory, in a process of its own, on one device and on eight."""
    hf = {"model_type": family, **LARGE[family]}
    large, largest = written(tmp_path / "large", hf, shards=4)
    small, _ = written(tmp_path / "small", families.CASES[family], shards=2)
    for devices in (1, 8):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, small, large, str(devices)],
            capture_output=True, text=True,
            env=os.environ | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        growth, own = map(int, done.stdout.split())
        assert own > 150e6 and largest < own / 6
        print(f"{family} on {devices}: own {own:,}, largest {largest:,}, peak {growth:,} bytes")
        assert own < growth < own + 1.2 * largest
