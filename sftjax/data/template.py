"""A chat template: what it renders, and where in the rendering each message's own words stand.

No mask comes from subtracting a rendered prefix: templates rewrite history, and a prefix of the
text is not a prefix of its tokens. Regions are found in the one rendering that is trained, by
strategies that verify themselves; where none can, the row is refused.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sftjax.data.sources import DataError

OURS = ("train", "weight")  # keys of a message that are for us, not for the template
CACHED = 1024  # skeletons kept for one template
THINK = re.compile(r"(\s*(?:<think>\s*)?)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
OPEN_THINK = re.compile(r"<think>\s*$")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Region(NamedTuple):
    """Where one message's own words stand in the rendering, and the token that ends the turn."""

    start: int
    stop: int
    end: tuple[int, int] | None  # characters of the special token after it, where there is one


def load_template(tokenizer, template: str | None = None) -> "ChatTemplate":
    """The template in use for this tokenizer; one object, so that its skeletons are shared."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets: a tokenizer.json is needed"
        )
    return _load(tokenizer, template_text(tokenizer, template), len(tokenizer))


@lru_cache(maxsize=8)
def _load(tokenizer, source, vocabulary):
    return ChatTemplate(tokenizer, source)


def template_text(tokenizer, template: str | None = None) -> str:
    """The chat template in use: `template` (its text, or a file's name) or the tokenizer's."""
    if not template:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise DataError(f"data.template={template!r}: no such file, and it is no template text")
    return Path(template).read_text(encoding="utf-8")


class ChatTemplate:
    """One tokenizer with one chat template; `source` is "" where there is none."""

    def __init__(self, tokenizer, source):
        self.tokenizer, self.source = tokenizer, source
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._skeletons, self._opening = {}, None

    def render(self, messages, tools=None, where="", **options):
        plain = [{k: v for k, v in m.items() if k not in OURS} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                plain, tools=tools, chat_template=self.source, tokenize=False, **options
            )
        except Exception as error:  # a template may fail in any way; the row must be named
            raise DataError(
                f"{where}: the chat template failed: {type(error).__name__}: {error}; the roles "
                f"are: {', '.join(m['role'] for m in messages)}"
            ) from error

    def prompt(self, messages, tools, where):
        """A text, and the character in it at which the model begins to write."""
        prompt = self.render(messages[:-1], tools, where, add_generation_prompt=True)
        text = self.render(messages, tools, where)
        only_last = [0.0] * (len(messages) - 1) + [1.0]
        start = self.regions(messages, tools, text, only_last, where)[len(messages) - 1].start
        if text.startswith(prompt) and start >= len(prompt):
            return text, start
        return prompt, len(prompt)

    def end_of_turn(self):
        """The special token after an assistant's turn, or "" where there is none."""
        messages = [dict(role="user", content="u"), dict(role="assistant", content="Answer")]
        try:
            text = self.render(messages)
            end = self.regions(messages, None, text, [0.0, 1.0], "")[1].end
        except DataError:
            return ""
        return text[slice(*end)] if end else ""

    def regions(self, messages, tools, text, weights, where) -> dict[int, Region]:
        """The region of each message that is in `text`; of every trained one, or DataError."""
        trained = {i for i, weight in enumerate(weights) if weight}
        for strategy in (self._by_sentinels, self._by_generation_tags, self._by_search):
            regions = strategy(messages, tools, text)
            if regions is not None and trained <= set(regions):
                return regions
        raise DataError(
            f"{where}: the trained turns can't be found in what the chat template made of them; "
            "it changes or repeats their text. Set data.template=FILE to a template that keeps "
            "the text, or put {% generation %} ... {% endgeneration %} around the assistant's turn"
            f". The rendering: {text!r}"
        )

    def _by_sentinels(self, messages, tools, text):
        """Render once more with a unique mark in place of each content: the skeleton.

        It is right if the contents put back into it give `text` again, character by character.
        The skeleton depends on the marked messages alone, so rows of like shape share one.
        """
        salt = "sftjax"
        while salt in text:
            salt += "x"
        marked, originals = _with_marks(messages, salt)
        key = json.dumps([marked, tools], default=str)
        if key not in self._skeletons:
            if len(self._skeletons) >= CACHED:
                self._skeletons.clear()
            try:
                rendering = self.render(marked, tools)
            except DataError:  # a template may parse the contents
                return None
            self._skeletons[key] = re.split(rf"{salt}(\d+)z", rendering)
        found = _put_back(text, self._skeletons[key], originals)
        return found and self._regions_of_marks(messages, text, found)

    def _regions_of_marks(self, messages, text, found):
        """Marks found, {(message, part): (start, stop, stop of the literal)}, to regions."""
        regions = {}
        for i in {i for i, _ in found}:
            parts = [found[i, part] for part in ("think", "content", "call") if (i, part) in found]
            if (i, "think") in found and len(parts) == 1:
                continue  # the answer itself is gone
            start, (_, stop, literal_stop) = parts[0][0], parts[-1]
            if (i, "think") in found and (opening := OPEN_THINK.search(text, 0, start)):
                start = opening.start()
            if (i, "call") in found and (i, "content") not in found:
                header = text.rfind(self.opening(), 0, start)
                if header < 0 or not self.opening():
                    continue
                start = header + len(self.opening())
            end = self.special.search(text, stop, literal_stop)
            regions[i] = Region(start, stop, end and end.span())
        return regions

    def opening(self):
        """What the template writes before an assistant's turn, as its generation prompt."""
        if self._opening is None:
            user = [dict(role="user", content="u")]
            text, prompt = self.render(user), self.render(user, add_generation_prompt=True)
            self._opening = prompt[len(text) :] if prompt.startswith(text) else ""
        return self._opening

    def _by_generation_tags(self, messages, tools, text):
        if not GENERATION_TAG.search(self.source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, blocks = render_jinja_template(
            [[{k: v for k, v in m.items() if k not in OURS} for m in messages]],
            tools=tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if texts[0] != text or len(blocks[0]) != len(turns):
            return None
        return {i: self._block(text, *block) for i, block in zip(turns, blocks[0], strict=True)}

    def _block(self, text, start, stop):
        inside = [m for m in self.special.finditer(text, start, stop)]
        if inside and not text[inside[-1].end() : stop].strip():
            return Region(start, inside[-1].start(), inside[-1].span())
        end = self.special.search(text, stop)
        return Region(start, stop, end and end.span())

    def _by_search(self, messages, tools, text):
        """The contents one after the other; right only if there is one way to find them all."""
        contents = [(i, m["content"].strip()) for i, m in enumerate(messages)]
        contents = [(i, content) for i, content in contents if content]
        first, last, at, end = [], [], 0, len(text)
        for _, content in contents:
            if (start := text.find(content, at)) < 0:
                return None
            first.append(start)
            at = start + len(content)
        for _, content in reversed(contents):
            end = text.rfind(content, 0, end)
            last.append(end)
        if first != last[::-1]:
            return None
        bounds = [*first[1:], len(text)]
        regions = {}
        for (i, content), start, bound in zip(contents, first, bounds, strict=True):
            end = self.special.search(text, start + len(content), bound)
            regions[i] = Region(start, start + len(content), end and end.span())
        return regions


def _with_marks(messages, salt):
    """Messages with a mark for each text of theirs, and mark -> (message, part, text)."""
    originals, marked = [], []

    def mark(i, part, text):
        originals.append((i, part, text))
        return f"{salt}{len(originals) - 1}z"

    for i, message in enumerate(messages):
        message = {k: v for k, v in message.items() if k not in OURS}
        content, reasoning = message["content"], message.get("reasoning_content")
        thought = THINK.fullmatch(content) if message["role"] == "assistant" else None
        if isinstance(reasoning, str) and reasoning.strip():
            message["reasoning_content"] = mark(i, "think", reasoning)
        if thought and thought[4] and not reasoning:
            opening, think, closing, content = thought.groups()
            think = mark(i, "think", think) if think else ""
            content = mark(i, "content", content) if content else ""
            message["content"] = opening + think + closing + content
        elif content.strip():
            message["content"] = mark(i, "content", content)
        elif message.get("tool_calls"):
            message["tool_calls"] = _mark_call(message["tool_calls"], i, mark)
        marked.append(message)
    return marked, originals


def _mark_call(calls, i, mark):
    """Tool calls with a mark in place of the first one's name."""
    first, *others = calls
    nested = isinstance(first, dict) and isinstance(first.get("function"), dict)
    function = first["function"] if nested else first
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return calls
    function = function | {"name": mark(i, "call", function["name"])}
    return [first | {"function": function} if nested else function, *others]


def _put_back(text, skeleton, originals):
    """Put the texts back into the skeleton [literal, mark, literal, ...]; None if not `text`.

    Returns: {(message, part): (start, stop, stop of the literal after it)}. A template may trim
    a text, so its trimmed forms are tried as well.
    """
    if not text.startswith(skeleton[0]):
        return None
    at, found = len(skeleton[0]), {}
    for mark, literal in zip(skeleton[1::2], skeleton[2::2], strict=True):
        i, part, original = originals[int(mark)]
        form = next((f for f in _forms(original) if text.startswith(f + literal, at)), None)
        if form is None or (i, part) in found:
            return None
        stop = at + len(form)
        found[i, part] = (at, stop, stop + len(literal))
        at = stop + len(literal)
    return found if at == len(text) else None


def _forms(text):
    yield text
    yield text.strip()
    yield from (text.lstrip(), text.rstrip())
    yield from (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
