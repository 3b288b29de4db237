"""What a model offers to a task, a run and an export: a body, and the head that reads it.

A task asks a `Model` and knows no architecture.

Letters of shapes: B rows, S tokens of a row, D width, C classes.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from sftjax.errors import ConfigError, ModelError
from sftjax.ops import weight
from sftjax.params import replace


class Inserted(NamedTuple):
    """What stands in a batch in place of some tokens' embeddings, as features of images do."""

    own: jax.Array  # bool [B, S]: of which tokens
    values: jax.Array  # [B, S, D]
    sees: jax.Array | None = None  # int32 [B, S]: the last position that each token sees; None = its own


@dataclasses.dataclass(frozen=True)
class Model:
    """Config, abstract parameters and pure functions of them; holds no arrays.

    config: a frozen dataclass; head: which it has; classes: 0, or the rows of a head of classes. source: hf.Origin, the
    facts of the directory it came from, for export. nodes: which weights are nodes; see params.replace. kept: the
    `state` that a task keeps beside parameters. One with a vocabulary head (config.head == "vocabulary") has `head` and
    `logits` as well, see decoder.Model, and perhaps a `vocab_bias`.
    """

    tree: ClassVar[Callable[..., dict]]  # the Params of a config
    reads: ClassVar[str]  # the token of a document from which its class is read, "first" or "last"

    config: Any
    source: Any = dataclasses.field(default=None, compare=False)
    nodes: tuple = ()
    kept: Any = dataclasses.field(default=None, compare=False)

    @cached_property
    def abstract(self) -> dict:
        """The tree of params.Param, with nodes in place of those that `nodes` matches."""
        return replace(self.tree(self.config), self.nodes)

    @property
    def state(self) -> dict | None:
        """The tree of Param of what is no parameter, as batch statistics are; None for nothing."""
        return self.kept

    @property
    def logit_options(self) -> dict:
        """How logits follow from hidden states and head; see ops.cross_entropy."""
        c = self.config
        return dict(scale=c.logit_scale, softcap=c.logit_softcap, vocab=c.vocab)

    def outputs(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> tuple:
        """(hidden [B, S, D], moe.routing_sums or None) of a Batch; rng None: without dropout."""
        raise NotImplementedError

    def hidden(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> jax.Array:
        """The first of `outputs`."""
        return self.outputs(params, batch, rng)[0]

    def class_logits(
        self, params: dict[str, Any], hidden: jax.Array, rng: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, S, C] of hidden [B, S, D]: what each token says of the class.

        segments: int32 [B, S], None for one document a row; rng: of dropout, None = without. Most heads need neither.
        """
        del rng, segments
        return project_classes(params["score"], hidden)

    def train_flops(self, trainable: dict) -> Callable[[float, float, Callable], float]:
        """(tokens, trained, pairs) -> model FLOPs of a training step; see flops.train_flops."""
        from sftjax.models import flops  # it walks the layers of decoder.py, which imports this

        return flops.train_flops(self.config, trainable, self.abstract)

    @property
    def attention_features(self) -> set[str]:
        """What the model asks of an attention backend; see ops.attention.Backend."""
        c = self.config
        used = {
            "window": any(k.window for k in c.kinds) or c.loops > 1,
            "softcap": c.attn_softcap,
            "sinks": c.sinks,
            "bidirectional": not c.causal or c.cross,
            "relative": c.relative,
            "cross": c.cross,
            "distances": c.buckets,
        }
        return {name for name, on in used.items() if on}

    def check_length(self, length: int, what: str) -> None:
        """Raise ConfigError where learned positions do not reach so far."""
        c = self.config
        if c.learned_positions and length > c.max_positions:
            raise ConfigError(f"{what}: the model has {c.max_positions} positions, all learned")

    def names(self) -> list[tuple]:
        """The rows of its Hugging Face table; ModelError for a model of no directory."""
        if self.source is None:
            raise ModelError("names: this Model has no source, whose model_type names its tensors")
        from sftjax.hf import names

        return names.names(self)

    def replace(self, **changes: Any) -> Self:
        """The same model with other fields of its Config: dtype, remat, attention, split."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


def places(batch: dict) -> tuple[jax.Array, jax.Array]:
    """(positions, segments) int32 [B, S] of a Batch; by default one document a row."""
    tokens, positions = batch["tokens"], batch.get("positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = batch.get("segments")
    return positions, jnp.ones_like(tokens) if segments is None else segments


def project_classes(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """float32 [B, S, C] of x [B, S, D] and a head: w [C, D] and, where it has one, b [C]."""
    w = weight.gather_for_use(p["w"], ("classes", "embed"), jnp.float32)
    out = weight.einsum("bsd,cd->bsc", x.astype(jnp.float32), w)
    return out + p["b"] if "b" in p else out
