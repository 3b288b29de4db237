"""The masked language model: an encoder goes on learning on plain texts of a domain."""

from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from sftjax import losses
from sftjax.errors import ConfigError
from sftjax.models.base import Model
from sftjax.tasks.base import EvalFn, Scores, perplexity, read_model
from sftjax.tasks.texts import TEXTS, Texts


class MaskedLM(Texts):
    """Every token of a text may be hidden but its special ones; see losses.masked_lm."""

    usual: ClassVar = {"text": TEXTS}
    whole = False
    cuttable = True
    loss = staticmethod(losses.masked_lm)
    options = ("mask_rate", "chunk_tokens")
    metrics = ("perplexity", "accuracy")

    def placed(self, n: int, wanted: Any) -> tuple[np.ndarray, np.ndarray]:
        """Weight 1 at all tokens of the text itself; the targets are the tokens, in the loss."""
        weights, (before, after) = np.ones(n, np.float32), self.special_ends
        weights[:before] = weights[n - after :] = 0.0
        return weights, np.zeros(n, np.int32)

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The encoder of model.path with its head of the vocabulary."""
        model = read_model(section, head="vocabulary", **changes)
        if model.config.causal:
            raise ConfigError(
                f"model.path={section.path}: task='masked_lm' takes an encoder, and this model"
                " reads from left to right: train it with task='causal_lm'"
            )
        return model

    def own(self, options: dict) -> dict[str, Any]:
        """As of Task, and the token that hides others."""
        # Without a tokenizer it is a plan's, whose program is that of any id.
        mask_id = 0 if self.tokenizer is None else self.tokenizer.mask_token_id
        if mask_id is None:
            raise ConfigError("task='masked_lm': the tokenizer has no mask token")
        return {**super().own(options), "mask_id": mask_id}

    def eval_fn(self, model: Model, options: dict) -> EvalFn:
        """The loss of tokens that a hash chooses, and how many of them are found."""
        loss_fn = self.loss(model, accuracy=True, **self.own(options))
        return lambda params, batch, model_state=None: (loss_fn(params, batch, None), {})

    def score(self, loss: float, predictions: dict[str, np.ndarray], **how: Any) -> Scores:
        """The perplexity; the accuracy is a metric of the loss."""
        return Scores({"perplexity": perplexity(loss)})
