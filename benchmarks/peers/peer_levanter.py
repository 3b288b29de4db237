"""Levanter: its Trainer's own jitted step on its Llama, read by its Hugging Face converter.

No gradient checkpointing and no clipping, since no other worker does either. Its optimizer decays
no norms, embedding or biases by default.
"""

import dataclasses
import tempfile
from pathlib import Path

import haliax as hax
import jax
import jax.numpy as jnp
import jmp
import transformers
import worker
from levanter.models.llama import LlamaConfig
from levanter.models.lm_model import LmExample, compute_next_token_loss
from levanter.optim import AdamConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig


def trainer_config(job, folder):
    policy = "f32" if job["dtype"] == "float32" else "p=f32,c=bfloat16"
    config = TrainerConfig(
        mp=jmp.get_policy(policy),
        log_dir=Path(folder),
        log_jaxprs=False,
        log_xla_hlo=False,
        tracker=NoopConfig(),
        train_batch_size=job["rows"],
        num_train_steps=10**6,
        load_checkpoint=False,
        require_accelerator=False,
    )
    config.initialize()
    return config


def model_config(job, hf):
    config = LlamaConfig.from_hf_config(transformers.LlamaConfig(**hf))
    return dataclasses.replace(config, seq_len=job["length"], head_dim=hf["head_dim"], gradient_checkpointing=False)


def optimizer():
    return AdamConfig(
        learning_rate=worker.LEARNING_RATE,
        lr_schedule="constant",
        warmup=0,
        weight_decay=worker.ADAMW["weight_decay"],
        beta1=worker.ADAMW["b1"],
        beta2=worker.ADAMW["b2"],
        epsilon=worker.ADAMW["eps"],
        max_grad_norm=None,
    ).build(10**6)


def example(job, Batch, Pos):
    tokens, trained = worker.batch(job)
    weights = jnp.pad(trained[:, 1:], ((0, 0), (0, 1)))
    return LmExample(
        tokens=hax.named(jnp.asarray(tokens), (Batch, Pos)),
        loss_mask=hax.named(weights.astype(jnp.float32), (Batch, Pos)),
    )


def main():
    job = worker.job()
    hf = worker.hf_config(job)
    llama = model_config(job, hf)
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_config(job, folder)
        trainer = Trainer(config, optimizer(), compute_next_token_loss, add_default_hooks=False)
        with trainer:
            converter = llama.hf_checkpoint_converter(job["model"])
            model = converter.load_pretrained(
                llama.model_type,
                config=llama,
                axis_mapping=trainer.parameter_axis_mapping,
                dtype=jnp.float32,
            )
            state = trainer.initial_state(jax.random.PRNGKey(0), model=model)
            del model
            batch = example(job, config.TrainBatch, llama.Pos)
            box = [state]
            del state

            def step():
                info = trainer.train_step(box[0], batch)
                box[0] = info.state
                return info.loss

            worker.run(step, job["rows"] * job["length"])


main()
