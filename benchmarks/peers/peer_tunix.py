"""Tunix: PeftTrainer's own jitted step, on its Llama 3 model read by its own loader.

Its compute dtype is that of the weights, so it has no bfloat16 compute on float32 weights.
"""

import jax
import jax.numpy as jnp
import optax
import worker
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft import peft_trainer, utils


def config(hf):
    return llama3.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=hf["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        weight_tying=True,
    )


def model_input(example):
    real = jnp.ones_like(example.input_tokens, dtype=bool)
    return dict(
        input_tokens=example.input_tokens,
        input_mask=example.input_mask,
        positions=utils.build_positions_from_mask(real),
        attention_mask=utils.make_causal_attn_mask(real),
    )


def main():
    job = worker.job()
    model = params.create_model_from_safe_tensors(job["model"], config(worker.hf_config(job)), dtype=jnp.float32)
    trainer = peft_trainer.PeftTrainer(
        model,
        optax.adamw(worker.LEARNING_RATE, **worker.ADAMW),
        peft_trainer.TrainingConfig(eval_every_n_steps=10**9),
    ).with_gen_model_input_fn(model_input)
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as its train() does
    tokens, trained = worker.batch(job)
    example = jax.device_put(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=trained))

    def step():
        return jax.block_until_ready(train_step(example))[0]

    worker.run(step, tokens.size)


main()
