"""Which files of a folder, or of a hub data set, are data, and of which split and configuration."""

import json
from pathlib import PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftjax.data import DataError, open_source
from sftjax.data.records.layout import is_of, split_of

TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"


def put(path, row):
    """A file of one row, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row])
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(row) + "\n")


def fill(folder, names):
    for name in names:
        put(folder / name, {"x": name})
    return folder


def save(folder, *names):
    """A folder as `save_to_disk` writes it."""
    fill(folder, names)
    listed = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed, "_split": "train"}))
    (folder / "dataset_info.json").write_text('{"description": "", "features": {"x": {}}}')
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    def give(*args, **kwargs):
        assert "README.md" in kwargs["allow_patterns"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    return tmp_path


def found(spec):
    return [row["x"] for row in open_source(spec)]


def refused(spec):
    with pytest.raises(DataError) as error:
        open_source(spec)
    return str(error.value)


# --- folders ---


def test_a_folder_of_save_to_disk_is_read_in_its_own_order(tmp_path):
    folder = save(tmp_path / "saved", "data-00001-of-00002.arrow", "data-00000-of-00002.arrow")
    put(folder / "cache-0123.arrow", {"x": "left by a map"})
    assert found(folder) == ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    assert open_source(folder).where(0) == f"{folder}/data-00001-of-00002.arrow:1"
    (folder / "data-00001-of-00002.arrow").unlink()
    assert "state.json names data-00001-of-00002.arrow, which is not there" in refused(folder)


def test_a_saved_set_of_several_splits_asks_for_one(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        save(tmp_path / split, "data-00000-of-00001.arrow")
    assert "holds several splits" in refused(tmp_path)
    assert found(tmp_path / "test") == ["data-00000-of-00001.arrow"]


def test_a_saved_set_with_a_mapping_of_indices_is_refused(tmp_path):
    save(tmp_path, "data.arrow")
    state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert "flatten_indices" in refused(tmp_path)


def test_an_arrow_file_of_either_format(tmp_path):
    table = pa.Table.from_pylist([{"x": 1}, {"x": None}])
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as w,
    ):
        w.write_table(table)
    assert list(open_source(tmp_path / "a.arrow")) == [{"x": 1}, {"x": None}]
    (tmp_path / "b.arrow").write_text("not a table")
    assert "b.arrow: not a readable Arrow file" in refused(tmp_path / "b.arrow")


def test_metadata_beside_the_data_is_no_data(tmp_path):
    fill(tmp_path, [f"data/{TRAIN}"])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {"train": {}}}}')
    (tmp_path / "README.md").write_text("# A set\n")
    fill(tmp_path, [".cache/x.jsonl"])
    assert found(tmp_path) == [f"data/{TRAIN}"]


def test_splits_are_told_by_folders_too(tmp_path):
    fill(tmp_path, ["train/0.jsonl", "test/0.jsonl"])
    assert "several splits (0.jsonl); name the files to use" in refused(tmp_path)


def test_a_clone_of_several_configurations_asks_for_one(tmp_path):
    fill(tmp_path, [f"main/{TRAIN}", f"socratic/{TRAIN}"])
    (tmp_path / "dataset_infos.json").write_text('{"main": {}, "socratic": {}}')
    assert "holds several configurations (main, socratic); name the folder" in refused(tmp_path)
    assert found(tmp_path / "main") == [f"main/{TRAIN}"]


def test_folders_without_a_card_are_one_set(tmp_path):
    fill(tmp_path, ["a/part.jsonl", "b/part.jsonl"])
    assert found(tmp_path) == ["a/part.jsonl", "b/part.jsonl"]


# --- names of splits ---


@pytest.mark.parametrize(
    "path, split",
    [
        (f"data/{TRAIN}", "train"),
        ("train/0000.parquet", "train"),
        ("my_train.jsonl", "train"),
        ("data/train_sft-00000-of-00003-a3ecf92756993583.parquet", "train_sft"),
        ("dev.v2.jsonl", "dev"),
        ("training_notes.jsonl", ""),
        ("pretrain.jsonl", ""),
        ("latest.jsonl", ""),
        ("en-00000-of-00002.parquet", ""),
    ],
)
def test_the_split_that_a_path_tells(path, split):
    assert split_of(PurePath(path)) == split


@pytest.mark.parametrize(
    "path, split, yes",
    [
        (f"data/{TRAIN}", "train", True),
        ("training_notes.jsonl", "train", False),
        ("pretrain-0.jsonl", "train", False),
        ("data/train_sft-00000-of-00001.parquet", "train", False),
        ("data/train_sft-00000-of-00001.parquet", "train_sft", True),
        ("train_sft.jsonl", "train_sft", True),
        ("part_v10.jsonl", "v1", False),
        ("part_v1.jsonl", "v1", True),
        ("extra/0.jsonl", "extra", True),
        ("contest.jsonl", "test", False),
    ],
)
def test_a_split_is_matched_by_whole_parts(path, split, yes):
    assert is_of(PurePath(path), split) == yes


# --- the hub ---


def test_hub_metadata_and_other_names_are_no_train_split(hub):
    fill(hub, [f"data/{TRAIN}", f"data/{TEST}", "training_notes.jsonl", "metadata.json"])
    (hub / "dataset_infos.json").write_text('{"default": {"splits": {"train": {}}}}')
    assert found("org/name") == found("org/name:train") == [f"data/{TRAIN}"]
    assert found("org/name:test") == [f"data/{TEST}"]
    assert found("org/name:default/test") == [f"data/{TEST}"]
    assert "org/name: no file of split 'dev'; it holds: data/test" in refused("org/name:dev")


def test_a_split_of_its_own_name(hub):
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("train_sft", "train_gen")]
    fill(hub, names)
    assert found("org/name:train_sft") == names[:1]
    assert "no file of split 'train'; it holds: data/train_gen" in refused("org/name")


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path:
    - main/test-*
- config_name: socratic
  default: true
  data_files:
  - split: train
    path: socratic/**
---
# A set
"""


@pytest.mark.parametrize("card", [CARD, ""])
def test_several_configurations_ask_for_one(hub, card):
    fill(hub, [f"main/{TRAIN}", f"main/{TEST}", f"socratic/{TRAIN}"])
    if card:
        (hub / "README.md").write_text(card)
    listed = "the configurations are: main, socratic; write org/name:CONFIGURATION"
    assert f"org/name: it has several configurations; {listed}" in refused("org/name")
    assert f"org/name: no configuration 'train'; {listed}" in refused("org/name:train")
    assert found("org/name:main") == [f"main/{TRAIN}"]
    assert found("org/name:main/test") == [f"main/{TEST}"]
    assert found("org/name:socratic/train") == [f"socratic/{TRAIN}"]
    assert "no file of split 'test'" in refused("org/name:socratic/test")
    assert found("org/name:main, org/name:socratic") == [f"main/{TRAIN}", f"socratic/{TRAIN}"]


def test_files_that_tell_no_split_are_for_training(hub):
    fill(hub, ["rows.jsonl", "test.jsonl"])
    assert found("org/name") == ["rows.jsonl"]
    assert found("org/name:test") == ["test.jsonl"]


def test_one_configuration_needs_no_name(hub):
    fill(hub, ["rows/a.jsonl", "rows/b.jsonl"])
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files:\n  - split: train\n"
        "    path: rows/a.jsonl\n  - split: held\n    path: ./rows/b.jsonl\n---\n"
    )
    assert found("org/name") == found("org/name:plain") == ["rows/a.jsonl"]
    assert found("org/name:held") == found("org/name:plain/held") == ["rows/b.jsonl"]
    assert "no file of split 'dev'; it holds: held, train" in refused("org/name:dev")
    assert "no configuration 'other'; its only one is 'plain'" in refused("org/name:other/train")


def test_a_card_that_can_not_be_read_is_as_none(hub):
    fill(hub, [TRAIN])
    (hub / "README.md").write_text("---\nconfigs: [\n---\n")
    assert found("org/name") == [TRAIN]
