"""sftjax.train_step trains a Flax nnx module that sftjax did not define: an MLP tells two spirals
apart by random Fourier features, which stay frozen. Expect over 97%.
Command: python experiments/custom_loop/nnx.py"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sftjax


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.features = nnx.Linear(2, 64, kernel_init=nnx.initializers.normal(2.0), rngs=rngs)
        self.hidden = nnx.Linear(128, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        x = self.features(x)  # [B, 64]
        x = nnx.relu(self.hidden(jnp.concatenate([jnp.sin(x), jnp.cos(x)], -1)))
        return self.out(x)[:, 0]  # [B], the log odds of the second spiral


def points(rng, n):
    """{"x" [n, 2], "label" [n]} of two spirals of one and a half turns, with noise."""
    label, t = rng.integers(0, 2, n), np.sqrt(rng.uniform(0.02, 1, n))
    angle = 3 * np.pi * t + np.pi * label
    x = np.stack([t * np.cos(angle), t * np.sin(angle)], -1) + rng.normal(0, 0.04, (n, 2))
    return {"x": x.astype(np.float32), "label": label}


def main(steps=150):
    graph, params = nnx.split(Classifier(nnx.Rngs(0)))

    def loss_fn(params, batch, rng):
        odds = nnx.merge(graph, params)(batch["x"])
        losses, n = optax.sigmoid_binary_cross_entropy(odds, batch["label"]), jnp.float32(len(odds))
        return sftjax.Loss(losses.sum(), n, {"accuracy": (((odds > 0) == batch["label"]).sum(), n)})

    rng, tx = np.random.default_rng(0), optax.adamw(3e-3)
    rules = (("features/.*", False), (".*", True))
    state = sftjax.TrainState.create(params=params, tx=tx, trainable=rules)
    step = partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=2)
    step = jax.jit(step, donate_argnums=0)
    for _ in range(steps):
        state, metrics = step(state, points(rng, 256))
    print("last step:", "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    test = sftjax.eval_step(state.all_params, points(rng, 1000), loss_fn=loss_fn)
    accuracy = float(np.divide(*test.metrics["accuracy"]))
    print(f"accuracy on new points: {accuracy:.1%}")
    return accuracy, state


if __name__ == "__main__":
    main()
