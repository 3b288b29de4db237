"""A chat template: what it renders, and where in the rendering each message's own words stand.

No mask comes from subtracting a rendered prefix: templates rewrite history, and a prefix of the text is not a prefix of
its tokens. Regions are found in the one rendering that is trained, by strategies that verify themselves; where none
can, the row is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sftjax.data.masking import left_out, sandbox
from sftjax.data.masking.dialect import Dialect, learn
from sftjax.data.masking.marks import put_back, put_marks, split
from sftjax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers is slow to import

OURS = ("train", "weight")  # keys of a message that are for us, not for the template
KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
LEFT_OUT = {  # what may not be missing of a trained message
    "content": "the content of message {}",
    "call": "the tool call of message {}",
    "think": "the reasoning of message {}, as data.reasoning.last=drop would",
}
CACHED = 1024  # skeletons kept for one template
# Between the beginning of a turn and its answer, where nothing was thought.
EMPTY_THINK = re.compile(r"\s*+(?:(?:<think>\s*+)?</think>|<\|channel>thought\s*+<channel\|>)\s*+")
# Tags at the end of a text, in its reverse: a search from the front would begin at each of them.
OPEN_THINK = re.compile(r"(?:\s*+>kniht/?<)++")
CLOSE_THINK = re.compile(r".*?(?:</think>|<channel\|>)\s*", re.DOTALL)
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Region(NamedTuple):
    """Where words of a message stand in the rendering: [start, stop), then the stop token."""

    message: int
    start: int  # the first character that the model writes
    answer: int  # the same, after its reasoning; empty reasoning too is before it
    stop: int
    end: tuple[int, int] | None  # characters of the special token that ends the turn


class Case(NamedTuple):
    """A conversation with its rendering, in which `regions` are wanted."""

    chat: dict[str, Any]
    text: str
    trained: dict[int, bool]  # messages whose region is needed -> and is their reasoning, too?


class Found(NamedTuple):
    """What one strategy found of a case."""

    regions: list[Region] | None  # None: it does not verify
    absent: set[tuple[int, str]] | None = None  # (message, part) left out; None: not known
    literals: str = ""  # what the template wrote itself, where `absent` is known


def load_template(
    tokenizer: Tokenizer, template: str | None = None, chat: dict[str, Any] | None = None, where: str = ""
) -> "ChatTemplate":
    """The template in use for this tokenizer; one object, so that its skeletons are shared.

    chat: the conversation to be rendered, as of `to_conversation`: where the tokenizer has several templates, its tools
      choose one, and a text needs none.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets: a tokenizer.json is needed", kind="setting"
        )
    if chat and chat["kind"] in ("text", "segments"):
        return _load(tokenizer, "", len(tokenizer))
    texts = template_texts(tokenizer, template)
    name = "tool_use" if chat and chat["tools"] and "tool_use" in texts else "default"
    if name not in texts:
        raise DataError(
            f"the tokenizer's chat templates are called {', '.join(sorted(named_templates(tokenizer)))}, and none is"
            " the 'default' that a row without tools needs",
            "set data.template to one of these names, or to a file",
            where=where,
            kind="no_template",
        )
    return _load(tokenizer, texts[name], len(tokenizer))


def load_templates(tokenizer: Tokenizer, template: str | None = None) -> list["ChatTemplate"]:
    """All templates that rows may be rendered with, see `template_texts`."""
    return [_load(tokenizer, text, len(tokenizer)) for text in template_texts(tokenizer, template).values()]


@lru_cache(maxsize=8)
def _load(tokenizer, source, vocabulary):
    return ChatTemplate(tokenizer, source)


def named_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """{name: template} of a tokenizer that has several; {} where it has one, or none."""
    given: Any = tokenizer.chat_template
    return given if isinstance(given, dict) else {}


def template_texts(tokenizer: Tokenizer, template: str | None = None) -> dict[str, str]:
    """The templates that rows may be rendered with: "default", and "tool_use" for rows with tools.

    The default is `template` (its text, a file's name, the name of one of the tokenizer's). Without it they are the
    tokenizer's own, as transformers chooses; "" where it has none.
    """
    named = named_templates(tokenizer)
    if template in named:
        return {"default": named[template]}
    if not template:
        own: Any = named or {"default": tokenizer.chat_template or ""}
        return {name: own[name] for name in ("default", "tool_use") if name in own}
    if "{" in template:
        return {"default": template}
    if not Path(template).is_file():
        raise DataError(f"data.template={template!r}: no such file, and it is no template text", kind="setting")
    try:
        return {"default": Path(template).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template={template!r} can't be read as text: {error}", kind="setting") from None


class ChatTemplate:
    """One tokenizer with one chat template; `source` is "" where there is none."""

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._variables = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
        self._skeletons: dict[Any, Any] = {}

    # --- rendering ---

    @cached_property
    def dialect(self) -> Dialect:
        """What this template expects of a message, and how it begins and ends a turn."""

        def render(messages, prompt, tools):
            [result] = self._results([_request(messages, {"tools": tools}, generate=prompt)])
            return result.get("text", "")

        return learn(render, self.special)

    def render(self, chats: Sequence[dict[str, Any]], generate: bool = False) -> list[str]:
        """The text of each conversation, with the generation prompt if `generate`. Raises: DataError, by its row."""
        requests = [self._request(chat["messages"], chat, generate=generate) for chat in chats]
        texts = []
        for result, chat in zip(self._results(requests), chats, strict=True):
            if "error" in result:
                raise DataError(
                    f"the chat template failed: {result['error']}; the roles are: "
                    + ", ".join(m["role"] for m in chat["messages"]),
                    where=chat["where"],
                    kind="template_failed",
                )
            texts.append(result["text"])
        return texts

    def prompt(self, chat: dict[str, Any]) -> tuple[str, int, str, list[str]]:
        """A text, where in it the model begins to write, what it is to say, and what is left out.

        The text is that which training shows, never another rendering.
        """
        last = len(chat["messages"]) - 1
        [text] = self.render([chat])
        [prompt] = self.render([chat | {"messages": chat["messages"][:-1]}], generate=True)
        [(regions, words)] = self.found([Case(chat, text, {last: False})])
        region = next(r for r in regions if r.message == last)
        start = after_empty_think(text, region)
        answer = chat["messages"][-1]["content"] or text[region.answer : region.stop]
        start = max(start, len(prompt)) if text.startswith(prompt) else start
        return text, start, answer, words

    def _request(self, messages, chat, **more: Any):
        """What the sandbox gets: of the messages only what this template can read."""
        plain = ({k: v for k, v in m.items() if k in KEYS or (k in self.source and k not in OURS)} for m in messages)
        return _request([self.dialect.message(m) for m in plain], chat, **more)

    def _results(self, requests):
        return sandbox.render(self.source, self._variables, requests)

    # --- regions ---

    def found(self, cases: Sequence[Case]) -> list[tuple[list[Region], list[str]]]:
        """Of each case the regions of its messages, in the order of the text, and what is left out.

        Raises: DataError, naming the row in which a trained message's region can't be found.
        """
        regions: list[Any] = [None] * len(cases)
        left: list[Any] = [None] * len(cases)
        for strategy in (self._by_marks, self._by_trained_marks, self._by_generation_tags):
            open_ = [k for k, one in enumerate(regions) if one is None]
            for k, found in zip(open_, strategy([cases[k] for k in open_]), strict=True):
                case, own = cases[k], found.regions
                if own is not None and set(case.trained) <= {r.message for r in own}:
                    regions[k] = own
                if left[k] is None and found.absent is not None:
                    left[k] = self._left_out(case, found.absent, found.literals)
        if None in regions:
            why = "it changes or repeats their text, or where the model begins can't be told"
            raise self._not_found(cases[regions.index(None)], why)
        return [
            (own, self._left_out(case, None, case.text) if words is None else words)
            for case, own, words in zip(cases, regions, left, strict=True)
        ]

    def _left_out(self, case, absent, literals):
        return left_out.of_conversation(case.chat, case.text, absent, literals, self.source)

    def _not_found(self, case, why):
        others = [n for n, s in named_templates(self.tokenizer).items() if s != self.source]
        own = f" (the tokenizer has others, by name: {', '.join(sorted(others))})" * bool(others)
        return DataError(
            f"the trained turns can't be found in what the chat template made of them: {why}",
            f"set data.template=FILE to a template that keeps the text{own}, or put "
            "{% generation %} ... {% endgeneration %} around the assistant's turn. The rendering: "
            f"{case.text!r}",
            where=case.chat["where"],
            kind="turn_not_found",
        )

    def _by_trained_marks(self, cases):
        """Marks in trained messages alone, and not in the arguments of tool calls."""
        # A template may look into the others' texts, and quote arguments in a way of its own.
        safe = [not self._ends_in_arguments(case) for case in cases]
        found = iter(self._by_marks([c for c, ok in zip(cases, safe, strict=True) if ok], True))
        return [next(found)._replace(absent=None) if ok else Found(None) for ok in safe]

    def _ends_in_arguments(self, case):
        """Could a token in the arguments of a trained tool call be taken for the turn's end?"""
        calls = [case.chat["messages"][i].get("tool_calls") for i in case.trained]
        return bool(self.special.search(json.dumps(calls, ensure_ascii=False, default=str)))

    def _by_marks(self, cases, only_trained=False):
        """Skeletons depend on the marked messages alone, so rows of like shape share one."""
        if len(self._skeletons) > CACHED:
            self._skeletons = {}
        skeletons, marked, missing = self._skeletons, [], {}
        for case in cases:
            salt = "sftjax"
            while salt in case.text:
                salt += "x"
            messages, marks = put_marks(case.chat["messages"], salt, set(case.trained) if only_trained else None)
            key = json.dumps([messages, case.chat["tools"], case.chat["options"]], default=str)
            marked.append((key, marks))
            if key not in skeletons:
                missing[key] = salt, self._request(messages, case.chat)
        results = self._results([request for _, request in missing.values()])
        for (key, (salt, _)), result in zip(missing.items(), results, strict=True):
            # A template may fail where it parses a text for which there is a mark.
            skeletons[key] = split(result["text"], salt) if "text" in result else None
        return [self._regions(case, skeletons[key], marks) for case, (key, marks) in zip(cases, marked, strict=True)]

    def _regions(self, case, skeleton, marks):
        """The regions of one case by its skeleton, None if that does not give its text."""
        places = skeleton and put_back(case.text, skeleton, marks)
        if places is None:
            return Found(None)
        times = Counter(place.number for place in places)
        for number, (i, part, _) in enumerate(marks):
            if i not in case.trained or part == "argument":
                continue
            if times[number] == 0 and (part != "think" or case.trained[i]):
                raise self._not_found(case, f"it leaves out {LEFT_OUT[part].format(i + 1)}")
        absent = {(i, part) for number, (i, part, _) in enumerate(marks) if not times[number]}
        said = Found(None, absent, "\n".join(skeleton[::2]))
        twice = [marks[number] for number, n in times.items() if n > 1]
        if any(m.message in case.trained and m.part in ("think", "content") for m in twice):
            return said
        # A tool's name may come again, in its result: that is not the turn that called it.
        seen, own = set(), []
        for place in places:
            if place.number not in seen or marks[place.number].part in ("think", "content"):
                own.append(place)
            seen.add(place.number)
        runs = self._runs(case.text, marks, own)
        lower = [0, *(run[-1].stop for run in runs[:-1])]
        upper = [*(run[0].start for run in runs[1:]), len(case.text)]
        rows = zip(runs, lower, upper, strict=False)
        return said._replace(regions=[r for row in rows if (r := self._region(case, marks, *row))])

    def _runs(self, text, marks, places):
        """Places in runs, each of one message and without a stop token in it."""
        # Some templates write the tools' results between a message's calls and its content.
        runs: list[list] = []
        for place in places:
            last: Any = runs[-1][-1] if runs else None
            same = last and marks[last.number].message == marks[place.number].message
            if same and not self._stops.search(text, last.stop, place.start):
                runs[-1].append(place)
            else:
                runs.append([place])
        return runs

    def _region(self, case, marks, run, lower, upper):
        """The region of a run of one message's texts, between the texts before and after it."""
        message, part, _ = marks[run[0].number]
        text, start, answer = case.text, run[0].start, run[0].start
        end = self._ends.search(text, run[-1].stop, upper)
        stop = end.start() if end else run[-1].stop
        called = any(marks[place.number].part in ("call", "argument") for place in run)
        if called and not end:  # what follows the last text is still of the call
            if upper < len(text):
                return None
            stop = upper
        if case.chat["messages"][message]["role"] == "assistant":
            start = self._begin(case, message, part, lower, start)
            if start is None:
                return None
            answer = self._answer(case, marks, run, start, stop)
        return Region(message, start, answer, stop, end and end.span())

    def _begin(self, case, message, part, lower, start):
        """Where the model begins to write what has its first text, a `part`, at `start`, or None.

        None: it can't be told, as it was not learnt what the template writes before such a part.
        """
        text = case.text
        header = text.rfind(self.dialect.header, lower, start) if self.dialect.header else -1
        if header >= 0:
            return header + len(self.dialect.header)
        # No header where a turn goes on after tools' results, or where there is none to learn.
        if thinks := OPEN_THINK.match(text[lower:start][::-1]):
            return start - thinks.end()
        opening, written = self.dialect.openings.get(part, ""), text[lower:start]
        if opening is not None and (written.endswith(opening) or opening.endswith(written)):
            return start - min(len(opening), len(written))
        request = self._request(case.chat["messages"][:message], case.chat, generate=True)
        [prompt] = (result.get("text", "") for result in self._results([request]))
        return len(prompt) if prompt and text.startswith(prompt) and lower <= len(prompt) <= start else None

    def _answer(self, case, marks, run, start, stop):
        """Where the answer begins in the turn [start, stop): after its reasoning."""
        text = case.text
        thoughts = sum(marks[place.number].part == "think" for place in run)
        if not thoughts:
            empty = EMPTY_THINK.match(text, start, run[0].start)
            return empty.end() if empty else start
        after = run[thoughts - 1].stop
        bound = run[thoughts].start if thoughts < len(run) else stop
        if closing := CLOSE_THINK.match(text, after, bound):
            return closing.end()
        header = text.rfind(self.dialect.header, after, bound) if self.dialect.header else -1
        return header + len(self.dialect.header) if header >= 0 else bound

    @cached_property
    def _ends(self):
        """What ends a turn: the learned tokens, or any where there was none to learn."""
        return re.compile("|".join(map(re.escape, self.dialect.ends)) or self.special.pattern)

    @cached_property
    def _stops(self):
        return re.compile("|".join(map(re.escape, self.dialect.stops)) or r"(?!)")

    def _by_generation_tags(self, cases):
        """The blocks that the template's author has tagged, one for each assistant's turn."""
        if not cases or not GENERATION_TAG.search(self.source):
            return [Found(None)] * len(cases)
        requests = [self._request(c.chat["messages"], c.chat, blocks=True) for c in cases]
        return [Found(self._tagged(case, result)) for case, result in zip(cases, self._results(requests), strict=True)]

    def _tagged(self, case, result):
        turns = [i for i, m in enumerate(case.chat["messages"]) if m["role"] == "assistant"]
        if result.get("text") != case.text or len(result["blocks"]) != len(turns):
            return None
        return [self._block(case.text, i, *block) for i, block in zip(turns, result["blocks"], strict=True)]

    def _block(self, text, message, start, stop):
        inside = list(self.special.finditer(text, start, stop))
        end = self.special.search(text, stop)
        if inside and not text[inside[-1].end() : stop].strip():
            end, stop = inside[-1], inside[-1].start()
        closing = CLOSE_THINK.match(text, start, stop)
        return Region(message, start, closing.end() if closing else start, stop, end and end.span())


def after_empty_think(text: str, region: Region) -> int:
    """Where the turn begins if a think block in which nothing stands is left out of it."""
    empty = EMPTY_THINK.match(text, region.start, region.answer)
    return empty.end() if empty else region.start


def _request(messages, chat, *, generate=False, blocks=False):
    """What the sandbox gets of a conversation."""
    options = chat.get("options", {}) | {"add_generation_prompt": generate}
    where = chat.get("where", "a short conversation, to learn what the template expects")
    return dict(messages=messages, blocks=blocks, tools=chat.get("tools"), options=options, where=where)
