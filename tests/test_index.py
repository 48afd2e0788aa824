"""Listings that are kept, and orders of very many images.

Run: python -m pytest tests/test_index.py
"""
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import index
import order
import test_data
from data import batches, count_sources, open_data
from index import open_table
from listing import PassedOver, list_images
from order import AllBut, EpochOrder, split_images
from test_data import number_of_image, numbers_of_images, plain_image, write_images, write_tar

time_limit = test_data.time_limit                 # here, too, a test that hangs fails


# ---------------------------------------------------------------- indexes
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the indexes, which are written for any number of images."""
    monkeypatch.setenv("NANORAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "INDEXED", 1)
    monkeypatch.setattr(index, "TAR_BYTES", 1)
    monkeypatch.setattr(index, "RECORD_BYTES", 1)
    monkeypatch.setattr(index, "tables", {})
    return tmp_path / "cache"


def make_old(path):
    """Date all files and folders back, since what was just modified is not kept."""
    for file in [path, *Path(path).rglob("*")]:
        os.utime(file, (1, 1))
    return str(path)


def list_here(path, with_conversations=False):
    """What listing.py says, without an index."""
    return list_images(path, with_conversations, PassedOver(), set())


def count_listings(monkeypatch):
    """Return a list, to which the path of each listing from now on is added."""
    paths = []

    def list_and_note(path, *arguments):
        paths.append(path)
        return list_images(path, *arguments)
    monkeypatch.setattr(index, "list_images", list_and_note)
    return paths


def forget():
    """Forget what this process has listed, so that it is like another one."""
    index.tables.clear()


def folder_of_classes(path):
    return write_images(path / "set", 7, classes=3)


def folder_with_splits(path):
    for split, name in itertools.product(("train", "val"), ("a", "b")):
        write_images(path / "set" / split / name, 2, classes=0)
    return str(path / "set")


def folder_of_odd_names(path):
    folder = path / "set"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"two\nlines.png", b"tab\t['x'].png", "ünï.png".encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(plain_image())
    return str(folder)


def folder_of_captions(path):
    folder = write_images(path / "set", 3, classes=0)
    (path / "set" / "0000.txt").write_text("a cat\nein Kätzchen 🐈\n")
    (path / "set" / "0001.txt").write_text("")
    turns = [{"from": "human", "value": "what\t'is' \"it\"?"}, {"from": "gpt", "value": "a\ncat"}]
    (path / "set" / "0002.json").write_text(json.dumps({"conversations": turns}))
    return folder


def tar_of_ids(path):
    files = {}
    for i, label in enumerate([3, 10**30, 3]):
        files |= {f"./{i}.png": plain_image(), f"{i}.cls": b"%d" % label, f"{i}.txt": b"n\n\n\n m"}
    return write_tar(path / "a.tar", files)


def records(path):
    asking = {"from": "human", "value": "why?"}
    answer = {"from": "gpt", "value": "so"}
    lines = [{"image": "x: y.png", "label": "a: b", "caption": "half of a pair: \ud800"},
             {"conversations": [asking, answer]},
             {"image": "/elsewhere/z.png", "class": "ä", "caption": "c"}]
    (path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    return str(path / "a.jsonl")


def conversations(path):
    text = Path(records(path)).read_text().replace("half of a pair: \\ud800", "whole")
    (path / "a.jsonl").write_text(text)
    return str(path / "a.jsonl")


@pytest.mark.parametrize("write, with_conversations", [
    (folder_of_classes, False), (folder_with_splits, False), (folder_of_odd_names, False),
    (folder_of_captions, True), (tar_of_ids, False), (tar_of_ids, True), (records, False),
    (conversations, True)])
def test_an_index_has_what_was_listed(write, with_conversations, tmp_path, cache, monkeypatch):
    path = write(tmp_path)
    expected = list_here(path, with_conversations)
    new = open_table(path, with_conversations)                    # too new to be kept
    assert [new[i] for i in range(len(new))] == expected and not list(cache.glob("*.index"))

    make_old(path)
    paths = count_listings(monkeypatch)
    open_table(path, with_conversations)
    forget()
    table = open_table(path, with_conversations)

    assert paths == [path] and table.file in list(cache.iterdir())
    assert [table[i] for i in range(len(table))] == list(table) == expected
    assert table[len(table) - 1].label is None or type(table[0].label) is type(expected[0].label)
    lines = "".join(f"{image.name}\t{image.label}\t{image.texts}\n" for image in expected)
    assert table.text.tobytes() == lines.encode(errors="surrogatepass")
    copy = pickle.dumps(table)
    assert list(pickle.loads(copy)) == expected and len(copy) < 500


def test_identity_and_summary_are_those_of_a_listing(tmp_path):
    folder = folder_with_splits(tmp_path)
    shards = [tar_of_ids(tmp_path), write_tar(tmp_path / "b.tar", {"0.png": plain_image(),
                                                                   "0.cls": b"5", "1.cls": b"1"})]
    for specs in ([folder], shards):
        new = open_data(specs, 8, hold_out=1)
        images = [image for path in specs for image in list_here(path)]
        lines = [f"{image.name}\t{image.label}\t{image.texts}\n" for image in images]
        sha1 = hashlib.sha1("".join(lines).encode()).hexdigest()
        assert new.identity() == {"": {"images": len(images), "names": sha1}}
        for path in specs:
            make_old(path)
        open_data(specs, 8)
        forget()
        kept = open_data(specs, 8, hold_out=1)
        assert kept.identity() == new.identity() and kept.summary() == new.summary()
    assert new.summary()[""]["passed_over"] == {".cls of no image": {"count": 1, "first": "1.cls"}}


def test_a_path_is_listed_once_in_a_process(tmp_path, monkeypatch):
    path = make_old(write_images(tmp_path / "set", 6, classes=2))
    monkeypatch.setenv("NANORAE_CACHE", "")
    paths = count_listings(monkeypatch)
    assert count_sources(path) == [6]
    train, val = (open_data(path, 8, split=split, hold_out=2) for split in ("train", "val"))
    assert paths == [path] and len(train) == 4 and len(val) == 2
    assert not (tmp_path / "cache").exists()

    os.utime(path)                                # what is new is listed by each call, once
    for _ in range(2):
        open_data(path, 8)
    assert paths == [path] * 3


def add_file(path):
    write_images(Path(path) / "c1", 1, classes=0, first=9)


def rename_file(path):
    os.rename(f"{path}/c0/0000.png", f"{path}/c0/x.png")


def add_folder(path):
    write_images(Path(path) / "c9", 1, classes=0)


def rewrite_tar(path):
    write_tar(path, {"only.png": plain_image(), "only.cls": b"3"})


def append_record(path):
    with open(path, "a") as file:
        file.write('\n{"image": "new.png", "label": "a"}')


def edit_caption(path):
    (Path(path) / "0000.txt").write_text("a dog")


def add_caption(path):
    (Path(path) / "0001.json").write_text((Path(path) / "0002.json").read_text())


@pytest.mark.parametrize("write, with_conversations, change", [
    (folder_of_classes, False, add_file), (folder_of_classes, False, rename_file),
    (folder_of_classes, False, add_folder), (tar_of_ids, False, rewrite_tar),
    (records, False, append_record), (folder_of_captions, True, edit_caption),
    (folder_of_captions, True, add_caption)])
@pytest.mark.parametrize("same_process", [True, False])
def test_a_change_is_noticed(write, with_conversations, change, same_process, tmp_path):
    path = make_old(write(tmp_path))
    before = list(open_table(path, with_conversations))
    change(path)
    if not same_process:
        forget()
    after = list(open_table(path, with_conversations))
    assert after == list_here(path, with_conversations) != before


def header_of_another_version(content):
    return content.replace(index.FORMAT.encode(), b"nanoRAE index 0")


def header_of_another_path(content):
    return content.replace(b'"real_path": "/', b'"real_path": "_')


@pytest.mark.parametrize("damage", [
    header_of_another_version, header_of_another_path, lambda content: b"",
    lambda content: content[:5], lambda content: content[:-1], lambda content: content[:-300],
    lambda content: content + b"x", lambda content: b"GIF89a" * 100,
    lambda content: b"\2" + bytes(7) + b"[]", lambda content: b"\2" + bytes(7) + b"{}",
    lambda content: b"\xff" * 100, lambda content: content.replace(b'"images": ', b'"images": -')])
def test_a_damaged_index_is_written_again(damage, tmp_path, cache):
    path = make_old(folder_of_classes(tmp_path))
    expected = list(open_table(path, False))
    file, = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    forget()
    assert list(open_table(path, False)) == expected
    assert file.read_bytes() == whole


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
@pytest.mark.parametrize("part", ["rows", "text"])
def test_damage_within_an_index_is_named_when_it_is_met(part, byte, tmp_path, cache):
    """Nobody reads the whole index at a start, which takes milliseconds."""
    path = make_old(folder_of_classes(tmp_path))
    table = open_table(path, False)
    file, = cache.iterdir()
    spoilt = getattr(table, part).tobytes()
    file.write_bytes(file.read_bytes().replace(spoilt, byte * len(spoilt)))
    forget()
    with pytest.raises(ValueError, match=f"the index {file} is damaged at image 2; delete it"):
        open_table(path, False)[2]
    for workers in (0, 1):
        data = open_data(path, 8)
        message = f"^the index {file} is damaged at image [0-6]; delete it, [a-z ]* again$"
        with pytest.raises(ValueError, match=message):
            next(batches(data, 1, 1, workers=workers))


def test_what_may_change_unnoticed_is_not_kept(tmp_path, cache):
    path = Path(folder_of_classes(tmp_path))
    os.symlink(tmp_path / "later.png", path / "c0" / "link.png")
    for folder in (path, *path.iterdir()):
        os.utime(folder, (1, 1))
    assert len(open_table(str(path), False)) == 7
    (tmp_path / "later.png").write_bytes(plain_image())
    assert len(open_table(str(path), False)) == 8


def test_few_images_have_no_index(tmp_path, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("NANORAE_CACHE", str(cache))
    for path in (folder_of_classes(tmp_path), tar_of_ids(tmp_path), records(tmp_path)):
        open_table(make_old(path), False)
    assert not cache.exists()


def test_a_place_where_nothing_can_be_written(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANORAE_CACHE", f"{tmp_path}/file/cache")
    index.warn_once.cache_clear()
    path = make_old(folder_of_classes(tmp_path))
    for _ in range(2):
        forget()
        assert list(open_table(path, False)) == list_here(path)
    assert capfd.readouterr().err == (
        f"warning: no index can be written to {tmp_path}/file/cache (no permission, or no room?); "
        "images are listed at every start. NANORAE_CACHE=DIR names another folder\n")


def open_at_once(path, barrier, queue):
    barrier.wait()
    queue.put(list(open_table(path, False)))


def test_of_processes_that_start_at_once_one_lists(tmp_path, monkeypatch):
    path = make_old(folder_of_classes(tmp_path))
    log = tmp_path / "log"

    def list_slowly(*arguments):
        with open(log, "a") as file:
            file.write("listed\n")
        time.sleep(0.3)
        return list_images(*arguments)
    monkeypatch.setattr(index, "list_images", list_slowly)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_at_once, args=(path, barrier, queue))
                 for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results == [list_here(path)] * 3
    assert log.read_text() == "listed\n"
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".index"]


def test_processes_of_a_run_share_the_shards_that_are_to_be_listed(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{i}.tar", {"0.png": plain_image()}) for i in range(5)]
    for path in paths:
        make_old(path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    listed = count_listings(monkeypatch)
    data = open_data(paths, 8)
    assert listed == [paths[i] for i in (1, 2, 3, 4, 0)]
    assert [image.path for image in data.sources[0].all_images] == paths


# ---------------------------------------------------------------- orders
def test_the_order_of_up_to_two_million_images_stays_as_it_was():
    """Checkpoints of earlier versions go on with the same images."""
    for length, seed, source, epoch in ((50, 0, 0, 0), (1000, 7, 2, 3)):
        expected = np.random.default_rng((seed, epoch, 1, source)).permutation(length)
        epoch_order = EpochOrder(length, seed, source)
        found = [epoch_order.index_of(epoch * length + i) for i in range(length)]
        assert found == expected.tolist()
    train, held_out = split_images(100, 30)
    assert [*held_out, *train] == np.random.default_rng(0).permutation(100).tolist()
    assert order.AT_ONCE > 1_281_167              # ImageNet


@pytest.fixture
def small_pieces(monkeypatch):
    """More than 50 images are too many to shuffle at once; 5 pieces of 4 images are a buffer."""
    monkeypatch.setattr(order, "AT_ONCE", 50)
    monkeypatch.setattr(order, "PIECE", 4)
    monkeypatch.setattr(order, "BUFFER", 20)


@pytest.mark.parametrize("length", [51, 59, 60, 61, 63, 79, 80, 81, 83, 84, 200, 219, 1003])
def test_epochs_of_very_many_images_have_each_image_once(length, small_pieces):
    epoch_order = EpochOrder(length, seed=3, source=1)
    epochs = [[epoch_order.index_of(epoch * length + i) for i in range(length)]
              for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(length))
    assert len(set(map(tuple, epochs))) == 4
    for seed, source in ((4, 1), (3, 0)):
        other = EpochOrder(length, seed, source)
        assert [other.index_of(i) for i in range(length)] != epochs[0]
    for number in (3 * length - 1, 0, length + length // 2, 7):                  # in any order
        assert epoch_order.index_of(number) == epochs[number // length][number % length]


def test_a_buffer_has_pieces_of_neighbours_from_everywhere(small_pieces):
    length = 1000
    epoch_order = EpochOrder(length, seed=0, source=0)
    firsts = []
    for epoch in range(2):
        buffer = sorted(epoch_order.index_of(epoch * length + i) for i in range(20))
        gaps = np.diff([*buffer, buffer[0] + length])
        assert (gaps == 1).sum() >= 15            # 5 pieces of 4 have 5 gaps, or fewer
        assert gaps.max() < 800 and buffer[-1] - buffer[0] > 200
        firsts.append({i % 4 for i, gap in zip(buffer, np.roll(gaps, 1), strict=True) if gap > 1})
    assert firsts[0] != firsts[1]                 # the borders of the pieces differ


def test_very_many_images_take_no_memory():
    length = 73_000_000
    tracemalloc.start()
    to_train_on, held_out = split_images(length, 10_000)
    epoch_order = EpochOrder(len(to_train_on), seed=0, source=0)
    images = {to_train_on[epoch_order.index_of(10**9 + i)] for i in range(5000)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6                            # a permutation would have 584e6
    assert len(images) == 5000 and not images & set(held_out.tolist())
    assert 0 <= min(images) < length / 50 and length * 49 / 50 < max(images) < length


def test_all_but_some():
    for left_out in ([], [0], [9], [3, 1, 0, 9, 4]):
        kept = AllBut(10, np.array(left_out, int))
        expected = [i for i in range(10) if i not in left_out]
        assert [kept[i] for i in range(len(kept))] == expected


def test_of_fewer_held_out_images_all_are_among_those_of_more(small_pieces):
    train, few = split_images(60, 10)
    _, more = split_images(60, 40)
    assert len(set(few.tolist())) == 10 and few.tolist() == more[:10].tolist()
    assert sorted([*few.tolist(), *(train[i] for i in range(50))]) == list(range(60))
    assert few.tolist() != sorted(few.tolist())


def test_very_many_images_are_held_out_and_shared_by_ranks_and_go_on(small_pieces, tmp_path):
    folder = write_images(tmp_path / "set", 70, classes=4)
    val = open_data(folder, 8, seed=5, split="val", hold_out=10)
    data = open_data(folder, 8, seed=5, hold_out=10, flip=True)
    held_out = numbers_of_images(val, range(10))
    assert len(data) == 60 and data.class_names == val.class_names

    whole = list(batches(data, 12, 6, workers=0, stop=10))
    for epoch in (whole[:10], whole[10:]):
        numbers = [number_of_image(image) for _, _, images, _, _ in epoch for image in images]
        assert sorted([*numbers, *held_out]) == list(range(70))
    again = open_data(folder, 8, seed=5, hold_out=10, flip=True)
    parts = [list(batches(again, 12, 6, start=3, rank=rank, world=2, workers=2, stop=10))
             for rank in range(2)]
    together = sorted(itertools.chain(*parts), key=lambda x: x[:2])
    assert test_data.equal_batches(together, whole[6:])
