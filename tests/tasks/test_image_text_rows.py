"""Texts with images: cuts, and the rows of a batch."""

import dataclasses

import jax
import numpy as np
import pytest
from image_records import ANY, MOST, TOKEN, chat, counted, make, turn, write

from sftjax import parallel
from sftjax import params as params_lib
from sftjax.data import Rows, build_store, loader, open_source
from sftjax.data.packing.images import Patches
from sftjax.data.token_store import store_key
from sftjax.training import build
from sftjax.training import data as feed_lib

# ---- cuts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("overlong", ["truncate_end", "truncate_prompt"])
def test_a_cut_never_leaves_a_part_of_an_image(overlong, any_size, base, config):
    task = make(config, any_size)
    record = {"messages": [turn("user", "a<image>b"), turn("assistant", "cd"), turn("user", "<image>ef<image>"),
                           turn("assistant", "gh")], "images": ["0.png", "1.png", "2.png"]}  # fmt: skip
    [e] = task.examples([record], [f"{base}/x.jsonl:1"])
    counts, whole = np.bincount(e.image)[1:], len(e.tokens)
    assert counts.tolist() == ([9, 8, 9] if any_size else [4, 4, 4]) or any_size
    seen = set()
    for most in range(max(counts), whole + 2):
        pieces, kept = task.cut(e, most, overlong), task.kept(e, most, overlong)
        assert len(pieces) == len(kept) <= 1
        for (tokens, weights, data, sizes), at in zip(pieces, kept, strict=True):
            assert len(tokens) == len(weights) <= most and weights[1:].any()
            np.testing.assert_array_equal(tokens, e.tokens[at])
            np.testing.assert_array_equal(weights, e.weights[at])
            left = [i for i in range(1, 4) if i in e.image[at]]
            seen.add(tuple(left))
            assert data.tobytes() == b"".join(e.images[i - 1] for i in left)
            assert sizes.tolist() == [len(e.images[i - 1]) for i in left]
            assert (tokens == TOKEN).sum() == sum(counts[i - 1] for i in left)
            batch = {k: np.zeros(f.shape, f.dtype) for k, f in task.layout.spec(1, whole).items()}
            task.layout.fill({k: v[0] for k, v in batch.items()}, [pieces[0]], [(0, 0, len(tokens))])
            if any_size:
                assert (batch["patch_segments"] > 0).sum() == (tokens == TOKEN).sum()
    assert (1, 2, 3) in seen and len(seen) > 2, seen


def test_images_that_are_cut_away_are_counted_and_said(base, config):
    task, rows = make(config), [chat("<image>which?", "0.png"), chat("a longer question <image>", "1.png")]
    store = build_store(
        open_source(write(base / "two.jsonl", rows)), task, 16, "truncate_prompt", config.data.cache_dir
    )
    assert (store.report["images"], store.report["images_cut"]) == (1, 1)
    assert any("1 images are cut away" in line for line in task.warnings(store.report))


# ---- batches -------------------------------------------------------------------------------


def records(n):
    """Texts of several lengths with 0 to 3 images each."""
    return [
        chat("<image>" * (i % 4) + "wh" * (i % 7 + 1), *[f"{(i + j) % 5}.png" for j in range(i % 4)]) for i in range(n)
    ]


@pytest.mark.parametrize("any_size", [False, True])
@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_rows_have_as_many_patches_as_tokens_of_images(packing, any_size, base, config):
    source, task = open_source(write(base / "many.jsonl", records(23))), make(config, any_size)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    counted(Rows(store, 48, packing, layout=task.layout), task)
    shares = [(x[0] == TOKEN).mean() for x in store]
    assert task.layout.share == max(shares) < 1
    spec = task.layout.spec(1, 48)["patches"].shape[1]
    assert spec == (int(48 * max(shares)) if any_size else int(48 * max(shares) / MOST) * MOST)


@pytest.mark.parametrize("any_size", [False, True])
def test_buckets_cut_tokens_and_no_images(any_size, base, config):
    """Of a narrow batch too, patches come in whole images: 22 tokens of a row are 5 images and no part of one."""
    from sftjax.data.packing.rows import Buckets

    source, task = open_source(write(base / "many.jsonl", records(23))), make(config, any_size)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    rows = Buckets(store, 48, widths=(22, 31), batch_size=1, layout=task.layout)
    counted(rows, task)
    assert {rows.batch([r])["tokens"].shape[1] for r in range(len(rows))} == {22, 31, 48}


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(base, config):
    source, task = open_source(write(base / "many.jsonl", records(23))), make(config, True)
    store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
    task.opened(store.report)
    rows = Rows(store, 48, layout=task.layout, epochs=2)
    here, there = (list(loader(rows, 4, workers=n)) for n in (0, 2))
    assert len(here) == len(there) > 2
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            np.testing.assert_array_equal(a[k], b[k])


def test_training_rows_and_a_validation_set_share_one_shape(base, config, tmp_path):
    """Rows have room for the images of the set that has most of them."""
    few = [chat("a longer question that has an image <image>", "0.png")] * 6
    config.data.train = write(base / "few.jsonl", few)
    config.data.validation = write(base / "more.jsonl", [chat("<image><image><image>", "0.png", "1.png", "2.png")] * 3)
    task = make(config)
    feed = feed_lib.Feed(config, task, tmp_path, parallel.make_mesh({}, jax.devices()[:1]))
    own, other = next(feed.batches(0)), next(feed.eval_batches(feed.sets["more"]))
    assert own["patches"].shape[1:] == other["patches"].shape[1:] and (own["tokens"] == TOKEN).any()
    assert (np.asarray(other["tokens"]) == TOKEN).sum() == 3 * 3 * MOST


def test_sets_without_any_image_have_room_for_one(base, config, tmp_path):
    rows = [dict(messages=[turn("user", "a?"), turn("assistant", "b")])] * 6
    config.data.train = config.data.validation = write(tmp_path / "a.jsonl", rows)
    mesh = parallel.make_mesh(dict(data=1), jax.devices()[:1])
    feed = feed_lib.Feed(config, make(config), tmp_path, mesh)
    model, _ = build.make_model(config, feed.task)
    batch = next(feed.batches(0))
    assert batch["patches"].shape[1] == MOST and not batch["patches"].any() and feed.store.report["images"] == 0
    params = params_lib.init(model.abstract, jax.random.key(0))
    loss = feed.task.loss_fn(model, config.loss.to_dict())(params, batch, None)
    assert np.isfinite(float(loss.sum)) and float(loss.weight) > 0


def test_rows_of_several_sources_have_room_for_the_images_of_all(base, config, tmp_path):
    few, more = [chat("a long question <image>", "0.png")] * 4, [chat("<image><image>", "0.png", "1.png")] * 4
    paths = [write(base / f"{name}.jsonl", rows) for name, rows in (("few", few), ("two", more))]
    config.data.sources = tuple({"path": path} for path in paths)
    feed = feed_lib.Feed(config, make(config), tmp_path, parallel.make_mesh({}, jax.devices()[:1]))
    for _, batch in zip(range(2), feed.batches(0), strict=False):
        patches = np.asarray(batch["patches"]).any((2, 3, 4)).sum(1)
        np.testing.assert_array_equal(patches, (np.asarray(batch["tokens"]) == TOKEN).sum(1))
        assert {0, 1} >= set(np.unique(batch["sources"])) and patches.any()


def test_a_store_is_that_of_its_sizes_of_images(base, config):
    source = open_source(write(base / "few.jsonl", [chat("<image>which?", "4.png")]))
    keys, lengths = [], []
    for patches in (Patches(8, 4, 3), Patches(12, 4, 3), Patches(8, 2, 3), ANY, ANY._replace(limits=(4, 6))):
        task = make(config)
        task.patches = patches
        task.layout = dataclasses.replace(task.layout, patches=patches)
        keys.append(store_key(source, task, 48, "truncate_end"))
        store = build_store(source, task, 48, "truncate_end", config.data.cache_dir)
        assert store.folder.name == keys[-1]
        lengths.append(int((store[0][0] == TOKEN).sum()))
    assert len(set(keys)) == 5 and lengths[:3] == [4, 9, 16] and lengths[3] > lengths[4]
    assert keys[0] == store_key(source, make(config), 48, "truncate_end")
