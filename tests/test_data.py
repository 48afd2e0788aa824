"""Formats, crops, order, resuming and errors of data.py.

Run: python -m pytest tests/test_data.py
"""
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data as data_module
from data import (
    Arrays,
    batches,
    check_batch,
    load_images,
    open_data,
    resize_images,
    square,
    start_worker,
    to_rgb,
)
from listing import PassedOver, walk
from shapes import CLASSES, Scene

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def time_limit():
    """Fail a test that hangs after 2 minutes, and every second from then on if it goes on."""
    def stop(*_):
        raise TimeoutError("a test hangs")
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 120, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


# ---------------------------------------------------------------- images and files to test with
def encode_image(image, file_format, **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def plain_image(colour=(200, 30, 60), size=(40, 40), file_format="png"):
    """Return the bytes of an image file of one colour."""
    return encode_image(Image.new("RGB", size, colour), file_format)


def colour_of_number(i):
    """Return a colour that tells image i < 65536 from all others."""
    return i % 256, i // 256, 77


def number_of_image(image):
    """Return the number that colour_of_number hid in an image, 3 H W."""
    red, green, blue = image[:, image.shape[1] // 2, image.shape[2] // 2].tolist()
    assert blue == 77
    return red + 256 * green


def numbers_of_images(data, indices):
    return [number_of_image(data[k]["image"]) for k in indices]


def write_images(folder, n, classes=1, size=(8, 8), first=0):
    """Write n numbered .png to class folders c0, c1, ...; classes=0: to the folder itself."""
    for i in range(n):
        class_folder = folder / f"c{i % classes}" if classes else folder
        class_folder.mkdir(parents=True, exist_ok=True)
        content = plain_image(colour_of_number(first + i), size)
        (class_folder / f"{i:04}.png").write_bytes(content)
    return str(folder)


def write_tar(path, files, mode="w"):
    """Write a tar of files {name: bytes}."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def equal_batches(run, other):
    """True if two runs yield the same, and yield at all."""
    run, other = list(run), list(other)
    if not run or len(run) != len(other):
        return False
    for (step, micro, images, labels, texts), expected in zip(run, other, strict=True):
        if (step, micro) != expected[:2] or texts != expected[4]:
            return False
        if not images.equal(expected[2]) or not labels.equal(expected[3]):
            return False
    return True


# ---------------------------------------------------------------- modes of images
def reopen(image, file_format, **options):
    """Return the image as it comes back from a file."""
    return Image.open(io.BytesIO(encode_image(image, file_format, **options)))


def rgb_pixel(image, position=(0, 0)):
    """Return a pixel of to_rgb(image)."""
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return converted.getpixel(position)


def test_grey_and_bilevel():
    assert rgb_pixel(reopen(Image.new("L", (4, 4), 130), "png")) == (130, 130, 130)
    assert rgb_pixel(reopen(Image.new("1", (4, 4), 1), "png")) == (255, 255, 255)


@pytest.mark.parametrize("file_format", ["png", "tiff"])
def test_16_bit_grey_is_scaled_to_8_bits(file_format):
    values = ((0, 0), (257, 1), (128 * 257, 128), (65535, 255), (1000, 4), (40000, 156))
    for value, expected in values:
        image = reopen(Image.fromarray(np.full((4, 4), value, np.uint16)), file_format)
        assert image.mode.startswith("I")
        assert rgb_pixel(image) == (expected, expected, expected)
    wide = Image.fromarray(np.full((4, 4), 40000, np.int32))      # what older Pillow makes of a png
    assert wide.mode == "I"
    assert rgb_pixel(wide) == (156, 156, 156)


@pytest.mark.parametrize("mode, level, expected", [
    ("I;16", 200, 200), ("I;16B", 200, 200), ("I;16B", 40000, 156), ("I;16L", 40000, 156),
    ("I", 200, 200), ("I", 40000, 156),
    ("F", 0.5, 128), ("F", 1, 255), ("F", 128, 128), ("F", 40000, 156)])
def test_wide_grey_levels_are_scaled_by_their_range(mode, level, expected):
    image = reopen(Image.new(mode, (4, 4), level), "tiff")
    assert image.mode[0] in "IF"
    assert rgb_pixel(image) == (expected, expected, expected)


@pytest.mark.parametrize("mode, level", [
    ("F", float("nan")), ("F", float("inf")), ("F", -1), ("F", 70000), ("I", -1), ("I", 70000)])
def test_wide_grey_levels_without_a_white_are_refused(mode, level):
    with pytest.raises(ValueError, match="^has grey levels from .*; store 8 or 16 bits, or floats"):
        to_rgb(reopen(Image.new(mode, (4, 4), level), "tiff"))


def write_tiff(levels, bits, photometric):
    """A TIFF of one row of 16-bit words, packed as the file is told."""
    tags = {256: len(levels), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
            279: 2 * len(levels)}
    header = b"II*\0" + (8 + 2 * len(levels)).to_bytes(4, "little")
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    words = np.array(levels, "<u2").tobytes()
    return header + words + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


def test_tiff_whose_white_is_0():
    image = Image.open(io.BytesIO(write_tiff([0, 65535, 257 * 100, 0], 16, photometric=0)))
    assert [rgb_pixel(image, (x, 0))[0] for x in range(4)] == [255, 0, 155, 255]


def test_transparent_level_of_a_16_bit_png():
    image = Image.fromarray(np.array([[1000, 40000]], np.uint16))
    transparent = reopen(image, "png", transparency=1000)
    assert rgb_pixel(transparent) == (255, 255, 255)
    assert rgb_pixel(transparent, (1, 0)) == (156, 156, 156)


@pytest.mark.parametrize("mode, colour, expected", [
    ("YCbCr", (100, 100, 200), (200, 58, 50)), ("LAB", (136, 208, 195), (250, 3, 11)),
    ("HSV", (0, 255, 255), (255, 0, 0)), ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ("PA", (0, 0), (255, 255, 255)), ("RGBa", (10, 20, 30, 255), (10, 20, 30))])
def test_rare_modes(mode, colour, expected):
    converted = rgb_pixel(Image.new(mode, (4, 4), colour))
    assert np.abs(np.subtract(converted, expected)).max() <= 3    # versions of littleCMS round


def test_the_first_frame_of_an_animation():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for file_format in ("gif", "png", "webp", "tiff"):
        content = encode_image(red, file_format, save_all=True, append_images=[blue, blue])
        red_value, _, blue_value = rgb_pixel(Image.open(io.BytesIO(content)))
        assert red_value > 240 and blue_value < 15


# ---------------------------------------------------------------- metadata
def load_content(content, folder, name="x.png"):
    """Return an image as a run would load it, 3 8 8, and what was broken."""
    (folder / name).write_bytes(content)
    item = open_data(str(folder), 8)[0]
    return item["image"], item["broken"]


def test_all_orientations():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    for orientation, file_format in itertools.product(range(1, 9), ("png", "tiff", "webp")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encode_image(image, file_format, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert np.array_equal(to_rgb(Image.open(io.BytesIO(content))), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
                                  b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_leaves_an_image_as_it_is(exif):
    image = Image.new("RGB", (16, 8), (200, 30, 60))
    for file_format in ("jpeg", "webp"):
        assert to_rgb(reopen(image, file_format, exif=exif)).size == (16, 8)


def png_chunk(kind, content, checksum=None):
    if checksum is None:
        checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


@pytest.mark.parametrize("chunk", [
    png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**21))),
    png_chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    png_chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(2**21))),
    png_chunk(b"zTXt", b"key\0\0no zlib"), png_chunk(b"pHYs", b"1"), png_chunk(b"gAMA", b""),
    png_chunk(b"tEXt", b"key\0wrong checksum", 5)])
def test_metadata_of_a_png_break_no_image(chunk, tmp_path):
    content = plain_image(size=(8, 8))
    for position in (33, len(content) - 12):      # after the header, before the end
        image, broken = load_content(content[:position] + chunk + content[position:], tmp_path)
        assert broken == [] and image[:, 0, 0].tolist() == [200, 30, 60]


def test_large_profiles_and_texts_of_other_formats(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 30, 60))
    for file_format in ("jpeg", "webp", "avif"):
        content = encode_image(image, file_format, icc_profile=bytes(2**21))
        loaded, broken = load_content(content, tmp_path)
        assert broken == [] and abs(loaded[0].float().mean() - 200) < 6


def test_cmyk():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    black = Image.new("CMYK", (8, 8), (0, 0, 0, 255))
    assert rgb_pixel(reopen(red, "jpeg", quality=95))[0] > 240
    assert max(rgb_pixel(reopen(black, "tiff"))) == 0


def test_transparency_is_laid_over_white():
    assert rgb_pixel(reopen(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "png")) == (255, 255, 255)
    assert rgb_pixel(reopen(Image.new("RGBA", (4, 4), (10, 20, 30, 255)), "png")) == (10, 20, 30)
    assert rgb_pixel(reopen(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "png"))[0] in (127, 128)
    assert rgb_pixel(reopen(Image.new("LA", (4, 4), (0, 0)), "png")) == (255, 255, 255)
    assert rgb_pixel(reopen(Image.new("LA", (4, 4), (9, 255)), "png")) == (9, 9, 9)
    transparent_colour = reopen(Image.new("RGB", (4, 4), (1, 2, 3)), "png", transparency=(1, 2, 3))
    assert rgb_pixel(transparent_colour) == (255, 255, 255)


@pytest.mark.parametrize("file_format", ["png", "gif"])
def test_palettes_with_and_without_transparency(file_format):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 10, 20])
    image.putpixel((0, 0), 0)

    opaque = reopen(image, file_format)
    transparent = reopen(image, file_format, transparency=0)

    assert rgb_pixel(opaque) == (0, 0, 0)
    assert rgb_pixel(transparent) == (255, 255, 255)
    assert rgb_pixel(opaque, (2, 2)) == rgb_pixel(transparent, (2, 2)) == (250, 10, 20)


def test_exif_rotation():
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))           # stored: blue left, red right
    exif = Image.Exif()
    exif[0x0112] = 6                              # to be turned clockwise: blue on top
    for file_format in ("jpeg", "png", "webp"):
        stored = reopen(image, file_format, exif=exif)
        assert to_rgb(stored).size == (10, 20)
        assert rgb_pixel(stored, (5, 2))[2] > 200
        assert rgb_pixel(stored, (5, 17))[0] > 200


SUFFIXES = ["jpg", "jpeg", "JPEG", "jpe", "jfif", "png", "apng", "webp", "avif", "bmp", "dib",
            "gif", "tif", "TIFF", "jp2", "j2k", "jpx", "ppm", "pnm", "tga", "pcx", "qoi"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_in_any_case(suffix, tmp_path):
    Image.init()
    file_format = Image.EXTENSION[f".{suffix.lower()}"]
    (tmp_path / f"a.{suffix}").write_bytes(plain_image(file_format=file_format))

    image = open_data(str(tmp_path), 32)[0]["image"]

    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert np.abs(image[:, 16, 16].numpy() - np.array([200.0, 30, 60])).max() < 6


# ---------------------------------------------------------------- crop, flip and resize
def test_centre_crop_halves_by_means_of_2x2_then_takes_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    means = pixels.reshape(32, 2, 64, 2, 3).mean((1, 3))          # 64 x 128 -> 32 x 64
    cropped = np.asarray(square(Image.fromarray(pixels), 32)).astype(float)
    assert np.abs(cropped - means[:, 16:48]).max() <= 1           # rounded twice, across and down


def adm_centre_crop(image, size):
    """The centre crop of FID's references, from the description in ADM."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    pixels = np.array(image.resize(shape, Image.BICUBIC))
    y = (pixels.shape[0] - size) // 2
    x = (pixels.shape[1] - size) // 2
    return pixels[y:y + size, x:x + size]


def test_centre_crop_is_that_of_the_fid_references():
    rng = np.random.default_rng(1)
    sizes = ((256, 256), (500, 375), (333, 1000), (64, 65), (31, 200), (20, 20), (129, 127))
    for width, height in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        cropped = np.asarray(square(image, 64))
        assert np.array_equal(cropped, adm_centre_crop(image, 64)), (width, height)


def test_same_size_is_left_as_it_is_and_small_images_are_enlarged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(square(Image.fromarray(pixels), 32)), pixels)
    assert square(Image.fromarray(pixels), 64).size == (64, 64)
    small = Image.fromarray(pixels[:5, :30])
    assert square(small, 64, np.random.default_rng(0)).size == (64, 64)
    assert square(Image.new("RGB", (1, 1)), 16).size == (16, 16)


@pytest.mark.parametrize("width, height", [(1, 20_000), (20_000, 2), (7, 300), (700, 20)])
def test_a_thin_image_is_cropped_before_it_is_enlarged(width, height, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crops = [square(image, 16), square(image, 16, np.random.default_rng(3))]
    monkeypatch.setattr(data_module, "THIN", 10**9)               # enlarge, then crop
    expected = [square(image, 16), square(image, 16, np.random.default_rng(3))]
    for crop, other in zip(crops, expected, strict=True):
        difference = np.asarray(crop).astype(int) - np.asarray(other)
        assert np.abs(difference).max() <= 1


def test_random_crop_reaches_every_offset_of_a_side_of_one_and_a_half():
    ramp = np.zeros((48, 96, 3), np.uint8)        # a pixel is its position
    ramp[..., 0] = np.arange(48)[:, None]
    ramp[..., 1] = np.arange(96)
    rng = np.random.default_rng(0)

    corners = set()
    for _ in range(6000):
        crop = np.asarray(square(Image.fromarray(ramp), 32, rng))
        corners.add(tuple(crop[0, 0, :2].tolist()))

    assert {y for y, _ in corners} == set(range(48 - 32 + 1))
    assert {x for _, x in corners} == set(range(96 - 32 + 1))


def test_flip_mirrors_half_of_the_images_and_only_with_the_flag(tmp_path):
    image = Image.new("RGB", (16, 16), (77, 0, 0))
    image.paste((77, 255, 0), (0, 0, 8, 16))      # green on the left
    image.save(tmp_path / "a.png")

    plain = open_data(str(tmp_path), 16, flip=False)
    flipped = open_data(str(tmp_path), 16, flip=True)

    assert all(plain[k]["image"][1, 0, 0] == 255 for k in range(200))
    assert 70 < sum(flipped[k]["image"][1, 0, 0] == 255 for k in range(200)) < 130


def test_resize_images():
    images = torch.rand(2, 3, 32, 32)
    assert resize_images(images, 32) is images
    constant = resize_images(torch.full((1, 3, 32, 32), 0.25), 8)
    torch.testing.assert_close(constant, torch.full((1, 3, 8, 8), 0.25))
    edge = (torch.arange(32) < 16).float().expand(1, 3, 32, 32)
    enlarged = resize_images(edge, 64)
    assert enlarged.shape == (1, 3, 64, 64)
    assert enlarged.min() == 0 and enlarged.max() == 1            # no overshoot


# ---------------------------------------------------------------- sources
def test_shapes():
    data = open_data("shapes", 64, seed=3, objects=1)
    assert data.class_names == list(CLASSES) and data.num_classes == 36
    assert data.labelled and data.is_shapes and data.is_built_in(0)
    assert len(data) == 1_000_000

    item = data[17]
    scene = Scene.random(3, 17, (1,))
    assert np.array_equal(item["image"].permute(1, 2, 0), scene.render(64))
    assert item["text"] == scene.caption() and item["broken"] == []
    assert item["label"] == scene.objects[0].label
    assert data.scene_or_text(17) == scene

    next_epoch = Scene.random(3, 1_000_017, (1,))                 # never twice the same
    assert data[1_000_000 + 17]["text"] == next_epoch.caption()
    assert open_data("shapes", 64, objects=(1,)).labelled
    several = open_data(["shapes"], 64)
    assert not several.labelled and several.num_classes == 1
    assert several[5]["label"] == Scene.random(0, 5).objects[0].label


def test_held_out_shapes_are_others_and_the_same_for_every_seed():
    train = open_data("shapes", 32, objects=1)
    val = open_data("shapes", 32, objects=1, split="val")
    other_seed = open_data("shapes", 32, seed=9, objects=1, split="val")
    assert not any(train[k]["image"].equal(val[k]["image"]) for k in range(50))
    assert val[7]["image"].equal(other_seed[7]["image"])


def test_class_folders(tmp_path):
    folder = write_images(tmp_path / "set", 12, classes=3)
    (tmp_path / "set" / "empty").mkdir()

    data = open_data(folder, 8)

    assert data.class_names == ["c0", "c1", "c2"] and data.num_classes == 3
    assert data.labelled and len(data) == 12
    assert not data.is_shapes and not data.is_built_in(0)
    for k in range(12):
        assert data[k]["label"] == number_of_image(data[k]["image"]) % 3
        assert data[k]["text"] == ""
    assert sorted(numbers_of_images(data, range(12))) == list(range(12))


def test_flat_folder_has_no_labels(tmp_path):
    data = open_data(write_images(tmp_path, 5, classes=0) + "/", 8)
    assert not data.labelled and data.num_classes == 1 and len(data.class_names) == 1
    assert {data[k]["label"] for k in range(5)} == {0}


def test_other_files_are_ignored_and_links_followed(tmp_path):
    folder = tmp_path / "set"
    write_images(folder, 4, classes=2)
    for name in ("notes.txt", "Thumbs.db", ".hidden.png", "._0000.png", "png", "c0/list.json"):
        (folder / name).write_bytes(b"no image")
    for name in (".git", "__MACOSX", "c0/.cache"):
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes(b"no image")
    write_images(tmp_path / "elsewhere", 3, classes=0, first=100)
    os.symlink(tmp_path / "elsewhere", folder / "c2")
    os.symlink(tmp_path / "elsewhere" / "0000.png", folder / "c1" / "link.png")

    data = open_data(str(folder), 8)

    assert data.class_names == ["c0", "c1", "c2"]
    numbers = sorted(numbers_of_images(data, range(len(data))))
    assert numbers == [0, 1, 2, 3, 100, 100, 101, 102]


def test_tar_of_class_folders(tmp_path):
    files = {}
    for i in range(6):
        name = "cat" if i % 2 else "ant"
        files[f"./{name}/{i}.png"] = plain_image(colour_of_number(i))
    files["__MACOSX/cat/._1.png"] = b""
    files["./cat/._1.png"] = b""
    files["./readme.md"] = b"text"

    data = open_data(write_tar(tmp_path / "a.tar", files), 8)

    assert data.class_names == ["ant", "cat"] and len(data) == 6
    assert all(data[k]["label"] == number_of_image(data[k]["image"]) % 2 for k in range(6))


def test_tar_with_cls_and_txt(tmp_path):
    labels = (2, 0, 5)
    files = {}
    for i, label in enumerate(labels):
        files[f"{i:05}.cls"] = f"{label}\n".encode()
        files[f"{i:05}.png"] = plain_image(colour_of_number(i))
        files[f"{i:05}.txt"] = f"number {i} é\n".encode()

    data = open_data(write_tar(tmp_path / "a.tar", files), 8)

    assert data.labelled and data.num_classes == 3
    assert data.class_names == ["0", "2", "5"]
    for k in range(3):
        i = number_of_image(data[k]["image"])
        assert data.class_names[data[k]["label"]] == str(labels[i])
        assert data[k]["text"] == f"number {i} é"


@pytest.mark.parametrize("label_key, caption_key", [("label", "caption"), ("class", "text")])
def test_tar_with_json(label_key, caption_key, tmp_path):
    files = {}
    for i, name in enumerate(["dog", "bee", "dog"]):
        record = {label_key: name, caption_key: f"a {name}", "width": 40}
        files[f"{i}.json"] = json.dumps(record).encode()
        files[f"{i}.jpg"] = plain_image(file_format="jpeg")

    data = open_data(write_tar(tmp_path / "a.tar", files), 8)

    assert data.class_names == ["bee", "dog"]
    pairs = sorted((data[k]["label"], data[k]["text"]) for k in range(3))
    assert pairs == [(0, "a bee"), (1, "a dog"), (1, "a dog")]


def test_tar_without_labels(tmp_path):
    files = {f"{i}.png": plain_image() for i in range(3)}
    data = open_data(write_tar(tmp_path / "a.tar", files), 8)
    assert not data.labelled and data.num_classes == 1


@pytest.fixture
def shards(tmp_path):
    """A folder of x-008.tar, x-009.tar and x-010.tar, with four images each."""
    for shard in range(3):
        files = {f"c/{i}.png": plain_image(colour_of_number(10 * shard + i)) for i in range(4)}
        write_tar(tmp_path / f"x-{shard + 8:03}.tar", files)
    return tmp_path


def test_shards_by_list_and_by_brace_range_are_one_source(shards):
    by_list = open_data(sorted(str(path) for path in shards.glob("*.tar")), 8)
    by_range = open_data(f"{shards}/x-{{008..010}}.tar", 8)
    two_sources = open_data([f"a={shards}/x-{{008..009}}.tar:1", f"b={shards}/x-010.tar:1"], 8)

    assert len(by_list) == len(by_range) == len(two_sources) == 12
    assert by_range.source_lengths == [12] and two_sources.source_lengths == [8, 4]
    numbers = numbers_of_images(by_range, range(12))
    assert sorted(numbers) == [10 * shard + i for shard in range(3) for i in range(4)]
    assert numbers_of_images(by_list, range(12)) == numbers


def test_tars_are_read_in_place(shards):
    before = sorted(shards.rglob("*"))
    data = open_data(f"{shards}/x-008.tar", 8)
    listed = data.sources[0].images[0]
    with open(shards / "x-008.tar", "rb") as file:
        file.seek(listed.offset)
        assert Image.open(io.BytesIO(file.read(listed.size))).size == (40, 40)
    assert sorted(shards.rglob("*")) == before


# ---------------------------------------------------------------- what is read is told
def test_what_is_passed_over_is_counted(tmp_path):
    folder = tmp_path / "set"
    write_images(folder, 4, classes=2)
    (folder / "grey.pgm").write_bytes(encode_image(Image.new("L", (8, 8)), "ppm"))
    for name in ("c0/1.heic", "c1/2.HEIC", "c1/notes.txt", "README"):
        (folder / name).write_bytes(b"no image")
    os.rename(folder / "grey.pgm", folder / "c1" / "grey.pgm")
    os.symlink("nowhere.png", folder / "c0" / "broken.png")
    os.symlink("itself.png", folder / "c0" / "itself.png")
    os.symlink("c0", folder / "again")
    os.symlink("..", folder / "c0" / "up")
    os.mkfifo(folder / "c0" / "pipe.png")

    data = open_data(str(folder), 8, hold_out=1)

    (name, summary), = data.summary().items()
    assert name == ""
    assert summary["passed_over"] == {
        ".heic": {"count": 2, "first": "c0/1.heic"}, ".txt": {"count": 1, "first": "c1/notes.txt"},
        "broken links": {"count": 2, "first": "c0/broken.png"},
        "links to folders that are read elsewhere": {"count": 2, "first": "again"},
        "pipes or devices": {"count": 1, "first": "c0/pipe.png"},
        "files without a suffix": {"count": 1, "first": "README"}}
    assert json.loads(json.dumps(summary)) == summary
    for key, value in dict(split="train", images=4, images_in_all=5, held_out=1, classes=2).items():
        assert summary[key] == value
    title, passed_over = data.describe().splitlines()
    assert title == f"data {folder}, train: images: 4 of 5 (held out of training: 1), classes: 2"
    assert passed_over.startswith("  passed over: ")
    assert ".heic 2, " in passed_over and "broken links 2 (c0/broken.png), " in passed_over


def test_folders_that_can_not_be_read_are_told(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "set", 6, classes=3)
    scandir = os.scandir

    def refuse(path):
        if path.rstrip("/").endswith("c1"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)

    data = open_data(folder, 8)
    assert len(data) == 4 and data.class_names == ["c0", "c2"]
    assert data.summary()[""]["passed_over"] == {"unreadable folders": {"count": 1, "first": "c1"}}
    with pytest.raises(PermissionError):
        open_data(f"{folder}/c1", 8)


def test_links_are_followed_but_no_folder_is_read_twice(tmp_path):
    write_images(tmp_path / "set" / "a", 1, classes=0)
    write_images(tmp_path / "other" / "b", 1, classes=0)
    os.symlink("a", tmp_path / "set" / "0")                       # before the folder itself
    os.symlink(".", tmp_path / "set" / "a" / "here")
    os.symlink(tmp_path, tmp_path / "set" / "a" / "above")
    os.symlink(tmp_path / "other", tmp_path / "set" / "x")
    os.symlink(tmp_path / "other" / "b", tmp_path / "set" / "y")
    os.symlink(tmp_path / "set", tmp_path / "other" / "b" / "back")

    passed_over = PassedOver()
    names = list(walk(str(tmp_path / "set"), passed_over, set()))

    assert names == ["a/0000.png", "x/b/0000.png"]
    assert passed_over.counts == {"links to folders that are read elsewhere": 5}


def test_a_mixture_and_the_built_in_worlds_are_told(folder):
    data = open_data([f"a={folder}:1", "b=shapes:1"], 8, split="val", hold_out=8, objects=1)
    summary = data.summary()
    assert summary["b"] == {"data": "shapes", "split": "val", "images": 1_000_000, "classes": 36}
    assert summary["a"]["images"] == 8 and summary["a"]["images_in_all"] == 48
    first, second = data.describe().splitlines()
    assert first == f"data a={folder}, val: images: 8 of 48 (held out of training: 8), classes: 4"
    assert second == "data b=shapes, val: images are drawn when needed, classes: 36"


def test_identity_changes_with_names_and_labels_alone(tmp_path):
    folder = write_images(tmp_path / "set", 8, classes=2)
    (before, identity), = open_data(folder, 8).identity().items()
    assert before == "" and identity["images"] == 8
    assert open_data(folder, 16, seed=3, hold_out=3, split="val").identity() == {"": identity}
    os.rename(folder, tmp_path / "moved")
    folder = str(tmp_path / "moved")
    assert open_data(folder, 8).identity() == {"": identity}

    os.rename(f"{folder}/c0/0000.png", f"{folder}/c1/0000.png")
    assert open_data(folder, 8).identity()[""]["names"] != identity["names"]
    os.rename(f"{folder}/c1/0000.png", f"{folder}/c0/0000.png")
    write_images(tmp_path / "moved", 1, first=99, classes=1)
    assert open_data([f"a={folder}:1", "b=shapes:1"], 8).identity() == {"a": identity}
    write_images(tmp_path / "moved" / "c1", 1, classes=0)
    assert open_data(folder, 8).identity()[""]["images"] == 9
    assert open_data("shapes", 8).identity() == {}


def test_identity_of_a_jsonl_has_the_paths_of_its_images(tmp_path):
    write_images(tmp_path, 4, classes=2)
    identities = []
    for name in ("c0/0000.png", "c1/0001.png"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"image": name}))
        identities.append(open_data(str(tmp_path / "a.jsonl"), 8).identity()[""]["names"])
    assert identities[0] != identities[1]


# ---------------------------------------------------------------- layouts
def write_layout(path, names):
    """Write images of these names to a folder and to a tar. Returns: both paths"""
    files = {name: plain_image(size=(8, 8)) for name in names}
    for name, content in files.items():
        (path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "set" / name).write_bytes(content)
    return str(path / "set"), write_tar(path / "set.tar", files)


@pytest.mark.parametrize("names, meant", [
    (["x/y/train/a/1.png", "x/y/train/b/2.png", "x/y/val/3.png", "x/y/test/4.png"], "x/y/train"),
    (["train/a/1.png", "train/b/2.png", "val/a/3.png"], "train"),
    (["train2017/1.png", "val2017/2.png"], "train2017"),
    (["validation/a/1.png", "test_set/a/2.png"], "test_set"),
    (["train/a/1.png", "train/b/2.png", "more/3.png"], "train"),
    (["set/a/1.png", "set/b/2.png", "cover.png"], "set")])
def test_layouts_that_mix_levels_are_refused_with_the_path_that_was_meant(names, meant, tmp_path):
    folder, shard = write_layout(tmp_path, names)
    with pytest.raises(ValueError, match=f"--data {folder}.*; give --data {folder}/{meant}$"):
        open_data(folder, 8)
    message = rf"unpack it \(tar -xf {shard}\) and give --data {meant}$"
    with pytest.raises(ValueError, match=message):
        open_data(shard, 8)
    assert len(open_data(f"{folder}/{meant}", 8)) >= 1


@pytest.mark.parametrize("names, train", [
    (["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"], "train"),
    (["x/Training/a/1.png", "x/Training/b/2.png", "x/Testing/a/3.png", "x/Testing/b/4.png"],
     "x/Training")])
def test_of_splits_with_the_same_classes_only_train_is_read(names, train, tmp_path):
    for path in write_layout(tmp_path, names):
        data = open_data(path, 8)
        assert data.class_names == ["a", "b"]
        assert len(data) == 2
        assert f"images outside {train}/ 2" in data.describe()


@pytest.mark.parametrize("names", [
    ["a/1.png", "2.png"], ["a/1.png", "b/c/2.png"], ["1.png", "a/2.png", "b/c/3.png"]])
def test_classes_at_several_depths_are_refused(names, tmp_path):
    for path in write_layout(tmp_path, names):
        with pytest.raises(ValueError, match="several depths.*; move or remove those at one"):
            open_data(path, 8)


@pytest.mark.parametrize("names, classes", [
    (["a/b/1.png", "a/c/2.png", "d/e/3.png"], ["a/b", "a/c", "d/e"]),
    (["test/1.png", "cat/2.png"], ["cat", "test"]),
    (["training/1.png", "train/2.png"], ["train", "training"]),
    (["train/cat/1.png", "train/dog/2.png"], ["train/cat", "train/dog"]),
    (["val/1.png", "valve/2.png", "value/3.png"], ["val", "value", "valve"])])
def test_layouts_of_one_level_are_classes(names, classes, tmp_path):
    for path in write_layout(tmp_path, names):
        assert open_data(path, 8).class_names == classes


def test_splits_beside_each_other_are_refused_in_stage_3(tmp_path):
    files = {}
    for name in ("train/1", "val/2"):
        files |= {f"{name}.png": plain_image(), f"{name}.txt": b"a cat"}
    with pytest.raises(ValueError, match="holds train and val side by side"):
        open_data(write_tar(tmp_path / "a.tar", files), 8, chat=lambda scene, rng: [])


# ---------------------------------------------------------------- class ids
def labelled_tar(path, labels):
    """A tar of images i.png with the contents of i.cls."""
    files = {}
    for i, label in enumerate(labels):
        files[f"{i}.png"] = plain_image(colour_of_number(i), (8, 8))
        files[f"{i}.cls"] = f"{label}".encode()
    return write_tar(path, files)


@pytest.mark.parametrize("ids, missing", [
    ([0, 1, 2], []), ([1, 2, 3], ["0"]), ([0, 5, 5_000_000], ["1 to 4", "6 to 4999999"]),
    ([9_999_999_999, 9, 10], ["0 to 8", "11 to 9999999998"]), ([7], ["0 to 6"])])
def test_classes_are_the_ids_that_have_images(ids, missing, tmp_path):
    data = open_data(labelled_tar(tmp_path / "a.tar", [*ids, *ids]), 8)

    assert data.labelled and data.num_classes == len(ids)
    assert data.class_names == [str(label) for label in sorted(ids)]
    for k in range(2 * len(ids)):
        label = ids[number_of_image(data[k]["image"]) % len(ids)]
        assert data.class_names[data[k]["label"]] == str(label)
    assert data.summary()[""]["missing_ids"] == missing
    assert ("no image has the class ids" in data.describe()) == bool(missing)


def test_ids_of_hundreds_of_digits(tmp_path):
    data = open_data(labelled_tar(tmp_path / "a.tar", [10**400, 3]), 8)
    assert data.num_classes == 2 and len(data.describe()) < 400
    with pytest.raises(ValueError, match="0.png Exceeds the limit"):
        open_data(labelled_tar(tmp_path / "b.tar", ["9" * 5000]), 8)


def test_a_class_that_is_held_out_whole_stays_a_class_and_is_named(tmp_path):
    path = labelled_tar(tmp_path / "a.tar", range(10))
    train = open_data(path, 8, hold_out=3)
    val = open_data(path, 8, hold_out=3, split="val")

    assert train.class_names == val.class_names == [str(i) for i in range(10)]
    without = train.summary()[""]["classes_held_out"]
    assert len(without) == 3
    assert {int(name) for name in without} == {val[k]["label"] for k in range(3)}
    assert f"classes without an image to train on: 3 ({', '.join(without)})" in train.describe()
    assert "without an image" not in val.describe()


# ---------------------------------------------------------------- sidecars
def test_sidecars_are_found_by_the_last_dot_or_else_by_the_first(tmp_path):
    files = {"set.v1/0001.image.png": plain_image(), "set.v1/0001.cls": b"3",
             "set.v1/0001.txt": b"to the first dot", "v1.0.png": plain_image(), "v1.0.cls": b"4",
             "v1.cls": b"5", "v1.txt": b"of both"}
    data = open_data(write_tar(tmp_path / "a.tar", files), 8)
    items = [data[k] for k in range(2)]
    found = {data.class_names[item["label"]]: item["text"] for item in items}
    assert found == {"3": "to the first dot", "4": "of both"}
    assert data.summary()[""]["passed_over"] == {".cls of no image": {"count": 1,
                                                                      "first": "v1.cls"}}


@pytest.mark.parametrize("label", [b"3\r\n", b"\xef\xbb\xbf3\n", b"\n 3 \n\n"])
def test_class_ids_with_blank_lines_and_byte_order_marks(label, tmp_path):
    files = {"0.png": plain_image(), "0.cls": label}
    assert open_data(write_tar(tmp_path / "a.tar", files), 8).class_names == ["3"]


def test_sidecars_that_no_image_uses_are_named(tmp_path):
    files = {"0.png": plain_image(), "0.txt": b"a", "01.txt": b"b", "2.TXT": b"c", "2.cls": b"1",
             "3.json": b"{}"}
    data = open_data(write_tar(tmp_path / "a.tar", files), 8)
    passed_over = data.summary()[""]["passed_over"]
    assert passed_over[".txt of no image"] == {"count": 2, "first": "01.txt"}
    assert passed_over[".cls of no image"] == {"count": 1, "first": "2.cls"}
    assert passed_over[".json of no image"] == {"count": 1, "first": "3.json"}
    assert ".txt of no image 2 (01.txt)" in data.describe()


# ---------------------------------------------------------------- mixtures
def test_mixture_keeps_its_proportions_and_repeats_no_image_of_an_epoch(tmp_path):
    a = write_images(tmp_path / "a", 50)
    b = write_images(tmp_path / "b", 30, first=100)
    data = open_data([f"first={a}:6", f"second={b}:4.0"], 8)
    assert len(data) == 80 and data.domains == ["first", "second"]
    assert data.source_lengths == [50, 30]

    numbers = numbers_of_images(data, range(1000))
    first = [i for i in numbers if i < 100]
    second = [i for i in numbers if i >= 100]
    assert len(first) == 600 and len(second) == 400
    for of_source, n in ((first, 50), (second, 30)):              # each epoch is complete
        for start in range(0, len(of_source) - n, n):
            assert len(set(of_source[start:start + n])) == n
    # Mixed all along, not in blocks.
    assert 0.5 < sum(i < 100 for i in numbers[:200]) / 200 < 0.7
    assert [data.source_of(k) for k in range(1000)] == [int(i >= 100) for i in numbers]

    later = numbers_of_images(data, range(1000, 1100))
    assert [i >= 100 for i in later] == [i >= 100 for i in numbers[:100]]     # it is periodic
    same_ratio = open_data([f"first={a}:0.6", f"second={b}:0.4"], 8)
    assert later == numbers_of_images(same_ratio, range(1000, 1100))


def test_mixture_of_odd_weights_is_exact_to_one_in_a_thousand(tmp_path):
    paths = [write_images(tmp_path / str(i), 2, first=10 * i) for i in range(3)]
    thirds = open_data([f"s{i}={path}:1" for i, path in enumerate(paths)], 8)
    assert sorted(thirds.mixture.counts) == [333, 333, 334]
    specs = [f"a={paths[0]}:.2", f"b={paths[1]}:0.01", f"c={paths[2]}:9"]
    assert open_data(specs, 8).mixture.counts == [22, 1, 977]


def test_mixture_unites_class_names(tmp_path):
    for source, names, first in (("a", ("dog", "bee"), 0), ("b", ("cat", "dog"), 10)):
        for i, name in enumerate(names):
            folder = tmp_path / source / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(plain_image(colour_of_number(first + i)))

    data = open_data([f"a={tmp_path}/a:1", f"b={tmp_path}/b:1"], 8)

    assert data.class_names == ["bee", "cat", "dog"] and data.num_classes == 3
    items = [data[k] for k in range(40)]
    labels = {number_of_image(item["image"]): item["label"] for item in items}
    assert labels == {0: 2, 1: 0, 10: 1, 11: 2}


def test_mixture_has_labels_only_if_all_its_sources_do(tmp_path):
    a = write_images(tmp_path / "a", 4, classes=2)
    b = write_images(tmp_path / "b", 4, classes=0)
    unlabelled = open_data([f"a={a}:1", f"b={b}:1"], 8)
    assert not unlabelled.labelled and unlabelled.num_classes == 1
    assert {unlabelled[k]["label"] for k in range(20)} == {0}

    data = open_data([f"a={a}:0.5", "world=shapes:0.5"], 32, objects=1)
    assert data.labelled and data.num_classes == 38
    assert data.class_names == sorted([*CLASSES, "c0", "c1"])
    assert [data.is_built_in(0), data.is_built_in(1)] == [False, True]
    items = [data[k] for k in range(40)]
    scenes = [item for item in items if item["text"]]
    assert 10 < len(scenes) < 30
    assert all(data.class_names[scene["label"]] in scene["text"] for scene in scenes)


def test_odd_paths(tmp_path, monkeypatch):
    odd = write_images(tmp_path / "a=b:c, d" / "x:0.5", 3)
    assert len(open_data(odd, 8)) == 3
    assert len(open_data([f"one={odd}:0.5", "two=shapes:1"], 16)) == 1_000_003
    monkeypatch.chdir(tmp_path)
    assert len(open_data("a=b:c, d", 8)) == 3     # it exists, so it is a path


def test_a_brace_range_that_the_shell_expanded_is_one_source(shards):
    # What bash makes of a={008..010}.tar:0.5.
    specs = [f"a={shards}/x-{shard:03}.tar:0.5" for shard in (8, 9, 10)]
    data = open_data([*specs, "w=shapes:0.5"], 16, objects=1)
    assert data.mixture.counts == [500, 500] and len(data) == 1_000_012


# ---------------------------------------------------------------- order and resuming
def test_each_epoch_is_another_permutation_and_seeds_differ(tmp_path):
    data = open_data(write_images(tmp_path, 40, classes=4), 8)
    first, second, third = (numbers_of_images(data, range(40 * e, 40 * e + 40)) for e in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(40))
    assert first != second != third != first

    other_seed = open_data(str(tmp_path), 8, seed=1)
    assert numbers_of_images(other_seed, range(40)) != first
    out_of_order = [third[5], first[3], second[1], first[3]]
    assert numbers_of_images(data, [85, 3, 41, 3]) == out_of_order


def test_image_k_is_a_function_of_seed_and_k(tmp_path):
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    a = open_data(str(tmp_path), 16, seed=5, crop="random", flip=True)
    b = open_data(str(tmp_path), 16, seed=5, crop="random", flip=True)
    for k in (30, 2, 1000, 2, 10**9):
        assert a[k]["image"].equal(b[k]["image"])

    for path in list(tmp_path.iterdir())[1:]:     # of the one that is left, only crops can differ
        path.unlink()
    crops = set()
    for seed in (5, 6):
        data = open_data(str(tmp_path), 16, seed=seed, crop="random")
        crops.update(data[k]["image"].numpy().tobytes() for k in range(6))
    assert len(crops) > 6                         # they differ by k and by seed


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "set", 48, classes=4)


def test_ranks_and_workers_share_an_epoch_without_repeats(folder):
    data = open_data(folder, 8, flip=True)
    whole = list(batches(data, 16, 4, workers=0, stop=6))
    assert [x[:2] for x in whole] == [(step, micro) for step in range(6) for micro in range(4)]
    for _, _, images, labels, _ in whole:
        assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64
    for epoch in (whole[:12], whole[12:]):        # 48 images are 3 steps of 16
        numbers = [number_of_image(image) for _, _, images, _, _ in epoch for image in images]
        assert sorted(numbers) == list(range(48))

    for world, workers in ((2, 0), (2, 2), (4, 1)):
        of_ranks = []
        for rank in range(world):
            of_ranks.append(list(batches(data, 16, 4, 0, rank, world, workers, stop=6)))
        assert [x[1] for x in of_ranks[1]][:4 // world] == list(range(1, 4, world))
        together = sorted(itertools.chain(*of_ranks), key=lambda x: x[:2])
        assert equal_batches(whole, together)


@pytest.mark.parametrize("source", ["folder", "shapes", "mixture"])
def test_workers_change_nothing(source, folder):
    mixture = [f"a={folder}:0.3", "b=shapes:0.7"]
    specs = {"folder": folder, "shapes": "shapes", "mixture": mixture}[source]
    data = open_data(specs, 16, seed=2, crop="random", flip=True)
    none, one, two = (list(batches(data, 12, 6, workers=n, stop=5)) for n in range(3))
    assert equal_batches(none, one) and equal_batches(none, two)


def test_resume_at_any_step_equals_the_straight_run(folder):
    def run(start, workers):
        specs = [f"a={folder}:0.5", "b=shapes:0.5"]
        data = open_data(specs, 16, seed=4, crop="random", flip=True)
        return list(batches(data, 16, 8, start=start, workers=workers, stop=9))
    straight = run(start=0, workers=0)
    for start in range(9):
        assert equal_batches(run(start, workers=0), straight[2 * start:])
    assert equal_batches(run(start=5, workers=2), straight[10:])


def test_micro_batches_are_slices_of_the_batch(folder):
    data = open_data(folder, 8, crop="random", flip=True)
    small = list(batches(data, 24, 6, workers=0, stop=4))
    for step, micro, images, labels, _ in batches(data, 24, 24, workers=0, stop=4):
        slices = small[4 * step:4 * step + 4]
        assert micro == 0
        assert images.equal(torch.cat([x[2] for x in slices]))
        assert labels.equal(torch.cat([x[3] for x in slices]))


def test_batches_go_on_without_end_and_leave_the_global_random_state_alone(folder):
    data = open_data(folder, 8)
    before = torch.get_rng_state()
    *_, last = itertools.islice(batches(data, 48, 48, workers=0), 20)
    assert last[0] == 19
    next(batches(data, 48, 48, workers=1))
    assert before.equal(torch.get_rng_state())


def test_texts_travel_with_their_images():
    data = open_data("shapes", 32)
    for step, micro, _, labels, texts in batches(data, 8, 4, workers=1, stop=2):
        first = step * 8 + micro * 4
        assert texts == [data[k]["text"] for k in range(first, first + 4)]
        assert labels.tolist() == [data[k]["label"] for k in range(first, first + 4)]


# ---------------------------------------------------------------- hold-out
def test_hold_out_parts_the_images_alike_for_every_seed(folder):
    held_out = {}
    for seed, n in itertools.product((0, 7), (6, 20)):
        train = open_data(folder, 8, seed=seed, hold_out=n)
        val = open_data(folder, 8, seed=seed, split="val", hold_out=n, crop="centre")
        assert len(train) == 48 - n and len(val) == n
        assert train.class_names == val.class_names
        in_train = numbers_of_images(train, range(48 - n))
        in_val = numbers_of_images(val, range(n))
        assert sorted(in_train + in_val) == list(range(48))
        held_out[seed, n] = in_val

    assert held_out[0, 6] == held_out[7, 6]
    assert held_out[0, 20] == held_out[7, 20]
    assert set(held_out[0, 6]) < set(held_out[0, 20])
    assert len({i % 4 for i in held_out[0, 20][:12]}) == 4        # not sorted by class


def test_hold_out_of_a_mixture_is_of_each_source(folder, tmp_path):
    other = write_images(tmp_path / "other", 10, first=100)
    specs = [f"a={folder}:0.5", f"b={other}:0.5"]
    val = open_data(specs, 8, split="val", hold_out=4)
    train = open_data(specs, 8, split="train", hold_out=4)
    assert len(val) == 8 and len(train) == 50
    in_val = set(numbers_of_images(val, range(60)))
    in_train = set(numbers_of_images(train, range(200)))
    assert not in_val & in_train


# ---------------------------------------------------------------- broken files
def test_a_broken_file_is_replaced_counted_and_named_once(tmp_path, capfd):
    write_images(tmp_path, 120, classes=2)
    before = numbers_of_images(open_data(str(tmp_path), 8), range(240))
    path = tmp_path / "c1" / "0007.png"
    path.write_bytes(path.read_bytes()[:30])
    k = before.index(7)

    data = open_data(str(tmp_path), 8)
    item = data[k]
    assert item["broken"] == [(str(path), "no image that Pillow can read")]
    assert number_of_image(item["image"]) != 7
    assert item["label"] == number_of_image(item["image"]) % 2    # that of the replacement
    assert item["image"].equal(open_data(str(tmp_path), 8)[k]["image"])
    after = numbers_of_images(data, range(240))
    changed = [x != y for x, y in zip(before, after, strict=True)]
    assert sum(changed) == 2                      # once in each epoch; nothing else moves

    for workers in (0, 2):
        data = open_data(str(tmp_path), 8)
        run = batches(data, 40, 20, workers=workers, stop=6)
        assert [number_of_image(image) for _, _, images, _, _ in run for image in images] == after
        reported = re.findall("broken image (.*)", capfd.readouterr().err)
        assert reported == [f"1, replaced by another: {path} (no image that Pillow can read)"]


DAMAGES = ["empty", "text", "cut jpeg", "cut png", "bad checksum", "no pixels", "vanished"]


def damaged_file(damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file_format = "jpeg" if damage == "cut jpeg" else "png"
    whole = encode_image(Image.fromarray(noise), file_format)
    if damage == "empty":
        return b""
    if damage == "text":
        return b"<html>not found</html>"
    if damage == "bad checksum":
        return whole[:60] + b"?" + whole[61:]
    if damage == "no pixels":                     # a header of width 0 and height 0
        chunk = b"IHDR" + bytes(8) + b"\x08\x02\0\0\0"
        return b"\x89PNG\r\n\x1a\n\0\0\0\r" + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return whole[:len(whole) // 2]


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_kinds_of_damage(damage, tmp_path):
    write_images(tmp_path, 3, classes=0)
    path = tmp_path / "9.png"
    path.write_bytes(damaged_file(damage))
    data = open_data(str(tmp_path), 8)
    if damage == "vanished":
        path.unlink()

    items = [data[k] for k in range(4)]

    assert any(str(path) in dict(item["broken"]) for item in items)
    assert all(number_of_image(item["image"]) in range(3) for item in items)


def test_a_broken_member_of_a_tar_is_named(tmp_path):
    files = {f"c/{i}.png": plain_image(colour_of_number(i)) for i in range(5)}
    files["c/0.png"] = b""
    path = write_tar(tmp_path / "a.tar", files)
    data = open_data(path, 8)
    broken = {pair for k in range(5) for pair in data[k]["broken"]}
    assert broken == {(f"{path}/c/0.png", "no image that Pillow can read")}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n, broken, stops", [
    (300, 3, False), (300, 4, True), (20, 1, False), (20, 2, True)])
def test_more_than_one_percent_of_broken_files_stop_the_run(
        n, broken, stops, workers, tmp_path, capfd):
    write_images(tmp_path, n)
    broken_paths = sorted(tmp_path.rglob("*.png"))[:broken]
    for path in broken_paths:
        path.write_bytes(b"broken")

    run = batches(open_data(str(tmp_path), 8), 20, 20, workers=workers, stop=n // 20)

    if stops:
        message = rf"^--data has {broken} broken images of {n}.*at most 1%"
        with pytest.raises(ValueError, match=message):
            list(run)
    else:
        assert len(list(run)) == n // 20
    pattern = r"broken image (\d+), replaced by another: (.*) \("
    reported = re.findall(pattern, capfd.readouterr().err)
    assert [int(count) for count, _ in reported] == list(range(1, broken + 1))
    assert {path for _, path in reported} == {str(path) for path in broken_paths}


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_files_is_an_error_and_no_endless_search(workers, tmp_path):
    for i in range(3000):
        (tmp_path / f"{i}.jpg").write_bytes(b"<html>")
    data = open_data(str(tmp_path), 8)
    with pytest.raises(ValueError, match=r"^--data has \d+ broken images"):
        next(batches(data, 1, 1, workers=workers))
    with pytest.raises(ValueError, match="10 broken images in a row"):
        data[0]


# ---------------------------------------------------------------- errors of the user
def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data .*/nowhere does not exist; give shapes"):
        open_data(f"{tmp_path}/nowhere", 8)
    with pytest.raises(FileNotFoundError, match="shape does not exist"):
        open_data(["a=shape:1", "b=shapes:1"], 8)


def test_empty_folder_and_tar_without_images(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    message = r"--data .*folder must hold images, .jpg or .png; it holds .txt 1$"
    with pytest.raises(ValueError, match=message):
        open_data(f"{tmp_path}/folder", 8)
    without_images = write_tar(tmp_path / "a.tar", {"a.txt": b"no"})
    empty = write_tar(tmp_path / "b.tar", {})
    for path in (without_images, empty):
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


def test_what_follows_a_tar_is_not_dropped(tmp_path):
    first = Path(write_tar(tmp_path / "a.tar", {"a/0.png": plain_image()})).read_bytes()
    second = Path(write_tar(tmp_path / "b.tar", {"b/1.png": plain_image()})).read_bytes()
    (tmp_path / "both.tar").write_bytes(first + second)
    with pytest.raises(ValueError, match="bytes follow its end, such as a second tar; split it"):
        open_data(str(tmp_path / "both.tar"), 8)
    (tmp_path / "padded.tar").write_bytes(first + bytes(100_000))
    assert len(open_data(str(tmp_path / "padded.tar"), 8)) == 1


@pytest.mark.parametrize("cut", [
    "in a header", "in a file", "in a later header", "between two files", "before the end mark",
    "in the end mark"])
def test_truncated_tars(cut, tmp_path):
    files = {f"c/{i}.png": plain_image() for i in range(4)}
    whole = Path(write_tar(tmp_path / "whole.tar", files))
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
    blocks = -(-members[-1].size // 512)          # of the last file, rounded up
    end_mark = members[-1].offset_data + 512 * blocks
    size = {"in a header": 40, "in a file": 512 + 40, "in a later header": 2 * 512 + 100,
            "between two files": members[2].offset, "before the end mark": end_mark,
            "in the end mark": end_mark + 7}[cut]
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:size])
    assert path.stat().st_size < whole.stat().st_size

    with pytest.raises(ValueError, match=r"--data .*cut\.tar: .* whole and uncompressed"):
        open_data(str(path), 8)


@pytest.mark.parametrize("mode, name, command", [
    ("w:gz", "a.tar.gz", "gunzip"), ("w:bz2", "a.tar", "bunzip2"), ("w:xz", "a.tar.xz", "unxz")])
def test_compressed_tars_are_to_be_decompressed(mode, name, command, tmp_path):
    files = {f"c/{i}.png": plain_image() for i in range(4)}
    path = write_tar(tmp_path / name, files, mode)
    with pytest.raises(ValueError, match=rf"--data {path}: .* by: {command} < {path} > images.tar"):
        open_data(path, 8)
    (tmp_path / "one.png").write_bytes(plain_image())
    with pytest.raises(ValueError, match=r"one\.png.*tar"):
        open_data(f"{tmp_path}/one.png", 8)


@pytest.mark.parametrize("name, content, command", [
    ("a.npy", b"\x93NUMPY", "mkdir images; python -c "), ("a.npz", b"PK\x03\x04", "mkdir images; "),
    ("a.zip", b"PK\x03\x04", "python -m zipfile -e "), ("a.tgz", b"\x1f\x8b", "gunzip < "),
    ("a.parquet", b"PAR1", 'python -c "import os, datasets; '),
    ("a.arrow", b"\xff\xff\xff\xff", 'python -c "import os, datasets; '),
    ("data", b"PAR1", 'python -c "import os, datasets; '),
    ("folder/data-0.arrow", b"", 'python -c "import os, datasets; .*load_from_disk'),
    ("folder/train-0.parquet", b"", "python -c .*load_dataset")])
def test_other_kinds_of_files_get_a_command_that_converts_them(name, content, command, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if "/" in name:
        path = path.parent
    with pytest.raises(ValueError, match=f"^--data {path}.* by: {command}"):
        open_data(str(path), 8)


def test_the_command_for_arrays_makes_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels / 255)
    with pytest.raises(ValueError) as error:
        open_data(f"{tmp_path}/a.npz", 8)
    command = str(error.value).split(" by: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    data = open_data(f"{tmp_path}/images", None)
    loaded = {data[k]["image"].permute(1, 2, 0).numpy().tobytes() for k in range(3)}
    assert loaded == {image.tobytes() for image in pixels}


@pytest.mark.parametrize("spec, message", [
    ("", "--data is empty, as if by a variable that is not set"), ("  ", "--data is empty"),
    ("a=:1", "must be name=PATH:weight"), ("/dev/zero", "is a pipe or a device"),
    ("x-{0..99999999999}.tar", "100,000,000,000 files; at most 1,000,000"),
    ("a=shapes:" + "9" * 400, "must be name=PATH:weight"), ("x" * 300, "File name too long")])
def test_specs_that_make_no_sense(spec, message):
    with pytest.raises((ValueError, OSError), match=message):
        open_data(spec, 8)


def test_names_that_are_no_text(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    latin_1 = os.fsencode(flat) + b"/caf\xe9.png"
    Path(os.fsdecode(latin_1)).write_bytes(plain_image())
    (flat / "two\nlines.png").write_bytes(b"broken")
    (flat / "two\nlines.heic").write_bytes(b"")
    (flat / "two\nlines").write_bytes(b"")
    data = open_data(str(flat), 8)
    names = {name for k in range(2) for name, _ in data[k]["broken"]}
    assert names == {repr(f"{flat}/two\nlines.png")}
    assert data.describe().isprintable() or data.describe().count("\n") == 1

    class_folder = os.fsdecode(os.fsencode(tmp_path) + b"/set/caf\xe9")
    write_images(Path(class_folder), 1, classes=0)
    with pytest.raises(ValueError, match="the class name 'caf.udce9' is no UTF-8.*; rename it"):
        open_data(f"{tmp_path}/set", 8)


@pytest.mark.parametrize("weight", ["-1", "0", "x", "", "nan", "inf", "1.2.3"])
def test_weights_must_be_positive_numbers(weight, folder):
    message = rf"--data a={folder}:{weight} must be name=PATH:weight.* above 0"
    with pytest.raises(ValueError, match=message):
        open_data([f"a={folder}:{weight}", "b=shapes:1"], 8)


def test_mixtures_need_names_and_weights(folder):
    with pytest.raises(ValueError, match="must be name=PATH:weight"):
        open_data([f"a={folder}", "b=shapes:1"], 8)
    with pytest.raises(ValueError, match="all must be name=PATH:weight or none"):
        open_data([folder, "b=shapes:1"], 8)
    with pytest.raises(ValueError, match="the same for a name"):
        open_data([f"a={folder}:1", "a=shapes:2"], 8)
    with pytest.raises(ValueError, match="shapes and text stand alone.* b=shapes:0.5"):
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
    check_batch(data, 48)
    message = "--batch 64 must be at most the 48 images of --data"
    with pytest.raises(ValueError, match=message):
        check_batch(data, 64)
    with pytest.raises(ValueError, match=message):
        batches(data, 64, 16)
    message = "--batch 48 must be a multiple of --micro_batch 5 x 2 processes"
    with pytest.raises(ValueError, match=message):
        batches(data, 48, 5, world=2)


@pytest.mark.parametrize("extra, message", [
    ({"0.cls": b"cat"}, "0.png.*cat.*integer >= 0"),
    ({"0.cls": b"1.5"}, "integer"),
    ({"0.cls": b"-1"}, "label -1.*integer"),
    ({"0.cls": b""}, "0.png invalid literal"),
    ({"0.json": b'{"label": [1]}'}, "label .1"),
    ({"0.json": b'{"label": true}'}, "label True"),
    ({"0.json": b'{"label": " "}'}, "label ' ' must be .* a name"),
    ({"0.json": b'{"label": "a\\nb"}'}, "1.png has None|class name"),
    ({"0.json": b"[" * 100_000}, "0.png is nested too deeply"),
    ({"0.txt": bytes(2**20 + 1)}, "0.png has 0.txt, which has 1,048,577 bytes, more than"),
    ({"0.json": b"{"}, "0.png.*json"),
    ({"0.json": b"[1]"}, "0.png.*json"),
    ({"0.json": b'{"caption": 3}'}, "0.png"),
    ({"0.txt": b"\xff\xfe"}, "0.png.*utf-8"),
    ({"0.cls": b"0"}, "0.png has 0.* 1.png has None|1.png has None"),
    ({"0.cls": b"0", "1.json": b'{"label": "cat"}'}, "0.png has 0, but 1.png has 'cat'"),
    ({"0.cls": b"0", "1.cls": b"1", "ant/2.png": plain_image()}, "ant/2.png has 'ant'")])
def test_labels_that_make_no_sense(extra, message, tmp_path):
    files = {"0.png": plain_image(), "1.png": plain_image(), **extra}
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=f"(?i)--data {path}: .*({message})"):
        open_data(path, 8)


def test_folder_with_and_without_classes(tmp_path):
    write_images(tmp_path, 3, classes=0)
    write_images(tmp_path, 3, classes=1)
    with pytest.raises(ValueError, match=r"several depths \(0000.png, c0/0000.png\), but class"):
        open_data(str(tmp_path), 8)


# ---------------------------------------------------------------- images to be measured
def test_threads_load_images_in_their_order_and_of_their_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "cores_of_process", lambda: 8)
    write_images(tmp_path, 24, classes=0)
    data = open_data(str(tmp_path), 8)
    numbers = list(range(20, 80)) + list(range(10))               # of four epochs
    expected = torch.stack([data[k]["image"] for k in numbers]).permute(0, 2, 3, 1)
    for _ in range(5):
        assert torch.equal(load_images(data, numbers), expected)


def test_load_images_refuses_broken_and_unequal_ones(tmp_path):
    write_images(tmp_path / "whole", 4, size=(8, 8))
    write_images(tmp_path / "unequal", 2, size=(8, 8))
    write_images(tmp_path / "unequal" / "wide", 2, classes=0, size=(9, 8))
    write_images(tmp_path / "broken", 4)
    path = tmp_path / "broken" / "c0" / "0002.png"
    path.write_bytes(b"broken")

    data = open_data(str(tmp_path / "whole"), None)
    images = load_images(data, range(4))
    assert images.shape == (4, 8, 8, 3) and images.dtype == torch.uint8
    for k in range(4):
        assert images[k].permute(2, 0, 1).equal(data[k]["image"])
    with pytest.raises(ValueError, match="images of different sizes.*--size centre-crops"):
        load_images(open_data(str(tmp_path / "unequal"), None), range(4))
    assert len(load_images(open_data(str(tmp_path / "unequal"), 8), range(4))) == 4
    with pytest.raises(ValueError, match=f"broken images can't be measured: {path}; remove"):
        load_images(open_data(str(tmp_path / "broken"), 8), range(4))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_uint8_or_of_floats(save, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    save(tmp_path / "uint8.npz", pixels)
    save(tmp_path / "float.npz", mu=np.zeros(3), arr_0=(pixels / 255).astype(np.float32))
    for name in ("uint8.npz", "float.npz"):
        path = str(tmp_path / name)
        assert Arrays.contains_images(path)
        data = Arrays(path)
        assert len(data) == 5
        assert np.array_equal(load_images(data, [3, 0]), pixels[[3, 0]])
        assert data.source_of(3) == 0 and not data.is_built_in(0) and not data.is_shapes


def npy_header(descr, shape, fortran_order=False, version=1):
    """The header of an .npy file, padded to 64 bytes."""
    fields = repr(dict(descr=descr, fortran_order=fortran_order, shape=shape)).encode()
    length_format, start = ("<H", 10) if version == 1 else ("<I", 12)
    fields += b" " * (-(len(fields) + start + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(length_format, len(fields)) + fields


def write_npz(path, content, compression=zipfile.ZIP_STORED):
    """Write an .npz whose arr_0.npy has any content."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
    return str(path)


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_arrays_of_any_order_and_version(compression, tmp_path):
    contents = []
    for version in (1, 2, 3):
        contents.append(npy_header("|u1", PIXELS.shape, version=version) + PIXELS.tobytes())
    contents.append(npy_header("|u1", PIXELS.shape, fortran_order=True) + PIXELS.tobytes("F"))
    for dtype in (">f4", "<f8", ">f8"):
        contents.append(npy_header(dtype, PIXELS.shape) + (PIXELS / 255).astype(dtype).tobytes())
    for i, content in enumerate(contents):
        path = write_npz(tmp_path / f"{i}.npz", content, compression)
        assert np.array_equal(load_images(Arrays(path), range(3)), PIXELS), i


@pytest.mark.parametrize("compression", COMPRESSIONS[:2])
@pytest.mark.parametrize("descr, shape", [
    ("|u1", (-3, 4, 5, 3)), ("|u1", (0, 4, 5, 3)), ("|u1", (3, 0, 5, 3)), ("|u1", (-3, -4, 5, 3)),
    ("|O", (3, 4, 5, 3)), ("<U5", (3, 4, 5, 3)), ("|b1", (3, 4, 5, 3)), ("<i4", (3, 4, 5, 3)),
    ([("a", "|u1")], (3, 4, 5, 3)), ("|u1", (3, 4, 5)), ("|u1", (3, 4, 5, 4)), ("|u1", ()),
    ("|u1", (2**40, 2**30, 5, 3)), ("<f4", (3, 4, 5, 3)), ("|u1", (3.0, 4, 5, 3)), ("?!", (3,))])
def test_arrays_that_are_no_images(descr, shape, compression, tmp_path):
    content = npy_header(descr, shape) + PIXELS.tobytes()
    path = write_npz(tmp_path / "a.npz", content, compression)
    with pytest.raises(ValueError, match=f"^{path} (has arr_0 of .*; images are|is damaged)"):
        Arrays(path)


def test_damaged_arrays(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "whole.npz", noise)
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "damaged.npz"
    for damaged in (whole[:5000] + b"?" + whole[5001:],           # another byte
                    whole[:5000] + bytes(2000) + whole[7000:],    # other bytes
                    whole[:5000] + whole[6000:],                  # some missing
                    whole[:40] + bytes(20) + whole[60:],
                    whole[:-30], whole[:5000], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{path} is (damaged|no whole .npz)"):
            Arrays(str(path))


@pytest.mark.parametrize("header", [
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4, 5, 3 }", b"{[]: 1}", b"{'a' 1}",
    b"-" * 9000 + b"1", b"(" * 9000, b"\xff\xfe", b"[]"])
def test_damaged_headers_of_arrays(header, tmp_path):
    content = b"\x93NUMPY\x02\0" + len(header).to_bytes(4, "little") + header
    for compression in COMPRESSIONS[:2]:
        path = write_npz(tmp_path / "a.npz", content + PIXELS.tobytes(), compression)
        with pytest.raises(ValueError, match=rf"^{path} is damaged \(.+\); write it again"):
            Arrays(path)


def test_headers_of_arrays_are_bounded(tmp_path):
    content = b"\x93NUMPY\x02\0" + (3 * 10**9).to_bytes(4, "little") + b" " * 10**6
    path = write_npz(tmp_path / "a.npz", content, COMPRESSIONS[1])
    with pytest.raises(ValueError, match="is damaged .its header has 3,000,000,000 bytes"):
        Arrays(path)


def test_compressed_arrays_are_bounded_by_memory(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", PIXELS)
    monkeypatch.setattr(data_module, "memory_of_machine", lambda: 2 * PIXELS.size)
    assert len(Arrays(str(tmp_path / "a.npz"))) == 3
    monkeypatch.setattr(data_module, "memory_of_machine", lambda: 2 * PIXELS.size - 2)
    with pytest.raises(ValueError, match="of which at most .* can be read; save them by np.savez,"):
        Arrays(str(tmp_path / "a.npz"))


def test_arrays_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    data = Arrays(str(tmp_path / "a.npz"))
    assert data.describe() == f"data {tmp_path}/a.npz: 3 images of 5 x 4"
    assert data.summary() == {"images": {"data": f"{tmp_path}/a.npz", "images": 3, "height": 4,
                                         "width": 5}}


def test_npz_that_holds_no_images(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    np.savez(tmp_path / "grey.npz", np.zeros((5, 6, 7), np.uint8))
    np.savez(tmp_path / "int.npz", np.zeros((5, 6, 7, 3), np.int32))
    np.savez(tmp_path / "range.npz", np.full((5, 6, 7, 3), 200.0))
    np.savez(tmp_path / "nan.npz", np.full((5, 6, 7, 3), np.nan))
    (tmp_path / "text.npz").write_text("no zip")

    for name in ("statistics.npz", "text.npz"):
        path = str(tmp_path / name)
        assert not Arrays.contains_images(path)
        with pytest.raises(ValueError, match=f"{name} is no whole .npz of arr_0"):
            Arrays(path)
    for name in ("grey.npz", "int.npz"):
        with pytest.raises(ValueError, match=f"{name} has arr_0 of .*images are n H W 3"):
            Arrays(str(tmp_path / name))
    for name in ("range.npz", "nan.npz"):
        with pytest.raises(ValueError, match=r"has floats of .*; scale them to \[0,1\]"):
            Arrays(str(tmp_path / name))[0]


# ---------------------------------------------------------------- what eats the machine
EATERS = """
import json, os, resource, sys
from functools import partial
from PIL import Image
sys.path.insert(0, {root!r})
from data import Arrays, open_data
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))

def first_pixel(path):
    return open_data(path, 256)[0]["image"][:, 0, 0].tolist()

def broken(path):
    data = open_data(path, 8)
    return dict(pair for k in range(3) for pair in data[k]["broken"])

for name, attempt in [
        ("thin", partial(first_pixel, "thin")),
        ("broken", partial(broken, "broken")),
        ("pipes.jsonl", partial(broken, "pipes.jsonl")),
        ("texts", partial(open_data, "texts", 8, chat=print)),
        ("label", lambda: open_data("label.tar", 8).num_classes),
        *[(path, partial(open_data, path, 8)) for path in
          ("deep.jsonl", "large.json", "line.jsonl", "pipe.tar", "pipe.jsonl", "size.tar",
           "negative.tar", "chain.tar", "name.tar")],
        ("bomb.npz", partial(Arrays, "bomb.npz")), ("lie.npz", partial(Arrays, "lie.npz"))]:
    try:
        result = attempt()
    except (ValueError, OSError) as error:
        result = str(error)
    print(json.dumps([name, result]), flush=True)
print(json.dumps(["megabytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]))
"""


def sparse_file(path, start=b"", size=10 * 2**40):
    """A file of `size` bytes that are not stored, all zeros after the start."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def tar_header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


def write_eaters(folder):
    """Write small files, each of which would take gigabytes or hang."""
    for name in ("thin", "broken", "texts"):
        (folder / name).mkdir()
    thin = Image.new("RGB", (1, 30_000), (200, 30, 60))
    thin.save(folder / "thin" / "0.png")
    write_images(folder / "broken", 1, classes=0)
    size = struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size) + png_chunk(b"IDAT", b"")
    (folder / "broken" / "bomb.png").write_bytes(bomb)
    sparse_file(folder / "broken" / "sparse.png")
    records = [{"image": name} for name in ("pipe.tar", "/dev/zero", "broken/0000.png")]
    (folder / "pipes.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_images(folder / "texts", 1, classes=0)
    sparse_file(folder / "texts" / "0000.txt")
    labelled_tar(folder / "label.tar", [9_999_999_999])
    (folder / "deep.jsonl").write_text('{"image":' * 1_000_000)
    sparse_file(folder / "large.json", b"[", 3 * 2**30)
    sparse_file(folder / "line.jsonl")
    os.mkfifo(folder / "pipe.tar")
    os.mkfifo(folder / "pipe.jsonl")
    image = plain_image() + bytes(-len(plain_image()) % 512)
    (folder / "size.tar").write_bytes(tar_header("0.png", 2**40) + image + bytes(1024))
    negative = tar_header("0.png", -1024) + tar_header("1.png", 0) + bytes(1024)
    (folder / "negative.tar").write_bytes(negative)
    chain = (tar_header("x", 4, tarfile.GNUTYPE_LONGNAME) + b"name" + bytes(508)) * 5000
    (folder / "chain.tar").write_bytes(chain + bytes(1024))
    sparse_file(folder / "name.tar", tar_header("x", 10 * 2**40, tarfile.GNUTYPE_LONGNAME))
    lie = npy_header("|u1", (10**6, 100, 100, 3))
    write_npz(folder / "lie.npz", lie, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("arr_0.npy", "w", force_zip64=True) as file:
        file.write(npy_header("|u1", (20, 4096, 4096, 3)))        # 1 GB in 1 MB
        for _ in range(60):
            file.write(bytes(4096 * 4096))


def test_small_inputs_take_neither_the_memory_nor_the_time_of_the_machine(tmp_path):
    write_eaters(tmp_path)
    script = EATERS.format(root=str(Path(__file__).parents[1]))
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                         text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    results = dict(json.loads(line) for line in run.stdout.splitlines())

    assert results["thin"] == [200, 30, 60]
    assert results["label"] == 1
    assert results["broken"].keys() == {"broken/bomb.png", "broken/sparse.png"}
    assert results["pipes.jsonl"] == {"pipe.tar": "is no regular file",
                                      "/dev/zero": "is no regular file"}
    for name, message in {
            "texts": "0000.png has 0000.txt, which has 10,995,116,277,760 bytes, more than",
            "deep.jsonl": "line 1 is nested too deeply", "large.json": "make it a .jsonl: jq -c",
            "line.jsonl": "line 1 has over", "pipe.tar": "is a pipe", "pipe.jsonl": "is a pipe",
            "size.tar": "whole", "negative.tar": "whole", "chain.tar": "whole", "name.tar": "whole",
            "lie.npz": "is damaged", "bomb.npz": "which are no images; save them"}.items():
        assert message in results[name], results[name]
    assert results["megabytes"] < 2000


# ---------------------------------------------------------------- processes
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
    request.addfinalizer(run.kill)                # it would run without end
    assert run.stdout.readline() == "ready\n"

    started = time.time()
    if code == -2:
        time.sleep(0.3)
        os.killpg(run.pid, signal.SIGINT)         # Ctrl-C reaches all processes
    errors = run.communicate(timeout=60)[1]

    assert run.returncode == code and time.time() - started < 4, errors
    assert errors.count("Traceback") == 1, errors                 # none from the workers
    with pytest.raises(ProcessLookupError):       # no worker is left
        os.killpg(run.pid, 0)


def test_workers_end_with_a_trainer_that_is_killed(tmp_path, request):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[1]), then="pass"))
    run = subprocess.Popen([sys.executable, script], text=True, start_new_session=True,
                           stdout=subprocess.PIPE)
    request.addfinalizer(run.kill)
    assert run.stdout.readline() == "ready\n"

    run.kill()

    run.wait()
    for _ in range(100):                          # a worker looks for its trainer once a second
        time.sleep(0.1)
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
    pytest.fail("a worker is left behind")


def workers_of(run):
    """Start a run of batches, and return the processes that load its images."""
    before = set(multiprocessing.active_children())
    next(run)
    return set(multiprocessing.active_children()) - before


def test_a_worker_that_is_killed_is_reported():
    for _ in range(2):                            # the second run finds the handler of the first
        run = batches(open_data("shapes", 64), 8, 8, workers=2)
        worker, _ = workers_of(run)
        with pytest.raises(ValueError, match="^a process that loads images has died .*Killed.*;"
                                             " if memory ran out, lower --workers"):
            worker.kill()
            time.sleep(10)                        # the error comes wherever the run is
        run.close()


def test_a_worker_that_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(data_module, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr(data_module, "SECONDS_OF_IMAGE", 0)
    run = batches(open_data("shapes", 64), 8, 8, workers=2)
    workers = workers_of(run)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="^the processes that load images were silent for 1 s;"):
        list(run)
    assert not any(worker.is_alive() for worker in workers)


def test_an_error_of_the_code_keeps_its_traceback():
    def divide(scene, rng):
        return 1 // 0
    run = batches(open_data("shapes", 16, chat=divide), 8, 8, workers=1)
    with pytest.raises(ZeroDivisionError, match=r"Original Traceback[\s\S]*in divide"):
        next(run)


def say_handlers(scene, rng):
    """A conversation that holds how the process that makes it handles signals."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    return [("user", [signal.getsignal(number) for number in signals])]


def test_workers_leave_signals_to_the_main_process(monkeypatch):
    before = {}
    for number in (signal.SIGTERM, signal.SIGUSR1):               # as a trainer has them
        before[number] = signal.signal(number, lambda *_: None)
    (_, _, _, _, texts), = batches(open_data("shapes", 16, chat=say_handlers), 1, 1,
                                   workers=1, stop=1)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert texts == [[("user", [signal.SIG_IGN, signal.SIG_DFL, signal.SIG_IGN])]]


@pytest.mark.parametrize("workers, for_each", [(0, None), (1, 5), (3, 3), (8, 2)])
def test_workers_have_the_micro_batches_of_a_step_ready(workers, for_each, monkeypatch):
    options = {}

    def record_options(*args, **given):
        options.update(given)

    monkeypatch.setattr(data_module, "DataLoader", record_options)
    batches(open_data("shapes", 16), batch=8, micro_batch=2, workers=workers)
    assert options["prefetch_factor"] == for_each


def say_number_of_threads(scene, rng):
    """A conversation that holds the number of torch's threads in the process that makes it."""
    return [("user", torch.get_num_threads())]


def test_workers_compute_on_one_thread_and_start_after_torch_has_used_its_own():
    one_thread = [("user", 1)]
    started = time.time()
    for _ in range(3):
        x = torch.randn(300, 300, requires_grad=True) @ torch.randn(300, 300)
        x.square().sum().backward()
        data = open_data("shapes", 16, chat=say_number_of_threads)
        texts = [x[4] for x in batches(data, 4, 2, workers=2, stop=1)]
        assert texts == [[one_thread, one_thread], [one_thread, one_thread]]
    assert time.time() - started < 10


def test_data_can_be_pickled_for_systems_that_spawn_workers(folder):
    data = open_data([f"a={folder}:1", "b=shapes:1"], 16)
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert all(copy[k]["image"].equal(data[k]["image"]) for k in range(10))


@pytest.mark.parametrize("platform, context", [
    ("linux", "fork"), ("darwin", None), ("win32", None)])
def test_workers_are_forked_on_linux_alone(platform, context, monkeypatch):
    options = {}
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("data.DataLoader", lambda *_, **given: options.update(given))
    batches(open_data("shapes", 16), 4, 4, workers=1)
    assert options["multiprocessing_context"] == context


def test_workers_start_without_what_windows_lacks(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.delattr(os, "setpgrp")
    monkeypatch.delattr(signal, "SIGUSR1")
    start_worker(os.getppid(), 0)
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}


# ---------------------------------------------------------------- real photographs
def test_cifar():
    path = SHARED / "cifar10_train_20000.tar"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = open_data(str(path), 64, crop="random", flip=True, hold_out=500)
    val = open_data(str(path), 64, split="val", hold_out=500)
    assert len(data) == 19_500 and len(val) == 500
    assert data.num_classes == 10 and data.class_names[:2] == ["airplane", "automobile"]
    for _, _, images, labels, _ in batches(data, 64, 32, workers=2, stop=3):
        assert images.shape == (32, 3, 64, 64) and len(labels.unique()) > 3
    assert len({val[k]["label"] for k in range(100)}) == 10


def test_imagenet():
    path = SHARED / "imagenet_1000x1_256px.tar"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    data = open_data(str(path), 256, crop="random")
    assert len(data) == 1000 and data.num_classes == 1000
    assert data.class_names[0] == "n01440764_tench"
    (_, _, images, _, _), = batches(data, 16, 16, workers=0, stop=1)
    assert images.shape == (16, 3, 256, 256) and 60 < images.float().mean() < 180

    centred = open_data(str(path), 256)
    name = data.class_names[data[3]["label"]]
    with tarfile.open(path) as archive:
        stored = Image.open(archive.extractfile(f"{name}/0.jpg")).convert("RGB")
    # The file is 256 px already.
    assert np.array_equal(centred[3]["image"].permute(1, 2, 0), np.asarray(stored))
