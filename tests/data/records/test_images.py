"""Images in folders, tar files and records: their pixels, and what is refused with a reason."""

import base64
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sftjax import config as config_lib
from sftjax import tasks
from sftjax.data import DataError, open_source
from sftjax.data.packing.images import ImageRows
from sftjax.data.records.images import encoded, labels_of, pixels
from sftjax.data.token_store import build_store
from sftjax.errors import ConfigError

RNG = np.random.default_rng(0)
SQUARE = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)


def png(x=SQUARE, kind="png", **options):
    out = io.BytesIO()
    (x if isinstance(x, Image.Image) else Image.fromarray(x)).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes, of two images each."""
    for name in ("cat/0.png", "cat/1.PNG", "dog/0.png", "dog/a/0.png", "cat/note.txt", ".x/0.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return tmp_path / "train"


def image_model(where):
    where.mkdir(exist_ok=True)
    model = {"architecture": "resnet8_cifar", "pretrained_cfg": {"input_size": [3, 8, 8]}}
    (where / "config.json").write_text(json.dumps(model))
    return where


def task(where, labels=("cat", "dog"), **data):
    config = config_lib.get_default()
    path = str(image_model(where / "model"))
    config.task, config.model.path, config.data.labels = "image_classification", path, labels
    config.data.update(data)
    return tasks.make(config, None)


def test_a_folder_and_a_tar_of_it_are_the_same_records(folder, tmp_path, caplog):
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        for path in sorted(folder.rglob("*")):
            file.add(path, path.relative_to(folder), recursive=False)
    a, b = open_source(str(folder)), open_source(str(tmp_path / "train.tar"))
    names = [r["file"] for r in a]
    assert names == [r["file"] for r in b] == ["cat/0.png", "cat/1.PNG", "dog/0.png", "dog/a/0.png"]
    assert [r["label"] for r in a] == [r["label"] for r in b] == ["cat", "cat", "dog", "a"]
    assert a.where(1) == str(folder / "cat" / "1.PNG")
    assert b.where(1) == f"{tmp_path / 'train.tar'}:cat/1.PNG"
    assert labels_of(a) == labels_of(b) == ["a", "cat", "dog"]
    same = [encoded(r["image"], s.where(i)) for s in (a, b) for i, r in enumerate(s)]
    assert set(same) == {png()}
    said = [r.getMessage() for r in caplog.records]  # not of what is hidden
    assert said == [f"{s.readers[0].path}: files that are not read as images: 1 of .txt" for s in (b, a)][::-1]
    assert a.files()[0]["bytes"] == 4 * len(png())
    before = a.fingerprint()
    (folder / "cat" / "0.png").write_bytes(png(SQUARE[::-1]) + b" ")
    assert open_source(str(folder)).fingerprint() != before


def test_every_form_of_an_image_has_the_same_pixels(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [{"image": "pictures/a.png"}, {"image": url}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = [
        {"image": {"bytes": png(), "path": None}},
        {"image": {"bytes": None, "path": "pictures/a.png"}},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        source = open_source(str(tmp_path / name))
        for i, record in enumerate(source):
            found = pixels(encoded(record["image"], source.where(i)), 8, 3)
            np.testing.assert_array_equal(found, SQUARE)


def test_pixels_of_other_modes_sizes_and_turns():
    gray = Image.fromarray(SQUARE[..., 0])
    np.testing.assert_array_equal(pixels(png(gray), 8, 3), np.repeat(SQUARE[..., :1], 3, -1))
    np.testing.assert_array_equal(pixels(png(gray), 8, 1), SQUARE[..., :1])
    clear = Image.fromarray(np.dstack([SQUARE, np.zeros((8, 8), np.uint8)]))
    np.testing.assert_array_equal(pixels(png(clear), 8, 3), SQUARE)
    wide = np.concatenate([0 * SQUARE[:, :4], SQUARE, 0 * SQUARE[:, :4]], 1)
    np.testing.assert_array_equal(pixels(png(wide), 8, 3), SQUARE)  # the middle square
    camera = png(Image.fromarray(SQUARE), "mpo", save_all=True, append_images=FRAMES[1:])
    assert pixels(camera, 8, 3).shape == (8, 8, 3)  # the picture, not its preview
    turned = Image.Exif()
    turned[0x0112] = 3  # by half a turn, as a camera says it
    np.testing.assert_array_equal(pixels(png(exif=turned), 8, 3), SQUARE[::-1, ::-1])
    large = pixels(png(np.full((100, 60, 3), 77, np.uint8), "jpeg"), 8, 3)
    assert large.shape == (8, 8, 3) and abs(large.astype(int) - 77).max() <= 1


def claimed(width, height):
    """A PNG that says it is so large, and holds next to nothing."""
    part = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0")) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


FRAMES = [Image.fromarray(x) for x in (SQUARE, SQUARE[::-1])]
DEEP = Image.fromarray(RNG.integers(0, 60000, (8, 8)).astype(np.uint16))


@pytest.mark.parametrize(
    "data, message",
    [
        (png()[:60], "the image cannot be read: "),
        (b"", "the image cannot be read: UnidentifiedImageError"),
        (b"no image", "the image cannot be read"),
        (claimed(100_000, 100_000), "exceeds limit"),
        (claimed(9000, 8000), "the image has 9000 x 8000 pixels; at most 67,108,864 are read"),
        (png(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]), "has 2 frames; take one"),
        (png(DEEP), "mode I;16, expected one of 8 bits"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(data, message, tmp_path):
    with pytest.raises(DataError) as error:
        pixels(data, 8, 3, "train.tar:cat/1.png")
    assert str(error.value).startswith("train.tar:cat/1.png: ") and message in str(error.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"image": "no.png", "label": "cat"}, r"the image .*/no\.png is not there"),
        ({"image": 3, "label": "cat"}, "the image is '3', expected a path, a data URL or bytes"),
        ({"image": "data:image/png;base64,%%", "label": "cat"}, "data URL is no base64"),
        ({"label": "cat"}, "no image: none of the fields image"),
        ({"image": png(), "label": "cow"}, "label 'cow' is unknown; expected one of"),
        ({"image": png()}, "no label: none of the fields label"),
    ],
)
def test_a_record_that_is_none(record, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        task(tmp_path).examples([record], [f"{tmp_path}/a.jsonl:1"])
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:1: ")


def test_a_bad_image_among_good_ones_is_skipped_and_counted(folder, tmp_path):
    (folder / "cat" / "1.PNG").write_bytes(png()[:50])
    (folder / "dog" / "a" / "0.png").unlink()
    one, source = task(tmp_path), open_source(str(folder))
    with pytest.raises(DataError, match=r"cat/1\.PNG: the image cannot be read"):
        build_store(source, one, 0, "drop", tmp_path / "cache")
    store = build_store(source, one, 0, "drop", tmp_path / "cache", "skip", 0.5)
    assert (len(store), sum(store.report["skipped"].values())) == (2, 1)
    assert store.report["labels"] == {"cat": 1, "dog": 1}
    layout = ImageRows(8, 3)
    for i in range(2):
        row = {k: np.zeros(f.shape, f.dtype)[0] for k, f in layout.spec(1, 1).items()}
        layout.fill(row, store, [(i, 0, 1)])
        np.testing.assert_array_equal(row["image"], SQUARE)
        assert (row["weights"], row["targets"]) == (1, i)
    assert (store.lengths == 1).all() and np.diff(store.own["image"])[0] == len(png())


def test_classes_that_differ_between_splits_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="label 'a' is unknown; expected one of"):
        build_store(open_source(str(folder)), task(tmp_path), 0, "drop", tmp_path / "cache")
    assert task(tmp_path, (), train=str(folder)).labels.names == ("a", "cat", "dog")
    with pytest.raises(ConfigError, match=r"data\.labels is empty"):
        task(tmp_path, ())


def test_folders_of_several_splits_are_refused_and_links_followed(folder, tmp_path):
    for name in ("train", "test"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "cat").symlink_to(folder / "cat")
    with pytest.raises(DataError, match=r"both holds several splits \(test, train\)"):
        open_source(str(tmp_path / "both"))
    with tarfile.open(tmp_path / "both.tar", "w", dereference=True) as file:
        file.add(tmp_path / "both", "both")
    with pytest.raises(DataError, match="several splits"):
        open_source(str(tmp_path / "both.tar"))
    (tmp_path / "both" / "train" / "round").symlink_to(tmp_path / "both")
    one = open_source(str(tmp_path / "both" / "train"))
    assert [r["file"] for r in one] == ["cat/0.png", "cat/1.PNG"]


def test_settings_that_are_not_of_images(folder, tmp_path):
    with pytest.raises(ConfigError, match="'flop' is no variant of images; known: flip, crop"):
        task(tmp_path, augment=("flop",))
    with pytest.raises(DataError, match="ImageClassification has none"):
        task(tmp_path).prepared(None)
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(dict(model_type="bert", vocab_size=9, hidden_size=8, num_attention_heads=2,
                        num_hidden_layers=1, intermediate_size=8))
    )  # fmt: skip
    config = config_lib.get_default()
    config.task, config.model.path = "image_classification", str(tmp_path / "model")
    with pytest.raises(ConfigError, match="the model reads texts, the task images"):
        tasks.make(config, None)
    config.model.path = str(image_model(tmp_path / "of_images"))
    for name in ("classification", "token_labels", "multi_label"):
        config.task = name
        with pytest.raises(ConfigError, match="the model reads images, the task texts"):
            tasks.make(config, None)
    config.task = "causal_lm"
    with pytest.raises(ConfigError, match="is empty, or of images"):
        tasks.make(config, None).key()
    assert tasks.of_head({"model_type": "vit", "architectures": ["ViTModel"]}) == "image_classification"


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as file:
        file.add(__file__, "a.py")
    with pytest.raises(DataError, match="not a readable tar file"):
        open_source(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        file.add(__file__, Path(__file__).name)
    with pytest.raises(DataError, match="holds no row"):
        open_source(str(tmp_path / "b.tar"))
