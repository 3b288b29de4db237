"""From a record to tokens, each with the weight at which it is trained.

A record becomes one conversation (`conversation.py`), is rendered ONCE with the tokenizer's own chat template and
tokenised ONCE. Which characters are trained is found by `ChatTemplate.found`; tokens are matched to them by character
offsets, and none is judged by its id.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from sftjax.data.masking import left_out
from sftjax.data.masking.conversation import last_turn, to_conversation, without_reasoning
from sftjax.data.masking.messages import ROLES, wrong_value
from sftjax.data.masking.template import Case, ChatTemplate, Tokenizer, after_empty_think, load_template
from sftjax.data.records.failures import located
from sftjax.errors import DataError

PART = 250  # records rendered, and then tokenised, together
STOP_TOKEN = ("turn", "all", "last", "none")
REASONING = {"history": "train", "last": "train", "empty": "keep"}


class Encoded(NamedTuple):
    """One example. `weights[i]` says whether token i itself is trained; nothing is shifted yet."""

    tokens: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]
    text: str  # what was tokenised
    spans: list[tuple[int, int]]  # trained characters of text: (start, stop)
    kind: str = "chat"  # chat: rendered with a template; pair, segments, text: as it stands
    left_out: Sequence[str] = ()  # what the record holds and `text` does not, in words

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens and weights, int32 and float32 [n], in the order of a store's columns."""
        return self.tokens, self.weights


class Policy(NamedTuple):
    """What is trained of a conversation."""

    roles: set[str]
    only_last: bool  # of the assistant's turns
    stop_token: str
    reasoning: dict[str, str]


def encode(record: dict[str, Any], tokenizer: Tokenizer, *, where: str = "", **policy: Any) -> Encoded:
    """Tokenise one record and say which of its tokens are trained.

    record: any form that `to_conversation` reads. tokenizer: a fast Hugging Face one. where: file and row, for errors.
    policy: train_on, stop_token, reasoning and template are those of the config's section `data` (train_on may be a
    list of roles too, template also a text); template_kwargs, fields, roles, system as of `to_conversation`.

    A message's own `train: bool` or `weight: float` counts before train_on. A text prompt and completion are rendered
    as a user's and an assistant's turn; where there is no template they are run together as they stand, and the
    end-of-text token follows. Of plain text everything is trained. Segments say themselves what is trained; they are
    run together and nothing is added. Raises: DataError.
    """
    return encode_batch([record], [where], tokenizer, **policy)[0]


def encode_batch(
    records: Sequence[dict[str, Any]],
    wheres: Sequence[str],
    tokenizer: Tokenizer,
    *,
    train_on: str | Sequence[str] = "assistant",
    stop_token: str = "turn",
    reasoning: Mapping[str, str] | None = None,
    template: str | None = None,
    **forms: Any,
) -> list[Encoded]:
    """`encode` for many records, which uses all cores."""
    if stop_token not in STOP_TOKEN:
        raise DataError(f"data.stop_token={stop_token!r}: expected {' | '.join(STOP_TOKEN)}", kind="setting")
    policy = Policy(_trained_roles(train_on), train_on == "last", stop_token, reasoning_of(reasoning))
    groups: dict[ChatTemplate, dict[int, dict]] = {}  # a tokenizer may have a template for tools
    for i, (record, where) in enumerate(zip(records, wheres, strict=True)):
        chosen, chat = conversation_of(record, where, tokenizer, template, policy.reasoning, forms)
        groups.setdefault(chosen, {})[i] = chat
    encoded: dict[int, Encoded] = {}
    for chosen, chats in groups.items():
        encoded.update(zip(chats, _encode_chats(chosen, list(chats.values()), policy), strict=True))
    return [encoded[i] for i in range(len(records))]


def _encode_chats(template, chats, policy):
    parts = [chats[at : at + PART] for at in range(0, len(chats), PART)]
    # Beside us the next parts are rendered, in a process of its own, and tokenised, by threads of the tokenizer; one at
    # a time, as a tokenizer may fail if two callers set it up at once.
    with ThreadPoolExecutor(1) as pool:
        tokenised = pool.map(lambda part: _tokenise(template, part), parts)
        examples = []
        for part, (texts, encodings) in zip(parts, tokenised, strict=True):
            rows = zip(part, texts, encodings, _trained_spans(template, part, texts, policy), strict=True)
            examples += [_encoded(template.tokenizer, *row, *own) for *row, own in rows]
    return examples


def _tokenise(template, chats):
    """The texts of conversations, and their encodings."""
    texts = template.render(chats) if template.source else [raw_text(chat) for chat in chats]
    _check_unicode(texts, chats)
    output = template.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return texts, output.encodings


def _check_unicode(texts, chats):
    for text, chat in zip(texts, chats, strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"half of a surrogate pair, {text[error.start]!r}, is no character, and no tokenizer reads it",
                "repair the text, which was cut there, or drop the row",
                where=chat["where"],
                kind="surrogate",
            ) from None


# --- what the policy says ---


def _trained_roles(train_on):
    if train_on in ("assistant", "last"):
        return {"assistant"}
    if train_on == "all":
        return set(ROLES.values()) - {"system", "developer"}
    roles = [role.strip() for role in (train_on.split(",") if isinstance(train_on, str) else train_on)]
    if unknown := [role for role in roles if role not in ROLES]:
        raise DataError(
            f"data.train_on={train_on!r}: unknown role {unknown[0]!r}; expected assistant | last "
            f"| all | a comma-separated list of {', '.join(sorted(set(ROLES.values())))}",
            kind="setting",
        )
    return {ROLES[role] for role in roles}


def reasoning_of(given: Mapping[str, str] | None) -> dict[str, str]:
    """The default with what is given, checked."""
    reasoning = REASONING | dict(given or {})
    for key, value in reasoning.items():
        expected = ("train", "keep") if key == "empty" else ("train", "keep", "drop")
        if key not in REASONING or value not in expected:
            known = "history, last: train | keep | drop; empty: train | keep"
            raise DataError(f"data.reasoning.{key}={value!r}: expected {known}", kind="setting")
    return reasoning


def conversation_of(
    record: dict[str, Any],
    where: str,
    tokenizer: Tokenizer,
    template: str | None,
    reasoning: Mapping[str, str],
    forms: Mapping[str, Any],
) -> tuple[ChatTemplate, dict[str, Any]]:
    """The template of a record, and its conversation without the reasoning that is dropped.

    As of to_conversation; it has where too, and a pair with a template is a chat.
    """
    chat = to_conversation(record, where=where, **forms)
    chosen = load_template(tokenizer, template, chat, where)
    kind = "chat" if chat["kind"] == "pair" and chosen.source else chat["kind"]
    border = last_turn(chat["messages"])
    messages = [
        without_reasoning(m) if reasoning["last" if i >= border else "history"] == "drop" else m
        for i, m in enumerate(chat["messages"])
    ]
    return chosen, chat | dict(messages=messages, kind=kind, where=where)


def _message_weights(chat, policy):
    messages = chat["messages"]
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    weights = []
    for i, message in enumerate(messages):
        by_role = message["role"] in policy.roles and (i == last or not policy.only_last)
        trained = message.get("train", "weight" in message or by_role)
        weight = message.get("weight", 1.0)
        with located(chat["where"], f"message {i + 1}: "):
            if not isinstance(trained, (bool, int)):
                raise wrong_value("train", trained, "expected a bool")
            if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise wrong_value("weight", weight, "expected a number")
        weights.append(float(weight) if trained else 0.0)
    return weights


# --- from conversations to spans ---


def _trained_spans(template, chats, texts, policy):
    """Of each text the spans (start, stop, weight), in order, and what it leaves out."""
    weights = [_message_weights(chat, policy) for chat in chats]
    if not template.source:
        return [(_raw_spans(chat, own), left_out.of_text(chat)) for chat, own in zip(chats, weights, strict=True)]
    cases = [
        Case(chat, text, _wanted(chat["messages"], own, policy))
        for chat, text, own in zip(chats, texts, weights, strict=True)
    ]
    rows = zip(cases, template.found(cases), weights, strict=True)
    return [(_spans(case, regions, own, policy), words) for case, (regions, words), own in rows]


def _wanted(messages, weights, policy):
    """The trained messages, each with: has its reasoning to be in the rendering?

    That is asked of the last message only: of those before, templates leave it out on purpose.
    """
    last, train = len(messages) - 1, policy.reasoning["last"] == "train"
    says = [m["content"].strip() or len(m.keys() & {"tool_calls", "reasoning_content"}) for m in messages]
    return {i: train and i == last for i, weight in enumerate(weights) if weight and says[i]}


def _spans(case, regions, weights, policy):
    """Trained spans (start, stop, weight) in order of the text."""
    border, spans = last_turn(case.chat["messages"]), []
    for region in regions:
        i, start, answer, stop, end = region
        with_end = policy.stop_token == "turn" or region is regions[-1]
        with_end = end and policy.stop_token != "none" and (with_end or policy.stop_token == "all")
        if weights[i]:
            thought = after_empty_think(case.text, region)
            part = "last" if i >= border else "history"
            if thought < answer and policy.reasoning[part] == "keep":
                start = answer
            elif policy.reasoning["empty"] != "train":
                start = thought
            spans.append((start, end[1] if with_end else stop, weights[i]))
        elif end and policy.stop_token == "all":
            spans.append((*end, 1.0))
    return sorted(span for span in spans if span[0] < span[1])


def raw_text(chat: dict[str, Any]) -> str:
    """The messages run together, as without a template. Raises: DataError if they need one."""
    if chat["kind"] == "chat":
        raise DataError(
            "a chat, but the tokenizer has no chat template",
            "set data.template=FILE to a Jinja chat template, or use prompt and completion in text",
            where=chat["where"],
            kind="no_template",
        )
    messages = chat["messages"]
    if messages[0]["role"] in ("system", "developer"):
        problem, fix = "a system message needs a chat template", "set data.template=FILE"
        raise DataError(problem, fix, where=chat["where"], kind="system_unused")
    return "".join(m["content"] for m in messages)


def _raw_spans(chat, weights):
    """Of texts run together: of segments those with a weight, else the last one."""
    if chat["kind"] != "segments":
        weights = [0.0] * (len(weights) - 1) + [1.0]
    stops = list(accumulate(len(m["content"]) for m in chat["messages"]))
    return [span for span in zip([0, *stops], stops, weights, strict=False) if span[2] and span[0] < span[1]]


def _encoded(tokenizer, chat, text, encoding, spans, words):
    ids, bos = encoding.ids, tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        raise DataError(
            f"the text begins with {tokenizer.bos_token!r} twice",
            f"take it out of the template or the first message; the text begins {text[:80]!r}",
            where=chat["where"],
            kind="double_bos",
        )
    weights = token_weights(len(ids), encoding.token_to_chars, spans)
    trained, said = [span[:2] for span in spans], chat["left_out"] + words
    example = Encoded(np.array(ids, np.int32), weights, text, trained, chat["kind"], said)
    return _with_ends(tokenizer, *example) if chat["kind"] in ("pair", "text") else example


def _with_ends(tokenizer, tokens, weights, text, spans, *about: Any):
    """Text as it stands: the tokenizer's own first tokens, and the end-of-text token."""
    first, last = added_ids(tokenizer)
    first = [] if tokens[: len(first)].tolist() == first else first
    last = [] if tokens[-len(last) :].tolist() == last else last
    before, after = (tokenizer.decode(ids) if ids else "" for ids in (first, last))
    start, stop = spans[0]
    span = (start + len(before), stop + len(before) + len(after))
    tokens = np.concatenate([first, tokens, last]).astype(np.int32)
    weights = np.concatenate([np.zeros(len(first)), weights, np.ones(len(last))])
    return Encoded(tokens, weights.astype(np.float32), before + text + after, [span], *about)


@lru_cache(maxsize=8)
def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text, and those that end it."""
    of: Any = tokenizer
    plain, full = of("a", add_special_tokens=False)["input_ids"], of("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    eos = tokenizer.eos_token_id
    return full[:start], full[start + len(plain) :] if eos is None else [eos]


def token_weights(n: int, chars: Callable[[int], Any], spans: Iterable[tuple[int, int, float]]) -> np.ndarray:
    """The weight of each token, float32 [n]: of the span that its characters overlap, else 0.

    chars: gives the (start, stop) characters of a token, ascending; few are asked for. spans: (start, stop, weight),
    ascending.
    """
    weights = np.zeros(n, np.float32)
    for start, stop, weight in spans:
        first = bisect_right(range(n), start, key=lambda i: chars(i)[1])
        weights[first : bisect_left(range(n), stop, key=lambda i: chars(i)[0])] = weight
    return weights
