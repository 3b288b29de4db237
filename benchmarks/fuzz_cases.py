"""What fuzz.py does in a case of each kind: a valid input, mutated, read as sftjax reads it."""

import contextlib
import functools
import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
from fuzz_mutations import ODD, TEXTS, damaged, dumped, mutated, torn
from transformers import AutoTokenizer

from sftjax import config as config_lib
from sftjax.data import encode, open_source
from sftjax.data.masking.conversation import to_conversation
from sftjax.data.mixing import spec as mix
from sftjax.data.records import layout, readers
from sftjax.errors import DataError
from sftjax.families import common
from sftjax.hf import directory
from sftjax.hf.safetensors_io import DTYPES, Reader, write
from sftjax.parallel import mesh
from sftjax.reports import curves
from sftjax.training import identity, metrics, workdir

REPO = Path(__file__).resolve().parents[1]
FIXTURES = Path(os.environ.get("SFTJAX_FIXTURES") or REPO.parent / "shared" / "fixtures")
BASE = REPO / "experiments" / "quickstart" / "base_model"
MESSAGE = 2000  # characters of an error, at most

# ---- records -------------------------------------------------------------------------------

USER = {"role": "user", "content": "what is two?"}
ANSWER = {"role": "assistant", "content": "four"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "y", "n": 1}}}
CALLED = [USER, ANSWER | {"content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}]
TREE = {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "rank": 0}]}
ALPACA = {"instruction": "a", "input": "b", "output": "c"}
FORMS = [
    {"messages": [USER, ANSWER, USER, ANSWER | {"reasoning_content": "so"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            USER,
            ANSWER | {"train": False},
            USER,
            ANSWER,
        ]
    },
    {"messages": [*CALLED, ANSWER], "tools": [{"name": "f", "parameters": {"type": "object"}}]},
    {"messages": json.dumps([USER, ANSWER]), "tools": "[]", "chat_template_kwargs": {"a": 1}},
    {"messages": [USER | {"content": [{"type": "text", "text": "a"}]}, ANSWER | {"weight": 0.5}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversations": [USER, {"role": "function_call", "content": '{"name": "f"}'}, ANSWER]},
    {"messages": TREE},
    {"prompt": "a", "completion": "b"},
    {"prompt": [USER], "completion": [ANSWER], "system": "s"},
    ALPACA,
    ALPACA | {"history": [["a", "b"]], "system_prompt": "s"},
    {"segments": [{"text": "a", "train": False}, {"text": "b", "weight": 2}]},
    {"text": "once"},
]
NAMES = ("prompt", "completion", "input", "system", "messages", "text", "tools", "role", "content")
FIELDS = [
    "",
    "text",
    "prompt",
    "messages",
    "messages.0.content",
    "a.*.b",
    "{prompt}: {x}",
    "{",
    "0",
]


def as_file(rng, rows):
    """(name, bytes) of a file that holds rows, where its kind can hold them."""
    kind = rng.choice(["jsonl", "jsonl", "json", "json", "csv", "tsv", "parquet", "arrow", "gz"])
    lines = b"\n".join(map(dumped, rows))
    if kind == "json":
        return "d.json", dumped(rng.choice([rows, {"data": rows}, rows[0]]))
    if kind in ("csv", "tsv"):
        mark = "\t" if kind == "tsv" else ","
        written = ([dumped(value).decode("utf-8", "replace") for value in row.values()] for row in rows)
        table = [list(rows[0]), *written]
        quote = lambda field: '"' + str(field).replace('"', '""') + '"'  # noqa: E731
        text = "\n".join(mark.join(map(quote, row)) for row in table)
        return f"d.{kind}", text.encode("utf-8", "replace")
    if kind in ("parquet", "arrow"):
        try:
            table = pa.Table.from_pylist(rows)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError, AttributeError):
            table = pa.Table.from_pylist([FORMS[-1]] * 3)  # Arrow's columns can't hold them
        out = io.BytesIO()
        if kind == "arrow":
            with pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table)
        elif table.num_columns:
            with contextlib.suppress(pa.ArrowException):  # structs without fields
                pq.write_table(table, out)
        return f"d.{kind}", out.getvalue()
    return ("d.jsonl.gz", gzip.compress(lines, 1, mtime=0)) if kind == "gz" else ("d.jsonl", lines)


def records(rng, folder):
    form = rng.choice(FORMS)
    rows = [mutated(rng, form) if rng.random() < 0.4 else form for _ in range(rng.randint(1, 4))]
    rows = [row if isinstance(row, dict) else form for row in rows]
    name, data = as_file(rng, rows)
    (folder / name).write_bytes(torn(rng, data) if rng.random() < 0.3 else data)
    lists = rng.choice(["#messages", "#a.b", "#", "#messages.replies"]) if rng.random() < 0.05 else ""
    options = dict(fields={}, roles={}, system=rng.choice(["", "", "s"]))
    if rng.random() < 0.15:
        options["fields"] = {rng.choice(NAMES): rng.choice(FIELDS) for _ in range(2)}
    if rng.random() < 0.1:
        options["roles"] = {rng.choice(["boss", "user", ""]): rng.choice(["user", "assistant", "x"])}
    refused = None
    source = open_source(str(folder / name) + lists, limit=rng.choice([0, 0, 2]))
    for i in range(len(source)):
        try:
            to_conversation(source[i], where=source.where(i), **options)
        except DataError as error:
            assert len(str(error)) < MESSAGE, f"a message of {len(str(error)):,} characters"
            assert error.where in ("", source.where(i)), error.where
            refused = error
    stream = getattr(readers.READERS[layout.kind(folder / name)], "stream", None)
    if stream and not lists:
        given = [row for row, _ in zip(stream(folder / name, 0), range(100), strict=False)]
        assert len(given) >= min(len(source), 100), "a stream has other rows"
    if refused:
        raise refused


# ---- spans ---------------------------------------------------------------------------------

RICH = (
    "{{ bos_token }}{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}CONTENT"
    "{% for c in m.tool_calls or [] %}[call]{{ c.function | tojson }}[/call]{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = ["", *(RICH.replace("CONTENT", "{{ m.content" + f + " }}") for f in ("", " | trim"))]
PIECES = [
    *(text for text in TEXTS if text != "\ud800"),
    "four",
    "\n\n",
    " two ",
    "user",
    "<|user|>",
    "<s>",
    "{% x %}",
    "\u0301",
    "a\\n",
]


@functools.cache
def tokenizers():
    """[(tokenizer, template)]: the quickstart's with TEMPLATES, fixtures' with their own."""
    base = AutoTokenizer.from_pretrained(BASE)
    found = [(base, template) for template in TEMPLATES]
    for folder in sorted(FIXTURES.glob("tokenizer-*")) if FIXTURES.is_dir() else ():
        said = folder / "tokenizer_config.json"
        if said.is_file() and "chat_template" in said.read_text(encoding="utf-8"):
            found.append((AutoTokenizer.from_pretrained(folder), ""))
    return found


def words(rng, said, message, part):
    """A text with a word of its own, by which it is known again: {word: (message, part)}."""
    word = f"w{len(said)}qz"
    said[word] = message, part
    pieces = PIECES if rng.random() < 0.98 else ["\ud800", *TEXTS]
    before, after = ("".join(rng.choices(pieces, k=rng.randint(0, 3))) for _ in range(2))
    return before + word + after


def conversation(rng, said):
    """A record of messages; which of them are trained."""
    own = lambda part: words(rng, said, len(messages), part)  # noqa: E731
    messages, trained = [], set()
    if rng.random() < 0.4:
        messages.append({"role": rng.choice(["system", "developer"]), "content": own("content")})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": own("content")})
        if rng.random() < 0.15:
            function = {"name": own("call").strip(), "arguments": {"x": own("argument")}}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            trained.add(len(messages))
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            result = {"role": "tool", "content": own("content"), "tool_call_id": "abcdefghi"}
            messages.append(result | {"name": function["name"]})
        answer = {"role": "assistant", "content": own("content")}
        if rng.random() < 0.25:
            answer["reasoning_content"] = own("think")
        if rng.random() < 0.2:
            answer["train"] = rng.random() < 0.5
        if answer.get("train", True):
            trained.add(len(messages))
        messages.append(answer)
    record = {"messages": messages}
    if rng.random() < 0.15:
        record["tools"] = [{"name": "f", "description": own("tools"), "parameters": {}}]
    return record, trained


def spans(rng, folder):
    tokenizer, template = rng.choice(tokenizers())
    said = {}
    record, trained = conversation(rng, said)
    example = encode(record, tokenizer, where="d.jsonl:7", template=template or None)
    inside = [example.text[a:b] for a, b in example.spans]
    assert len(example.tokens) == len(example.weights)
    assert len(inside) <= len(trained), "more trained spans than trained messages"
    for word, (message, part) in said.items():
        times, trained_times = example.text.count(word), sum(t.count(word) for t in inside)
        if times == 0:
            assert example.left_out, f"{part} of message {message} is left out, which is not said"
            own = message in trained and part in ("content", "call")
            if own and "</think>" in record["messages"][message]["content"].partition(word)[2]:
                own = False  # reasoning, by its tags
            assert not own, f"trained {part} of message {message} is left out"
        elif message not in trained or part == "tools":
            assert trained_times == 0, f"{part} of message {message} is trained"
        else:
            assert trained_times == 1, f"{part} of message {message} is trained {trained_times} times"
    plain = [m for m in record["messages"] if m["role"] == "assistant"]
    if len(inside) == len(trained) and not any(m.keys() & {"tool_calls", "reasoning_content"} for m in plain):
        contents = [record["messages"][i]["content"] for i in sorted(trained)]
        for text, content in zip(inside, contents, strict=True):
            own = content.split("</think>")[-1].strip()
            assert own in text, f"{text!r} is trained of {content!r}"
            rest = text.replace(content.strip(), "", 1).strip() if content.strip() in text else ""
            assert len(rest) < 40, f"{rest!r} is trained beside {content!r}"


# ---- weights and models --------------------------------------------------------------------


def header_of(data):
    """(header as JSON, what follows it) of a safetensors file's bytes."""
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def safetensors_case(rng, folder):
    numbers = np.random.default_rng(rng.randrange(2**32))
    rows = {}
    for n in range(rng.randint(1, 4)):
        shape = tuple(rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.randint(0, 3)))
        dtype = np.dtype(rng.choice(list(DTYPES.values())))
        rows[f"t{n}.weight"] = numbers.integers(0, 2, shape).astype(dtype)
    parts = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in rows.items()]
    write(folder, parts, max_shard_bytes=rng.choice([16, 1 << 20]))
    files, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    touched = rng.random() < 0.95
    if touched and index.exists() and rng.random() < 0.4:
        damaged(rng, index)
    elif touched:
        file = rng.choice(files)
        header, body = header_of(file.read_bytes())
        match rng.randrange(5):
            case 0:
                file.write_bytes(torn(rng, file.read_bytes()))
            case 1:
                (folder / "other.safetensors").write_bytes(file.read_bytes())
            case _:
                text = dumped(mutated(rng, header))
                size = len(text) + rng.choice([0, 0, 0, 0, 0, 1, -1, 2**40])
                body = body if rng.random() < 0.8 else torn(rng, body)
                file.write_bytes(max(size, 0).to_bytes(8, "little") + text + body)
    reader = Reader(folder)
    for name in reader.entries:
        x = reader.read(name)
        assert x.shape == reader.shape(name) and x.dtype == reader.dtype(name)
        if not touched:
            assert x.tobytes() == rows[name].tobytes(), "what was written is not what is read"
    for file in {entry[0] for entry in reader.entries.values()}:
        with safetensors.safe_open(file, "np") as library:  # it raises what it does not accept
            assert set(library.keys()) <= set(reader.entries)


@functools.cache
def model_configs():
    own = [BASE, *(FIXTURES / name for name in ("babyllama105-hf", "minilm-l6"))]
    found = [json.loads((p / "config.json").read_text()) for p in own if p.is_dir()]
    more = dict(sliding_window=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    more |= dict(num_local_experts=4, layer_norm_eps=1e-5, use_parallel_residual=True)
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 64
    gpt2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, activation_function="gelu_new")
    families = [k for k in directory.FAMILIES if k != "bert"]
    rope = ({}, {"rope_scaling": scaled}, {"id2label": {"0": "a", "1": "b"}})
    return found + [found[0] | more | gpt2 | {"model_type": kind} | rope[n % 3] for n, kind in enumerate(families)]


def models(rng, folder):
    (folder / "config.json").write_bytes(dumped(mutated(rng, rng.choice(model_configs()))))
    if rng.random() < 0.2:
        said = {"bos_token_id": 1, "eos_token_id": [7, 2], "transformers_version": "4.57"}
        (folder / "generation_config.json").write_bytes(dumped(said))
        damaged(rng, folder / "generation_config.json")
    if rng.random() < 0.2:
        damaged(rng, folder / "config.json")
    model = directory.load_model(folder)
    assert len(list(directory.tensors(model))) < common.MOST["num_hidden_layers"] * 40


# ---- config --------------------------------------------------------------------------------

SOURCE = """from sftjax.config import get_default

def get_config(arg=""):
    c = get_default()
    c.model.path = "model"
    c.train.batch_size = 8
    c.optim.lr = 1e-4
    c.optim.lr_multipliers = ((".*", 1.0),)
    c.train.duration, c.train.log_every = "2 epochs", "10 steps"
    c.data.sources = (dict(path="a.jsonl", weight=0.5), dict(path="b.jsonl", name="b", count=3))
    return c
"""
VALUES = [*TEXTS, "0", "1", "3", "0.5", "1e-4", "1e400", "-5", "True", "()", "(1, 2)", "('a', 1)"]
VALUES += ["(('.*', 0.1),)", "(('(', 1),)", "{'a': 1}", "3 steps", "2 epochs", "5%", "1e9 tokens"]
VALUES += [
    "0 steps",
    "cosine",
    "bfloat16",
    "({'path': 'a'},)",
    "(dict(path='a'),)",
    "({'weight': 1},)",
]
VALUES += ["[[[" * 300, "lambda: 1", "__import__('os')", "1_000", "0x10", "1,2", "\n", "('a',) * 9"]


class Documents:
    """What phases ask of a store of tokens."""

    lengths = np.array([3, 5, 8])

    def __len__(self):
        return 3


@functools.cache
def keys():
    def walk(group, prefix):
        for key, value in group.items():
            yield f"{prefix}{key}"
            if hasattr(value, "items"):
                yield from walk(value, f"{prefix}{key}.")

    return list(walk(config_lib.get_default(), ""))


def config(rng, folder):
    text = SOURCE.encode()
    if rng.random() < 0.3:
        text = torn(rng, text)
    elif rng.random() < 0.5:
        value = rng.choice(VALUES).encode("unicode_escape").decode()
        value = rng.choice([value, repr(value), repr(rng.choice(ODD))])
        text = text.replace(b"    return", f"    c.{rng.choice(keys())} = {value}\n    return".encode())
    (folder / "c.py").write_bytes(text)
    argv = [f"--config={folder / 'c.py'}{rng.choice(['', '', ':', ':arg'])}", "--workdir=w"]
    for _ in range(rng.choice([0, 1, 1, 2])):
        key, value = rng.choice(keys()), rng.choice(VALUES)
        if rng.random() < 0.1:
            key = torn(rng, key.encode()).decode("utf-8", "replace")[:300]
        argv += rng.choice([[f"--config.{key}={value}"]] * 8 + [[f"--config.{key}"], [f"--x{key}"]])
    if rng.random() < 0.3:
        entry = {"path": "a.jsonl", "weight": 0.5, "fields": {"prompt": "q"}, "train_on": "last"}
        other = {"path": "b.jsonl", "weight": 1, "limit": 3}
        argv += [f"--config.data.sources={mutated(rng, [entry, other])!r}"]
        phases = [
            {"until": "10%", "weights": {"a": 1}},
            {"counts": {"a": 2}, "weights": {"b": 0.5}},
        ]
        argv += [f"--config.data.phases={mutated(rng, phases)!r}"] * rng.randint(0, 1)
    c, _ = config_lib.parse(argv, workdir=None)
    json.dumps(config_lib.to_dict(c), allow_nan=False)
    config_lib.unusual(c)
    mesh.mesh_shape({axis: c.mesh[axis] for axis in mesh.AXES}, 8)
    rows = dict(total=100, batch=c.train.batch_size, epoch_rows=1000, per_row=(2.0, 100.0))
    for key in config_lib.DURATIONS:
        config_lib.duration(functools.reduce(getattr, key.split("."), c), key, **rows)
    sources = mix.sources(c)
    mix.phases(c, sources, [Documents()] * len(sources))


# ---- manifests -----------------------------------------------------------------------------


@functools.cache
def resumed():
    """A config, and what its run leaves in its workdir: {file: JSON value}."""
    c = config_lib.get_default()
    made = {"identity": {"tokenised data": "0" * 32}}
    lines = [{"step": n, "loss": 2.0, "grad_norm": None} for n in (1, 2, 3)]
    files = {"config.json": config_lib.to_dict(c), "env.json": workdir.environment()}
    return c, made, files | {"checkpoints/manifest.json": made, "metrics.jsonl": lines}


def manifests(rng, folder):
    c, made, files = resumed()
    (folder / "checkpoints" / "3").mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_bytes(dumped(value))
    for name in rng.sample(sorted(files), rng.choice([1, 1, 1, 2])):
        damaged(rng, folder / name)
    if (folder / "metrics.jsonl").is_file():
        lines = (folder / "metrics.jsonl").read_bytes().strip(b"[]")
        (folder / "metrics.jsonl").write_bytes(lines.replace(b"}, {", b"}\n{") + b"\n")
    workdir.prepare_workdir(c, folder)
    workdir.began_in(folder)
    identity.check_manifest(folder / "checkpoints", made)
    with contextlib.closing(metrics.Writer(folder, 10, tensorboard=False, start_step=2)) as writer:
        writer.write(3, {"loss": 1.0})
    curves.loss_figure(curves.read_losses(folder / "metrics.jsonl"), "Loss")
    config_lib.check(c)


KINDS = dict(records=records, spans=spans, safetensors=safetensors_case, models=models)
KINDS |= dict(config=config, manifests=manifests)
