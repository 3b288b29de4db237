"""Every file in configs/ builds its model, its sharded state and its training step."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import sftjax
from sftjax import config as config_lib
from sftjax import optim, parallel, tasks
from sftjax.training import build

REPO = Path(__file__).resolve().parents[2]
NAMES = sorted(p.name for p in (REPO / "configs").glob("*.py"))

LLAMA_3_8B = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "llama3_8b.py:gpu"])
def test_a_config_builds(name, tmp_path, monkeypatch):
    """Shapes only: the step of the 8B is traced and lowered without an array of its size."""
    monkeypatch.chdir(REPO)
    config = config_lib.load(f"configs/{name}")
    if not Path(config.model.path or "none").exists():  # a hub id, or the user's to give
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
        config.model.path, config.model.init = str(tmp_path), "random"
    mesh = parallel.make_mesh({a: config.mesh[a] for a in parallel.AXES})
    with jax.set_mesh(mesh):
        tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 99})
        model, trainable = build.make_model(config, tasks.make(config, tokenizer))
        lr = build.make_schedule(config.optim, 100)
        tx = optim.make(config.optim, lr, model.abstract, trainable)
        state = build.abstract_state(config.model, model, trainable, tx, mesh)
        size, length = config.train.batch_size, config.data.max_length
        parallel.check_batch(mesh, size, config.train.micro_batches, length)
        layout = parallel.named(mesh, "batch", "seq")
        batch = {
            k: jax.ShapeDtypeStruct((size, length), kind, sharding=layout)
            for k, kind in dict(
                tokens=np.int32, targets=np.int32, weights=np.float32, positions=np.int32,
                segments=np.int32,
            ).items()
        }  # fmt: skip
        step = functools.partial(
            sftjax.train_step,
            loss_fn=tasks.make(config, tokenizer).loss_fn(model, config.loss.to_dict()),
            tx=tx,
            micro_batches=config.train.micro_batches,
        )
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    new_state, metrics = lowered.out_info
    assert metrics["loss"].shape == ()
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new_state)
    assert all(jax.tree.leaves(same))
    if "llama3" in name:
        shards = state.params["layers"]["0-31"]["mlp"]["up"]["w"].sharding.shard_shape((32, 4096, 14336))
        assert shards == (32, 512, 14336)  # fsdp over all eight devices
