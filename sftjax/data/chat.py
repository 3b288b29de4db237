"""From a record to tokens, each with the weight at which it is trained.

A record becomes one conversation (`conversation.py`), is rendered ONCE with the tokenizer's own
chat template and tokenised ONCE. Which characters are trained is found by `ChatTemplate.regions`;
tokens are matched to them by character offsets. No mask comes from subtracting a rendered prefix,
and no token is judged by its id.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sftjax.data.conversation import ROLES, to_conversation
from sftjax.data.sources import DataError
from sftjax.data.template import load_template

STOP_TOKEN = ("turn", "all", "last", "none")


class Encoded(NamedTuple):
    """One example. `weights[i]` says whether token i itself is trained; nothing is shifted yet."""

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]
    text: str  # what was tokenised
    spans: list[tuple[int, int]]  # trained characters of text: (start, stop)
    kind: str = "chat"  # chat: rendered with a template; pair, text: as it stands


def encode(record: dict, tokenizer, *, where: str = "", **policy) -> Encoded:
    """Tokenise one record and say which of its tokens are trained.

    Args:
      record: any form that `to_conversation` reads.
      tokenizer: a fast Hugging Face tokenizer.
      where: file and row, for errors.
      **policy:
        train_on: "assistant" (default) | "last" (the last assistant turn) | "all" (every turn but
          the system's) | roles, comma-separated. A message's own `train: bool` or
          `weight: float` counts before it.
        stop_token: train the special token that ends a turn: "turn" (default, after each trained
          turn) | "all" (after every turn) | "last" (after the last turn only) | "none".
        template: a chat template, or a file that holds one, in place of the tokenizer's.
        fields, system: as in `to_conversation`.

    A text prompt and completion are rendered as a user's and an assistant's turn; where there is
    no template they are run together as they stand, and the end-of-text token follows. Of plain
    text everything is trained. Raises: DataError.
    """
    return encode_batch([record], [where], tokenizer, **policy)[0]


def encode_batch(
    records,
    wheres,
    tokenizer,
    *,
    train_on: str = "assistant",
    stop_token: str = "turn",
    template: str | None = None,
    fields=None,
    system: str = "",
) -> list[Encoded]:
    """`encode` for many records: one call of the tokenizer, which uses all cores."""
    if stop_token not in STOP_TOKEN:
        raise DataError(f"data.stop_token={stop_token!r}: expected {' | '.join(STOP_TOKEN)}")
    roles = _trained_roles(train_on)
    chat_template = load_template(tokenizer, template)
    marked = []
    for record, where in zip(records, wheres, strict=True):
        chat = to_conversation(record, fields=fields, system=system, where=where)
        only_last = train_on == "last"
        marked.append(_mark(chat_template, chat, roles, only_last, stop_token, where))
    output = tokenizer(
        [text for text, _, _ in marked],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    rows = zip(marked, output["input_ids"], output["offset_mapping"], wheres, strict=True)
    return [_encoded(chat_template, *row) for row in rows]


def prompt_and_answer(record: dict, tokenizer, *, where: str = "", **policy):
    """The prompt for which a model generates, and the reference answer.

    The prompt is the conversation up to the last assistant turn with the template's generation
    prompt; and what the template itself writes between that and the answer, such as an empty
    think block. Of a pair without a template it is the prompt as it stands. It is cut from the
    tokens of the whole, so the model sees before the answer what it saw in training.

    Returns: prompt tokens int32 [n], answer text. Raises: DataError.
    """
    template = load_template(tokenizer, policy.get("template"))
    keys = {k: policy[k] for k in ("fields", "system") if k in policy}
    chat = to_conversation(record, where=where, **keys)
    if chat["kind"] == "text":
        raise DataError(f"{where}: plain text has no prompt and answer: evaluate its loss instead")
    answer = chat["messages"][-1]["content"]
    if chat["kind"] == "pair" and not template.source:
        prompt = chat["messages"][0]["content"]
        ids = [*_added_ids(tokenizer)[0], *_ids_before(tokenizer, prompt + answer, len(prompt))]
    else:
        ids = _ids_before(tokenizer, *template.prompt(chat["messages"], chat["tools"], where))
    return np.array(ids, np.int32), answer


def _ids_before(tokenizer, text, stop):
    """The tokens of `text` before character `stop`; a token across the border is left out."""
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = np.array(output["offset_mapping"], np.int64).reshape(-1, 2)[:, 1]
    return output["input_ids"][: np.searchsorted(ends, stop, side="right")]


def stop_ids(tokenizer, template: str | None = None) -> list[int]:
    """The ids at which generation stops: end of text, and the template's end of a turn."""
    chat_template = load_template(tokenizer, template)
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if chat_template.source and (token := chat_template.end_of_turn()):
        ids.append(tokenizer.convert_tokens_to_ids(token))
    return sorted(set(ids))


def _trained_roles(train_on):
    if train_on in ("assistant", "last"):
        return {"assistant"}
    if train_on == "all":
        return set(ROLES.values()) - {"system", "developer"}
    roles = [role.strip() for role in train_on.split(",")]
    if unknown := [role for role in roles if role not in ROLES]:
        raise DataError(
            f"data.train_on={train_on!r}: unknown role {unknown[0]!r}; expected assistant | last "
            f"| all | a comma-separated list of {', '.join(sorted(set(ROLES.values())))}"
        )
    return {ROLES[role] for role in roles}


def _mark(template, chat, roles, only_last, stop_token, where):
    """The text to tokenise, its trained spans (start, stop, weight), and the kind."""
    messages = chat["messages"]
    if chat["kind"] == "text" or (chat["kind"] == "pair" and not template.source):
        return _raw_text(messages, where), _raw_span(messages), chat["kind"]
    if not template.source:
        raise DataError(
            f"{where}: a chat, but the tokenizer has no chat template: set "
            "data.template=FILE to a Jinja chat template, or use prompt and completion in text"
        )
    text = template.render(messages, chat["tools"], where)
    weights = _message_weights(messages, roles, only_last, where)
    regions = template.regions(messages, chat["tools"], text, weights, where)
    return text, _spans(regions, weights, stop_token), "chat"


def _raw_text(messages, where):
    if messages[0]["role"] in ("system", "developer"):
        raise DataError(f"{where}: a system message needs a chat template: set data.template=FILE")
    return "".join(m["content"] for m in messages)


def _raw_span(messages):
    stop = sum(len(m["content"]) for m in messages)
    return [(stop - len(messages[-1]["content"]), stop, 1.0)]


def _encoded(template, marked, ids, offsets, where):
    text, spans, kind = marked
    tokens, weights = np.array(ids, np.int32), token_weights(offsets, spans)
    if kind != "chat":
        return _with_ends(template.tokenizer, text, spans, kind, tokens, weights)
    bos = template.tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        raise DataError(
            f"{where}: the text begins with {template.tokenizer.bos_token!r} twice: take it out "
            f"of the template or the first message; the text begins {text[:80]!r}"
        )
    return Encoded(tokens, weights, text, [span[:2] for span in spans], kind)


def _with_ends(tokenizer, text, spans, kind, tokens, weights):
    """Text as it stands: the tokenizer's own first tokens, and the end-of-text token."""
    first, last = _added_ids(tokenizer)
    first = [] if tokens[: len(first)].tolist() == first else first
    last = [] if tokens[-len(last) :].tolist() == last else last
    before, after = (tokenizer.decode(ids) if ids else "" for ids in (first, last))
    start, stop, _ = spans[0]
    span = (start + len(before), stop + len(before) + len(after))
    tokens = np.concatenate([first, tokens, last]).astype(np.int32)
    weights = np.concatenate([np.zeros(len(first)), weights, np.ones(len(last))])
    return Encoded(tokens, weights.astype(np.float32), before + text + after, [span], kind)


@lru_cache(maxsize=8)
def _added_ids(tokenizer):
    """The ids that the tokenizer puts before a text, and those that end it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    eos = tokenizer.eos_token_id
    return full[:start], full[start + len(plain) :] if eos is None else [eos]


def _message_weights(messages, roles, only_last, where):
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    weights = []
    for i, message in enumerate(messages):
        by_role = message["role"] in roles and (i == last or not only_last)
        trained = message.get("train", "weight" in message or by_role)
        weight = message.get("weight", 1.0)
        if not isinstance(trained, (bool, int)):
            raise DataError(f"{where}: message {i + 1}: train={trained!r}, expected a bool")
        if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise DataError(f"{where}: message {i + 1}: weight={weight!r}, expected a number")
        weights.append(float(weight) if trained else 0.0)
    return weights


def _spans(regions, weights, stop_token):
    """Trained spans (start, stop, weight) in order of the text."""
    spans, last = [], max(regions, default=0)
    for i in sorted(regions):
        start, stop, end = regions[i]
        with_end = stop_token == "turn" or (stop_token in ("all", "last") and i == last)
        with_end = end and (with_end or stop_token == "all")
        if weights[i]:
            spans.append((start, end[1] if with_end else stop, weights[i]))
        elif end and stop_token == "all":
            spans.append((*end, 1.0))
    return sorted(span for span in spans if span[0] < span[1])


def token_weights(offsets, spans) -> np.ndarray:
    """The weight of each token: that of the span with which its characters overlap, else 0.

    Args:
      offsets: (start, stop) characters of each token, ascending.
      spans: (start, stop, weight), ascending.
    """
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    weights = np.zeros(len(offsets), np.float32)
    for start, stop, weight in spans:
        first = np.searchsorted(offsets[:, 1], start, side="right")
        weights[first : np.searchsorted(offsets[:, 0], stop, side="left")] = weight
    return weights
