"""Texts with images: conversations as of causal_lm, in which "<image>" stands where an image is.

A record has its images in order, as paths, data URLs or bytes, under `images` or `image`; or each in its part of a
message's content. In tokens an image is as many placeholders as it has patches, none of them trained.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sftjax.data.masking.around import Around
from sftjax.data.masking.encode import Encoded
from sftjax.data.packing.images import ImageTextRows, Patches
from sftjax.data.packing.pack import Batch
from sftjax.data.records.images import encoded
from sftjax.data.records.sources import Source
from sftjax.data.token_store import COLUMNS, OWN
from sftjax.errors import ConfigError, DataError
from sftjax.models.base import Model
from sftjax.models.vision_language import Config
from sftjax.tasks.base import Task, read_model
from sftjax.tasks.causal_lm import CausalLM, CausalTally

MARK = "<image>"
PARTS = ("image", "image_url", "input_image")  # types of a message's parts that are images
VALUES = ("image_url", "image", "url", "path", "bytes", "data")  # where a part has it
FIELDS = ("images", "image")


class Pictured(Encoded):
    """An Encoded with its images' files. image: int32 [n], which image a token is of, from 1 on; 0 for none."""

    images: Sequence[bytes] = ()
    image: np.ndarray = np.zeros(0, np.int32)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:  # type: ignore[override] # more than of texts
        """The tokens, weights, the bytes of all images, and how many each has."""
        sizes = np.array([len(x) for x in self.images], np.int32)
        return self.tokens, self.weights, np.frombuffer(b"".join(self.images), np.uint8), sizes


class ImageText(CausalLM):
    """A CausalLM of records with images; made by `of`."""

    columns: Any = COLUMNS | {"images": ("uint8", OWN), "sizes": ("int32", OWN)}
    foreign = ("label", "pair")
    field = ""  # which of a record holds its images; "" = the first of FIELDS that it has
    layout: ImageTextRows
    image_token: int
    patches: Patches
    sized = False  # is the layout's share that of data
    breaks = False  # does a prompt end with a line break

    @classmethod
    def of(cls, config: ConfigDict, tokenizer: Any) -> "ImageText":
        """The task of a config. Raises: ConfigError for what images do not go with."""
        d, c = config.data, read_model(config.model, "image_text").config
        refused = {
            "data.packing": d.packing not in ("bfd", "none") and d.packing,
            "data.eval_packing": d.eval_packing not in ("bfd", "none") and d.eval_packing,
            "data.overlong": d.overlong == "split" and d.overlong,
            "data.streaming": d.streaming,
            "eval.shots": config.eval.shots,
            "eval.metrics": "choice" in config.eval.metrics and "choice",
        }
        for key, value in refused.items():
            if value:
                raise ConfigError(f"{key}={value!r} does not go with images yet, task={config.task!r}")
        task: Any = super().of(config, tokenizer)
        return task.reads(c, d.fields.image)

    def reads(self, c: Config, field: str = "") -> "ImageText":
        """The same task, for the images of a model."""
        v, self.field, self.image_token = c.vision, field, c.image_token
        if isinstance(self.tokenizer, Around):  # another task's, as of one source of several
            self.tokenizer = self.tokenizer.within
        self.patches = Patches(v.image_size, v.patch, v.channels, v.patches, c.pool**2)
        self.layout = ImageTextRows(patches=self.patches)
        if self.tokenizer is not None:
            known = self.tokenizer.added_tokens_decoder  # an ordinary token would stand in texts
            if other := [i for i in (self.image_token, *c.around) if i not in known]:
                raise ConfigError(f"token {other[0]}, the image's of the model's config, is no added token")
            first, last = (known[i].content for i in c.around) if c.around else ("", "")
            self.mark = first + known[self.image_token].content + last
            if c.around:  # as Gemma 3's processor
                self.tokenizer = Around(self.tokenizer, re.escape(self.mark), "\n\n", "\n\n")
            self.breaks = c.prefix and not self.tokenizer.chat_template
            if self.breaks:  # as PaliGemma's
                pattern = rf"\A(?:{re.escape(self.mark)})*"
                self.tokenizer = Around(self.tokenizer, pattern, "", self.tokenizer.bos_token or "", whole=True)
        return self

    # ---- data ----

    def separated(self, record: dict, where: str) -> tuple[dict, list[bytes]]:
        """(the record with the model's placeholder for each image and without the images, their files in order)."""
        key = self.field or next((k for k in FIELDS if record.get(k)), "")
        given = record.get(key)
        listed = iter(given if isinstance(given, list) else [] if given is None else [given])
        found: list[bytes] = []
        last = self.policy.get("fields", {}).get("completion", "completion")  # in the text, wherever it stands here
        names = sorted((k for k in record if k != key), key=lambda k: k == last)
        text = self._walked({k: record[k] for k in names}, listed, found, where)
        if left := sum(1 for _ in listed):
            raise DataError(
                f"{len(found) + left} images, and {len(found)} places for them in the text",
                f"write {MARK} where each of them belongs",
                where=where,
                kind="image_slots",
            )
        return text, found

    def _walked(self, x: Any, listed: Iterator, found: list[bytes], where: str, part: bool = False) -> Any:
        """X with placeholders in place of images; part: is it a part of a message's content, or a list of them."""
        if isinstance(x, str):
            for _ in range(x.count(MARK)):
                found.append(self._next(listed, found, where))
            return x.replace(MARK, self.mark)
        if isinstance(x, dict) and part and x.get("type") in PARTS:
            value = next((x[k] for k in VALUES if x.get(k) is not None), None)
            if value is None and (other := [k for k in x if k != "type" and x[k] is not None]):
                problem = f"an image's part has {', '.join(map(repr, other))}, expected one of {', '.join(VALUES)}"
                fix = "or the type alone, for the next of the record's images"
                raise DataError(problem, fix, where=where, kind="image_slots")
            value = value.get("url") if isinstance(value, dict) and "url" in value else value
            found.append(self._next(listed, found, where) if value is None else encoded(value, where))
            return {"type": "text", "text": self.mark}
        if isinstance(x, dict):
            own = self.policy.get("fields", {}).get("content", "content")
            return {k: self._walked(v, listed, found, where, k == own) for k, v in x.items()}
        return [self._walked(v, listed, found, where, part) for v in x] if isinstance(x, list) else x

    def _next(self, listed, found, where):
        value = next(listed, None)
        if value is None:
            raise DataError(
                f"the text has a place for image {len(found) + 1}, and the record {len(found)} images",
                f"give it under {self.field or FIELDS[0]!r}, or take {MARK} out of the text",
                where=where,
                kind="image_slots",
            )
        return encoded(value, where)

    def expanded(self, tokens: np.ndarray, images: Sequence[bytes], where: str) -> tuple[np.ndarray, np.ndarray]:
        """(times that each token stands in the row, which image it is of): int32 [n] both, of tokens with one each."""
        own = tokens == self.image_token
        if own.sum() != len(images):
            raise DataError(
                f"{len(images)} images, and {own.sum()} tokens {self.mark!r} in the rendered text",
                "is that the model's template, and does no text hold this token itself?",
                where=where,
                kind="image_slots",
            )
        times, which = np.ones(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
        times[own] = [self.patches.tokens(data, where) for data in images]
        which[own] = np.arange(1, len(images) + 1)
        return times, np.repeat(which, times)

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list[Encoded]:
        """Each record, rendered and tokenised, with its images' placeholders and files."""
        parts = [self.separated(*pair) for pair in zip(records, wheres, strict=True)]
        texts = super().examples([text for text, _ in parts], wheres)
        return [self._pictured(t, p[1], w) for t, p, w in zip(texts, parts, wheres, strict=True)]

    def _pictured(self, text, images, where):
        times, which = self.expanded(text.tokens, images, where)
        weights = np.where(which > 0, np.float32(0), np.repeat(text.weights, times))
        out = Pictured(np.repeat(text.tokens, times), weights, *text[2:])
        if self.breaks and out.spans and not out.text[: out.spans[0][0]].endswith("\n"):
            out = out._replace(left_out=[*out.left_out, "the prompt does not end with a line break, as PaliGemma's do"])
        out.images, out.image = images, which
        return out

    def fields_read(self, record: dict) -> set[str]:
        """Those of the text, and that of the images."""
        own = {self.field} if self.field else set(FIELDS)
        return super().fields_read({k: v for k, v in record.items() if k not in own}) | (own & set(record))

    def key(self) -> list:
        """Those of the text, and how images become patches."""
        around = self.tokenizer.written if isinstance(self.tokenizer, Around) else []
        return [*super().key(), self.field, self.image_token, list(self.patches), *around]

    def kept(self, example: Any, max_length: int, overlong: str) -> list[np.ndarray]:
        """As of CausalLM, without the tokens of images that would be cut in parts."""
        image, out = example.image, []
        whole = np.bincount(image, minlength=1)
        for at in super().kept(example, max_length, overlong):
            lost = np.bincount(image[at], minlength=len(whole)) < whole
            lost[0] = False
            at = at[~lost[image[at]]]
            out += [at] if example.weights[at][1:].any() else []
        return out

    def cut(self, example: Any, max_length: int, overlong: str) -> list[tuple]:
        """The arrays of what is kept: whole images only."""
        out, (tokens, weights, _, sizes) = [], example.arrays
        for at in self.kept(example, max_length, overlong):
            there = np.unique(example.image[at])
            files = b"".join(example.images[i - 1] for i in there if i)
            out.append((tokens[at], weights[at], np.frombuffer(files, np.uint8), sizes[there[there > 0] - 1]))
        return out

    def tally(self, max_length: int, overlong: str) -> Any:
        """As of CausalLM. Raises: DataError where no image would fit into a row."""
        least = (self.patches.limits[0] if self.patches.limits else self.patches.most) // self.patches.each
        if 0 < max_length < least:
            raise DataError(f"data.max_length={max_length}: an image has {least} tokens", "raise it", kind="setting")
        return ImageTally(self, max_length, overlong)

    def opened(self, report: dict) -> None:
        """Rows have room for the images of the store that has most of them beside its texts."""
        known = self.layout.share if self.sized else 0.0
        self.layout, self.sized = replace(self.layout, share=max(known, report["image_share"])), True

    # Rules of cleaning read texts.
    prepared: Any = Task.prepared
    answers_only: Any = Task.answers_only

    def summary(self, report: dict) -> str:
        """As of CausalLM, with the number of images."""
        return f"{super().summary(report)}; {report['images']:,} images"

    def warnings(self, report: dict) -> Iterable[str]:
        """As of CausalLM, and of images that are cut away."""
        yield from super().warnings(report)
        if report["images_cut"]:
            yield f"{report['images_cut']:,} images are cut away, or dropped with their texts: see data.max_length"

    # ---- model, questions ----

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The model of model.path, without weights."""
        return read_model(section, "image_text", **changes)

    def questions(self, source: Source, shots: Callable[[int, dict], Sequence[dict]] | None = None) -> list:
        """What is asked of each record, with the record's images."""
        texts = _Texts(source, self)
        asked = super().questions(texts)  # type: ignore[arg-type] # what it reads of a source is there
        for i, (q, images) in enumerate(zip(asked, texts.images, strict=True)):
            times, _ = self.expanded(q.prompt, images, source.where(i))
            asked[i] = q._replace(prompt=np.repeat(q.prompt, times), images=images)
        return asked

    def try_it(self, section: ConfigDict, export: Path) -> str:
        """A command that asks the export about an image; "" where no template says how."""
        if not self.tokenizer.chat_template:
            return ""
        python, model = os.path.relpath(sys.executable), os.path.relpath(export)
        return f"Ask the trained model:\n  {python} -m sftjax.generate --model={model} --image=FILE --prompt=TEXT"

    def answers(self, model: Any, params: Any, questions: list, groups: Sequence | None = None, **options: Any) -> dict:
        """See evaluation.answers.answered."""
        draws = self.asking.draws
        options["beside"] = lambda rows: self.beside_prompts([questions[i // draws].images for i in rows])
        return super().answers(model, params, questions, groups, **options)

    def beside_prompts(self, images: Sequence[Sequence[bytes]]) -> Batch:
        """The arrays of prompts' images, a row each; few widths mean few compilations."""
        step = min(self.patches.most, 256) if self.patches.limits else self.patches.most
        cells = [sum(int(np.prod(self.patches.of(data).shape[:2])) for data in row) for row in images]
        return self.patches.batch(images, -(-max(*cells, 1) // step) * step)


class ImageTally(CausalTally):
    """Counts the images, and measures the most of an example's tokens that are of images."""

    images, patches, share, given = 0, 0, 0.0, 0

    def fit(self, encoded: Sequence[tuple[str, Any]]) -> list[tuple[np.ndarray, ...]]:
        """As of CausalTally; counts the images that there are before anything is cut."""
        self.given += sum(len(example.images) for _, example in encoded)
        return super().fit(encoded)

    def count(self, pieces: Sequence[tuple[np.ndarray, ...]]) -> None:
        """As of CausalTally, with the images."""
        super().count(pieces)
        own: Any = [piece[0] == self.task.image_token for piece in pieces]  # type: ignore[attr-defined]
        self.images += sum(len(piece[3]) for piece in pieces)
        self.patches += sum(int(x.sum()) for x in own)
        self.share = max([self.share, *(float(x.mean()) for x in own)])

    def report(self, skipped: Mapping[str, int]) -> dict:
        """As of CausalTally, with images, images_cut and image_share; the trained fraction is that of the texts."""
        out = super().report(skipped)
        out["trained_fraction"] = out["trained_tokens"] / max(out["targets"] - self.patches, 1)
        return out | dict(images=self.images, images_cut=self.given - self.images, image_share=self.share)


class _Texts:
    """A source's records without their images, and these."""

    def __init__(self, source: Source, task: ImageText) -> None:
        self.where, rows = source.where, range(len(source))
        self.records, self.images = zip(*(task.separated(source[i], source.where(i)) for i in rows), strict=True)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return self.records[i]
