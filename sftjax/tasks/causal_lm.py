"""Causal language modelling: conversations and texts, of which the responses are trained."""

import functools
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.data import open_source
from sftjax.data.masking import encode as chat
from sftjax.data.masking.conversation import read_field, to_conversation
from sftjax.data.masking.question import SEPARATOR, Question, question, stop_ids
from sftjax.data.masking.template import template_texts
from sftjax.data.packing.truncate import fit
from sftjax.data.records.rejects import Notes, said, unread
from sftjax.data.records.sources import Source
from sftjax.data.token_store import COLUMNS, Tally
from sftjax.errors import ConfigError
from sftjax.evaluation.answers import Asking, with_choices
from sftjax.hf.tokenizer_files import Tokenizer
from sftjax.models.base import Model
from sftjax.tasks.answering import Answering
from sftjax.tasks.base import counted, read_model
from sftjax.terminal import printable

logger = logging.getLogger(__name__)
READING = ("fields", "roles")  # of a policy: what says how to read a record
FORM = (*READING, "system", "template_kwargs")  # and what to_conversation adds to it


class CausalTally(Tally):
    """Counts chats and trained stop tokens too."""

    def __init__(self, task: "CausalLM", max_length: int, overlong: str) -> None:
        super().__init__(task, max_length, overlong)
        self.stops, self.stopped, self.chats = task.stop_ids, Counter[int](), 0

    def fit(self, encoded: Sequence[tuple[str, chat.Encoded]]) -> list[tuple[np.ndarray, ...]]:
        """As of Tally; counts the chats among the examples."""
        self.chats += sum(example.kind == "chat" for _, example in encoded)
        return super().fit(encoded)

    def count(self, pieces: Sequence[tuple[np.ndarray, ...]]) -> None:
        """As of Tally; counts each stop token where it is trained."""
        super().count(pieces)
        if pieces:
            tokens, weights = (np.concatenate([piece[i] for piece in pieces]) for i in range(2))
            self.stopped.update(tokens[np.isin(tokens, self.stops) & (weights > 0)].tolist())

    def report(self, skipped: Mapping[str, int]) -> dict:
        """As of Tally, with chat, stop_token (that trained most often) and stop_token_trained."""
        stop = self.stopped.most_common(1)
        token = self.task.tokenizer.convert_ids_to_tokens(stop[0][0]) if stop else None
        return super().report(skipped) | dict(chat=self.chats > 0, stop_token=token, stop_token_trained=bool(stop))


class CausalLM(Answering):
    """policy: the keywords of `data.encode`: what is trained of a record, and how it is read."""

    columns = COLUMNS
    foreign: tuple[str, ...] = ("label", "pair", "image")  # fields of other tasks
    tallies = CausalTally
    options = (*"normalise label_smoothing z_loss dft load_balance chunk_tokens".split(),)

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        policy: dict | None = None,
        asking: Asking = Asking(),  # noqa: B008, it is a constant
    ) -> None:
        self.tokenizer, self.policy, self.asking = tokenizer, dict(policy or {}), asking

    @classmethod
    def of(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> "CausalLM":
        """The task of a config. Raises: ConfigError for a setting of another task."""
        d = config.data
        foreign = {f"data.fields.{k}": d.fields[k] for k in cls.foreign}
        for key, value in ({"data.labels": d.labels} | foreign).items():
            if value:
                raise ConfigError(
                    f"{key}={value!r} belongs to tasks with labels, such as 'classification', and"
                    f" this is {config.task!r}; leave it empty"
                )
        return cls(tokenizer, policy(config.data), Asking.of(config))

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[chat.Encoded]:
        """Each record, rendered and tokenised, with a weight for each token."""
        return chat.encode_batch(records, wheres, self.tokenizer, **self.policy)

    def fields_read(self, record: dict) -> set[str]:
        """All but those that `to_conversation` never asks for."""
        return set(record) & to_conversation(record, **only(self.policy, FORM))["read"]

    def left_out(self, record: dict, example: chat.Encoded) -> Sequence[str]:
        """What `encode` found that the text of the example does not hold."""
        return self._unknown(example.left_out)

    def _unknown(self, words: Sequence[str]) -> list[str]:
        read = unread(dict.fromkeys(self.beside, 1), ())
        return [what for what in words if what not in read]

    def key(self) -> list:
        """The policy, the chat template and the special tokens."""
        if self.tokenizer is None:
            raise ConfigError("model.path is empty, or of images; give a language model's directory")
        special = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        settings = {k: dict(v) if k == "fields" and v else v for k, v in self.policy.items()}
        settings["template"] = list(template_texts(self.tokenizer, self.policy.get("template")).values())
        return [settings, special]

    def cut(self, example: chat.Encoded, max_length: int, overlong: str) -> list[tuple]:
        """(tokens int32 [n], weights float32 [n]) of each piece with a trained token."""
        return fit(example.tokens, example.weights, max_length, overlong, self.tokenizer.bos_token_id)

    def kept(self, example: chat.Encoded, max_length: int, overlong: str) -> list[np.ndarray]:
        """The places of the tokens of each piece."""
        # The places are cut as the tokens would be; a bos that stands first has place 0.
        places = np.arange(len(example.tokens))
        bos = 0 if len(places) and example.tokens[0] == self.tokenizer.bos_token_id else None
        return [at for at, _ in fit(places, example.weights, max_length, overlong, bos)]

    def prepared(self, source: Source | None) -> tuple[Any, "CausalLM", dict]:
        """The source as it is: cleaning reads conversations as this task does."""
        return source, self, only(self.policy, FORM)

    def answers_only(self) -> "CausalLM":
        """As of Task: without what the policy says of fields, roles, system prompt and template."""
        kept = {k: v for k, v in self.policy.items() if k not in FORM}
        return CausalLM(self.tokenizer, kept | dict(train_on="last"))

    def summary(self, report: dict) -> str:
        """The numbers of examples and tokens, the share that is trained, and the stop token."""
        return (
            f"{report['examples']} examples, {report['tokens']:,} tokens,"
            f" {report['trained_fraction']:.1%} trained; stop token {report.get('stop_token')}"
        )

    def facts(self, report: dict) -> dict[str, str]:
        """Whether a stop token is trained, and which."""
        stop = f"yes, {report['stop_token']}" if report["stop_token_trained"] else "no"
        return {"stop token": f"trained: {stop}"}

    def warnings(self, report: dict) -> Iterable[str]:
        """Of all or next to no tokens being trained, and of no stop token."""
        fraction = report["trained_fraction"]
        if report["chat"] and fraction == 1:
            yield "every token of the chats is trained, the users' too: see data.train_on"
        if fraction < 0.01:
            yield f"only {100 * fraction:.2f}% of the tokens are trained: see sftjax inspect"
        if report["chat"] and not report["stop_token_trained"]:
            yield "no stop token is trained: the model won't learn to end its answer"

    def nothing_left(self, first: tuple[str, chat.Encoded] | None, report: dict, max_length: int) -> str:
        """What was lost and which settings to check, with the first example's trained spans."""
        lost = report["dropped"] | report["skipped"]
        text = (
            f"nothing is trained in any of {sum(lost.values())} rows ({counted(lost)}): check"
            f" data.train_on={self.policy.get('train_on', 'assistant')!r} and data.max_length={max_length}."
        )
        if first:
            where, example = first
            shown = mark_spans(example.text, example.spans)
            text += f" {where}, {len(example.tokens)} tokens, trained spans in ⟦ ⟧:\n{shown}"
        return text

    # ---- model and loss ----

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The model of model.path with its vocabulary head, without weights."""
        return read_model(section, classes=0, **changes)

    # ---- evaluation ----

    def questions(self, source: Source, shots: Callable[[int, dict], Sequence[dict]] | None = None) -> list[Question]:
        """What is asked of each record."""
        # A text without turns goes on with a next example: the answer ends before that.
        self.cut_at = SEPARATOR if shots and not self.tokenizer.chat_template else ""
        found, notes, given = list[Question](), Notes(), list[Any]()
        for i in range(len(source)):
            where, record = source.where(i), source[i]
            before = shots(i, record) if shots else ()
            asked, words = question(record, self.tokenizer, where=where, shots=before, **self.policy)
            notes.add(where, self._unknown(words))
            found.append(asked)
            if self.asking.choices:
                given.append(read_field(record, self.asking.choices, where, "eval.choices"))
        for line in said(notes.counts):
            logger.warning("of the questions, %s", printable(line))
        if "choice" in self.asking.metrics:
            found = with_choices(found, self.asking, given, [*map(source.where, range(len(found)))])
        return found

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a turn of the template, or a text."""
        return stop_ids(self.tokenizer, self.policy.get("template"))

    # ---- for people ----

    def try_it(self, section: ConfigDict, export: Path) -> str:
        """The command that asks the export the first question of data.test; "" without one."""
        if not (section.test and self.tokenizer.chat_template):
            return ""
        keys = {k: self.policy[k] for k in ("fields", "roles", "system")}
        first = to_conversation(open_source(section.test)[0], **keys)
        prompt = quote(first["messages"][-2]["content"])
        python, model = os.path.relpath(sys.executable), os.path.relpath(export)
        system = f" --system={quote(section.system)}" if section.system else ""
        return f"Ask the trained model:\n  {python} -m sftjax.generate --model={model}{system} --prompt={prompt}"


def policy(data: ConfigDict) -> dict:
    """The keywords of `data.encode` that the config's section `data` sets."""
    return dict(
        train_on=data.train_on,
        stop_token=data.stop_token,
        reasoning=data.reasoning.to_dict(),
        fields={k: v for k, v in data.fields.items() if v and k not in CausalLM.foreign},
        roles=_roles(data.roles),
        system=data.system,
        template_kwargs=_template_kwargs(data.template_kwargs),
    )


def _roles(text):
    pairs = [pair.strip().partition("=") for pair in text.split(",") if pair.strip()]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(f"data.roles={text!r}: {wrong[0]!r} has no role; write {wrong[0]}=user")
    return {name.strip(): role.strip() for name, _, role in pairs}


def _template_kwargs(text):
    try:
        kwargs = json.loads(text or "{}")
    except (ValueError, RecursionError):
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ConfigError(f'data.template_kwargs={text!r:.200} is no JSON object, such as {{"x": true}}')
    return kwargs


def only(policy: dict, keys: Sequence[str]) -> dict:
    """The entries of a policy under these keys, as far as it has them."""
    return {key: policy[key] for key in keys if key in policy}


def mark_spans(text: str, spans: Iterable[tuple[int, int]], before: str = "⟦", after: str = "⟧") -> str:
    """`text` with `before` and `after` put around each trained span."""
    pieces, at = [], 0
    for start, stop in spans:
        pieces += [text[at:start], before, text[start:stop], after]
        at = stop
    return "".join(pieces) + text[at:]
