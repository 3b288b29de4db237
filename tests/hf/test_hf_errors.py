"""Bad input: what is wrong with a directory, its config.json or its weights, in one message."""

import json
import os
import shutil
import tracemalloc

import families
import numpy as np
import pytest
import vision
import vision_language
from safetensors.numpy import load_file, save_file
from test_hf import HF, KINDS, Q, checkpoint, refused, shapes

import sftjax
from sftjax import hf as hf_lib
from sftjax import parallel
from sftjax.families import common
from sftjax.hf import names as names_lib
from sftjax.hf.safetensors_io import WeightsError

# ---- weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite(tmp_path, value, kind, mesh):
    def spoil(tensors):
        tensors[Q][-1, -1] = value

    source = checkpoint(tmp_path / "in", (kind,), 2, spoil)
    message = rf"model-0000\d-of-00002.safetensors: tensor {Q} holds NaN or infinity; take an intact"
    refused(source, message, mesh=mesh and parallel.make_mesh(mesh))


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


@pytest.mark.parametrize("missing", [9, 10, 12, None])
def test_the_message_has_at_most_ten_lines(tmp_path, missing):
    def remove(tensors):
        for name in list(tensors)[:missing]:
            del tensors[name]

    lines = refused(checkpoint(tmp_path / "in", change=remove), "missing").splitlines()
    assert len(lines) == 10
    missing = missing or len(shapes(HF))
    assert lines[-1].startswith("  missing" if missing == 9 else f"  ... and {missing - 8} more")


def respoil(directory, name, change):
    """One tensor of a model.safetensors replaced."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, file)


BLOCK = "model.layers.1."


@pytest.mark.parametrize(
    ("case", "name", "change", "found", "expected"),
    [
        ("phi3", "self_attn.qkv_proj.weight", lambda x: x[:-8], [56, 32], [64, 32]),
        ("phi3", "mlp.gate_up_proj.weight", lambda x: x[:48], [48, 32], [96, 32]),
        ("mixtral", "block_sparse_moe.experts.2.w2.weight", np.transpose, [48, 32], [32, 48]),
        ("qwen3_moe", "mlp.experts.5.up_proj.weight", lambda x: x[:-1], [19, 32], [20, 32]),
        ("gpt_oss", "mlp.experts.gate_up_proj", lambda x: x[:3], [3, 32, 96], [4, 32, 96]),
        ("gpt_oss", "mlp.experts.down_proj_bias", lambda x: x[0], [32], [4, 32]),
    ],
)
def test_a_fused_tensor_or_an_expert_of_another_shape(tmp_path, case, name, change, found, expected):
    source = families.write(case, tmp_path)
    respoil(source, BLOCK + name, change)
    message = refused(source, "are not those of its config.json")
    assert message.splitlines()[1:] == [f"  {BLOCK}{name} has shape {found}, the config asks for {expected}"]


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


DAMAGED = "model.safetensors: damaged safetensors header: "


def test_a_file_that_is_cut_short(tmp_path):
    file = checkpoint(tmp_path / "in") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(file.parent, f"{DAMAGED}.*file not fully covered. Download it again")
    for size, problem in {5: "header too small", 100: "invalid header length"}.items():
        file.write_bytes(whole[:size])
        refused(file.parent, f"{DAMAGED}.*{problem}. Download it again")


def test_a_damaged_header(tmp_path):
    file = checkpoint(tmp_path / "in") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:8] + b"\xff\xfe" + whole[10:])
    refused(file.parent, f"{DAMAGED}.* Download it again")
    cases = {
        "missing field `shape`": lambda e: e.pop("shape"),
        "invalid shape, data type, or offset for tensor": lambda e: e.update(shape=[32, 17]),
        f"tensor {Q} has unsupported dtype 'F4'": lambda e: e.update(dtype="F4", shape=[32, 128]),
    }
    for message, change in cases.items():
        file.write_bytes(whole)
        rewrite_header(file, lambda header: change(header[Q]))  # noqa: B023
        refused(file.parent, f"{DAMAGED}.*{message}")
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    refused(file.parent, DAMAGED)


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


# What is written into the entry of Q: the format's own library refuses all but the last.
ENTRIES = {
    "shape-of-text": dict(shape=["a", 10**9]),
    "shape-below-0": dict(shape=[-32, -16]),
    "shape-of-truth": dict(shape=[True, 16]),
    "shape-of-floats": dict(shape=[32.0, 16]),
    "shape-is-huge": dict(shape=[2**40, 2**40]),
    "shape-past-64-bits": dict(shape=[0, 10**4000]),
    "shape-is-text": dict(shape="32"),
    "offsets-of-text": dict(data_offsets=["0", "9"]),
    "three-offsets": dict(data_offsets=[0, 1, 2]),
    "offsets-below-0": dict(data_offsets=[-9, 0]),
    "dtype-is-list": dict(dtype=["F32"]),
    "overlap": dict(data_offsets=[0, 2048]),
    "shape-is-long": dict(shape=[1] * 10**5 + [512]),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_of_a_header_that_lies(tmp_path, case):
    file = checkpoint(tmp_path / "in") / "model.safetensors"
    rewrite_header(file, lambda header: header[Q].update(ENTRIES[case]))
    tracemalloc.start()
    said = refused(file.parent, DAMAGED)
    assert tracemalloc.get_traced_memory()[1] < 100e6 and len(said) < 1000
    tracemalloc.stop()


def test_headers_that_are_no_table_of_all_bytes(tmp_path):
    file = checkpoint(tmp_path / "in") / "model.safetensors"
    whole = file.read_bytes()
    rewrite_header(file, lambda header: header.pop(Q))
    refused(file.parent, f"{DAMAGED}.*invalid offset for tensor")
    file.write_bytes(whole + b"more")
    refused(file.parent, f"{DAMAGED}.*file not fully covered")
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    entry = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}).encode()
    texts = {b"[]": "", deep: "", b'{"a":5}': "", b'{"a":' + b"9" * 5000 + b"}": "",
             b'{"a":' + entry + b',"a":' + entry + b"}": "a name stands in it twice",
             b'{"a":' + entry.replace(b"[0]", b"[0, 1152921504606846976]") + b"}": "tensor a has shape",
             b'{"__metadata__":[]}': "", b'{"__metadata__":{"a":1}}': ""}  # fmt: skip
    for text, message in texts.items():
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        refused(file.parent, f"{DAMAGED}.*{message}")
    with open(file, "wb") as f:  # sparse: it has no such bytes on the disk
        f.write((2 * 10**8).to_bytes(8, "little"))
        f.truncate(10**9)
    refused(file.parent, f"{DAMAGED}.*header too large")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "..", "", "a\0b",
             "a.bin", ".safetensors", "..\\b.safetensors"], ids=repr
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    source = checkpoint(tmp_path / "in", shards=3)
    shutil.copy(source / "model-00001-of-00003.safetensors", tmp_path / "outside.safetensors")
    (source / "a").mkdir()
    index = source / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"][Q] = name
    index.write_text(json.dumps(value))
    refused(source, "damaged index: it names .*, expected a file of its own folder")


def test_an_index_that_is_no_table(tmp_path):
    source = checkpoint(tmp_path / "in", shards=3)
    index = source / "model.safetensors.index.json"
    for text in ('{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}', "[" * 100_000):
        index.write_text(text)
        refused(source, "index.json: damaged index: ")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json",
                                  "model.safetensors.index.json"])  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_read(tmp_path, name, kind):
    source = checkpoint(tmp_path / "in", shards=2 if "index" in name else 1)
    (source / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(source / name)
    elif kind == "device":
        (source / name).symlink_to("/dev/zero")
    else:
        (source / name).mkdir()
    word = {"pipe": "a named pipe", "device": "a device", "folder": "a folder"}[kind]
    refused(source, f"{name} is {word}, expected a regular file", ValueError)


# ---- config.json ---------------------------------------------------------------------------


def refused_config(directory, fields, message):
    """One ValueError that begins with the file; there are no weights to read."""
    hf = {k: v for k, v in fields.items() if v != "absent"}
    (directory / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError) as e:
        sftjax.load_pretrained(directory)
    assert str(e.value).startswith(f"{directory / 'config.json'}: ")
    assert message in str(e.value)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0], long_factor=[1.0] * 4)
ROPES = [
    (dict(rope_type="twisted"), "rope type 'twisted' is not supported; known: default, linear,"),
    (dict(type="su"), "rope type 'su' is not supported"),
    (dict(type="linear"), "rope type 'linear' needs the field 'factor'"),
    (dict(rope_type="dynamic"), "rope type 'dynamic' needs the field 'factor'"),
    (dict(rope_type="longrope"), "rope type 'longrope' needs the field 'short_factor'"),
    (LONGROPE, "short_factor has 1 entries, expected 4"),
    (LLAMA3, "'llama3' needs the field 'original_max_position_embeddings'"),
    (dict(rope_type="linear", factor=0), "rope_scaling.factor is 0, expected a positive number"),
    (dict(rope_type="yarn", factor="4"), "rope_scaling.factor is '4', expected a positive number"),
    (dict(rope_type="yarn", factor=2, rope_theta=1), "'yarn': no frequencies for theta 1.0"),
    (dict(rope_type=["yarn"]), "rope_scaling.rope_type is ['yarn'], expected a name"),
    (dict(rope_type="yarn", more=[[1]]), "rope_scaling.more is [[1]], expected a plain value"),
    (dict(full_attention={"rope_theta": 1e4}), "rope_parameters of each layer type: all layers"),
    (dict(partial_rotary_factor=0.4), "rotary embedding of 3 dimensions (0.4 of a head's 8)"),
]


@pytest.mark.parametrize(("settings", "message"), ROPES, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_rope_settings_that_are_refused(tmp_path, settings, message):
    refused_config(tmp_path, HF | {"rope_scaling": settings}, message)


CONFIGS = [
    # what the model is
    (
        "llama",
        dict(model_type="absent"),
        "model_type is None; the known ones are bart, bert, ",
    ),
    (
        "llama",
        dict(model_type=["llama"]),
        "model_type is ['llama']; the known ones are bart, bert, ",
    ),
    ("llama", dict(model_type="lama"), "'lama' is not supported; known: bart, bert, "),
    ("llama", dict(model_type="lama"), "; the nearest is 'llama'"),
    ("llama", dict(model_type="gemma3n"), "; the nearest is 'gemma3'"),
    ("llama", dict(model_type="qwen2_vl"), "; the nearest is 'qwen2'"),
    (
        "llama",
        dict(model_type="zzz"),
        "model_type 'zzz' is not supported; known: bart, bert, ",
    ),
    ("llama", dict(model_type="zzz", hidden_size=None), "model_type 'zzz' is not supported"),
    # what it would need
    (
        "llama",
        dict(quantization_config={"quant_method": "gptq"}),
        "quantization_config: quantised weights (gptq) are not supported",
    ),
    ("llama", dict(quantization_config="gptq"), "quantization_config is 'gptq', expected an obj"),
    ("llama", dict(hidden_act="relu6"), "hidden_act 'relu6' is not supported; known: silu, "),
    ("gemma", dict(hidden_activation="relu6"), "hidden_activation 'relu6' is not supported"),
    ("gpt2", dict(activation_function="mish"), "activation_function 'mish' is not supported"),
    (
        "gpt2",
        dict(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx=True is not supported, only False",
    ),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False is not supported"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True is not supported"),
    (
        "gemma3",
        dict(use_bidirectional_attention=True),
        "use_bidirectional_attention=True is not supported",
    ),
    ("mistral", dict(layer_types=["full_attention"] * 3), "layer_types=['full_attention', "),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers=[0] is not supported, only []"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2 is not supported, only 1"),
    (
        "qwen3",
        dict(layer_types=["full_attention", "linear_attention", "full_attention"]),
        "layer type 'linear_attention' is not supported; known: full_attention, sliding_attention",
    ),
    # what does not fit together
    ("qwen3", dict(layer_types=["full_attention"]), "layer_types has 1 entries, num_hidden_la"),
    ("smollm3", dict(no_rope_layers=[1]), "no_rope_layers has 1 entries, num_hidden_layers is 5"),
    (
        "llama",
        dict(num_key_value_heads=3),
        "num_attention_heads=4 do not divide over num_key_value_heads=3",
    ),
    ("gpt2", dict(n_head=64), "64 heads share 32 dimensions: head_dim would be 0"),
    ("mixtral", dict(num_experts_per_tok=5), "num_experts_per_tok=5 of 4 experts"),
    ("mixtral", dict(num_local_experts=0), "num_experts_per_tok=2 of 0 experts"),
    ("qwen3_moe", dict(num_experts_per_tok=0), "num_experts_per_tok=0 of 6 experts"),
    ("qwen3_moe", dict(moe_intermediate_size=0), "moe_intermediate_size is 0, expected a positive"),
    ("gemma3", dict(sliding_window=None), "sliding_window is 0 or null, expected a positive"),
    ("llama-odd", dict(head_dim=9), "rotary embedding of 9 dimensions (1 of a head's 9)"),
    # fields that hold another thing than they should
    ("llama", dict(hidden_size="absent"), "field 'hidden_size' is missing"),
    ("llama", dict(hidden_size=None), "hidden_size is None, expected a positive whole number"),
    ("llama", dict(hidden_size="32"), "hidden_size is '32', expected a positive whole number"),
    ("llama", dict(num_attention_heads=0), "num_attention_heads is 0, expected a positive whole"),
    ("llama", dict(num_hidden_layers=-3), "num_hidden_layers is -3, expected a positive whole"),
    ("llama", dict(vocab_size=64.0), "vocab_size is 64.0, expected a positive whole number"),
    ("llama", dict(intermediate_size=True), "intermediate_size is True, expected a positive"),
    ("llama", dict(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', expected a positive number"),
    ("llama", dict(rope_theta=float("inf")), "rope_theta is inf, expected a positive number"),
    ("llama", dict(rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
    ("llama", dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', expected true"),
    ("llama", dict(attention_bias=None), "attention_bias is None, expected true or false"),
    ("llama", dict(hidden_act=["silu"]), "hidden_act is ['silu'], expected a name"),
    ("mistral", dict(sliding_window=-1), "sliding_window is -1, expected a whole number"),
    ("qwen3", dict(layer_types="full_attention"), "layer_types is 'full_attention', expected a l"),
    ("granite", dict(logits_scaling=0), "logits_scaling is 0, expected a positive number"),
    ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar is 0, expected a positive"),
    ("gemma3", dict(rope_parameters=dict(full_attention=5)), "rope_parameters.full_attention is 5"),
    ("gpt2", dict(n_embd=None), "n_embd is None, expected a positive whole number"),
    ("llama", dict(eos_token_id="</s>"), "eos_token_id is '</s>', expected a token's id, or a"),
    # sizes that no machine has; none of them may be laid out to find that out
    ("llama", dict(vocab_size=10**12), "vocab_size is 1000000000000, expected at most 2,147,483,"),
    ("llama", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected at most"),
    ("llama", dict(hidden_size=2**30), "hidden_size is 1073741824, expected at most 16,777,216"),
    ("llama", dict(hidden_size=2**24, head_dim=8, intermediate_size=2**24), "parameters, ["),
    ("llama", dict(head_dim=2**40), "head_dim is 1099511627776, expected at most 65,536"),
    ("gpt2", dict(n_embd=2**24, n_head=2), "2 heads share 16777216 dimensions: head_dim would be"),
    ("gpt2", dict(n_layer=10**8), "n_layer is 100000000, expected at most 4,096"),
    ("gpt2", dict(n_positions=10**15), "n_positions is 1000000000000000, expected at most"),
    ("mixtral", dict(num_local_experts=10**9), "num_local_experts is 1000000000, expected at"),
    ("mixtral", dict(num_local_experts=4096, num_hidden_layers=4096), "4096 layers of 4096 expe"),
    ("bert", dict(num_labels=10**12), "num_labels is 1000000000000, expected at most 1,048,576"),
    ("bert", dict(type_vocab_size=10**15), "parameters, ["),
]


@pytest.mark.parametrize(("case", "fields", "message"), CONFIGS, ids=[f"{c}-{'-'.join(f)}" for c, f, _ in CONFIGS])
def test_configs_that_are_refused(tmp_path, case, fields, message):
    refused_config(tmp_path, families.ALL[case] | fields, message)


ALWAYS = {"head_dim", "layer_types", "rope_scaling", "sliding_window", "n_inner"}
BAD = ["x", "", -1, 0, 0.01, 1.5, 7, True, None, [], ["x"], [[1]], {}, {"a": 1}, 10**400]


@pytest.mark.parametrize("kind", hf_lib.FAMILIES)
def test_no_value_of_any_field_breaks_the_reading(tmp_path, kind):
    """It is taken, or refused by one ValueError that begins with the file."""
    known = [*families.ALL.values(), *vision.CASES.values(), *vision_language.CASES.values(), vision.TIMM]
    case = next(c for c in known if c.get("model_type", "timm") == kind)
    file, refusals = tmp_path / "config.json", 0
    checked = {f.rstrip("?") for _, names in common.EXPECTED.values() for f in names.split()}
    for field in sorted(checked & {*case, *ALWAYS}):
        for value in BAD:
            file.write_text(json.dumps(case | {field: value}))
            try:
                model = hf_lib.load_model(file)
                hash(model.config)
                assert model.abstract and list(names_lib.tensors(model))
            except ValueError as e:
                assert str(e).startswith(f"{file}: "), (field, value, e)
                refusals += 1
    assert refusals > 60


def test_sizes_are_bounded_by_what_the_files_hold(tmp_path):
    """Also where only headers are read, before anything of these sizes is made."""
    source = checkpoint(tmp_path / "in")
    for field, value in dict(vocab_size=2**31, num_hidden_layers=4096, hidden_size=2**20).items():
        (source / "config.json").write_text(json.dumps(HF | {field: value}))
        message = "the weights are not those of its config.json"
        refused(source, message)
        with pytest.raises(WeightsError, match=message):
            hf_lib.with_dtypes(hf_lib.load_model(source), source)


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    refused(tmp_path, "config.json is not valid JSON: it is nested too deeply", ValueError)
    (tmp_path / "config.json").write_text("{'model_type': ")
    refused(tmp_path, "config.json is not valid JSON: ", ValueError)
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json holds no JSON object", ValueError)


def test_a_path_that_is_neither_directory_nor_hub_id(monkeypatch):
    refused("/no/such/model", "does not exist, and is no hub id", FileNotFoundError)
    import huggingface_hub

    def offline(*a, **k):
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = "'no-such/model' is no local directory and could not be fetched from the hub: no netw"
    refused("no-such/model", message, FileNotFoundError)


@pytest.mark.parametrize("value", [0, -2])
def test_a_vocab_multiple_that_is_none(tmp_path, value):
    message = f"model.vocab_multiple is {value}, expected 1 or more"
    refused(checkpoint(tmp_path), message, ValueError, vocab_multiple=value)
