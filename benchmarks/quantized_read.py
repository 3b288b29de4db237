"""Host memory of reading a model into few bits, beside reading it as it is.

    python benchmarks/quantized_read.py [--layers=24] [--width=1024] [--out=FILE]

Writes a Llama of random bfloat16 weights, and reads it in a process of its own as a run with LoRA does: as the files
have it, and with each model.quantize. Reported are the bytes of the parameters, and the process's peak above its start.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax

from sftjax import config as config_lib
from sftjax import hf, parallel
from sftjax import params as params_lib
from sftjax.adapters import lora
from sftjax.training import build, workdir

KINDS = ("", "int8", "int4", "nf4")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def make(path, layers, width):
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, intermediate_size=4 * width, vocab_size=8000,
        max_position_embeddings=2048, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    model = hf.load_model(path)
    params = params_lib.init(model.abstract, jax.random.key(0), "bfloat16")
    hf.save_pretrained(path, model, params)
    return params_lib.count(params)


def read(path, kind) -> dict:
    """The bytes of the parameters, and the peak of this process above its start."""
    c = config_lib.get_default()
    c.model.path, c.model.quantize, c.adapter.kind = str(path), kind, "lora"
    model = lora.adapt(c.adapter, hf.with_dtypes(hf.load_model(path), path), kind)
    trainable = params_lib.match_rules(lora.rules(((".*", True),), model), model.abstract, "trainable")
    mesh = parallel.make_mesh({}, jax.devices()[:1])
    start, peak = resident(), [0]

    def watch():
        while True:
            peak[0] = max(peak[0], resident())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    params, _ = build.make_params(c.model, model, trainable, mesh)
    jax.block_until_ready(params)
    return dict(quantize=kind, bytes=params_lib.nbytes(params), peak_bytes=peak[0] - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--out", default="")
    parser.add_argument("--read", nargs=2, default=(), help="of the script itself: a directory and model.quantize")
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(Path(args.read[0]), args.read[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        count = make(Path(folder), args.layers, args.width)
        found = []
        for kind in KINDS:
            command = [sys.executable, __file__, "--read", folder, kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            mib = {k: round(v / 2**20) for k, v in found[-1].items() if k != "quantize"}
            print(
                f"{kind or 'as it is':<10}{mib['bytes']:>6} MiB of parameters, peak {mib['peak_bytes']:>6} MiB",
                flush=True,
            )
    if args.out:
        out = dict(environment=workdir.environment(), parameters=count, results=found)
        Path(args.out).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
