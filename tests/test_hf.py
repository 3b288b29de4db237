"""Hugging Face directories in and out: every bit, on any mesh, by slices; and bad ones.

The checkpoints are written by the `safetensors` library, and read back by it.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import sftjax
from sftjax import config as config_lib
from sftjax import params as params_lib
from sftjax import setup, sharding
from sftjax.models import hf as hf_lib
from sftjax.models import layout
from sftjax.models.safetensors_io import Reader, WeightsError

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
    where = {
        n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(tensors)
    }
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
        assert {name for name, _ in entries} == {
            k for k, f in index["weight_map"].items() if f == file
        }
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

    def counted(self, name, index=...):
        x = read(self, name, index)
        reads.setdefault(name, []).append(x.nbytes)
        return x

    monkeypatch.setattr(Reader, "read", counted)
    mesh = sharding.make_mesh(sizes)
    _, params = sftjax.load_pretrained(source, mesh=mesh)
    equal(params, plain)
    expected = sharding.param_shardings(mesh, model.abstract)
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
    equal(sftjax.load_pretrained(source, mesh=sharding.make_mesh({"fsdp": 8}))[1], whole)


# ---- what is beside the weights ------------------------------------------------------------


def test_config_fields_are_kept_and_stop_ids_collected(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "<pad>": 0, "<end>": 7}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<end>", pad_token="<pad>"
    )
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
    params = params_lib.map_named(
        lambda _, p: jnp.float32(rng.normal(size=p.shape)), model.abstract
    )
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
    model, params = sftjax.load_pretrained(
        checkpoint(tmp_path / "in", change=more, tie_word_embeddings=True)
    )
    equal(params, sftjax.load_pretrained(bare)[1])
    sftjax.save_pretrained(tmp_path / "out", model, params)
    kept = {k: v for k, v in stored(tmp_path / "in").items() if "rotary" not in k}
    assert stored(tmp_path / "out") == kept and "lm_head.weight" in kept

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    other = checkpoint(tmp_path / "other", change=untie, tie_word_embeddings=True)
    refused(other, "lm_head.weight differs from model.embed_tokens.weight in rows 0 to 31")


def test_other_safetensors_beside_model_safetensors_are_not_read(tmp_path):
    source = checkpoint(tmp_path / "in")
    save_file({"lora": np.ones(3, np.float32)}, source / "adapter_model.safetensors")
    sftjax.load_pretrained(source)


# ---- bad input -----------------------------------------------------------------------------


def refused(directory, message, error=WeightsError, **how):
    with pytest.raises(error, match=message) as e:
        sftjax.load_pretrained(directory, **how)
    assert str(directory) in str(e.value)  # which one, whatever it is
    return str(e.value)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite(tmp_path, value, kind, mesh):
    def spoil(tensors):
        tensors[Q][-1, -1] = value

    source = checkpoint(tmp_path / "in", (kind,), 2, spoil)
    message = (
        rf"model-0000\d-of-00002.safetensors: tensor {Q} holds NaN or infinity; take an intact"
    )
    refused(source, message, mesh=mesh and sharding.make_mesh(mesh))


def test_missing_extra_and_misshapen_tensors_are_listed(tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((24, 16), np.float32)
        tensors[Q] = tensors[Q][:, :-2].copy()

    message = refused(checkpoint(tmp_path / "in", change=spoil), "are not those of its config.json")
    assert sorted(message.splitlines()[1:]) == [
        "  missing model.norm.weight [16]",
        f"  {Q} has shape [32, 14], the config asks for [32, 16]",
        "  unexpected model.layers.3.mlp.up_proj.weight [24, 16]",
    ]


def test_an_untied_model_without_a_head(tmp_path):
    source = checkpoint(tmp_path / "in", change=lambda t: t.pop("lm_head.weight"))
    refused(source, r"missing lm_head.weight \[32, 16\]$")


def test_more_than_ten_differences_are_cut(tmp_path):
    message = refused(checkpoint(tmp_path / "in", change=lambda t: t.clear()), "missing")
    lines = message.splitlines()
    assert len(lines) == 12
    assert lines[-1] == f"  ... and {len(shapes(HF)) - 10} more"


def weightless(tmp_path):
    source = checkpoint(tmp_path / "in")
    (source / "model.safetensors").unlink()
    return source


def test_pickles_are_refused(tmp_path):
    source = weightless(tmp_path)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = r"holds only pickled weights \(pytorch_model.bin\); .* only safetensors .* Convert it"
    refused(source, message)


def test_directories_without_weights_or_config(tmp_path):
    refused(weightless(tmp_path), r"has no \*.safetensors file")
    (tmp_path / "empty").mkdir()
    message = "config.json does not exist; a model directory needs a config.json"
    refused(tmp_path / "empty", message, FileNotFoundError)


def rewrite_header(file, change):
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def test_a_file_that_is_cut_short(tmp_path):
    file = checkpoint(tmp_path / "in") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    n = len(whole)
    last = r"model.safetensors is cut short: tensor \S+ ends at byte"
    refused(file.parent, rf"{last} {n}, the file at {n - 1}. Download it again")
    for size in (5, 100):
        file.write_bytes(whole[:size])
        refused(file.parent, rf"not a safetensors file, or is cut short \({size} bytes\)")


def test_a_damaged_header(tmp_path):
    file = checkpoint(tmp_path / "in") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"\xff\xfe" + whole[10:])
    refused(file.parent, "model.safetensors: damaged safetensors header: .* Download it again")
    cases = {
        "damaged safetensors header: KeyError": lambda e: e.pop("shape"),
        r"has bytes \d+ to \d+, F32 \[32, 17\] needs 2176": lambda e: e.update(shape=[32, 17]),
        f"tensor {Q} has unsupported dtype F4": lambda e: e.update(dtype="F4"),
    }
    for message, change in cases.items():
        file.write_bytes(whole)
        rewrite_header(file, lambda header: change(header[Q]))  # noqa: B023
        refused(file.parent, rf"model.safetensors: .*{message}")
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    refused(file.parent, "damaged safetensors header")


def test_a_damaged_index(tmp_path):
    source = checkpoint(tmp_path / "in", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    message = r"index.json names files that are absent: \['model-00002-of-00003.safetensors'\]"
    refused(source, message)
    index = source / "model.safetensors.index.json"
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        refused(source, "index.json: damaged index: .* Download it again")
    index.unlink()
    save_file({Q: np.zeros(3, np.float32)}, source / "a.safetensors")
    save_file({Q: np.zeros(3, np.float32)}, source / "b.safetensors")
    refused(source, f"b.safetensors: tensor {Q} is also in a.safetensors")


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type=None), "has no model_type; the known ones are .*llama"),
        (
            dict(model_type="lama"),
            "model_type 'lama' is not supported; known: .*nearest is 'llama'",
        ),
        (dict(model_type="zzz"), "model_type 'zzz' is not supported; known: .*llama"),
        (dict(hidden_size=None), "field 'hidden_size' is missing"),
        (
            dict(hidden_act="gelu_banana"),
            "hidden_act 'gelu_banana' is not supported; known: .*silu",
        ),
        (
            dict(rope_scaling=dict(rope_type="twisted")),
            "rope type 'twisted' is not supported; known",
        ),
        (dict(rope_scaling=dict(type="linear")), "rope type 'linear' needs the field 'factor'"),
        (dict(rope_scaling=LLAMA3), "'llama3' needs the field 'original_max_position_embeddings'"),
        (dict(quantization_config={"quant_method": "gptq"}), r"quantised weights \(gptq\) are not"),
        (dict(num_key_value_heads=3), "4 heads do not divide over 3 kv heads"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_configs_that_are_refused_before_any_weight_is_read(tmp_path, fields, message):
    hf = {k: v for k, v in (HF | fields).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    refused(tmp_path, f"config.json:? .*{message}", ValueError)


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{'model_type': ")
    refused(tmp_path, "config.json is not valid JSON: ", ValueError)


def test_a_path_that_is_neither_directory_nor_hub_id(monkeypatch):
    refused("/no/such/model", "does not exist, and is no hub id", FileNotFoundError)
    import huggingface_hub

    def offline(*a, **k):
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = "'no-such/model' is no local directory and could not be fetched from the hub: no netw"
    refused("no-such/model", message, FileNotFoundError)


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    config = config_lib.get_default()
    config.model.path = str(checkpoint(tmp_path / "in"))
    setup.make_model(config, range(32))  # all that is asked of the tokenizer is its length
    message = "the tokenizer has 33 tokens, the model's embedding only 32 rows: they do not belong"
    with pytest.raises(config_lib.ConfigError, match=message):
        setup.make_model(config, range(33))
