"""Plans: what is counted is counted right, what does not fit is said, what is advised builds."""

import json
import re
from pathlib import Path

import jax
import pytest

from sftjax import config as config_lib
from sftjax import params as params_lib
from sftjax import tasks
from sftjax.errors import OutOfMemory
from sftjax.plan import __main__ as command
from sftjax.plan import compile as plan
from sftjax.plan import estimate as estimate_lib
from sftjax.plan import hardware as targets
from sftjax.plan import hlo, search
from sftjax.plan import text as plan_text
from sftjax.training import build, metrics

LLAMA = dict(
    model_type="llama", vocab_size=512, hidden_size=64, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, intermediate_size=192, torch_dtype="bfloat16",
)  # fmt: skip
LLAMA_8B = LLAMA | dict(
    vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072,
)  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A config of a model that is a config.json and nothing else."""

    def config(model=LLAMA, **overrides):
        (tmp_path / "config.json").write_text(json.dumps(model))
        c = config_lib.get_default()
        c.model.path = str(tmp_path)
        c.data.max_length, c.train.batch_size = 64, 16
        for key, value in overrides.items():
            config_lib.override(c, key.replace("__", "."), str(value))
        return c

    return config


HERE = targets.resolve("here")


# ---- what is counted -----------------------------------------------------------------------

CASES = {
    "fsdp": dict(),
    "micro-batches": dict(train__micro_batches=2, model__remat="full", loss__chunk_tokens=128),
    "frozen": dict(
        optim__trainable="((r'layers/.*', True), ('.*', False))", model__remat="dots",
        mesh__fsdp=4, mesh__tensor=2,
    ),
}  # fmt: skip
RUN = [pytest.param(c, marks=pytest.mark.slow) for c in ("fsdp", "micro-batches", "frozen")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{case: (Program, compiled, Plan)}: each compiled once."""
    known = {}

    def get(case):
        if case not in known:
            where = tmp_path_factory.mktemp("model")
            (where / "config.json").write_text(json.dumps(LLAMA))
            c = config_lib.get_default()
            c.model.path, c.data.max_length, c.train.batch_size = str(where), 64, 16
            for key, value in CASES[case].items():
                config_lib.override(c, key.replace("__", "."), str(value))
            program = plan.build(c, HERE)
            with plan.use(program.mesh):
                done = program.step.lower(program.state, program.batch).compile()
            known[case] = program, done, plan.plan(c, HERE)
        return known[case]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_held_is_what_the_compiler_holds(compiled, case):
    program, done, p = compiled(case)
    m = done.memory_analysis()
    held = sum(plan.held(program).values())
    assert 0 <= m.argument_size_in_bytes - held <= 64  # beside it: the step and the random key
    assert p.total == metrics.peak_bytes(done)
    assert p.memory["temporaries"] == m.temp_size_in_bytes and sum(p.memory.values()) == p.total
    assert 0 <= p.memory["other"] < 0.02 * p.total
    names = ["parameters", "frozen", "optimizer", "batch", "temporaries"]
    expected = sorted(((p.memory[name], f"the {name}") for name in names), reverse=True)
    assert p.largest == expected
    assert p.basis == "compiled" and p.fits and p.limit > p.total


@pytest.mark.parametrize("case", RUN)
def test_flops_by_shapes_are_those_of_the_compiled_step(compiled, case):
    """And at most a few percent above the model's own, once what is computed again is off."""
    program, _, p = compiled(case)
    with plan.use(program.mesh):
        traced = estimate_lib.trace(program)
    cost, parts, _ = estimate_lib.estimate(traced, program)
    # Of the compiled step attention is counted by whole rounds of its loop over blocks.
    assert cost.flops * 8 == pytest.approx(p.hardware_flops, rel=0.07)
    assert parts["parameters"] == plan.held(program)["parameters"]
    assert p.model_flops <= p.hardware_flops


@pytest.mark.parametrize("remat", search.REMAT)
def test_no_remat_keeps_gathered_weights(make, remat):
    """What layers keep grows with the rows, beside their own shards of the weights at most."""
    kept = []
    for rows in (16, 32):
        program = plan.build(make(model__remat=remat, train__batch_size=rows), HERE)
        with plan.use(program.mesh):
            kept.append(estimate_lib.trace(program).kept)
    assert program.mesh.shape["fsdp"] == 8
    shards = 2 * params_lib.count(program.model.abstract["layers"])  # of the weights, in bfloat16
    assert 2 * kept[0] - kept[1] < 1.1 * shards, "a part that does not grow with the rows"
    assert bool(kept[0]) == (remat != "offload")  # that is the host's


@pytest.mark.slow
def test_the_rounds_of_the_loss_follow_from_what_is_trained(make):
    c = make(loss__chunk_tokens=128)
    program = plan.build(c, HERE, trained=0.5)
    with plan.use(program.mesh):
        text = program.step.lower(program.state, program.batch).compile().as_text()
    half = plan.rounds(text, program)
    program.work = plan.Work(16, 64, 1.0, 64)
    assert half >= 2 and plan.rounds(text, program) == 2 * half


def test_pairs_of_documents():
    assert plan.Work(1, 8, 1, 8).pairs(0) == 36
    assert plan.Work(1, 8, 1, 4).pairs(0) == 20
    assert plan.Work(1, 8, 1, 8).pairs(3) == 1 + 2 + 6 * 3


# ---- the projection ------------------------------------------------------------------------


def test_the_projection_adds_up(make):
    p = plan.plan(make(LLAMA_8B, train__batch_size=64), targets.parse("gpu-h100x64"))
    t, chip = p.time, targets.CHIPS["gpu-h100"]
    assert t["work"] == pytest.approx(p.hardware_flops / 64 / (0.6 * chip.flops))
    sent = sum(c.wire for c in p.cost.collectives.values())
    assert t["collectives"] == pytest.approx(sent / (chip.link * 1e9))
    assert t["step"] == pytest.approx(t["work"] + t["collectives"] - t["hidden"])
    assert t["mfu"] == pytest.approx(p.model_flops / (t["step"] * 64 * chip.flops))
    assert t["trained_tokens_per_s"] == pytest.approx(t["tokens_per_s"] / 2)
    text = plan_text.report(p)
    assert "A projection, no measurement" in text and "estimated from shapes" in text


def test_across_slices_the_network_is_what_counts():
    cost = hlo.Cost()
    cost.collectives["all-reduce", 4].wire = 3.1e9
    one = targets.parse("v5e:4x4")
    many = targets.parse("4xv5e:4x4")
    assert plan.seconds_of_collectives(cost, one) == pytest.approx(3.1 / 200)
    assert plan.seconds_of_collectives(cost, many) == pytest.approx(1.0)


# ---- what does not fit ---------------------------------------------------------------------


def test_a_config_that_does_not_fit_names_its_largest_part(make):
    p = plan.plan(make(LLAMA_8B), targets.parse("gpu-h100x1"))
    assert not p.fits
    assert p.largest[0][1] == "the optimizer" and p.largest[0][0] == 2 * p.memory["parameters"]
    text = plan_text.report(p)
    assert "it does NOT fit" in text and "largest: 59.8" in text and "the optimizer" in text


def test_the_compilers_own_word_is_read():
    total, largest = plan.exhausted(TPU_MESSAGE)
    assert total == pytest.approx(20.1 * 2**30)
    assert largest[0][0] == 8 * 2**30
    assert largest[0][1] == "bf16[16,4096,128256] jit(train_step)/mul"
    short = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
    total, _ = plan.exhausted(f"{short} temporaries (600.00G) exceeds available HBM (15.75G).")
    assert total == 600 * 2**30
    assert plan.exhausted("RESOURCE_EXHAUSTED: Out of memory allocating 128 bytes.") == (128, [])


TPU_MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G.

Total hbm usage >= 20.36G:
    reserved        265.00M
    program          20.10G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(train_step)/mul"
     Shape: bf16[16,4096,128256]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     ==========================

  2. Size: 1.00G
     Shape: f32[16]{0}
"""


def test_memory_that_runs_out_in_training_ends_in_advice(make):
    with pytest.raises(OutOfMemory) as e, build.advice(make()):
        jax.block_until_ready(jax.jit(lambda: jax.numpy.ones((2**48,)))())
    text = str(e.value)
    assert text.startswith("RESOURCE_EXHAUSTED") and "To paste into the config:" in text


def test_other_errors_pass_through(make):
    with pytest.raises(ZeroDivisionError), build.advice(make()):
        _ = 1 / 0


# ---- search --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_ends_in_lines_that_fit(make):
    c = make(LLAMA_8B, train__batch_size=32, data__max_length=2048)
    target = targets.parse("gpu-h100x8")
    found = search.search(c, target)
    best = found[0]
    assert best.fits and not found[-1].fits
    assert {p.remat for p in found} == set(search.REMAT)
    same = {p.remat: p for p in found if p.micro_batches == 2 and p.mesh["fsdp"] == 8}
    held = [same[remat].memory["activations"] for remat in search.REMAT]
    assert held[0] > held[1] > held[2] and held[3] > held[4]
    fitting = [p.time["step"] for p in found if p.fits]
    assert fitting[0] <= min(fitting) * 1.011
    exec("\n".join(x.strip() for x in plan_text.config_lines(best)), {"c": c})
    again = plan.plan(c, target)
    assert again.mesh == best.mesh and again.remat == best.remat
    assert again.total == pytest.approx(best.total, rel=0.05)
    assert again.hardware_flops == pytest.approx(best.hardware_flops, rel=0.01)


def test_a_search_without_a_way_says_so(make):
    c = make(LLAMA_8B, train__batch_size=1)
    text = plan_text.table(search.search(c, targets.parse("gpu-a100x1")))
    assert text.endswith("Nothing that was tried fits: more devices, or a shorter row.")


# ---- the command ---------------------------------------------------------------------------


@pytest.fixture
def file(make, tmp_path):
    make()
    text = "from sftjax.config import get_default\n\ndef get_config(arg=''):\n    c = get_default()\n"
    text += f"    c.model.path = {str(tmp_path)!r}\n    c.data.max_length = 64\n    return c\n"
    (tmp_path / "c.py").write_text(text)
    return tmp_path / "c.py"


@pytest.mark.slow
def test_the_command_prints_and_writes_json(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "plan.json"
    monkeypatch.setattr(search, "COMPILED", 1)
    flags = ["--target=here", "--trained=0.25", "--search", f"--json={out}"]
    command.main([f"--config={file}", *flags])
    text = capsys.readouterr().out
    for part in ("parameters", "optimizer", "batch", "temporaries", "other", "remain"):
        assert part in text, part
    assert "25% of the tokens trained" in text and "of this chip" in text
    assert text.splitlines()[-1].startswith("    c.model.remat = ")
    one, *rest = json.loads(out.read_text())
    assert {p["basis"] for p in rest} == {"estimated from shapes"}
    assert one["fits"] and one["basis"] == "compiled" and one["memory"]["optimizer"] > 0
    assert one["cost"]["flops"] > 0 and any("x8" in k for k in one["cost"]["collectives"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--target=v9"], "--target=v9 is unknown; known are here"),
        (["--target=here", "--trained=0"], "--trained=0.0: expected a share"),
        (["--target=here", "--document=65"], "up to data.max_length = 64 tokens"),
        (["--target=here", "--config.mesh.fsdp=3"], "mesh data=1, fsdp=3.* needs 3 devices"),
        (["--target=here", "--config.train.batch_size=12"], "does not divide over the 8 batch"),
        (["--target=here", "--config.train.micro_batches=5"], "does not divide into 5 micro"),
        (["--target=gpu-h100x8", "--config.mesh.data=16"], "needs a multiple of 16 devices"),
        (["--target=here", "--config.mesh.tensor=8"], "kv_heads=4 does not divide over mesh axis"),
        (["--target=here", "--config.model.attention=nope"], "'nope' is unknown; the backends"),
        (["--target=here", "--config.model.attention=splash"], "does not run on cpu; set one of"),
        (["--target=gpu-h100x8", "--config.model.attention=splash"], "does not run on gpu"),
        (
            ["--target=here", "--config.mesh.context=2", "--config.data.max_length=66"],
            "data.max_length=66 does not divide into twice mesh.context=2 parts",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_what_cannot_be_is_refused_before_any_compile(file, flags, says, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    with pytest.raises(ValueError, match=says):
        command.main([f"--config={file}", *flags])


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [(dict(data__max_length=192), 192), (dict(data__max_length=256, mesh__context=4), 64)],
)
def test_rows_that_a_backend_cannot_take(make, changes, tokens):
    says = f"takes rows of a multiple of 128 tokens on each shard of mesh.context, found {tokens};"
    with pytest.raises(ValueError, match=says):
        config = make(model__attention="splash", **changes)
        build.make_model(config, tasks.make(config, None), platform="tpu")


# ---- a TPU's compiler ----------------------------------------------------------------------


@pytest.mark.tpu
def test_a_step_compiles_for_a_slice_that_is_not_here(make):
    c = make(data__max_length=256, model__remat="full")
    p = plan.plan(c, targets.resolve("v5e:2x2"))
    assert p.basis == "compiled" and p.fits and p.limit == 15.75 * 2**30
    assert p.cost.total_cycles > 0 and 0 < p.time["mfu"] < 1
    assert {kind for kind, _ in p.cost.collectives} >= {"all-gather", "reduce-scatter"}


@pytest.mark.tpu
def test_what_the_compiler_finds_too_large_is_a_plan_too(make):
    c = make(data__max_length=1024, train__batch_size=2048, model__attention="xla")
    p = plan.plan(c, targets.resolve("v5e-1"))
    assert not p.fits and p.basis == "does not fit, says the compiler"
    assert p.total > p.limit and p.largest[0][0] > 2**30
    assert "it does NOT fit" in plan_text.report(p)


# ---- the page ------------------------------------------------------------------------------

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "plan.md").read_text()
COMMANDS = re.findall(r"^python -m sftjax.plan (.*)$", PAGE, re.MULTILINE)


def run_command(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    command.main(text.replace("plan.json", str(tmp_path / "plan.json")).split())
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [pytest.param(c, marks=pytest.mark.slow if "=here" in c else ()) for c in COMMANDS if "v5e" not in c],
)
def test_the_commands_of_the_page_run(text, tmp_path, capsys, monkeypatch):
    out = run_command(text, tmp_path, capsys, monkeypatch)
    for name in re.findall(r"^- \*\*(\w+)\*\*", PAGE, re.MULTILINE):
        if name != "assumed" or "compiled" in out:
            assert re.search(rf"^{name} ", out, re.MULTILINE), name
    assert ("estimated from shapes" in out) == ("gpu" in text)
    assert (tmp_path / "plan.json").exists() == ("--json" in text)


@pytest.mark.tpu
@pytest.mark.parametrize("text", [c for c in COMMANDS if "v5e" in c])
def test_the_commands_for_tpus_run(text, tmp_path, capsys, monkeypatch):
    out = run_command(text, tmp_path, capsys, monkeypatch)
    assert "basis     compiled" in out and "MFU" in out


def test_the_page_names_every_option():
    for option in ("--search", "--json", "--trained", "--document", "--target"):
        assert option in PAGE
    assert len(COMMANDS) == 3
