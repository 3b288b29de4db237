"""TRL: SFTTrainer.train(), held between two steps by a callback.

JOB may also hold packing: true for rows packed by TRL (bfd, padding-free as TRL does it).
No gradient checkpointing, no clipping, since no other worker does either; else as shipped.
"""

import tempfile

import datasets
import numpy as np
import torch
import transformers
import trl
import worker


class Trainer(trl.SFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        self.tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.loss = super().training_step(model, inputs, *args, **kwargs)
        return self.loss


class Hold(transformers.TrainerCallback):
    """Counts the time from one step's end to the next, so collation and all."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.pace = worker.Pace(epoch=len(self.trainer.get_train_dataloader()))

    def on_step_end(self, args, state, control, **kwargs):
        self.pace.step(self.trainer.loss, self.trainer.tokens)


def arguments(job, folder):
    return trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=job["rows"],
        max_length=job["length"],
        packing=job.get("packing", False),
        max_steps=10**6,
        learning_rate=worker.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=worker.ADAMW["weight_decay"],
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=job["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential" if job["work"] == "steps" else "random",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main():
    job = worker.job()
    repeats = 64 if job["work"] == "steps" else 1  # an epoch's end costs time too
    rows = [
        {"input_ids": tokens.tolist(), "labels": np.where(trained, tokens, -100).tolist()}
        for tokens, trained in worker.examples(job)
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    hold = Hold()
    with tempfile.TemporaryDirectory() as folder:
        hold.trainer = Trainer(
            model,
            arguments(job, folder),
            train_dataset=datasets.Dataset.from_list(rows * repeats),
            processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[hold],
        )
        hold.trainer.train()


main()
