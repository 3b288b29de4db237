"""Models of images against transformers, live: logits, gradients, twenty steps, files both ways."""

import jax
import numpy as np
import optax
import pytest
from reference import torch, transformers
from safetensors.numpy import load_file
from vision import CASES, PIXELS, WANTED, images, write

import sftjax
from sftjax import hf

pytestmark = pytest.mark.parity
F = torch.nn.functional
COUNTS = "num_batches_tracked"


def theirs(path):
    kind = transformers.AutoModelForImageClassification
    model, info = kind.from_pretrained(path, output_loading_info=True)
    missing = [k for k in info["missing_keys"] if not k.endswith(COUNTS) and ".head." not in k]
    assert not missing and not info["unexpected_keys"], info
    return model


def pixel_values(kind=torch.float32):
    x = (images() / 255 - PIXELS["image_mean"]) / PIXELS["image_std"]
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=kind)


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_torch_s(name, tmp_path):
    """SGD, whose steps are the gradients themselves; batch statistics go along."""
    model, params = hf.load_pretrained(write(name, tmp_path / "in"))
    reference = theirs(tmp_path / "in").train()
    stats, losses = params.pop("stats", None), []
    rate = 1e-3
    tx, optimizer = optax.sgd(rate), torch.optim.SGD(reference.parameters(), rate)
    batch = {"image": images(), "weights": np.ones((4, 1), np.float32)}
    batch["targets"] = np.array(WANTED)[:, None]
    loss_fn = sftjax.losses.classification(model)
    state = sftjax.TrainState.create(params=params, tx=tx, model_state=stats)
    step = jax.jit(lambda s: sftjax.train_step(s, batch, loss_fn=loss_fn, tx=tx))
    for _ in range(20):
        state, metrics = step(state)
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(pixel_values=pixel_values()).logits, torch.tensor(WANTED))
        loss.backward()
        optimizer.step()
        losses.append((float(metrics["loss"]), loss.item()))
    ours, wanted = np.array(losses).T
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    assert wanted[-1] < wanted[0]
    whole = state.all_params | ({} if stats is None else {"stats": state.model_state})
    hf.save_pretrained(tmp_path / "out", model, whole)
    reference.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "theirs"))
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=2e-5 * max(1, np.abs(b[key]).max()))
    again = theirs(tmp_path / "out").eval()
    with torch.no_grad():
        wanted = again(pixel_values=pixel_values()).logits.numpy()
    own = () if stats is None else (state.model_state,)
    hidden, _ = model.outputs(state.all_params, {"image": images()}, None, *own)
    given = model.class_logits(state.all_params, hidden)[:, 0]
    np.testing.assert_allclose(given, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["vit", "resnet-bottleneck"])
def test_bfloat16_is_as_near_to_float32_as_theirs(name, tmp_path):
    write(name, tmp_path)
    reference = theirs(tmp_path).eval()
    with torch.no_grad():
        exact = reference.double()(pixel_values=pixel_values(torch.float64)).logits.numpy()
        low = reference.bfloat16()(pixel_values=pixel_values(torch.bfloat16)).logits
    model, params = hf.load_pretrained(tmp_path)
    model, stats = model.replace(dtype="bfloat16"), params.pop("stats", None)
    hidden, _ = model.outputs(params, {"image": images()}, None, *([stats] if stats else []))
    given = model.class_logits(params, hidden)[:, 0]
    errors = [np.abs(np.float64(x) - exact).max() for x in (given, low.float().numpy())]
    assert errors[0] <= 1.5 * errors[1] + 1e-3
