"""What the tasks share that write text: a loss of tokens, and questions that are answered."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftjax import losses
from sftjax.errors import writing
from sftjax.evaluation import metrics
from sftjax.evaluation.answers import Asking, answered
from sftjax.models import decoder
from sftjax.tasks.base import EvalFn, Scores, Task, perplexity


class Answering(Task):
    """A task whose model has a vocabulary head, and whose data.test is questions."""

    loss = staticmethod(losses.causal_lm)
    metrics = ("perplexity", "accuracy")
    counts = ("cells", "tokens", "trained_tokens")
    asking: Asking = Asking()
    cut_at = ""  # where an answer ends, in the text
    generates = True

    def eval_fn(self, model: decoder.Model, options: dict) -> EvalFn:
        """The token-weighted loss, whatever the weighting of training, and the accuracy.

        The predictions are the sums of each document's losses and weights.
        """
        chunk = options.get("chunk_tokens", losses.CHUNK_TOKENS)
        loss_fn = losses.causal_lm(model, accuracy=True, chunk_tokens=chunk, documents=True)
        return lambda params, batch, model_state=None: loss_fn(params, batch, None)

    def held(self, predictions: dict[str, Any], final: bool) -> dict[str, np.ndarray]:
        """At the end the sums of each document there is; before, nothing."""
        found = super().held(predictions, final) if final else {}
        return {k: v[found["tokens"] > 0] for k, v in found.items()}

    def score(
        self, loss: float, predictions: dict[str, np.ndarray], *, groups: Sequence | None = None, errors: bool = False
    ) -> Scores:
        """The perplexity; with errors the mean loss of each document and the standard error of the whole.

        The accuracy is a metric of the loss.
        """
        if not errors:
            return Scores({"perplexity": perplexity(loss)})
        held = predictions["tokens"] > 0
        total, weight = (predictions[k][held].astype(np.float64) for k in ("losses", "weights"))
        rows = {"loss": total / np.where(weight > 0, weight, 1), "weight": weight}
        # Of a ratio of sums over documents, which are drawn; not of tokens, which are not.
        off = (total - loss * weight) * len(total) / max(weight.sum(), 1e-38)
        found = {"loss": metrics.standard_error(off, groups)} if len(off) > 1 else {}
        return Scores({"perplexity": perplexity(loss)}, errors=found, rows=rows)

    def answers(
        self, model: decoder.Model, params: Any, questions: list, groups: Sequence | None = None, **options: Any
    ) -> dict:
        """What the texts score by eval.metrics, see evaluation.answers.answered."""
        options |= dict(stop_ids=self.stop_ids, cut_at=self.cut_at, groups=groups)
        return answered(model, params, questions, self.asking, self.tokenizer, **options)

    def shown(self, result: dict, questions: list, n: int) -> str:
        """The first n questions with the answers before and after, and the one that is wanted."""
        lines, before, after = [], result["before"], result["after"]
        for i, asked in enumerate(questions[:n]):
            prompt = self.tokenizer.decode(asked.prompt, skip_special_tokens=True)
            lines += [
                f"  prompt  {_line(prompt)}",
                f"  before  {_line(before['answers'][i])}",
                f"  after   {_line(after['answers'][i])}",
                f"  wanted  {_line(asked.answer)}",
                "",
            ]
        return "\n".join(lines)

    def write_answers(self, path: Path, questions: list, before: dict, after: dict) -> None:
        """A JSON line for each question: prompt, reference, and the answers before and after.

        Of several draws an answer is a list.
        """
        with writing("the directory", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with writing("the file", path), open(path, "w", encoding="utf-8") as f:
            rows = zip(questions, before["answers"], after["answers"], strict=True)
            for asked, old, new in rows:
                row = {
                    "prompt": asked.text if getattr(asked, "images", ()) else self.tokenizer.decode(asked.prompt),
                    "reference": asked.answer,
                }
                row |= {"before": old, "after": new}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")


def _line(answer, most=100):
    """On one line; of several draws the first."""
    text = answer if isinstance(answer, str) else answer[0]
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= most else text[: most - 3] + "..."
