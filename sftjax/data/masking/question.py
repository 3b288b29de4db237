"""What is asked of a record: the prompt that its answer is generated for, cut from the whole."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import takewhile
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from sftjax.data.masking import left_out
from sftjax.data.masking.encode import added_ids, conversation_of, raw_text, reasoning_of
from sftjax.data.masking.template import Tokenizer, load_templates
from sftjax.errors import DataError

SEPARATOR = "\n\n"  # after an example that stands before a question, where there is no template


class Question(NamedTuple):
    """A prompt and the answer that is wanted."""

    prompt: np.ndarray  # int32 [n] token ids
    answer: str
    text: str  # of the prompt, without the special tokens that the tokenizer puts first
    asked: str  # its last message
    lead: int  # so many special tokens stand before the text's
    ends: Sequence[int] = ()  # the tokens that end the answer
    choices: Sequence[str] = ()  # between which the metric `choice` decides
    images: Sequence[bytes] = ()  # the files of those that the prompt's image tokens stand for


def prompt_and_answer(
    record: dict[str, Any], tokenizer: Tokenizer, *, where: str = "", **policy: Any
) -> tuple[np.ndarray, str]:
    """The prompt for which a model generates, and the reference answer.

    The prompt is the conversation up to the last assistant turn with the template's generation prompt; and what the
    template itself writes between that and the answer, such as an empty think block. Of a pair without a template it is
    the prompt as it stands. It is cut from the tokens of the whole, so the model sees before the answer what it saw in
    training. Returns: prompt tokens int32 [n], answer text. Raises: DataError.
    """
    return question(record, tokenizer, where=where, **policy)[0][:2]


def question(
    record: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    where: str = "",
    shots: Sequence[dict[str, Any]] = (),
    **policy: Any,
) -> tuple[Question, list[str]]:
    """As `prompt_and_answer`; and in words what the record holds and the whole does not.

    shots: records that stand before it with their answers, as turns of the same conversation; of pairs without a
    template as texts, with SEPARATOR after each.
    """
    policy = {k: v for k, v in policy.items() if k not in ("train_on", "stop_token")}
    how = tokenizer, policy.pop("template", None), reasoning_of(policy.pop("reasoning", None)), policy
    template, chat = conversation_of(record, where, *how)
    if chat["kind"] in ("text", "segments"):
        problem, fix = "plain text has no prompt and answer", "evaluate its loss instead"
        raise DataError(problem, fix, where=where, kind="no_prompt")
    asked = "".join(m["content"] or "" for m in chat["messages"][:-1][-1:])
    if shots:
        before = [conversation_of(s, f"an example before {where}", *how)[1] for s in shots]
        chat = chat | {"messages": _after_shots(chat["messages"], before, template)}
    lead, ends = list[int](), list[int]()
    if not template.source:
        text, answer = raw_text(chat), chat["messages"][-1]["content"]
        (lead, ends), words = added_ids(tokenizer), left_out.of_text(chat)
        start = len(text) - len(answer)
    else:
        text, start, answer, words = template.prompt(chat)
        if text.startswith(answer, start):
            ends = split_at(tokenizer, text, start + len(answer))[1][:1]
    ids = np.array([*lead, *split_at(tokenizer, text, start)[0]], np.int32)
    return Question(ids, answer, text[:start], asked, len(lead), ends), chat["left_out"] + words


def _after_shots(messages, shots, template):
    """The messages, with those of other conversations after the system's; each has one answer."""
    is_system = lambda message: message["role"] in ("system", "developer")  # noqa: E731
    lead = list(takewhile(is_system, messages))
    turns = []
    for shot in shots:
        own = [message for message in shot["messages"] if not is_system(message)]
        if not template.source:
            own[-1] = own[-1] | {"content": own[-1]["content"] + SEPARATOR}
        turns += own
    return [*lead, *turns, *messages[len(lead) :]]


def split_at(tokenizer: Tokenizer, text: str, stop: int) -> tuple[list[int], list[int]]:
    """The tokens of `text` before character `stop`, and the others; one across it is of these."""
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    at = bisect_right(output["offset_mapping"], stop, key=itemgetter(1))
    return output["input_ids"][:at], output["input_ids"][at:]


def continuations(tokenizer: Tokenizer, asked: Question) -> list[tuple[list[int], list[int]]]:
    """(the prompt's tokens, the choice's and its end's) of each choice.

    They are cut from the tokens of both together. Without its end "1" would be likelier than "10".
    """
    out = []
    for text in asked.choices:
        before, after = split_at(tokenizer, asked.text + text, len(asked.text))
        out.append(([*asked.prompt[: asked.lead], *before], [*after, *asked.ends]))
    return out


def stop_ids(tokenizer: Tokenizer, template: str | None = None) -> list[int]:
    """The ids at which generation stops: end of text, and the template's ends of a turn."""
    stops = [token for t in load_templates(tokenizer, template) if t.source for token in t.dialect.stops]
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends: Any = tokenizer.convert_tokens_to_ids(list(stops))  # of a list, a list
    return sorted({*ids, *ends})
