"""MaxText: train_step under its own jit, settings by its pyconfig; the loss of its SFT.

Layers in a scan and without rematerialisation, its fastest settings here that fit.
"""

import os

import jax
import maxtext
import numpy as np
import worker
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils
from safetensors.numpy import load_file


def settings(job, hf):
    base = os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")
    return pyconfig.initialize(
        ["", base],
        run_name="benchmark",
        hardware="cpu" if jax.default_backend() == "cpu" else jax.default_backend(),
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        enable_goodput_recording=False,
        dataset_type="synthetic",
        base_emb_dim=hf["hidden_size"],
        base_num_query_heads=hf["num_attention_heads"],
        base_num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        base_mlp_dim=hf["intermediate_size"],
        base_num_decoder_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        rope_max_timescale=int(hf["rope_theta"]),
        logits_via_embedding=True,
        normalize_embedding_logits=False,
        dtype=job["dtype"],
        per_device_batch_size=job["rows"],
        max_target_length=job["length"],
        remat_policy="none",
        scan_layers=True,
        steps=10**6,
        learning_rate=worker.LEARNING_RATE,
        warmup_steps_fraction=0.0,
        gradient_clipping_threshold=0.0,
        adam_b1=worker.ADAMW["b1"],
        adam_b2=worker.ADAMW["b2"],
        adam_eps=worker.ADAMW["eps"],
        adam_weight_decay=worker.ADAMW["weight_decay"],
    )


def load(state, job, hf):
    """The weights of the Hugging Face directory into MaxText's names, stacked over layers."""
    file = load_file(os.path.join(job["model"], "model.safetensors"))
    n, d = hf["num_hidden_layers"], hf["head_dim"]

    def stacked(name, *shape):
        layers = [file[f"model.layers.{i}.{name}.weight"].T.reshape(shape) for i in range(n)]
        return np.stack(layers, 1)

    width, mlp = hf["hidden_size"], hf["intermediate_size"]
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    weights = {
        "decoder_norm/scale": file["model.norm.weight"],
        "mlp/wi_0/kernel": stacked("mlp.gate_proj", width, mlp),
        "mlp/wi_1/kernel": stacked("mlp.up_proj", width, mlp),
        "mlp/wo/kernel": stacked("mlp.down_proj", mlp, width),
        "pre_self_attention_layer_norm/scale": stacked("input_layernorm", width),
        "post_self_attention_layer_norm/scale": stacked("post_attention_layernorm", width),
        # MaxText does not scale the scores, but the weights.
        "query/kernel": stacked("self_attn.q_proj", width, heads, d) / d**0.5,
        "key/kernel": stacked("self_attn.k_proj", width, kv_heads, d),
        "value/kernel": stacked("self_attn.v_proj", width, kv_heads, d),
        "out/kernel": stacked("self_attn.o_proj", heads, d, width),
        "token_embedder/embedding": file["model.embed_tokens.weight"],
    }
    for path, variable in nnx.to_flat_state(nnx.state(state.model, nnx.Param)):
        name = "/".join(map(str, path))
        (value,) = [w for tail, w in weights.items() if name.endswith(tail)]
        old = variable.get_value()
        if old.shape != value.shape:
            raise ValueError(f"{name} has the shape {old.shape}; the weights have {value.shape}")
        variable.set_value(jax.device_put(value.astype(old.dtype), old.sharding))


def batch(job):
    tokens, trained = worker.batch(job)
    position = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    trained = np.pad(trained[:, 1:], ((0, 0), (0, 1)))
    return dict(
        inputs=tokens,
        inputs_position=position,
        inputs_segmentation=np.ones_like(tokens),
        targets=np.roll(tokens, -1, 1),
        targets_position=position,
        targets_segmentation=trained.astype(np.int32),
    )


def main():
    job = worker.job()
    hf = worker.hf_config(job)
    config = settings(job, hf)
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(config, None)
    load(state, job, hf)
    graph, state = nnx.split(state)
    param_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    train_step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, params_shardings=param_shardings
    )
    example = jax.device_put(batch(job), sharding.get_input_data_sharding(config, mesh))
    box = [state]

    def step():
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            box[0], metrics = train_step(box[0], example)
        return metrics["scalar"]["learning/loss"]

    worker.run(step, example["inputs"].size)


main()
