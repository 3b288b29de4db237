"""transformers as the reference of decoders that read images: LLaVA's own, and the parts of Phi-4's.

transformers has no model of Phi-4's form; it is its Phi-3, its SigLIP 2 and the two matrices between them.
"""

import json

import numpy as np
from reference import F, torch, transformers
from safetensors.numpy import save_file
from vision_language import TOKEN, patches_of, stored

TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."


class Llava:
    """LLaVA, PaliGemma or Gemma 3 of a directory, every tensor of it used and none missing."""

    def __init__(self, path, dtype=torch.float32):
        kind = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
        how = dict(output_loading_info=True, attn_implementation="eager", dtype=dtype)
        self.module, info = kind.from_pretrained(path, **how)
        missing = [k for k in info["missing_keys"] if ".head." not in k]
        assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
        self.module.eval()

    def logits(self, model, doc):
        out = {}
        if doc.files:
            whole = [np.swapaxes(patches_of(model).of(f), 1, 2) for f in doc.files]
            v = model.config.vision
            side = whole[0].shape[0] * v.patch
            pixels = np.stack([x.reshape(side, side, 3) for x in whole])
            out["pixel_values"] = scaled(v, pixels.transpose(0, 3, 1, 2), (3, 1, 1), self.module.dtype)
        tokens = torch.tensor(doc.tokens[None], dtype=torch.long)
        if model.config.whole:
            out["token_type_ids"] = (tokens == TOKEN).long()
        if model.config.prefix:
            first = np.flatnonzero(doc.weights > 0).min(initial=len(doc.weights))
            out["token_type_ids"] = (torch.arange(tokens.shape[1]) >= int(first)).long()[None]
        return self.module(input_ids=tokens, **out).logits[0]

    def parameters(self):
        return list(self.module.parameters())

    def save(self, directory):
        self.module.save_pretrained(directory)


class Phi(torch.nn.Module):
    """As the files of Phi-4-reasoning-vision say, of a directory."""

    def __init__(self, path, dtype=torch.float32):
        super().__init__()
        hf = json.loads((path / "config.json").read_text())
        tensors = {k: torch.tensor(x) for k, x in stored(path).items()}
        other = ("vision_config", "model_type", "architectures")
        text = transformers.Phi3Config(**{k: v for k, v in hf.items() if k not in other})
        tower = transformers.Siglip2VisionConfig(**hf["vision_config"], vision_use_head=False)
        for config in (text, tower):
            config._attn_implementation = "eager"
        width, inner = text.hidden_size, tower.hidden_size
        self.text = transformers.Phi3ForCausalLM(text)
        self.tower = transformers.Siglip2VisionModel(tower)
        parts = torch.nn.Linear(inner, width), torch.nn.GELU(), torch.nn.Linear(width, width)
        self.projector = torch.nn.Sequential(*parts)
        own = {TOWER: self.tower, PROJECTOR: self.projector}
        self.files = {}
        for prefix, module in own.items():
            names = {
                k: k if any(n.startswith(prefix + k) for n in tensors) else f"vision_model.{k}"
                for k in module.state_dict()
            }  # transformers 5 leaves this part of the names out
            module.load_state_dict({k: tensors[prefix + n] for k, n in names.items()})
            self.files |= {prefix + names[k]: p for k, p in module.named_parameters()}
        rest = {k: x for k, x in tensors.items() if not k.startswith(tuple(own))}
        self.text.load_state_dict(rest)
        self.files |= dict(self.text.named_parameters())
        assert self.files.keys() == tensors.keys()
        self.config = hf
        self.to(dtype).eval()

    def features(self, model, file):
        cut, v = patches_of(model).of(file), model.config.vision
        height, width = cut.shape[:2]
        n, most = height * width, v.patches[1]
        dtype = self.projector[0].weight.dtype
        pixels = scaled(v, cut.reshape(1, n, -1, 3), (3,), dtype).reshape(1, n, -1)
        pixels = F.pad(pixels, (0, 0, 0, most - n))
        mask = torch.tensor([[1] * n + [0] * (most - n)])
        shapes = torch.tensor([[height, width]])
        out = self.tower(pixels, pixel_attention_mask=mask, spatial_shapes=shapes, output_hidden_states=True)
        return self.projector(out.hidden_states[-2][0, :n])

    def logits(self, model, doc):
        tokens = torch.tensor(doc.tokens[None], dtype=torch.long)
        x = self.text.model.embed_tokens(tokens)
        if doc.files:
            found = torch.cat([self.features(model, f) for f in doc.files])
            x = x.masked_scatter((tokens == TOKEN)[..., None], found)
        return self.text(inputs_embeds=x).logits[0]

    def save(self, directory):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.config))
        tensors = {k: p.detach().numpy().copy() for k, p in self.files.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def scaled(v, pixels, shape, dtype):
    mean, std = (np.reshape(x, shape) for x in (v.mean, v.std))
    return torch.tensor((pixels / 255 - mean) / std, dtype=dtype)


def theirs(path, dtype=torch.float32):
    """The reference of a case's directory."""
    kind = json.loads((path / "config.json").read_text())["model_type"]
    return (Phi if kind == "phi4-siglip" else Llava)(path, dtype)


def loss(reference, model, docs):
    """Mean cross-entropy over the trained tokens of documents, each alone."""
    total, n = 0.0, 0
    for doc in docs:
        logits, on = reference.logits(model, doc)[:-1], torch.tensor(doc.weights[1:] > 0)
        wanted = torch.tensor(doc.tokens[1:], dtype=torch.long)[on]
        total, n = total + F.cross_entropy(logits[on], wanted, reduction="sum"), n + len(wanted)
    return total / n


def gradients(reference, model, docs, directory):
    """The loss; and write its gradients in place of the parameters, under the files' names."""
    value = loss(reference, model, docs)
    value.backward()
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(p.grad if p.grad is not None else 0 * p)
    reference.save(directory)
    return value.item()
