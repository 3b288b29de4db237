"""EasyDeL: SFTTrainer's own jitted step on its Llama, read by its from_pretrained.

No gradient checkpointing and no clipping, since no other worker does either.
"""

import tempfile

import datasets
import easydel
import jax.numpy as jnp
import numpy as np
import transformers
import worker


def load(job):
    return easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        job["model"],
        dtype=jnp.dtype(job["dtype"]),
        param_dtype=jnp.float32,
        from_torch=True,
    )


def arguments(job, folder):
    return easydel.SFTConfig(
        save_directory=folder,
        model_name="benchmark",
        max_length=job["length"],
        total_batch_size=job["rows"],
        max_training_steps=10**6,
        num_train_epochs=1,
        learning_rate=worker.LEARNING_RATE,
        scheduler=easydel.EasyDeLSchedulers.NONE,
        optimizer=easydel.EasyDeLOptimizers.ADAMW,
        weight_decay=worker.ADAMW["weight_decay"],
        warmup_steps=0,
        extra_optimizer_kwargs={k: worker.ADAMW[k] for k in ("b1", "b2", "eps")},
        use_wandb=False,
        report_metrics=False,
        do_last_save=False,
    )


def main():
    job = worker.job()
    tokens, trained = worker.batch(job)
    # With an attention mask it would divide the loss by all tokens of it, trained or not.
    batch = dict(
        input_ids=tokens,
        completion_mask=trained.astype(np.int32),
        labels=np.where(trained, tokens, -100).astype(np.int32),
    )
    rows = [{k: v[i].tolist() for k, v in batch.items()} for i in range(len(tokens))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = easydel.SFTTrainer(
            arguments=arguments(job, folder),
            model=load(job),
            processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        box = [trainer.model_state]

        def step():
            with trainer.mesh:
                box[0], metrics, error = trainer._execute_train_step(box[0], dict(batch))
            if error is not None:
                raise error
            return metrics.loss

        worker.run(step, tokens.size)


main()
