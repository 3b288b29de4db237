"""Errors: a DataError holds its parts, and `run` prints what the user has to mend, no bugs."""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from test_chat import TOKENIZER

from sftjax import config, errors, exits, files, parallel
from sftjax.data import DataError, build_store, encode, open_source
from sftjax.hf import safetensors_io
from sftjax.plan import hardware as targets
from sftjax.tasks.causal_lm import CausalLM
from sftjax.training import checkpoint, workdir

REPO = Path(__file__).resolve().parents[1]
GOOD = {"prompt": "what is two plus two?", "completion": "four"}
CLASSES = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.UserError)]


# --- the parts of a DataError ---


def chat(*messages):
    return {"messages": [dict(role=role, content=content) for role, content in messages]}


# Record -> kind, subject, what the problem begins with, what the fix begins with.
ROWS = [
    ({"prompt": "a"}, "missing_field", "'completion'", "field 'completion' is", "set data.fields"),
    ({"prompt": "a", "completion": None}, "null_field", "'completion'", "field 'comp", "set data."),
    ({"prompt": "a", "completion": 3}, "wrong_type", "'completion'", "'completion' is 3", ""),
    ({"prompt": "a", "completion": ""}, "empty_response", "", "empty response: 'comp", "fill it"),
    (chat(("alien", "a")), "unknown_role", "", "message 1: unknown role 'alien'; kn", "map yours"),
    (chat(("user", "a")), "role_order", "", "roles out of order: the last", "drop the last"),
    ({"question": "a"}, "no_form", "", "no known form in the fields 'question'", "say which"),
    ({"messages": "[{"}, "bad_json", "", "'messages' is not valid JSON", ""),
    ({"prompt": "a", "completion": "\ud800"}, "surrogate", "", "half of a surrogate", "repair"),
]


@pytest.mark.parametrize("record, kind, subject, problem, fix", ROWS, ids=[r[1] for r in ROWS])
def test_the_parts_of_a_bad_row(record, kind, subject, problem, fix):
    with pytest.raises(DataError) as caught:
        encode(record, TOKENIZER, where="d.jsonl:7")
    e = caught.value
    assert (e.where, e.kind, e.subject) == ("d.jsonl:7", kind, subject)
    assert e.problem.startswith(problem) and e.fix.startswith(fix) and bool(e.fix) == bool(fix)
    assert str(e) == f"d.jsonl:7: {e.reason}" and e.reason == f"{e.problem}{'; ' * bool(fix)}{e.fix}"


def test_the_parts_of_a_bad_file(tmp_path):
    path = tmp_path / "d.jsonl"
    found = {}
    for text in ("", "\n\n", "{\n", "3\n"):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            open_source(path)[0]
        found[text] = caught.value.where, caught.value.kind
    row = f"{path}:1"
    assert found == {
        "": (str(path), "no_rows"),
        "\n\n": (str(path), "no_rows"),
        "{\n": (row, "bad_json"),
        "3\n": (row, "wrong_type"),
    }
    with pytest.raises(DataError) as caught:
        open_source(tmp_path / "absent.jsonl")
    assert (caught.value.where, caught.value.kind) == (str(tmp_path / "absent.jsonl"), "no_file")


def test_a_name_that_the_system_refuses_is_a_data_error():
    with pytest.raises(DataError, match="not a readable data file: .*too long"):
        open_source("x" * 5000)


def test_a_wrong_setting_is_of_no_row():
    with pytest.raises(DataError, match="^data.stop_token='eos'") as caught:
        encode(GOOD, TOKENIZER, where="d.jsonl:7", stop_token="eos")
    assert (caught.value.where, caught.value.kind) == ("", "setting")


def test_a_users_own_error():
    e = DataError("the label is not one of mine")
    assert (e.where, e.kind, e.problem, e.fix) == ("", "", "the label is not one of mine", "")
    assert str(e) == e.reason == e.problem and e.label == "another reason"
    e = DataError("no label", "write one", where="d.csv:3", kind="no_label")
    assert str(e) == "d.csv:3: no label; write one" and e.label == "no label"
    assert DataError("x", kind="no_label", subject="'y'").label == "no label: 'y'"


def test_the_parts_survive_a_pickle():
    """Loader processes hand their errors to the run."""
    e = DataError("no label", "write one", where="d:3", kind="no_label", subject="'x'")
    again = pickle.loads(pickle.dumps(e))
    assert vars(again) == vars(e) and str(again) == str(e)


def test_every_data_error_of_ours_says_its_kind():
    missing = []
    for path in (REPO / "sftjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DataError"
            if called and "kind" not in {k.arg for k in node.keywords}:
                missing.append(f"{path.name}: {ast.unparse(node)}")
    assert missing == ["__init__.py: DataError(report['problem'])"]  # kept as plain text


# --- counting rows that can't be used ---


def test_rows_are_counted_by_kind_whatever_their_messages_say(tmp_path, monkeypatch):
    """Two messages alike but for the kind, and two of one kind that have no word in common."""
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(GOOD | {"n": n}) for n in range(6)))
    raised = {
        1: dict(problem="d.jsonl: odd; text: (1)", kind="odd_label"),
        2: dict(problem="nothing like it", fix="at all", kind="odd_label"),
        3: dict(problem="nothing like it", fix="at all", kind="missing_field", subject="'x'"),
        4: dict(problem="field 'y' is missing"),
    }

    def examples(self, records, wheres):
        for record, where in zip(records, wheres, strict=True):
            if error := raised.get(record["n"]):
                raise DataError(**error, where=where)
        return original(self, records, wheres)

    original = CausalLM.examples
    monkeypatch.setattr(CausalLM, "examples", examples)
    source, task = open_source(path), CausalLM(TOKENIZER)
    store = build_store(source, task, 64, "drop", tmp_path / "c", "skip", 1.0)
    assert store.report["skipped"] == {
        "odd label": 2, "missing field: 'x'": 1, "another reason": 1
    }  # fmt: skip
    lines = [json.loads(line) for line in (store.folder / "rejects.jsonl").open()]
    assert [line["kind"] for line in lines] == ["odd_label", "odd_label", "missing_field", ""]
    assert lines[1]["reason"] == "nothing like it; at all" and lines[1]["file"] == f"{path}:3"


@pytest.mark.parametrize("where", ["", "another.jsonl:1", "{path}", "{path}:1: message 2"])
def test_an_error_of_another_place_is_not_skipped(tmp_path, monkeypatch, where):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD))
    error = DataError(f"{path}:1: looks as if it were of the row", where=where.format(path=path))

    def fail(*args, **policy):
        raise error

    monkeypatch.setattr(CausalLM, "examples", fail)
    source, task = open_source(path), CausalLM(TOKENIZER)
    with pytest.raises(DataError) as caught:
        build_store(source, task, 64, "drop", tmp_path / "c", "skip", 1.0)
    assert caught.value is error


# --- what `run` prints ---


@pytest.mark.parametrize("error", CLASSES, ids=lambda e: e.__name__)
def test_run_prints_each_class_as_one_message(error):
    def main(argv):
        raise error(f"what is wrong with {argv[0]}")

    with pytest.raises(SystemExit) as caught:
        exits.run(main, ["x"])
    assert caught.value.code == f"{error.__name__}: what is wrong with x"  # printed; the status is 1


@pytest.mark.parametrize("error", CLASSES, ids=lambda e: e.__name__)
def test_a_message_is_bounded_whatever_it_quotes(error):
    message = str(error("data.train=" + "x" * 10**6 + " is wrong: expected a file"))
    assert message.startswith("data.train=xxx") and message.endswith("xxx is wrong: expected a file")
    assert len(message) < 300
    message = str(error("data.train=" + "x " * 10**6 + "is wrong: expected a file"))
    assert message.startswith("data.train=x x") and message.endswith("x is wrong: expected a file")
    assert 1800 < len(message) < 1900 and " characters) … " in message
    assert str(error("y" * 1800)) == "y" * 1800


def test_classes_are_those_of_their_places_and_of_python():
    assert config.ConfigError is errors.ConfigError and DataError is errors.DataError
    assert safetensors_io.WeightsError is errors.WeightsError
    assert parallel.MeshError is errors.MeshError and targets.TargetError is errors.TargetError
    assert checkpoint.CheckpointError is errors.CheckpointError
    builtin = (ValueError, OSError, RuntimeError, TypeError, ArithmeticError)
    for error in CLASSES:
        assert issubclass(error, errors.UserError)
        assert error is errors.UserError or issubclass(error, builtin)


@pytest.mark.parametrize("bug", [ValueError, OSError, RuntimeError, KeyError, ZeroDivisionError])
def test_a_bug_keeps_its_traceback(bug):
    """Also one that is raised in the package itself, as this one is as good as."""

    def main(argv):
        raise bug("a bug")

    with pytest.raises(bug):
        exits.run(main, [])
    code = compile("raise ValueError('a bug')", config.__file__, "exec")
    with pytest.raises(ValueError):
        exits.run(lambda argv: exec(code), [])


def command(*argv):
    code = "import sys; from sftjax import config, exits; exits.run(config.parse, sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=REPO, capture_output=True, text=True)


def test_one_line_and_exit_status_1(tmp_path):
    found = command(f"--config={tmp_path / 'no.py'}")
    assert found.returncode == 1 and found.stdout == ""
    path = tmp_path / "no.py"
    assert found.stderr == f"ConfigError: --config={path}: file {path} does not exist\n"


# --- config files ---

START = "from sftjax.config import get_default\ndef get_config(arg=''):\n  c = get_default()\n"

# What the file holds -> what the message says after the file's path.
FILES = {
    "syntax": ("x = 1\ny = (\n", r":2: '\(' was never closed: 'y = \('"),
    "not_python": ("model:\n  path: x\n", r":1: invalid syntax: 'model:'"),
    "indent": ("def get_config():\nreturn 1\n", r":2: expected an indented block"),
    "zeros": ("x = 1\0", r".*source code .* null bytes"),
    "import": ("\nimport no_such_module\n", r":2: ModuleNotFoundError: No module named 'no_such"),
    "raises": (START + "  return c.data / 0\n", r":4: TypeError: unsupported operand"),
    "deeper": ("def f():\n  return {}['x']\ndef get_config():\n  return f()\n", ":2: KeyError: x"),
    "key": (START + "  c.optim.lrr = 1\n", r':4: KeyError: .*Did you mean "lr" instead of "lrr"'),
    "type": (START + "  c.seed = 1e22\n", r":4: TypeError: .*'seed'"),
    "override": (
        "from sftjax import config\ndef get_config():\n"
        "  c = config.get_default()\n  config.override(c, 'seed', 'x')\n",
        r":4: ConfigError: --config.seed=x: expected int, like 0",
    ),
    "five": ("x = 1\ndef get_config():\n  return 5\n", r":2: get_config returned 5 \(int\), expec"),
    "nothing": (START + "  c.seed = 1\n", r":2: get_config returned None \(NoneType\), expected"),
    "no_function": ("get_config = 3\n", r" has no function get_config\(arg=''\)"),
    "exits": ("import sys\nsys.exit(0)\n", r":2: SystemExit: 0"),
    "imports_wrong": ("\nfrom sftjax import no_such\n", r":2: ImportError: cannot import"),
    "latin": ("x = '\udce9'\n", r":1: .*"),
    "deep": ("x = " + "(" * 5000 + ")" * 5000 + "\n", r":.*too many nested parentheses"),
    "frozen": ("from ml_collections import FrozenConfigDict\ndef get_config():\n"
               "  return FrozenConfigDict({})\n", r":2: get_config returned [^,]*, expected"),
    "no_argument": ("def get_config(a, b):\n  pass\n", r":1: TypeError: get_config\(\) missing 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_that_is_wrong(tmp_path, name):
    text, message = FILES[name]
    path = tmp_path / f"{name}.py"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(config.ConfigError, match=f"^{path}{message}"):
        config.load(str(path))


def test_files_that_hold_no_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {}")
    with pytest.raises(config.ConfigError, match="c.yaml is not a Python file; a config is a file"):
        config.load(str(path))
    for path in ("/dev/zero", str(tmp_path)):
        with pytest.raises(config.ConfigError, match=f"file {path} is no regular file"):
            config.load(path)
    with pytest.raises(config.ConfigError, match="does not exist"):
        config.load("x" * 5000)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batch_size=0", "train.batch_size=0: expected a number from 1 to 2147483648"),
        ("train.micro_batches=-1", "train.micro_batches=-1: expected a number from 1 to"),
        (
            "seed=10000000000000000000000",
            "seed=1.*: expected a number from 0 to 9223372036854775807",
        ),
        ("seed=1e22", "--config.seed=1e22: expected int, like 0"),
        ("seed=-1", "seed=-1: expected a number from 0 to"),
        ("optim.lr=-1", "optim.lr=-1.0: expected 0 or more"),
        ("optim.lr=1e999", "optim.lr=.*: expected a finite number, 0 or more"),
        ("optim.b1=1.5", "optim.b1=1.5: expected a number from 0 to 0.99"),
        ("data.temperature=1e999", "data.temperature=inf: expected a finite number"),
        ("optim.lr=1" + "0" * 400, "--config.optim.lr=10.*: expected float, like 0.002"),
        ("optim.lr=" + "(" * 10_000, r"--config.optim.lr=\(\(.*: expected float"),
        ("data.max_length=0", "data.max_length=0: expected a number from 1 to"),
        ("eval.batch_size=0", "eval.batch_size=0: expected a number from 1 to"),
        ("generate.top_p=2.0", "generate.top_p=2.0: expected a number from 0 to 1"),
    ],
    ids=lambda x: x[:24],
)
def test_values_out_of_range(override, message):
    with pytest.raises(config.ConfigError, match=f"^{message}"):
        config.parse([f"--config={REPO / 'configs/quickstart.py'}", f"--config.{override}"])


@pytest.mark.parametrize(
    "lines, message",
    [
        ("  c.train.batch_size = None", "train.batch_size=None: expected int, like 32"),
        ("  c.seed = True", "seed=True: expected int, like 0"),
        ("  c.optim.lr = float('nan')", "optim.lr=nan: expected a finite number, 0 or more"),
        ("  c.mesh = None", "mesh=None: expected a group with context, coordinator"),
        ("  c = type(c)()", "the config has no adapter: start from sftjax.config.get_default()"),
    ],
)
def test_values_that_a_file_may_set_but_nothing_can_use(tmp_path, lines, message):
    path = tmp_path / "c.py"
    path.write_text(f"{START}{lines}\n  return c\n")
    with pytest.raises(config.ConfigError) as caught:
        config.parse([f"--config={path}"])
    line = 2 if "no adapter" in message else 4
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


# What a file sets, a line each from its fourth on -> (line, what is said of it).
WRONG = [
    ("c.train.batch_size = 0", 4, "train.batch_size=0: expected a number from 1 to 2147483648"),
    ("c.eval.batch_size = 8\n  c.train.batch_size = 0", 5, "train.batch_size=0: expected"),
    ("t = c.train\n  t.batch_size = 0", 5, "train.batch_size=0: expected"),
    ("c.train.update(\n    micro_batches=0)", 5, "train.micro_batches=0: expected"),
    ("c['seed'] = -1", 4, "seed=-1: expected a number from 0 to"),
    ("c.seed = 10**22", 4, "seed=10000000000000000000000: expected a number from 0 to"),
    ("c.seed = 3; c.seed = 10**5000", 4, "seed=a huge number: expected a number from 0 to"),
    ("c.optim.lr = -1.0", 4, "optim.lr=-1.0: expected 0 or more"),
    ("c.optim.b2 = 1.0", 4, "optim.b2=1.0: expected a number from 0 to 0.99"),
    ("c.data.max_length = 0", 4, "data.max_length=0: expected"),
    ("c.data.workers = 10**9", 4, "data.workers=1000000000: expected a number from 0 to 1024"),
    ("c.data.temperature = 0.0", 4, "data.temperature=0.0: expected"),
    ("c.data.shuffle_window = 0", 4, "data.shuffle_window=0: expected a number from 1"),
    ("c.data.clean.near = 2.0", 4, "data.clean.near=2.0: expected a number from 0 to 1"),
    ("c.mesh.process_id = -1", 4, "mesh.process_id=-1: expected a number from 0 to"),
    ("c.mesh.timeout = 10**12", 4, "mesh.timeout=1000000000000: expected"),
    ("c.train.duration = 'soon'", 4, "train.duration='soon' is no duration; write a number and"),
    ("c.train.duration = '-3 steps'", 4, "train.duration='-3 steps' is no duration"),
    ("c.eval.every = '1e999'", 4, "eval.every='1e999': expected a finite number"),
    ("c.optim.warmup = '3 days'", 4, "optim.warmup='3 days' is no duration"),
    ("c.optim.warmup = '1._2 steps'", 4, "optim.warmup='1._2 steps': '1._2' is not a number"),
    ("c.train.log_every = ''", 4, "train.log_every='' is no duration"),
    ("c.optim.name = 'adamw2'", 4, "optim.name='adamw2': expected adamw | adam | sgd"),
    ("c.optim.schedule = 'cosin'", 4, "optim.schedule='cosin': expected constant | linear | "),
    ("c.model.dtype = 'bf16'", 4, "model.dtype='bf16': expected float32 | bfloat16"),
    ("c.data.reasoning.last = 'no'", 4, "data.reasoning.last='no': expected train | keep | drop"),
    ("c.model.split = ('a',)", 4, "model.split=('a',): expected positive whole numbers"),
    ("c.data.buckets = (0,)", 4, "data.buckets=(0,): expected positive whole numbers"),
    ("c.optim.trainable = (('(', True),)", 4, "optim.trainable: '(' is no regex: missing )"),
    ("c.optim.trainable = (('.*', 1),)", 4, "optim.trainable: ('.*', 1): expected (regex, True"),
    ("c.optim.decay = ('.*', 0.1)", 4, "optim.decay: '.*' is no rule, expected (regex, a number"),
    ("c.optim.lr_multipliers = (('.*', -1.0),)", 4, "optim.lr_multipliers: ('.*', -1.0): expected"),
]


@pytest.mark.parametrize(("lines", "line", "message"), WRONG, ids=[w[0][:40] for w in WRONG])
def test_a_wrong_value_is_said_with_its_file_and_line(tmp_path, lines, line, message):
    path = tmp_path / "c.py"
    path.write_text(f"{START}  {lines}\n  return c\n")
    with pytest.raises(config.ConfigError) as caught:
        config.parse([f"--config={path}:"])
    assert str(caught.value).startswith(f"{path}:{line}: {message}") and len(str(caught.value)) < 500


def test_what_the_command_line_sets_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(f"{START}  c.train.batch_size = 8\n  return c\n")
    with pytest.raises(config.ConfigError, match="^train.batch_size=0: expected"):
        config.parse([f"--config={path}", "--config.train.batch_size=0"])
    path.write_text(f"{START}  c.train.batch_size = 0\n  return c\n")
    assert config.parse([f"--config={path}", "--config.train.batch_size=8"])[0].train.batch_size == 8


def test_every_number_has_a_range_and_every_table_holds_its_default():
    def leaves(group, prefix=""):
        for key, value in group.items():
            if hasattr(value, "items"):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    found = dict(leaves(config.get_default()))
    numbers = {k for k, v in found.items() if type(v) in (int, float)}
    assert numbers == set(config.RANGES)
    for key, choices in config.CHOICES.items():
        assert found[key] in choices
    for key in (*config.DURATIONS, *config.WHOLE, *config.RULES):
        assert key in found


def test_the_choices_are_those_of_the_code():
    from sftjax import optim
    from sftjax.data.packing import pack, truncate
    from sftjax.data.records import rejects

    assert set(config.CHOICES["optim.name"]) == set(optim.OPTIMIZERS)
    assert set(config.CHOICES["optim.schedule"]) == set(optim.SCHEDULES)
    assert set(config.CHOICES["data.overlong"]) == set(truncate.OVERLONG)
    assert config.CHOICES["data.on_error"] == rejects.ON_ERROR
    assert set(config.CHOICES["data.packing"]) == set(pack.STRATEGIES)


def test_a_learning_rate_that_is_rarely_meant_is_said(caplog):
    c = config.get_default()
    workdir.warn(c)
    assert not caplog.records
    c.optim.lr = 1e6
    workdir.warn(c)
    [record] = caplog.records
    assert record.getMessage().startswith("optim.lr=1e+06 is more than 1: a step may be larger")


def test_every_range_is_of_a_key_and_holds_its_default():
    config.check(config.get_default())
    for key in config.RANGES:
        node = config.get_default()
        for part in key.split("."):
            node = node[part]
        assert isinstance(node, (int, float))


def test_a_duration_without_end():
    with pytest.raises(config.ConfigError, match="train.duration='1e999': expected a finite numb"):
        config.duration("1e999", "train.duration")


def test_a_place_that_cannot_be_written(tmp_path):
    path, message = tmp_path / "absent" / "x.json", "--json .*absent/x.json cannot be written: No"
    with pytest.raises(errors.WriteError, match=message), errors.writing("--json", path):
        path.write_text("")
    (tmp_path / "file").touch()
    with pytest.raises(errors.WriteError, match="the file .*file/x.json cannot be written: File"):
        files.write_atomic(tmp_path / "file" / "x.json", "{}")
