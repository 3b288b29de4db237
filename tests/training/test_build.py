"""What is known before the first step: whether the devices hold the state at all."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_hf import HF

from sftjax import hf, optim, parallel
from sftjax import params as params_lib
from sftjax.config import get_default
from sftjax.errors import OutOfMemory
from sftjax.training import build


def test_a_state_that_no_machine_holds_is_refused_before_it_is_made(tmp_path):
    """A config.json alone may ask for anything: there are no weights to contradict it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HF | dict(vocab_size=2**31, hidden_size=2**10)))
    config, began = get_default(), time.process_time()
    config.model.init, config.model.path = "random", str(file)
    model = hf.load_model(file)
    trainable = params_lib.match_rules(config.optim.trainable, model.abstract, "x")
    tx = optim.make(config.optim, lambda step: 1e-3, model.abstract, trainable)
    mesh = parallel.make_mesh(dict(data=1, fsdp=-1, context=1, tensor=1, expert=1))
    target = build.abstract_state(config.model, model, trainable, tx, mesh)
    with pytest.raises(OutOfMemory, match=r"GiB of each device.*largest array is \[2147483648, 1024"):
        build.first_state(config.model, model, trainable, tx, target, mesh)
    assert time.process_time() - began < 60  # it would be hours, and the machine's memory


def test_shards_count_and_not_the_whole(monkeypatch):
    mesh = parallel.make_mesh(dict(data=1, fsdp=8, context=1, tensor=1, expert=1))
    split, whole = (NamedSharding(mesh, spec) for spec in (P("fsdp"), P()))
    host = {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(build.os, "sysconf", host.__getitem__)
    array = lambda sharding: jax.ShapeDtypeStruct((800,), jnp.float32, sharding=sharding)  # noqa: E731
    build.check_memory({"a": array(split), "key": jax.random.key(0)})
    with pytest.raises(OutOfMemory, match="the largest array is"):
        build.check_memory({"a": array(whole)})
