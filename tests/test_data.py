"""Images in, batches out: formats, crops, order, resume, errors. Run: python -m pytest tests/test_data.py"""
import io
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import batches, check, open_data, square, to_rgb
from shapes import CLASSES, Scene

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def in_time():
    """A test that hangs fails after 2 minutes, and every second from then on if the error is caught."""
    def late(*_):
        raise TimeoutError("a test hangs")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 120, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def picture(colour=(200, 30, 60), size=(40, 40), suffix="png"):
    """The bytes of a plain image file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, {"jpg": "jpeg"}.get(suffix, suffix))
    return file.getvalue()


def number_colour(i):
    """A colour that tells image i < 65536 from all others."""
    return i % 256, i // 256, 77


def fill(folder, n, classes=1, size=(8, 8), first=0):
    """n png images of different colours in class folders c0, c1, ...; classes=0: in the folder itself."""
    for i in range(n):
        place = folder / f"c{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:04}.png").write_bytes(picture(number_colour(first + i), size))
    return str(folder)


def tar(path, files, **options):
    """A tar of {name: bytes}."""
    with tarfile.open(path, options.pop("mode", "w"), **options) as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return str(path)


def identity(image):
    """The number that number_colour hid in an image of one colour."""
    red, green, blue = image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()
    assert blue == 77
    return red + 256 * green


def identities(data, numbers):
    return [identity(data[k]["image"]) for k in numbers]


def equal(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) > 0 and all(
        x[:2] == y[:2] and x[2].equal(y[2]) and x[3].equal(y[3]) and x[4] == y[4] for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------ modes of images
def reopened(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def corner(image, at=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_grey_and_bilevel():
    assert corner(to_rgb(reopened(Image.new("L", (4, 4), 130), "png"))) == (130, 130, 130)
    assert corner(to_rgb(reopened(Image.new("1", (4, 4), 1), "png"))) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_to_8_bits(suffix):
    for value, expected in ((0, 0), (257, 1), (128 * 257, 128), (65535, 255), (1000, 4), (40000, 156)):
        image = reopened(Image.fromarray(np.full((4, 4), value, np.uint16)), suffix)
        assert image.mode.startswith("I") and corner(to_rgb(image)) == (expected,) * 3
    wide = Image.fromarray(np.full((4, 4), 40000, np.int32))  # what older Pillow makes of a png
    assert wide.mode == "I" and corner(to_rgb(wide)) == (156, 156, 156)


def test_cmyk():
    assert corner(to_rgb(reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=95)))[0] > 240
    assert max(corner(to_rgb(reopened(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "tiff")))) == 0


def test_transparency_is_laid_over_white():
    assert corner(to_rgb(reopened(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "png"))) == (255, 255, 255)
    assert corner(to_rgb(reopened(Image.new("RGBA", (4, 4), (10, 20, 30, 255)), "png"))) == (10, 20, 30)
    assert corner(to_rgb(reopened(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "png")))[0] in (127, 128)
    assert corner(to_rgb(reopened(Image.new("LA", (4, 4), (0, 0)), "png"))) == (255, 255, 255)
    assert corner(to_rgb(reopened(Image.new("LA", (4, 4), (9, 255)), "png"))) == (9, 9, 9)
    keyed = reopened(Image.new("RGB", (4, 4), (1, 2, 3)), "png", transparency=(1, 2, 3))
    assert corner(to_rgb(keyed)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_with_and_without_transparency(suffix):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 10, 20])
    image.putpixel((0, 0), 0)
    plain, clear = to_rgb(reopened(image, suffix)), to_rgb(reopened(image, suffix, transparency=0))
    assert corner(plain) == (0, 0, 0) and corner(clear) == (255, 255, 255)
    assert corner(plain, (2, 2)) == corner(clear, (2, 2)) == (250, 10, 20)


def test_exif_rotation():
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))  # stored: blue left, red right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: blue on top
    for suffix in ("jpeg", "png", "webp"):
        upright = to_rgb(reopened(image, suffix, exif=exif))
        assert upright.size == (10, 20)
        assert corner(upright, (5, 2))[2] > 200 and corner(upright, (5, 17))[0] > 200


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPEG", "png", "webp", "bmp", "gif", "tif", "TIFF", "ppm"])
def test_suffixes_in_any_case(suffix, tmp_path):
    kind = {"jpg": "jpeg", "tif": "tiff"}.get(suffix.lower(), suffix.lower())
    (tmp_path / f"a.{suffix}").write_bytes(picture(suffix=kind))
    image = open_data(str(tmp_path), 32)[0]["image"]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and image.is_contiguous()
    assert np.abs(image[:, 16, 16].numpy() - np.array([200., 30, 60])).max() < 6


# -------------------------------------------------------------------------------------------- crop and flip
def test_centre_crop_halves_by_means_of_2x2_then_takes_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    means = pixels.reshape(32, 2, 64, 2, 3).mean((1, 3))  # 64 x 128 -> 32 x 64, no bicubic left
    cropped = np.asarray(square(Image.fromarray(pixels), 32)).astype(float)
    assert np.abs(cropped - means[:, 16:48]).max() <= 1  # rounded twice, across and down


def test_centre_crop_is_that_of_the_fid_references():
    def adm(image, size):  # from the description, one line each
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        scale = size / min(image.size)
        shape = round(image.width * scale), round(image.height * scale)
        pixels = np.array(image.resize(shape, Image.BICUBIC))
        y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        return pixels[y:y + size, x:x + size]
    rng = np.random.default_rng(1)
    for w, h in ((256, 256), (500, 375), (333, 1000), (64, 65), (31, 200), (20, 20), (129, 127)):
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        assert np.array_equal(np.asarray(square(image, 64)), adm(image, 64)), (w, h)


def test_same_size_is_left_as_it_is_and_small_images_are_enlarged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(square(Image.fromarray(pixels), 32)), pixels)
    assert square(Image.fromarray(pixels), 64).size == (64, 64)
    assert square(Image.fromarray(pixels[:5, :30]), 64, np.random.default_rng(0)).size == (64, 64)
    assert square(Image.new("RGB", (1, 1)), 16).size == (16, 16)


def test_random_crop_reaches_every_offset_of_a_side_of_one_and_a_half():
    ramp = np.zeros((48, 96, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(48)[:, None], np.arange(96)
    rng = np.random.default_rng(0)
    seen = {tuple(np.asarray(square(Image.fromarray(ramp), 32, rng))[0, 0, :2]) for _ in range(6000)}
    assert {y for y, _ in seen} == set(range(48 - 32 + 1)) and {x for _, x in seen} == set(range(96 - 32 + 1))


def test_flip_mirrors_half_of_the_images_and_only_with_the_flag(tmp_path):
    image = Image.new("RGB", (16, 16), (77, 0, 0))
    image.paste((77, 255, 0), (0, 0, 8, 16))                                        # green on the left
    image.save(tmp_path / "a.png")
    left = [open_data(str(tmp_path), 16, flip=flip)[k]["image"][1, 0, 0].item() == 255
            for flip in (False, True) for k in range(200)]
    assert all(left[:200]) and 70 < sum(left[200:]) < 130


# -------------------------------------------------------------------------------------------------- sources
def test_shapes():
    data = open_data("shapes", 64, seed=3, objects=1)
    assert data.class_names == CLASSES and data.num_classes == 36 and data.labelled and len(data) == 1_000_000
    item, scene = data[17], Scene.random(3, 17, (1,))
    assert np.array_equal(item["image"].permute(1, 2, 0), scene.render(64))
    assert item["text"] == scene.caption() and item["broken"] == []
    assert item["label"] == scene.objects[0].label
    assert data[1_000_000 + 17]["text"] == Scene.random(3, 1_000_017, (1,)).caption()  # never twice the same
    assert open_data("shapes", 64, objects=(1,)).labelled
    several = open_data(["shapes"], 64)
    assert not several.labelled and several.num_classes == 1
    assert several[5]["label"] == Scene.random(0, 5).objects[0].label


def test_held_out_shapes_are_others_and_the_same_for_every_seed():
    train, val = open_data("shapes", 32, objects=1), open_data("shapes", 32, objects=1, split="val")
    assert not any(train[k]["image"].equal(val[k]["image"]) for k in range(50))
    assert val[7]["image"].equal(open_data("shapes", 32, seed=9, objects=1, split="val")[7]["image"])


def test_class_folders(tmp_path):
    folder = fill(tmp_path / "set", 12, classes=3)
    (tmp_path / "set" / "empty").mkdir()
    data = open_data(folder, 8)
    assert data.class_names == ["c0", "c1", "c2"] and data.num_classes == 3
    assert data.labelled and len(data) == 12
    for k in range(12):
        assert data[k]["label"] == identity(data[k]["image"]) % 3 and data[k]["text"] == ""
    assert sorted(identities(data, range(12))) == list(range(12))


def test_flat_folder_has_no_labels(tmp_path):
    data = open_data(fill(tmp_path, 5, classes=0) + "/", 8)
    assert not data.labelled and data.num_classes == 1 and len(data.class_names) == 1
    assert {data[k]["label"] for k in range(5)} == {0}


def test_other_files_are_ignored_and_links_followed(tmp_path):
    fill(tmp_path / "set", 4, classes=2)
    for name in ("notes.txt", "Thumbs.db", ".hidden.png", "._0000.png", "png", "c0/list.json"):
        (tmp_path / "set" / name).write_bytes(b"no image")
    for name in (".git", "__MACOSX", "c0/.cache"):
        (tmp_path / "set" / name).mkdir()
        (tmp_path / "set" / name / "x.png").write_bytes(b"no image")
    fill(tmp_path / "elsewhere", 3, classes=0, first=100)
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "c2")
    os.symlink(tmp_path / "elsewhere" / "0000.png", tmp_path / "set" / "c1" / "link.png")
    data = open_data(str(tmp_path / "set"), 8)
    assert data.class_names == ["c0", "c1", "c2"]
    assert sorted(identities(data, range(len(data)))) == [0, 1, 2, 3, 100, 100, 101, 102]


def test_tar_of_class_folders(tmp_path):
    files = {f"./{'cat' if i % 2 else 'ant'}/{i}.png": picture(number_colour(i)) for i in range(6)}
    files |= {"__MACOSX/cat/._1.png": b"", "./cat/._1.png": b"", "./readme.md": b"text"}
    data = open_data(tar(tmp_path / "a.tar", files), 8)
    assert data.class_names == ["ant", "cat"] and len(data) == 6
    assert all(data[k]["label"] == identity(data[k]["image"]) % 2 for k in range(6))


def test_tar_with_cls_and_txt(tmp_path):
    files = {}
    for i, label in enumerate((2, 0, 5)):
        files |= {f"{i:05}.cls": f"{label}\n".encode(), f"{i:05}.png": picture(number_colour(i)),
                  f"{i:05}.txt": f"number {i} é\n".encode()}
    data = open_data(tar(tmp_path / "a.tar", files), 8)
    assert data.labelled and data.num_classes == 6 and data.class_names == list("012345")  # highest + 1
    for k in range(3):
        i = identity(data[k]["image"])
        assert data[k]["label"] == (2, 0, 5)[i] and data[k]["text"] == f"number {i} é"


@pytest.mark.parametrize("label, caption", [("label", "caption"), ("class", "text")])
def test_tar_with_json(label, caption, tmp_path):
    names = ["dog", "bee", "dog"]
    records = [{label: name, caption: f"a {name}", "width": 40} for name in names]
    files = {f"{i}.json": json.dumps(record).encode() for i, record in enumerate(records)}
    files |= {f"{i}.jpg": picture(suffix="jpg") for i in range(3)}
    data = open_data(tar(tmp_path / "a.tar", files), 8)
    assert data.class_names == ["bee", "dog"]
    found = sorted((data[k]["label"], data[k]["text"]) for k in range(3))
    assert found == [(0, "a bee"), (1, "a dog"), (1, "a dog")]


def test_tar_without_labels(tmp_path):
    data = open_data(tar(tmp_path / "a.tar", {f"{i}.png": picture() for i in range(3)}), 8)
    assert not data.labelled and data.num_classes == 1


@pytest.fixture
def shards(tmp_path):
    for s in range(3):
        files = {f"c/{i}.png": picture(number_colour(10 * s + i)) for i in range(4)}
        tar(tmp_path / f"x-{s + 8:03}.tar", files)
    return tmp_path


def test_shards_by_list_and_by_brace_range_are_one_source(shards):
    by_list = open_data(sorted(map(str, shards.glob("*.tar"))), 8)
    by_range = open_data(f"{shards}/x-{{008..010}}.tar", 8)
    assert len(by_list) == len(by_range) == 12
    found = identities(by_range, range(12))
    assert sorted(found) == [10 * s + i for s in range(3) for i in range(4)]
    assert identities(by_list, range(12)) == found
    assert len(open_data([f"a={shards}/x-{{008..009}}.tar:1", f"b={shards}/x-010.tar:1"], 8)) == 12


def test_tars_are_read_in_place(shards):
    before = sorted(shards.rglob("*"))
    data = open_data(f"{shards}/x-008.tar", 8)
    with open(shards / "x-008.tar", "rb") as file:
        path, offset, size, *_ = data.rows[0][0]
        file.seek(offset)
        assert Image.open(io.BytesIO(file.read(size))).size == (40, 40)
    assert sorted(shards.rglob("*")) == before


# ------------------------------------------------------------------------------------------------- mixtures
def test_mixture_keeps_its_proportions_and_repeats_no_image_of_an_epoch(tmp_path):
    a, b = fill(tmp_path / "a", 50), fill(tmp_path / "b", 30, first=100)
    data = open_data([f"first={a}:6", f"second={b}:4.0"], 8)
    assert len(data) == 80
    found = identities(data, range(1000))
    mine = [[i for i in found if (i >= 100) == second] for second in (False, True)]
    assert [len(x) for x in mine] == [600, 400]
    for numbers, n in zip(mine, (50, 30)):  # each epoch of each source is complete
        for at in range(0, len(numbers) - n, n):
            assert len(set(numbers[at:at + n])) == n
    assert 0.5 < sum(i < 100 for i in found[:200]) / 200 < 0.7  # mixed all along, not in blocks
    again = identities(data, range(1000, 1100))
    assert [i >= 100 for i in again] == [i >= 100 for i in found[:100]]             # the pattern is periodic
    assert again == identities(open_data([f"first={a}:0.6", f"second={b}:0.4"], 8), range(1000, 1100))


def test_mixture_of_odd_weights_is_exact_to_one_in_a_thousand(tmp_path):
    sources = [fill(tmp_path / str(s), 2, first=10 * s) for s in range(3)]
    data = open_data([f"s{s}={path}:{weight}" for s, (path, weight) in enumerate(zip(sources, (1, 1, 1)))], 8)
    assert sorted(data.counts) == [333, 333, 334]
    spec = [f"a={sources[0]}:.2", f"b={sources[1]}:0.01", f"c={sources[2]}:9"]
    assert open_data(spec, 8).counts == [22, 1, 977]


def test_mixture_unites_class_names(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, names in ((a, ("dog", "bee")), (b, ("cat", "dog"))):
        for i, name in enumerate(names):
            (folder / name).mkdir(parents=True)
            (folder / name / "0.png").write_bytes(picture(number_colour(i + 10 * (folder is b))))
    data = open_data([f"a={a}:1", f"b={b}:1"], 8)
    assert data.class_names == ["bee", "cat", "dog"] and data.num_classes == 3
    labels = {identity(data[k]["image"]): data[k]["label"] for k in range(40)}
    assert labels == {0: 2, 1: 0, 10: 1, 11: 2}


def test_mixture_has_labels_only_if_all_its_sources_do(tmp_path):
    a, b = fill(tmp_path / "a", 4, classes=2), fill(tmp_path / "b", 4, classes=0)
    mixed = open_data([f"a={a}:1", f"b={b}:1"], 8)
    assert not mixed.labelled and mixed.num_classes == 1 and {mixed[k]["label"] for k in range(20)} == {0}
    world = open_data([f"a={a}:0.5", "world=shapes:0.5"], 32, objects=1)
    assert world.labelled and world.num_classes == 38 and world.class_names == sorted([*CLASSES, "c0", "c1"])
    captions = [world[k]["text"] for k in range(40)]
    assert 10 < sum(map(bool, captions)) < 30
    assert all(world.class_names[world[k]["label"]] in world[k]["text"] for k in range(40) if captions[k])


def test_odd_paths(tmp_path):
    odd = fill(tmp_path / "a=b:c, d" / "x:0.5", 3)
    assert len(open_data(odd, 8)) == 3
    assert len(open_data([f"one={odd}:0.5", "two=shapes:1"], 16)) == 1_000_003
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert len(open_data("a=b:c, d", 8)) == 3  # it exists, so it is a path
    finally:
        os.chdir(here)


def test_a_brace_range_that_the_shell_expanded_is_one_source(shards):
    spec = [f"a={shards}/x-{s:03}.tar:0.5" for s in (8, 9, 10)]  # what bash makes of a={008..010}.tar:0.5
    data = open_data([*spec, "w=shapes:0.5"], 16, objects=1)
    assert data.counts == [500, 500] and len(data) == 1_000_012


# ----------------------------------------------------------------------------------------- order and resume
def test_each_epoch_is_another_permutation_and_seeds_differ(tmp_path):
    data = open_data(fill(tmp_path, 40, classes=4), 8)
    epochs = [identities(data, range(e * 40, e * 40 + 40)) for e in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert identities(open_data(str(tmp_path), 8, seed=1), range(40)) != epochs[0]
    anyhow = [epochs[2][5], epochs[0][3], epochs[1][1], epochs[0][3]]               # asked for out of order
    assert identities(data, [85, 3, 41, 3]) == anyhow


def test_image_k_is_a_function_of_seed_and_k(tmp_path):
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    a, b = (open_data(str(tmp_path), 16, seed=5, crop="random", flip=True) for _ in range(2))
    for k in (30, 2, 1000, 2, 10**9):
        assert a[k]["image"].equal(b[k]["image"])
    for path in list(tmp_path.iterdir())[1:]:
        path.unlink()
    one, other = (open_data(str(tmp_path), 16, seed=seed, crop="random") for seed in (5, 6))
    crops = [[data[k]["image"].numpy().tobytes() for k in range(6)] for data in (one, other)]
    assert len(set(crops[0] + crops[1])) > 6  # by k and by seed


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "set", 48, classes=4)


def test_ranks_and_workers_share_an_epoch_without_repeats(folder):
    data = open_data(folder, 8, flip=True)
    whole = list(batches(data, 16, 4, workers=0, stop=6))
    assert [x[:2] for x in whole] == [(s, m) for s in range(6) for m in range(4)]
    for _, _, images, labels, _ in whole:
        assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    for epoch in (whole[:12], whole[12:]):  # 48 images are 3 steps of 16
        assert sorted(identity(image) for x in epoch for image in x[2]) == list(range(48))
    for world, workers in ((2, 0), (2, 2), (4, 1)):
        ranks = [list(batches(data, 16, 4, 0, rank, world, workers, stop=6)) for rank in range(world)]
        assert [x[1] for x in ranks[1]][:4 // world] == list(range(1, 4, world))
        assert equal(whole, sorted(itertools.chain(*ranks), key=lambda x: x[:2]))


@pytest.mark.parametrize("spec", ["folder", "shapes", "mixture"])
def test_workers_change_nothing(spec, folder):
    spec = {"folder": folder, "shapes": "shapes", "mixture": [f"a={folder}:0.3", "b=shapes:0.7"]}[spec]
    data = open_data(spec, 16, seed=2, crop="random", flip=True)
    runs = [list(batches(data, 12, 6, workers=workers, stop=5)) for workers in (0, 1, 2)]
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


def test_resume_at_any_step_equals_the_straight_run(folder):
    options = dict(seed=4, crop="random", flip=True)
    spec = [f"a={folder}:0.5", "b=shapes:0.5"]
    straight = list(batches(open_data(spec, 16, **options), 16, 8, workers=0, stop=9))
    for start in range(9):
        resumed = list(batches(open_data(spec, 16, **options), 16, 8, start=start, workers=0, stop=9))
        assert equal(resumed, straight[2 * start:])
    assert equal(batches(open_data(spec, 16, **options), 16, 8, start=5, workers=2, stop=9), straight[10:])


def test_micro_batches_are_slices_of_the_batch(folder):
    data = open_data(folder, 8, crop="random", flip=True)
    small = list(batches(data, 24, 6, workers=0, stop=4))
    for step, m, whole, labels, _ in batches(data, 24, 24, workers=0, stop=4):
        parts = small[4 * step:4 * step + 4]
        assert m == 0 and whole.equal(torch.cat([x[2] for x in parts]))
        assert labels.equal(torch.cat([x[3] for x in parts]))


def test_batches_go_on_without_end_and_leave_the_global_random_state_alone(folder):
    data = open_data(folder, 8)
    before = torch.get_rng_state()
    *_, last = itertools.islice(batches(data, 48, 48, workers=0), 20)
    assert last[0] == 19
    next(batches(data, 48, 48, workers=1))
    assert before.equal(torch.get_rng_state())


def test_texts_travel_with_their_images():
    data = open_data("shapes", 32)
    for step, m, images, labels, texts in batches(data, 8, 4, workers=1, stop=2):
        first = step * 8 + m * 4
        assert texts == [data[k]["text"] for k in range(first, first + 4)]
        assert labels.tolist() == [data[k]["label"] for k in range(first, first + 4)]


# ------------------------------------------------------------------------------------------------- hold-out
def test_hold_out_parts_the_images_alike_for_every_seed(folder):
    parts = {}
    for seed, n in itertools.product((0, 7), (6, 20)):
        train = open_data(folder, 8, seed=seed, hold_out=n)
        val = open_data(folder, 8, seed=seed, split="val", hold_out=n, crop="centre")
        assert len(train) == 48 - n and len(val) == n and train.class_names == val.class_names
        seen, held = identities(train, range(48 - n)), identities(val, range(n))
        assert sorted(seen + held) == list(range(48))
        parts.setdefault(n, []).append(held)
    assert parts[6][0] == parts[6][1] and parts[20][0] == parts[20][1]
    assert set(parts[6][0]) < set(parts[20][0])
    assert len({i % 4 for i in parts[20][0][:12]}) == 4                             # not sorted by class


def test_hold_out_of_a_mixture_is_of_each_source(folder, tmp_path):
    other = fill(tmp_path / "other", 10, first=100)
    spec = [f"a={folder}:0.5", f"b={other}:0.5"]
    val, train = (open_data(spec, 8, split=split, hold_out=4) for split in ("val", "train"))
    assert len(val) == 8 and len(train) == 50
    assert not set(identities(val, range(60))) & set(identities(train, range(200)))


# --------------------------------------------------------------------------------------------- broken files
def test_a_broken_file_is_replaced_counted_and_named_once(tmp_path, capfd):
    fill(tmp_path, 120, classes=2)
    whole = open_data(str(tmp_path), 8)
    before = identities(whole, range(240))
    bad = tmp_path / "c1" / "0007.png"
    bad.write_bytes(bad.read_bytes()[:30])
    data = open_data(str(tmp_path), 8)
    at = before.index(7)
    item = data[at]
    assert item["broken"] == [str(bad)] and identity(item["image"]) != 7
    assert item["label"] == identity(item["image"]) % 2  # the label is that of the replacement
    assert item["image"].equal(open_data(str(tmp_path), 8)[at]["image"])
    after = identities(data, range(240))
    assert [x == y for x, y in zip(before, after)].count(False) == 2                # nothing else moves
    for workers in (0, 2):
        data = open_data(str(tmp_path), 8)
        found = [identity(image) for x in batches(data, 40, 20, workers=workers, stop=6) for image in x[2]]
        assert found == after
        assert re.findall("broken image (.*)", capfd.readouterr().err) == [f"1, replaced by another: {bad}"]


DAMAGES = ["empty", "text", "cut jpeg", "cut png", "bad checksum", "no pixels", "vanished"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_kinds_of_damage(damage, tmp_path):
    fill(tmp_path, 3, classes=0)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, "jpeg" if "jpeg" in damage else "png")
    whole, path = file.getvalue(), tmp_path / "9.png"
    chunk = b"IHDR" + bytes(8) + b"\x08\x02\0\0\0"
    path.write_bytes({
        "empty": b"", "text": b"<html>not found</html>", "bad checksum": whole[:60] + b"?" + whole[61:],
        "no pixels": b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4, "big"),
    }.get(damage, whole[:len(whole) // 2]))
    data = open_data(str(tmp_path), 8)
    if damage == "vanished":
        path.unlink()
    items = [data[k] for k in range(4)]
    assert sum([x["broken"] for x in items], []).count(str(path)) >= 1
    assert all(identity(x["image"]) in range(3) for x in items)


def test_a_broken_member_of_a_tar_is_named(tmp_path):
    path = tar(tmp_path / "a.tar", {f"c/{i}.png": picture(number_colour(i)) if i else b"" for i in range(5)})
    names = sum([open_data(path, 8)[k]["broken"] for k in range(5)], [])
    assert set(names) == {f"{path}/c/0.png"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n, broken, stops", [(300, 3, False), (300, 4, True), (20, 1, False), (20, 2, True)])
def test_more_than_one_percent_of_broken_files_stop_the_run(n, broken, stops, workers, tmp_path, capfd):
    paths = sorted(Path(fill(tmp_path, n)).rglob("*.png"))
    for path in paths[:broken]:
        path.write_bytes(b"broken")
    run = batches(open_data(str(tmp_path), 8), 20, 20, workers=workers, stop=n // 20)
    if stops:
        with pytest.raises(ValueError, match=rf"^--data has {broken} broken images of {n}.*at most 1%"):
            list(run)
    else:
        assert len(list(run)) == n // 20
    named = re.findall(r"broken image (\d+), replaced by another: (.*)", capfd.readouterr().err)
    assert [int(count) for count, _ in named] == list(range(1, broken + 1))
    assert {path for _, path in named} == {str(path) for path in paths[:broken]}


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_files_is_an_error_and_no_endless_search(workers, tmp_path):
    for i in range(3000):
        (tmp_path / f"{i}.jpg").write_bytes(b"<html>")
    data = open_data(str(tmp_path), 8)
    with pytest.raises(ValueError, match=r"^--data has \d+ broken images"):
        next(batches(data, 1, 1, workers=workers))
    with pytest.raises(ValueError, match="10 broken images in a row"):
        data[0]


# --------------------------------------------------------------------------------------- errors of the user
def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data .*/nowhere does not exist; give shapes"):
        open_data(f"{tmp_path}/nowhere", 8)
    with pytest.raises(FileNotFoundError, match="shape does not exist"):
        open_data(["a=shape:1", "b=shapes:1"], 8)


def test_empty_folder_and_tar_without_images(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"--data .*folder must hold images"):
        open_data(f"{tmp_path}/folder", 8)
    for path in (tar(tmp_path / "a.tar", {"a.txt": b"no"}), tar(tmp_path / "b.tar", {})):
        with pytest.raises(ValueError, match=rf"--data {path} must hold images"):
            open_data(path, 8)


def test_a_folder_of_shards_is_pointed_out(shards):
    with pytest.raises(ValueError, match=r"must hold images.*/\*\.tar"):
        open_data(str(shards), 8)


def test_missing_shard_of_a_range(shards):
    with pytest.raises(FileNotFoundError, match=r"x-007\.tar does not exist"):
        open_data(f"{shards}/x-{{007..010}}.tar", 8)
    with pytest.raises(FileNotFoundError, match=r"x-011\.tar does not exist"):
        open_data(f"{shards}/x-{{008..099}}.tar", 8)


@pytest.mark.parametrize("keep", [40, 512 + 40, 2 * 512 + 100, 0, -1024, -10240 + 7])
def test_truncated_tars(keep, tmp_path):
    whole = Path(tar(tmp_path / "whole.tar", {f"c/{i}.png": picture() for i in range(4)}))
    size = whole.stat().st_size
    members = tarfile.open(whole).getmembers()
    end = members[-1].offset_data + 512 * -(-members[-1].size // 512)  # where the end mark begins
    cuts = {0: members[2].offset, -1024: end}  # exactly between two files
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:cuts.get(keep, keep if keep > 0 else end + 7)])
    assert path.stat().st_size < size
    with pytest.raises(ValueError, match=r"--data .*cut\.tar: .* whole and uncompressed"):
        open_data(str(path), 8)


@pytest.mark.parametrize("mode, name", [("w:gz", "a.tar.gz"), ("w:bz2", "a.tar"), ("w:xz", "a.tar.xz")])
def test_compressed_tars_are_to_be_decompressed(mode, name, tmp_path):
    path = tar(tmp_path / name, {f"c/{i}.png": picture() for i in range(4)}, mode=mode)
    with pytest.raises(ValueError, match=rf"--data {path}.*gunzip"):
        open_data(path, 8)
    (tmp_path / "one.png").write_bytes(picture())
    with pytest.raises(ValueError, match=r"one\.png.*tar"):
        open_data(f"{tmp_path}/one.png", 8)


@pytest.mark.parametrize("weight", ["-1", "0", "x", "", "nan", "inf", "1.2.3"])
def test_weights_must_be_positive_numbers(weight, folder):
    with pytest.raises(ValueError, match=rf"--data a={folder}:{weight} must be name=PATH:weight.* above 0"):
        open_data([f"a={folder}:{weight}", "b=shapes:1"], 8)


def test_mixtures_need_names_and_weights(folder):
    with pytest.raises(ValueError, match="must be name=PATH:weight"):
        open_data([f"a={folder}", "b=shapes:1"], 8)
    with pytest.raises(ValueError, match="all must be name=PATH:weight or none"):
        open_data([folder, "b=shapes:1"], 8)
    with pytest.raises(ValueError, match="the same for a name"):
        open_data([f"a={folder}:1", "a=shapes:2"], 8)
    with pytest.raises(FileNotFoundError, match="give shapes or text"):
        open_data([folder, "shapes"], 8)
    with pytest.raises(ValueError, match="at least 1/1000 of their sum"):
        open_data([f"a={folder}:0.0001", "b=shapes:1"], 8)


def test_hold_out_must_leave_images(folder):
    for n in (48, 100, -1):
        with pytest.raises(ValueError, match=rf"--hold_out {n} must be below .*48 images"):
            open_data(folder, 8, hold_out=n)
    assert len(open_data(folder, 8, hold_out=47)) == 1


def test_fewer_images_than_a_batch(folder):
    data = open_data(folder, 8)
    check(data, 48)
    for ask in (lambda: check(data, 64), lambda: batches(data, 64, 16)):
        with pytest.raises(ValueError, match="--batch 64 must be at most the 48 images of --data"):
            ask()
    with pytest.raises(ValueError, match="--batch 48 must be a multiple of --micro_batch 5 x 2 processes"):
        batches(data, 48, 5, world=2)


@pytest.mark.parametrize("extra, message", [
    ({"0.cls": b"cat"}, "0.png.*cat.*integer >= 0"), ({"0.cls": b"1.5"}, "integer"),
    ({"0.cls": b"-1"}, "label -1.*integer"), ({"0.json": b'{"label": [1]}'}, "label .1"),
    ({"0.json": b"{"}, "0.png.*json"), ({"0.json": b"[1]"}, "0.png.*json"),
    ({"0.json": b'{"caption": 3}'}, "0.png"), ({"0.txt": b"\xff\xfe"}, "0.png.*utf-8"),
    ({"0.cls": b"0"}, "0.png has 0.* 1.png has None|1.png has None"),
    ({"0.cls": b"0", "1.json": b'{"label": "cat"}'}, "0.png has 0, but 1.png has 'cat'"),
    ({"0.cls": b"0", "1.cls": b"1", "ant/2.png": picture()}, "ant/2.png has 'ant'")])
def test_labels_that_make_no_sense(extra, message, tmp_path):
    path = tar(tmp_path / "a.tar", {"0.png": picture(), "1.png": picture(), **extra})
    with pytest.raises(ValueError, match=f"(?i)--data {path}: .*({message})"):
        open_data(path, 8)


def test_folder_with_and_without_classes(tmp_path):
    fill(tmp_path, 3, classes=0)
    fill(tmp_path, 3, classes=1)
    with pytest.raises(ValueError, match=r"has None.*has 'c0'|has 'c0'.*has None"):
        open_data(str(tmp_path), 8)


# ------------------------------------------------------------------------------------------------ processes
SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from data import batches, open_data
if __name__ == "__main__":
    for n, item in enumerate(batches(open_data("shapes", 64, objects=1), 64, 16, workers=2)):
        if n == 6:
            print("ready", flush=True)
            {then}
        time.sleep(0.05)
"""


@pytest.mark.parametrize("then, code", [("raise RuntimeError('mine')", 1), ("pass", -2)])
def test_a_run_with_workers_ends_at_once(then, code, tmp_path, request):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[1]), then=then))
    run = subprocess.Popen([sys.executable, script], text=True, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    request.addfinalizer(run.kill)  # it would run without end
    assert run.stdout.readline() == "ready\n"
    started = time.time()
    if code == -2:
        time.sleep(0.3)
        os.killpg(run.pid, signal.SIGINT)  # Ctrl-C reaches all processes
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == code and time.time() - started < 4, errors
    assert errors.count("Traceback") == 1, errors                                   # none from the workers
    with pytest.raises(ProcessLookupError):                                         # no worker is left
        os.killpg(run.pid, 0)


class Probe(open_data):
    """Its texts are the number of torch's threads in the process that made them."""

    def __getitem__(self, k):
        return super().__getitem__(k) | dict(text=torch.get_num_threads())


def test_workers_compute_on_one_thread_and_start_after_torch_has_used_its_own(folder):
    started = time.time()
    for _ in range(3):
        (torch.randn(300, 300, requires_grad=True) @ torch.randn(300, 300)).square().sum().backward()
        assert [x[4] for x in batches(Probe(folder, 8), 4, 2, workers=2, stop=1)] == [[1, 1], [1, 1]]
    assert time.time() - started < 10


def test_data_can_be_pickled_for_systems_that_spawn_workers(folder):
    data = open_data([f"a={folder}:1", "b=shapes:1"], 16)
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert all(copy[k]["image"].equal(data[k]["image"]) for k in range(10))


# ----------------------------------------------------------------------------------------- real photographs
def test_cifar():
    path = SHARED / "cifar10_train_20000.tar"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = open_data(str(path), 64, crop="random", flip=True, hold_out=500)
    val = open_data(str(path), 64, split="val", hold_out=500)
    assert len(data) == 19_500 and len(val) == 500
    assert data.num_classes == 10 and data.class_names[:2] == ["airplane", "automobile"]
    for step, m, images, labels, texts in batches(data, 64, 32, workers=2, stop=3):
        assert images.shape == (32, 3, 64, 64) and len(labels.unique()) > 3
    assert len({val[k]["label"] for k in range(100)}) == 10


def test_imagenet():
    path = SHARED / "imagenet_1000x1_256px.tar"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = open_data(str(path), 256, crop="random")
    assert len(data) == 1000 and data.num_classes == 1000 and data.class_names[0] == "n01440764_tench"
    (_, _, images, labels, _), = batches(data, 16, 16, workers=0, stop=1)
    assert images.shape == (16, 3, 256, 256) and 60 < images.float().mean() < 180
    with tarfile.open(path) as file:
        name = data.class_names[data[3]["label"]]
        stored = Image.open(file.extractfile(f"{name}/0.jpg")).convert("RGB")
    centred = open_data(str(path), 256)
    assert np.array_equal(centred[3]["image"].permute(1, 2, 0), np.asarray(stored))  # is 256 px already
