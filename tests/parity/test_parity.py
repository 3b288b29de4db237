"""torch as the reference of the loss, the optimizers and training; see reference.py.

The models' own parity is in test_parity_families.py.
"""

import functools

import jax
import numpy as np
import optax
import pytest
import reference
import tiny
from families import write
from reference import close, padded, torch, transformers

import sftjax
from sftjax import config as config_lib
from sftjax import optim
from sftjax import params as params_lib
from sftjax.params import Param

pytestmark = pytest.mark.parity


def test_label_smoothing(tmp_path):
    path = write("llama", tmp_path)
    model, params = sftjax.load_pretrained(path)
    batch = padded(np.random.default_rng(2), 64, [40, 12, 33])
    for smoothing in (0.1, 0.5):
        loss_fn = jax.jit(sftjax.losses.causal_lm(model, label_smoothing=smoothing))
        out = loss_fn(params, batch, None)
        expected = reference.loss(reference.load(path), batch, label_smoothing=smoothing).item()
        np.testing.assert_allclose(out.sum / out.weight, expected, rtol=1e-5)


def settings(**changes):
    c = config_lib.get_default().optim
    c.update(changes)
    return c


OPTIMIZERS = {
    "adamw": (dict(weight_decay=0.1), torch.optim.AdamW, dict(weight_decay=0.1)),
    "adam": ({}, torch.optim.Adam, {}),
    "sgd": (dict(momentum=0.9), torch.optim.SGD, dict(momentum=0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps(name):
    changes, kind, theirs = OPTIMIZERS[name]
    normal = jax.nn.initializers.normal(1.0)
    abstract = {"a": Param((5, 3), (None, None), normal), "b": Param((7,), (None,), normal)}
    c = settings(name=name, clip=0.0, decay=((".*", 1.0),), **changes)
    everything = params_lib.map_named(lambda *_: True, abstract)
    tx = optim.make(c, lambda _: 0.01, abstract, everything)
    params = params_lib.init(abstract, jax.random.key(0))
    copies = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in params.items()}
    optimizer, state = kind(copies.values(), lr=0.01, **theirs), tx.init(params)
    rng = np.random.default_rng(5)
    for _ in range(10):
        grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k, p in copies.items():
            p.grad = torch.tensor(grads[k])
        optimizer.step()
        for k, p in copies.items():
            close(params[k], p.detach().numpy(), 1e-6)


def unpack(batch):
    """Every document of a packed Batch in a right-padded row of its own."""
    rows = []
    for r, segments in enumerate(batch["segments"]):
        for s in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == s)
            rows.append({k: np.pad(v[r, here], (0, 16 - len(here))) for k, v in batch.items()})
            rows[-1]["segments"] = (rows[-1]["segments"] > 0).astype(np.int32)
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def torch_curve(path, batches, c, warmup):
    """A plain loop: AdamW without decay on norms and biases, clipping, warm-up and cosine."""
    model = reference.load(path)
    flat = {k: p.ndim == 1 for k, p in model.named_parameters()}
    groups = [
        dict(params=[p for k, p in model.named_parameters() if flat[k] is plain], weight_decay=decay)
        for plain, decay in [(False, c.weight_decay), (True, 0.0)]
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.b1, c.b2), eps=c.eps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    losses = []
    for batch in batches:
        loss = reference.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied"])
def test_ten_training_steps(name, tmp_path):
    path = write(name, tmp_path)
    model, params = sftjax.load_pretrained(path)
    steps, warmup = 10, 3
    c = settings(lr=3e-3, weight_decay=0.1, clip=1.0)
    packed = [tiny.batch(rows=8, seed=i) for i in range(steps)]
    unpacked = [unpack(b) for b in packed]
    expected = torch_curve(path, unpacked, c, warmup)
    lr = optim.schedule("cosine", c.lr, steps, warmup)
    everything = params_lib.map_named(lambda *_: True, model.abstract)
    most = max(len(b["tokens"]) for b in unpacked)  # with blank rows one shape is compiled, not ten
    filled = [{k: np.pad(v, ((0, most - len(v)), (0, 0))) for k, v in b.items()} for b in unpacked]
    for batches, micro in [(packed, 1), (packed, 4), (filled, 1)]:
        tx = optim.make(c, lr, model.abstract, everything)
        loss_fn = sftjax.losses.causal_lm(model)
        step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=micro))
        state, losses = sftjax.TrainState.create(params=params, tx=tx), []
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
