"""Questions to a language model: what it answers, and what the answers score."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sftjax.data.masking.question import Question, continuations
from sftjax.errors import ConfigError
from sftjax.evaluation import generation, metrics
from sftjax.evaluation.likelihood import log_likelihoods
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.models import decoder

LABELS = 20  # references of at most so many different texts are taken for labels
# Metrics by which a part of what was asked is an answer too: what these score stands beside.
OVERLAP = ("token_f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
LEAD = 3  # sentences


class Asking(NamedTuple):
    """How questions are asked and measured: the config's eval.metrics, and so on."""

    metrics: tuple[str, ...] = ("exact_match",)
    answer: str = ""
    choices: str = ""
    draws: int = 1

    @classmethod
    def of(cls, config: ConfigDict) -> "Asking":
        """Of a config. Raises: ConfigError for a metric of something else."""
        e = config.eval
        metrics.check(e.metrics, "texts")
        if not e.metrics:
            raise ConfigError("eval.metrics is empty; name one metric of answers or more")
        if e.draws > 1 and not config.generate.temperature:
            raise ConfigError(f"eval.draws={e.draws}: with generate.temperature=0 all of them are equal")
        for key, metric in {"answer": "number", "choices": "choice"}.items():
            if e[key] and metric not in e.metrics:
                raise ConfigError(
                    f"eval.{key}={e[key]!r} is of the metric {metric!r}, which eval.metrics lacks: {tuple(e.metrics)}"
                )
        if e.draws > 1 and set(e.metrics) == {"choice"}:
            raise ConfigError(f"eval.draws={e.draws}: choice draws nothing")
        return cls(tuple(e.metrics), e.answer, e.choices, e.draws)


def with_choices(
    questions: Sequence[Question], asking: Asking, given: Sequence[Any], wheres: Sequence[str]
) -> list[Question]:
    """The questions with the candidates of `choice`: given, or all their references.

    given: what each record holds under eval.choices; wheres: the records' places.
    Raises: ConfigError where these are no list of texts with the reference among them.
    """
    if not asking.choices:
        labels = sorted({q.answer.strip() for q in questions})
        if not 2 <= len(labels) <= LABELS:
            raise ConfigError(
                f"eval.metrics: choice decides between the references where these are 2 to {LABELS}"
                f" different texts, and here are {len(labels)}: name a field that lists each row's"
                " candidates, such as eval.choices='choices'"
            )
        return [q._replace(choices=[_as_of(q, text) for text in labels]) for q in questions]
    out = []
    for q, some, where in zip(questions, given, wheres, strict=True):
        texts = [x.strip() for x in some if isinstance(x, str)] if isinstance(some, list) else []
        if len(texts) < 2 or not all(texts) or q.answer.strip() not in texts:
            raise ConfigError(
                f"{where}: eval.choices={asking.choices!r} is {some!r:.80}: expected a list of two"
                f" or more texts, with the answer {q.answer!r:.80} among them"
            )
        out.append(q._replace(choices=[_as_of(q, text) for text in texts]))
    return out


def _as_of(asked, text):
    """With the blanks before it that the reference has: they are in its first token."""
    return asked.answer[: len(asked.answer) - len(asked.answer.lstrip())] + text


def answered(
    model: decoder.Model,
    params: Any,
    questions: Sequence[Question],
    asking: Asking,
    tokenizer: Tokenizer,
    *,
    cut_at: str = "",
    groups: Sequence | None = None,
    **options: Any,
) -> dict[str, Any]:
    """{"answers": texts, "<metric>": value, "errors", "baselines", "rows", "tables"}.

    cut_at: a text that ends an answer. groups: of the rows, see metrics.standard_error. options: as of
    generation.generate. Of several draws a row's value is their mean, and its answer a list. Where the references are
    few different texts, as labels are: also the answers' macro F1, the share that are none of them (no_label), and the
    confusion matrix.
    """
    wanted, n = [q.answer for q in questions], asking.draws
    out: dict[str, Any] = {"errors": {}, "baselines": {}, "rows": {}}
    if names := [name for name in asking.metrics if name != "choice"]:
        prompts = [q.prompt for q in questions for _ in range(n)]
        found = generation.generate(model, params, prompts, **options)
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]
        texts = [t.lstrip().partition(cut_at)[0] for t in texts] if cut_at else texts
        every = [answer for answer in wanted for _ in range(n)]
        # The draws of a question are a group, like questions of one.
        same = [one for one in groups or range(len(questions)) for _ in range(n)]
        how: Any = dict(answer=asking.answer, baselines=_trivial(questions, names, n), errors=True)
        scored = metrics.texts(names, every, texts, groups=same if n > 1 or groups else None, **how)
        out["errors"], out["baselines"] = dict(scored.errors), dict(scored.baselines)
        out["rows"] = {k: np.reshape(x, (-1, n)).mean(1) for k, x in scored.rows.items()}
        out |= scored.values | _as_labels(every, texts)
        out["answers"] = [texts[i : i + n] for i in range(0, len(texts), n)] if n > 1 else texts
    if "choice" in asking.metrics:
        chosen = choose(model, params, questions, tokenizer, **options)
        right = np.array([t == w.strip() for t, w in zip(chosen, wanted, strict=True)], np.float64)
        out |= {"choice": float(right.mean()), "answers": out.get("answers", chosen)}
        out["errors"]["choice"] = metrics.standard_error(right, groups)
        out["rows"]["choice"] = right
    return out


def choose(
    model: decoder.Model,
    params: Any,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 64,
    mesh: Any = None,
    said: Callable[[int, int], None] = lambda done, of: None,
    **unused: Any,
) -> list[str]:
    """Of each question the choice whose text the model finds likeliest after the prompt."""
    pairs = [pair for q in questions for pair in continuations(tokenizer, q)]
    sums, _ = log_likelihoods(model, params, pairs, batch_size=batch_size, mesh=mesh, said=said)
    each = np.split(sums, np.cumsum([len(q.choices) for q in questions])[:-1])
    return [q.choices[int(np.argmax(some))].strip() for q, some in zip(questions, each, strict=True)]


def _trivial(questions, names, n) -> Mapping[str, Sequence[str]]:
    """What needs no model: the usual answer; of metrics of overlap also what was asked."""
    [(usual, count)] = Counter(q.answer for q in questions).most_common(1)
    out = {f"always {usual:.40}": [usual] * len(questions)} if count > 1 else {}
    if set(names) & set(OVERLAP):
        out["copy"] = [q.asked for q in questions]
        out[f"lead-{LEAD}"] = [metrics.lead(q.asked, LEAD) for q in questions]
    return {what: [text for text in texts for _ in range(n)] for what, texts in out.items()}


def _as_labels(wanted: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """{"f1", "no_label", "tables"} where the texts that are wanted are labels, else {}."""
    wanted, given = [x.strip() for x in wanted], [x.strip() for x in given]
    names = sorted(set(wanted))
    if not 2 <= len(names) <= LABELS or len(wanted) < 5 * len(names):
        return {}
    index = {name: i for i, name in enumerate(names)}
    w, answers = (np.array([index.get(text, -1) for text in some]) for some in (wanted, given))
    found = metrics.labels(w, answers, names)
    tables = {"confusion": found.tables["confusion"]}
    return {"f1": found.values["f1"], "no_label": float((answers < 0).mean()), "tables": tables}
