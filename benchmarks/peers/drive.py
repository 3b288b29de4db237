"""The side of the driver: starts workers (worker.py), asks them for steps, compares them in pairs.

A pair is measured in rounds, one side right after the other, so that a ratio compares neighbours
in time; only two workers are alive at once, sftjax and the peer (the memory of shape M needs that).
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
HOMES = HERE.parents[1] / ".peers"  # made by install.sh
ROPE_THETA = 1e6  # Tunix's Llama always has this one


def python(peer: str) -> str | None:
    """The interpreter of a peer's environment; None where it is not installed."""
    if peer == "sftjax":
        return sys.executable
    found = HOMES / peer / "bin" / "python"
    return str(found) if (HOMES / peer / "installed").exists() else None


class WorkerError(RuntimeError):
    """A worker ended, or did other work than it was given."""


class Worker:
    """peer: the name of its environment and program. env: variables added to the driver's own.

    home: the folder of its program.
    """

    def __init__(self, peer, job, log, env=None, home=HERE):
        self.log = log
        inherited = dict(os.environ)
        if peer != "sftjax":
            inherited.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python(peer), str(home / f"peer_{peer}.py"), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=inherited | (env or {}),
        )  # fmt: skip
        self.facts = self._read()

    def ask(self, steps: int) -> dict:
        """Take so many steps: {seconds, losses, tokens: of each; peak_mib, cpu_s, idle_cpu_s}."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: _read says how
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            code, tail = self.process.wait(), self.log.read_text().strip().splitlines()[-30:]
            raise WorkerError("\n".join([*tail, f"{self.log.stem} ended with exit status {code}"]))
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def machine() -> dict:
    """What the processor is, as far as the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return dict(cpu=sorted(names) or platform.processor(), cores=os.cpu_count())


# ---- the same model for all ----------------------------------------------------------------


def write_model(folder, config, seed=0):
    """A Hugging Face directory with random weights of a decoder.Config's sizes."""
    c, rng = config, np.random.default_rng(seed)
    described = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=c.vocab,
        hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, intermediate_size=c.mlp,
        max_position_embeddings=c.max_positions, rms_norm_eps=c.norm_eps, rope_theta=ROPE_THETA,
        tie_word_embeddings=True, hidden_act="silu", attention_bias=False, mlp_bias=False,
        torch_dtype="float32", bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab, c.width), "model.norm.weight": (c.width,)}
    for i in range(c.layers):
        layer = {
            "self_attn.q_proj": (wide, c.width),
            "self_attn.k_proj": (narrow, c.width),
            "self_attn.v_proj": (narrow, c.width),
            "self_attn.o_proj": (c.width, wide),
            "mlp.gate_proj": (c.mlp, c.width),
            "mlp.up_proj": (c.mlp, c.width),
            "mlp.down_proj": (c.width, c.mlp),
            "input_layernorm": (c.width,),
            "post_attention_layernorm": (c.width,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Nothing is tokenised, but some libraries will not start without a tokenizer.
    words = tokenizers.models.WordLevel({str(i): i for i in range(c.vocab)}, unk_token="0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    described = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="0", eos_token="1")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


# ---- pairs ---------------------------------------------------------------------------------


def spread(values) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


def rate(answer) -> float:
    return sum(answer["tokens"]) / sum(answer["seconds"])


def cpu_rate(answer) -> float:
    return sum(answer["tokens"]) / answer["cpu_s"]


def warm(worker) -> dict:
    """Facts of the first two steps: the first compiles, the second tells how long one takes."""
    first, second = worker.ask(1), worker.ask(1)
    return dict(
        versions=worker.facts["versions"],
        first_step_s=first["seconds"][0],
        losses=first["losses"] + second["losses"],
        step_s=second["seconds"][0],
        peak_mib=second["peak_mib"],
    )


def compare(base, worker, rounds, base_steps, steps) -> dict:
    """Rounds of base and worker in turn: {tokens_per_s, base_tokens_per_s, ratio} of them.

    cpu_ratio: the same of tokens per second of processor time, which other programs on the machine
    disturb less (a thread that waits by spinning counts, too).
    """
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(base.ask(base_steps))
        theirs.append(worker.ask(steps))
    pairs = list(zip(ours, theirs, strict=True))
    return dict(
        tokens_per_s=spread([rate(a) for a in theirs]),
        base_tokens_per_s=spread([rate(a) for a in ours]),
        ratio=spread([rate(a) / rate(b) for a, b in pairs]),
        cpu_ratio=spread([cpu_rate(a) / cpu_rate(b) for a, b in pairs]),
        peak_mib=theirs[-1]["peak_mib"],
        # While the other side steps, a worker must cost nothing.
        idle_cpu_s=sum(a["idle_cpu_s"] for a in ours + theirs),
    )
