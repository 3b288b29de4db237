"""sftjax.train_step trains a Flax linen module that sftjax did not define: a small conv net learns
to tell shapes in noisy pictures apart, its first layer frozen at random. Expect over 97%.
Command: python experiments/custom_loop/linen.py"""

from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn

import sftjax


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="edges")(x))  # [B, 6, 6, 16]
        x = nn.relu(nn.Conv(32, (3, 3), name="parts")(x))  # [B, 6, 6, 32]
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(4, name="head")(x)  # [B, 4]


def pictures(rng, n):
    """{"image" [n, 12, 12, 1], "label" [n]}: a bar -, a bar |, a cross or two bars, with noise."""
    image, label = rng.normal(0, 0.2, (n, 12, 12, 1)), rng.integers(0, 4, n)
    for x, kind, (i, j) in zip(image[..., 0], label, rng.integers(3, 9, (n, 2)), strict=True):
        x[i, j - 3 : j + 4] += kind in (0, 2)
        x[i - 3 : i + 4, j] += kind in (1, 2)
        x[i - 2 : i + 3, [j - 2, j + 2]] += kind == 3
    return {"image": image.astype(np.float32), "label": label}


def loss_fn(params, batch, rng):
    rngs = None if rng is None else {"dropout": rng}  # eval_step passes no rng
    logits = ConvNet().apply({"params": params}, batch["image"], train=bool(rngs), rngs=rngs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    n, hits = np.float32(len(losses)), logits.argmax(-1) == batch["label"]
    return sftjax.Loss(losses.sum(), n, {"accuracy": (hits.sum(), n)})


def main(steps=150):
    rng, tx = np.random.default_rng(0), optax.adamw(4e-3)
    params = ConvNet().init(jax.random.key(0), pictures(rng, 1)["image"])["params"]
    rules = (("edges/.*", False), (".*", True))
    state = sftjax.TrainState.create(params=params, tx=tx, trainable=rules)
    step = partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=2)
    step = jax.jit(step, donate_argnums=0)
    for _ in range(steps):
        state, metrics = step(state, pictures(rng, 64))
    print("last step:", "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    test = sftjax.eval_step(state.all_params, pictures(rng, 1000), loss_fn=loss_fn)
    accuracy = float(np.divide(*test.metrics["accuracy"]))
    print(f"accuracy on new pictures: {accuracy:.1%}")
    return accuracy, state


if __name__ == "__main__":
    main()
