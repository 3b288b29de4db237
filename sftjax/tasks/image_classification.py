"""Classification of images: one label of several.

The labels are data.labels, else the model's, else the folders in which the training images lie.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from sftjax.data import open_source
from sftjax.data.packing.images import ImageRows
from sftjax.data.records.images import encoded, labels_of, pixels
from sftjax.data.token_store import OWN
from sftjax.errors import ConfigError
from sftjax.hf.heads import stored_labels
from sftjax.models.base import Model
from sftjax.ops.pixels import MIXES, check_names, vary
from sftjax.tasks.base import Example, LossFn, Task, read_model
from sftjax.tasks.classification import NEEDED, Classification, Labels
from sftjax.tasks.texts import LABELS

VARY = 3  # folded into a step's key for the images' variants


class ImageClassification(Classification):
    """labels: see Labels; side, channels: of the model's images; augment: names for ops.pixels."""

    head = "image"
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": ("image", "img", "file_name", "path"), "label": LABELS}
    columns: Mapping[str, tuple[str, tuple[int, ...] | None]] = {
        "image": ("uint8", OWN),
        "weights": ("float32", (1,)),
        "targets": ("int32", (1,)),
    }
    counts = ("images",)  # type: ignore[assignment] # others than of texts
    cleaned = False
    varies = True

    def __init__(
        self,
        labels: Mapping[Any, str] | Sequence[str],
        side: int,
        channels: int,
        names: Mapping[str, str] | None = None,
        augment: Sequence[str] = (),
    ) -> None:
        check_names(augment)
        self.labels, self.side, self.channels, self.augment = (Labels(labels), side, channels, augment)
        self.names = dict.fromkeys(("image", "label", "pair"), "") | dict(names or {})
        self.layout = ImageRows(side, channels)

    @classmethod
    def of(cls, config: ConfigDict, tokenizer: Any) -> "ImageClassification":
        """The task of a config. Raises: ConfigError where nothing names the labels."""
        d, model = config.data, read_model(config.model, "image")
        labels = d.labels or stored_labels(model.source.config, cls.head)
        if not labels and d.train:
            labels = labels_of(open_source(d.train))
        if not labels:
            raise ConfigError(NEEDED)
        names = {kind: d.fields[kind] for kind in cls.usual}
        size = (model.config.image_size, model.config.channels)
        return cls(labels, *size, names, tuple(d.augment))

    # ---- data ----

    def examples(self, records: Sequence[dict], wheres: Sequence[str]) -> list:
        """Each record's image, which is decoded once to know that it can be, and its label."""
        return [self._example(*pair) for pair in zip(records, wheres, strict=True)]

    def _example(self, record, where):
        label = self.read_wanted(record, where)
        data = encoded(self.field(record, "image", where), where)
        pixels(data, self.side, self.channels, where)
        arrays = np.frombuffer(data, np.uint8), np.ones(1, np.float32), np.full(1, label, np.int32)
        return Example(arrays, str(record.get("file", where)), note=self.note(label))

    def fields_read(self, record: dict) -> set[str]:
        """The keys of the image and its label, and the name of its file."""
        return super().fields_read(record) | ({"file"} & set(record))

    def key(self) -> list:
        """The fields' names and the labels; also the size, for which images were tried."""
        return [type(self).__name__, self.names, self.labels.by_value, self.side, self.channels]

    # An image is no text that could be cut, or cleaned.
    cut, kept, prepared = Task.cut, Task.kept, Task.prepared  # type: ignore[assignment]

    def summary(self, report: dict) -> str:
        """The number of images, and each label's share."""
        return f"{report['examples']:,} images; {self.facts(report)['labels']}"

    # ---- model and loss ----

    def loss_fn(self, model: Model, options: dict, sources: Sequence[str] = ()) -> LossFn:
        """As of Classification, of images that data.augment varies anew in each step."""
        inner = super().loss_fn(model, options, sources)
        if options["class_weights"] and {*self.augment} & {*MIXES}:
            raise ConfigError("loss.class_weights weighs one label, and mixed images have two")

        def varied(params, batch, rng, model_state=None):
            if rng is not None and self.augment:
                key = jax.random.fold_in(rng, VARY)
                batch = batch | vary(key, batch, self.augment)
            return inner(params, batch, rng, model_state)

        return varied

    def exported(self, params: Any, model_state: Any) -> Any:
        """The parameters, with the batch statistics of a model that has them."""
        return params if model_state is None else {**params, "stats": model_state}
