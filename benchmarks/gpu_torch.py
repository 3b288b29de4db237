"""The torch side of benchmarks/gpu.py: one measurement, printed as a line of JSON.

transformers' Llama with torch.compile (on a GPU), fused AdamW and its own loss, in bf16: autocast
over float32 parameters, or bf16 parameters where the case says so. A card without CUDA is an error
unless the case is a toy.
"""

import argparse
import json
import time

import torch
import transformers
from gpu import CASES, ROPE_THETA, SHAPES, make_batch


def make_model(case, attention, device):
    s = SHAPES[case.shape]
    config = transformers.LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["width"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"], intermediate_size=s["mlp"], tie_word_embeddings=s["tied"],
        max_position_embeddings=s["max_positions"], use_cache=False,
        rope_parameters=dict(rope_type="default", rope_theta=ROPE_THETA),
        attn_implementation=attention,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    first = s["layers"] - case.trained_layers if case.trained_layers else 0
    for name, p in model.named_parameters():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        p.requires_grad_(not first or (name == "model.norm.weight" or (layer or -1) >= first))
        if p.requires_grad:
            p.data = p.data.to(getattr(torch, case.dtype))
    if case.remat == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model


def tensors(case, attention, device):
    batch, _ = make_batch(case)
    labels = batch["targets"].astype("int64")
    labels[batch["weights"] == 0] = -100
    out = dict(input_ids=batch["tokens"], position_ids=batch["positions"], shift_labels=labels)
    out = {k: torch.as_tensor(v.astype("int64"), device=device) for k, v in out.items()}
    if attention.startswith("flash"):  # it finds documents in a batch of one row only
        out = {k: v.reshape(1, -1) for k, v in out.items()}
    return out | {"labels": out["shift_labels"]}


def measure(case, steps, attention):
    cuda = torch.cuda.is_available()
    if not cuda and case.shape != "toy":
        raise SystemExit("this torch has no CUDA device")
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model, batch = make_model(case, attention, device), tensors(case, attention, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-4, fused=cuda)
    forward = torch.compile(model) if cuda else model

    def step():
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device
        return time.perf_counter() - began, value

    first, *warm = [step() for _ in range(3)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = [step() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return dict(
        seconds=[s for s, _ in found], first_step=first[0], peak_bytes=peak, peak_of=device,
        losses=[loss for _, loss in [first, *warm, *found]],
        device=torch.cuda.get_device_name() if cuda else "cpu",
        versions=dict(torch=torch.__version__, transformers=transformers.__version__),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", choices=CASES, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--attention", default="sdpa")
    args = parser.parse_args()
    print(json.dumps(measure(CASES[args.cases], args.steps, args.attention)))


if __name__ == "__main__":
    main()
