"""IQuest-Coder's loop form in plain torch, the reference where transformers has no class.

Parameters are named as in the files. Every token is computed anew: no cache.
"""

import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x, theta):
    """x [B, N, S, H] by its places 0, 1, ..., dimension i paired with i + H/2."""
    S, half = x.shape[2], x.shape[3] // 2
    angles = torch.arange(S)[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x.float().chunk(2, -1)
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(q, k, v, window):
    """q [B, N, S, H], k and v [B, K, S, H]; a token sees itself and window-1 before it."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    behind = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (behind >= 0) & (behind < window)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, F_ = c["hidden_size"], c["intermediate_size"]
        self.head_dim, self.theta = D // c["num_attention_heads"], c.get("rope_theta", 500_000.0)
        self.window = c.get("loop_window_size", 64)
        kv = c["num_key_value_heads"] * self.head_dim
        sizes = {"q_proj": (D, D), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (D, D)}
        self.self_attn = nn.ModuleDict({k: nn.Linear(*s, bias=False) for k, s in sizes.items()})
        sizes = {"gate_proj": (D, F_), "up_proj": (D, F_), "down_proj": (F_, D)}
        self.mlp = nn.ModuleDict({k: nn.Linear(*s, bias=False) for k, s in sizes.items()})
        self.input_layernorm = Norm(D, c.get("rms_norm_eps", 1e-6))
        self.post_attention_layernorm = Norm(D, c.get("rms_norm_eps", 1e-6))

    def forward(self, x, gate, first):
        """(x [B, S, D], keys and values). first: those of this layer in the first pass, if past."""
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[n](h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        if first is None:
            o = attend(q, k, v, window=q.shape[2])
        else:
            g = torch.einsum("bnsh,nh->bns", q, gate.weight) + gate.bias[:, None]
            g = g.sigmoid()[..., None]
            o = g * attend(q, *first, window=q.shape[2]) + (1 - g) * attend(q, k, v, self.window)
        x = x + self.self_attn["o_proj"](o.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        h = F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)
        return x + self.mlp["down_proj"](h), (k, v)


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        n, heads, D = c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"]
        self.embed_tokens = nn.Embedding(c["vocab_size"], D)
        self.layers = nn.ModuleList(Layer(c) for _ in range(n))
        # A Linear's weight is [out, in]: of each head's gate, here.
        self.gate_projections = nn.ModuleList(nn.Linear(D // heads, heads) for _ in range(n))
        self.norm = Norm(D, c.get("rms_norm_eps", 1e-6))
        self.loops = c.get("loop_num", 2)

    def forward(self, tokens):
        x, first = self.embed_tokens(tokens), [None] * len(self.layers)
        for loop in range(self.loops):
            for i, layer in enumerate(self.layers):
                x, kv = layer(x, self.gate_projections[i], first[i])
                first[i] = kv if loop == 0 else first[i]
        return self.norm(x)


class Loop(nn.Module):
    """As much of transformers' interface as the tests call."""

    def __init__(self, c):
        super().__init__()
        self.config, self.generation_config = c, SimpleNamespace()
        self.model = Body(c)
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    @classmethod
    def from_pretrained(cls, path, dtype=None):
        """Every tensor used and none missing."""
        model, tensors = cls(json.loads((path / "config.json").read_text())), {}
        for file in path.glob("model*.safetensors"):
            tensors |= load_file(file)
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.to(dtype)

    def save_pretrained(self, path):
        (path / "config.json").write_text(json.dumps(self.config))
        save_file(self.state_dict(), path / "model.safetensors")

    def forward(self, tokens, attention_mask=None):
        """attention_mask: only of padding on the right, which no token sees in any case."""
        return SimpleNamespace(logits=self.lm_head(self.model(tokens)))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def generate(self, tokens, generation_config):
        for _ in range(generation_config.max_new_tokens):
            tokens = torch.cat([tokens, self(tokens).logits[:, -1:].argmax(-1)], 1)
        return tokens
