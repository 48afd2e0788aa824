"""Images and texts in, resumable batches out.

    data = open_data(["a=photos/faces:0.7", "b=birds-{000..012}.tar:0.3"], size=256, crop="random")
    for step, micro, images, labels, texts in batches(data, batch=64, micro_batch=16):
        ...

--data names one source, or several as name=PATH:weight:
    shapes, text   the built-in worlds, rendered when an image is needed
    a folder       class/name.jpg, or name.jpg without labels; stage 3 also reads name.txt, .json
    x.tar          the same, or name.jpg beside name.cls, name.txt or name.json; uncompressed
    x.jsonl        one record a line: {"image": path, "caption": text, "label": class, ...}; a .json
                   of one array of records is read, too
What is read, and what is passed over and why, is told by data.describe(); see listing.py. What was
listed is kept for the next start; see index.py.

Image k is a function of (seed, k) for any number of processes and workers, so resuming a run means
starting at a later k; order.py says which it is.
"""
import collections
import contextlib
import functools
import hashlib
import io
import itertools
import lzma
import math
import multiprocessing
import os
import re
import reprlib
import signal
import struct
import sys
import threading
import time
import tokenize
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, get_worker_info

from index import open_tables
from listing import PassedOver, describe_passed_over, read_bytes, shown
from order import EpochOrder, split_images
from runtime import cores_of_process, one_line, stop_request, world_size
from shapes import CLASSES, Scene, Text

SHAPES_EPOCH = 1_000_000   # the built-in worlds never end; this many of their images are an epoch
SHAPES_VAL = 2**40         # number of the first held-out scene; no training run gets that far
PERIOD = 1000              # a mixture repeats its order of sources; weights are exact to 0.1%
SHARDS = 1_000_000         # of a range; at the usual thousand images a shard, a billion images
TRIES = 10                 # with 1% of the files broken, ten in a row happen once in 1e20 images
THIN = 10                  # longer side / shorter side; panoramas have less
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262           # tags of TIFF
# Pillow warns of damaged metadata, and of images of over 89 million pixels. It refuses those of
# over 179 million, which would take half a gigabyte as RGB.
warnings.filterwarnings("ignore", module="PIL")
SAVE_UNCOMPRESSED = "save them by np.savez, which are read in place"
BLACK = Image.new("RGB", (1, 1))      # the image of a conversation that has none
# Seconds until a worker that yields nothing counts as hanging. A micro-batch takes seconds, over a
# slow network perhaps a minute, and two minutes are what a user waits without a word.
WORKER_TIMEOUT = 100
SECONDS_OF_IMAGE = 3       # at most: to load 24 megapixels on a slow or busy core
HEADER_BYTES = 10_000      # of an array; NumPy's own limit for files that are not trusted


# ---------------------------------------------------------------- images
def load_image(listed):
    """Load a ListedImage as PIL RGB. Raises: many kinds of exceptions if the file is broken"""
    if listed.path is None:
        return BLACK
    content = read_bytes(listed.path, listed.offset, listed.size)
    if content.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        raise ValueError("is a PostScript program, not pixels")   # Pillow would run it
    try:
        return to_rgb(Image.open(io.BytesIO(content)))
    except Exception:                             # Pillow's decoders raise a dozen kinds
        without_metadata = pixels_of_png(content)
        if without_metadata == content:
            raise
    return to_rgb(Image.open(io.BytesIO(without_metadata)))


def pixels_of_png(content):
    """Leave out of a PNG what is not needed for its pixels; return any other file as it is.

    Pillow refuses texts and colour profiles of over a megabyte, and checksums of them that are
    wrong. Source: the PNG specification, 5.3: length, type, data and checksum of each chunk.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept = [content[:8]]
    position = 8
    while position + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[position:position + 8])
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"):    # eXIf: orientation
            kept.append(content[position:position + 12 + size])
        position += 12 + size
    return b"".join(kept)


def to_rgb(image):
    """Convert a PIL image of any mode to upright RGB, with transparent parts over white.

    Raises: many kinds of exceptions if the file is broken
    """
    tiff_tags = getattr(image, "tag_v2", {})
    image.load()
    with contextlib.suppress(Exception):          # broken EXIF raises many kinds; pixels count
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                     # 16 or 32 bits, which convert("RGB") would clip
        image = to_8_bits(image, tiff_tags)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(image, tiff_tags):
    """Convert a PIL image of grey levels in 16 or 32 bits or in floats to mode "L".

    White is 255 or 65535 (of floats also 1), whichever is the first to hold all levels.
    Raises: ValueError if some are negative, larger, or not finite
    """
    levels = np.asarray(image).astype(np.float32)
    transparent = levels == image.info.get("transparency")
    whites = [255, 65535]
    if image.mode == "F":
        whites = [1, 255, 65535]
    elif tiff_tags.get(BITS_PER_SAMPLE) == (12,):
        whites = [4095]
    if not 0 <= levels.min() <= levels.max() <= whites[-1]:       # nan is not, either
        raise ValueError(f"has grey levels from {levels.min():.6g} to {levels.max():.6g}; store "
                         "8 or 16 bits, or floats from 0 to 1")
    white = next(white for white in whites if levels.max() <= white)
    if tiff_tags.get(PHOTOMETRIC) == 0:           # white is 0
        levels = white - levels
    levels = np.rint(levels / white * 255).astype(np.uint8)
    levels[transparent] = 255                     # over white
    return Image.fromarray(levels)


def square(image, size, rng=None):
    """Resize and crop a PIL image to size x size: its centre or, with rng, a random part of it.

    The centre crop is that of FID's reference images. Source: ADM, center_crop_arr.
    The random crop takes 2/3 of the shorter side, such as 256 of 384 pixels. Source: RAE.
    """
    if rng is None:
        shorter_side = size
        # Average 2 x 2 pixels until bicubic interpolation has less than a factor of 2 to do.
        while min(image.size) >= 2 * size:
            width, height = image.size
            image = image.resize((width // 2, height // 2), Image.BOX)
    else:
        shorter_side = round(1.5 * size)

    old_width, old_height = image.size
    width = round(old_width * shorter_side / min(image.size))
    height = round(old_height * shorter_side / min(image.size))
    if rng is None:
        left = (width - size) // 2
        top = (height - size) // 2
    else:
        left = int(rng.integers(width - size + 1))
        top = int(rng.integers(height - size + 1))
    if max(image.size) > THIN * min(image.size):
        return resize_part(image, width, height, left, top, size)
    image = image.resize((width, height), Image.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def resize_part(image, width, height, left, top, size):
    """Return a part of image.resize((width, height)), size x size, without making the rest.

    A line of 1 x 20,000 pixels would be enlarged to 256 x 5 million. The pixels are the same but
    for rounding.
    """
    box = []                                      # of the part, in pixels of a window around it
    window = []                                   # left, top, right, bottom
    for start, new, old in ((left, width, image.width), (top, height, image.height)):
        first = start * old / new
        last = (start + size) * old / new
        margin = math.ceil(2 * max(1, old / new))                 # bicubic: 2 pixels to each side
        edge = max(0, math.floor(first) - margin)
        window.append((edge, min(old, math.ceil(last) + margin)))
        box.append((first - edge, last - edge))
    image = image.crop((window[0][0], window[1][0], window[0][1], window[1][1]))
    box = (box[0][0], box[1][0], box[0][1], box[1][1])
    return image.resize((size, size), Image.BICUBIC, box)


def resize_images(images, side):
    """Resize images to side x side by antialiased bicubic interpolation.

    images: b 3 H W, in [0, 1], float
    Returns: b 3 side side, in [0, 1]
    """
    if images.shape[-1] == side:
        return images
    resized = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)                    # bicubic interpolation overshoots at edges


# ---------------------------------------------------------------- sources
# A source has class_names, labelled, its length (images in an epoch), and load(number, rng, size),
# which returns image number = 0, 1, ... without end: pixels H W 3 uint8, the name of its class or
# None, its text, and pairs (name, reason) of broken files that this image replaces. summary() says
# what it has, as a dict of JSON's types.
class SceneSource:
    """The scenes of shapes, labelled by their object if all have exactly one."""
    class_names = list(CLASSES)

    def __init__(self, seed, first, objects, conversation, skip_held_out):
        self.seed = seed
        self.first = first                        # number of the first scene
        self.objects = objects
        self.conversation = conversation
        self.skip_held_out = skip_held_out
        self.labelled = np.ravel(objects).tolist() == [1]         # 1, [1] or (1,)

    def __len__(self):
        return SHAPES_EPOCH

    def summary(self):
        return summary_of_world("shapes", self)

    def draw(self, number):
        """Return the Scene that image `number` shows."""
        scene_number = self.first + number
        scene = Scene.random(self.seed, scene_number, self.objects)
        while self.skip_held_out and scene.held_out():
            scene_number += 2 * SHAPES_VAL        # beyond the numbers of both splits
            scene = Scene.random(self.seed, scene_number, self.objects)
        return scene

    def load(self, number, rng, size):
        scene = self.draw(number)
        pixels = scene.render(size)
        text = self.conversation(scene, rng) if self.conversation else scene.caption()
        class_name = CLASSES[scene.objects[0].label]              # of several, that of the first
        return pixels, class_name, text, []


class TextSource:
    """Lines of letters, which show how much detail an autoencoder keeps."""
    class_names = ["text"]
    labelled = False

    def __init__(self, seed, first):
        self.seed = seed
        self.first = first                        # number of the first image

    def __len__(self):
        return SHAPES_EPOCH

    def summary(self):
        return summary_of_world("text", self)

    def draw(self, number):
        """Return the Text that image `number` shows."""
        return Text.random(self.seed, self.first + number)

    def load(self, number, rng, size):
        text = self.draw(number)
        return text.render(size), None, text.caption(), []


def summary_of_world(name, source):
    """The summary of a built-in world, which has as many images as are asked for."""
    classes = len(source.class_names) if source.labelled else 0
    return {"data": name, "split": "train" if source.first == 0 else "val", "images": len(source),
            "classes": classes}


class FileSource:
    """The images of folders, tars or .jsonl files, in another random order in every epoch."""

    def __init__(self, paths, split, hold_out, seed, index, crop, flip, with_conversations):
        self.tables = open_tables(paths, with_conversations)
        check_texts(self.tables, paths[0])
        self.all_images = ConcatDataset(self.tables)              # of both splits
        self.label_counts = collections.Counter()                 # without labels, of None
        for table in self.tables:
            self.label_counts.update(table.label_counts())
        self.class_names = find_class_names(self.label_counts, self.all_images, paths[0])
        self.labelled = None not in self.label_counts
        if not 0 <= hold_out < len(self.all_images):
            raise ValueError(f"--hold_out {hold_out} must be below the {len(self.all_images)} "
                             f"images of {paths[0]}; try --hold_out "
                             f"{len(self.all_images) // 10}")
        to_train_on, self.held_out = split_images(len(self.all_images), hold_out)
        if split == "train" or hold_out == 0:                     # 0: all are in both
            self.images = Subset(self.all_images, to_train_on)
        else:
            self.images = Subset(self.all_images, self.held_out)
        self.order = EpochOrder(len(self.images), seed, index)
        self.paths = paths
        self.split = split
        self.hold_out = hold_out
        self.crop = crop
        self.flip = flip
        self.with_conversations = with_conversations

    def __len__(self):
        return len(self.images)

    def summary(self):
        """What this source has and lacks; see ImageData.summary."""
        passed_over = PassedOver()
        for table in self.tables:
            passed_over.add_all(table.passed_over())
        summary = {"data": " ".join(self.paths), "split": self.split, "images": len(self.images),
                   "images_in_all": len(self.all_images), "held_out": self.hold_out,
                   "classes": len(self.class_names) if self.labelled else 0,
                   "passed_over": passed_over.summary()}
        if self.labelled:
            summary["missing_ids"] = missing_ids(self.label_counts)
        if self.labelled and self.split == "train":
            summary["classes_held_out"] = self.classes_held_out()
        return summary

    def classes_held_out(self):
        """Return the names of the classes all of whose images are held out."""
        held_out = collections.Counter(self.all_images[i].label for i in self.held_out)
        return [str(label) for label in sorted(held_out)
                if held_out[label] == self.label_counts[label]]

    def identity(self):
        """Number of images before the split; hash of their names, labels and texts in order."""
        sha1 = hashlib.sha1()
        for table in self.tables:
            sha1.update(table.text)
        return {"images": len(self.all_images), "names": sha1.hexdigest()}

    def load(self, number, rng, size):
        # What is drawn from rng, in this order: other images for broken ones, crop, flip, text.
        listed, image, broken = self.load_unbroken(self.order.index_of(number), rng, size)
        if self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)

        text = listed.texts[rng.integers(len(listed.texts))]
        if self.with_conversations:
            if isinstance(text, str):             # a caption asks for its image
                text = [("user", text), ("assistant", "<image>")]
            else:
                text = list(text)                 # a copy, which the caller may change
        class_name = None if listed.label is None else str(listed.label)
        return np.array(image), class_name, text, broken

    def load_unbroken(self, index, rng, size):
        """Load images[index] or, as long as the file is broken, a random other image.

        Returns: ListedImage, PIL RGB image, pairs (name, reason) of the broken files met
        Raises: ValueError if TRIES files in a row are broken
        """
        broken = []
        while len(broken) < TRIES:
            listed = self.images[index]
            try:
                image = load_image(listed)
                if size is not None:
                    image = square(image, size, rng if self.crop == "random" else None)
                return listed, image, broken
            except Exception as error:            # Pillow's decoders raise a dozen kinds
                broken.append((listed.full_name(), reason_of(error)))
                index = rng.integers(len(self))
        if get_worker_info() is None:
            names = sorted({name for name, _ in broken})
            raise ValueError(f"--data has {TRIES} broken images in a row ({broken[0][1]}): {names}")
        # In a worker, the error would come with a traceback of its own, so the main process raises
        # it: see ImageData.report_broken.
        unseen = BLACK if size is None else BLACK.resize((size, size))
        return listed, unseen, broken


def reason_of(error):
    """Say on one short line why an image could not be loaded."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (ValueError, OSError)):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return " ".join(reason.split())[:200]


def check_texts(tables, path):
    """Raises: ValueError if an image has no text, which only conversations need."""
    without_text = sum(table.header["without_text"] for table in tables)
    if without_text:
        table = next(table for table in tables if table.header["without_text"])
        image = table[table.header["first_without_text"]]
        first = image.full_name()
        if image.name not in first:               # the line of a .jsonl
            first += f" ({image.name})"
        raise ValueError(
            f"--data {path}: {without_text} of {sum(map(len, tables))} images have no text, "
            f"first {first}; put x.txt or x.json beside x.jpg (in .jsonl a caption), "
            "empty where it shall be unconditional")


def find_class_names(labels, images, path):
    """Return the names of the classes in the order of their ids; ["image"] if there are none."""
    if len({type(label) for label in labels}) > 1:
        examples = {type(image.label): f"{image.name} has {image.label!r}" for image in images}
        raise ValueError(
            f"--data {path}: {', but '.join(examples.values())}; give each image a class name "
            "(folder or .json), or each an integer (.cls or .json), or each none")
    if None in labels:
        return ["image"]
    unprintable = [label for label in labels if isinstance(label, str) and shown(label) != label]
    if unprintable:
        raise ValueError(f"--data {path}: the class name {shown(min(unprintable))} is no UTF-8 or "
                         "has control characters; rename it")
    return [str(label) for label in sorted(labels)]


def missing_ids(labels):
    """Name the class ids below the highest one that no image has: ["0", "4 to 9"]; at most 10."""
    missing = []
    ids = sorted(label for label in labels if isinstance(label, int))
    for before, after in itertools.pairwise([-1, *ids]):
        if after - before == 2:
            missing.append(reprlib.repr(before + 1))              # an id may have 400 digits
        elif after - before > 2:
            missing.append(f"{reprlib.repr(before + 1)} to {reprlib.repr(after - 1)}")
    if len(missing) > 10:
        missing[9:] = ["..."]
    return missing


# ---------------------------------------------------------------- specs and mixtures
def parse_specs(specs):
    """Parse --data: the paths of a single source, or name=PATH:weight of several.

    Returns: dict of name to list of paths, dict of name to weight; a single source is named ""
    """
    if isinstance(specs, str):
        specs = [specs]
    paths = {}
    weights = {}
    for spec in specs:
        name, path, weight = parse_spec(spec)
        paths.setdefault(name, []).extend(expand_range(path))
        if weights.setdefault(name, weight) != weight:
            raise ValueError(f"--data {spec}: the weight must always be the same for a name")
    if not paths or ("" in paths and len(paths) > 1):
        raise ValueError(f"--data {specs}: all must be name=PATH:weight or none")
    return paths, weights


def parse_spec(spec):
    """Split name=PATH:weight. Returns: name, path, weight; of a bare path "", path, 1."""
    if not re.match(r"[\w-]+=", spec) or os.path.exists(spec):    # paths may contain "=", too
        return "", spec, 1.0
    # Digits and a point: no sign, nan or inf.
    match = re.fullmatch(r"([\w-]+)=(.+):(\d*\.?\d+)", spec, re.DOTALL)
    if match is None or not 0 < float(match[3]) < math.inf:
        raise ValueError(f"--data {spec} must be name=PATH:weight, a number above 0")
    return match[1], match[2], float(match[3])


def expand_range(path):
    """Return the paths that a range stands for: x-{000..012}.tar is 13 of them, x.tar is one."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        return [path]
    first, last = sorted([int(match[1]), int(match[2])])
    if last - first >= SHARDS:
        raise ValueError(f"--data {path} stands for {last - first + 1:,} files; at most {SHARDS:,} "
                         "may be")
    digits = len(match[1])
    return [path.replace(match[0], f"{number:0{digits}}") for number in range(first, last + 1)]


class Mixture:
    """The source of each image: a shuffled order of PERIOD images, repeated without end."""

    def __init__(self, weights):
        values = list(weights.values())
        # Rounding where sources end, not how long they are, makes the counts add up to PERIOD.
        ends = np.cumsum([0, *values]) / sum(values) * PERIOD
        self.counts = np.diff(np.rint(ends).astype(int)).tolist()     # of each source in a period
        if not all(self.counts):
            raise ValueError(
                f"--data weights must be at least 1/{PERIOD} of their sum, not {weights}")

        order = np.repeat(np.arange(len(values)), self.counts)
        order = np.random.default_rng(0).permutation(order).tolist()
        self.turns = []                           # source, number of its earlier images in a period
        earlier = [0 for _ in values]
        for source in order:
            self.turns.append((source, earlier[source]))
            earlier[source] += 1

    def locate(self, k):
        """Return the index of the source of image k, and the number of the image within it."""
        periods, position = divmod(k, PERIOD)
        source, turn = self.turns[position]
        return source, periods * self.counts[source] + turn


# ---------------------------------------------------------------- amounts
def count_sources(specs, with_conversations=False):
    """Numbers of images of the sources of --data; of the built-in worlds, those of an epoch.

    with_conversations: as of list_images
    Raises: FileNotFoundError, ValueError, as open_data
    """
    paths, _ = parse_specs(specs)
    counts = []
    for source_paths in paths.values():
        if source_paths in (["shapes"], ["text"]):
            counts.append(SHAPES_EPOCH)
        else:
            counts.append(sum(map(len, open_tables(source_paths, with_conversations))))
    return counts


def fit_defaults(args, defaults, with_conversations=False):
    """Defaults of --batch, --hold_out and --eval_n for data that may have few images.

    args: flags, None where none was given. defaults: of the script; where its hold_out is None, as
    many images are held out as are evaluated, and at most a tenth.
    Returns: dict of the three, each at most its default
    """
    counts = count_sources(args.data or defaults["data"], with_conversations)
    n = min(counts)

    hold_out = getattr(args, "hold_out", None)
    if hold_out is None:
        hold_out = defaults["hold_out"]
    if hold_out is None and n < 4:                # at least two are evaluated, and trained on
        hold_out = 0
    elif hold_out is None:
        hold_out = args.eval_n or min(defaults["eval_n"], max(2, n // 10))
    eval_n = min(defaults["eval_n"], hold_out or n)

    to_train_on = sum(counts) - len(counts) * hold_out
    world = world_size()
    batch = min(defaults["batch"], max(1, to_train_on))
    batch = max(world, batch // world * world)
    return dict(batch=batch, hold_out=hold_out, eval_n=eval_n)


def check_amounts(specs, batch, hold_out=0, eval_n=0, with_conversations=False):
    """Check that --data has enough images for the other flags. eval_n: 0 without evaluations.

    Raises: ValueError that names all flags which are too large
    """
    counts = count_sources(specs, with_conversations)
    n = min(counts)
    to_train_on = sum(counts) - len(counts) * hold_out
    problems = []
    if hold_out >= n and hold_out == eval_n:
        problems.append(f"--hold_out {hold_out} must be below {n} (if it is not given, "
                        f"train_decoder.py takes that of --eval_n)")
    elif hold_out >= n:
        problems.append(f"--hold_out {hold_out} must be below {n}")
    elif batch > to_train_on:
        problems.append(f"--batch {batch} must be at most the {to_train_on} to train on")
    if eval_n == 1:
        problems.append(f"--eval_n 1 must be at least 2; give --hold_out {max(2, hold_out)}")
    if eval_n > (hold_out or n):
        problems.append(f"--eval_n {eval_n} must be at most the {hold_out or n} held out")
    if problems:
        raise ValueError(f"--data {' '.join(specs)} has {n} images: {'; '.join(problems)}")


# ---------------------------------------------------------------- data
def open_data(specs, size, seed=0, crop="centre", flip=False, split="train", hold_out=0,
              objects=(1, 2, 3, 4), chat=None):
    """List and check the images that --data names.

    specs: shapes, text, a folder, .tar shards or .jsonl; or several name=PATH:weight
    size: side in pixels; None: images stay as they are
    seed: of the order, crops and flips of training; validation is the same for every seed
    crop: centre or random
    flip: whether to mirror half of the images, drawn at random
    split: train or val
    hold_out: images of each source that are in val, not in train; 0: all are in both
    objects: number of objects in a scene of shapes, or a tuple of numbers to draw from
    chat: function (scene, rng) -> [(role, text), ...] about a scene of shapes. If given,
        the texts of files are conversations, too, and labels are ignored. None: captions
    Returns: ImageData
    Raises: FileNotFoundError, ValueError
    """
    paths, weights = parse_specs(specs)
    if split == "train":
        first = 0
    else:                                         # the same images for every run
        first = SHAPES_VAL
        seed = 0
    # Stage 3, which has conversations, is tested on combinations of objects it never trains on.
    skip_held_out = split == "train" and chat is not None

    sources = []
    for index, source_paths in enumerate(paths.values()):
        if source_paths == ["shapes"]:
            source = SceneSource(seed, first, objects, chat, skip_held_out)
        elif source_paths == ["text"]:
            if chat:
                raise ValueError("--data text has no conversations; it is for train_decoder.py")
            source = TextSource(seed, first)
        else:
            source = FileSource(source_paths, split, hold_out, seed, index, crop, flip,
                                with_conversations=chat is not None)
        sources.append(source)
    return ImageData(sources, weights, size, seed)


class ImageData(Dataset):
    """The images of one or more sources, data[k] for k = 0, 1, ... without end; see open_data.

    data[k] is a dict of
        image: 3 H W, uint8
        text: caption, or conversation [(role, text), ...] with roles "user" and "assistant"
        label: class id; 0 if there are no labels
        number: k
        broken: pairs (name, reason) of broken files that this image replaces
    len(data) is the number of images in an epoch of each source.
    """

    def __init__(self, sources, weights, size, seed):
        self.sources = sources
        self.domains = list(weights)              # names of the sources
        self.mixture = Mixture(weights)
        self.size = size
        self.seed = seed
        self.broken_names = [set() for _ in sources]              # of files, met so far

        # A mixture is labelled only if all its sources are; it then has the classes of all.
        self.labelled = all(source.labelled for source in sources)
        if len(sources) == 1:
            self.class_names = list(sources[0].class_names)
        elif self.labelled:
            self.class_names = sorted({name for source in sources for name in source.class_names})
        else:
            self.class_names = ["image"]
        self.num_classes = len(self.class_names) if self.labelled else 1
        self.class_ids = {name: i for i, name in enumerate(self.class_names)}

    def __len__(self):
        return sum(self.source_lengths)

    def __getitem__(self, k):
        index, number = self.mixture.locate(k)
        rng = np.random.default_rng((self.seed, k, 0))
        pixels, class_name, text, broken = self.sources[index].load(number, rng, self.size)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        label = self.class_ids.get(class_name, 0)
        return dict(image=image, text=text, label=label, number=k, broken=broken)

    def summary(self):
        """What is read and what is not, for a log.

        Returns: dict of the name of each source to a dict of JSON's types
            data, split, images (in this split), classes (0: no labels); of files also
            images_in_all, held_out, passed_over {reason: {"count": n, "first": name}}, and, with
            labels, missing_ids (below the highest one), and in the split that is trained on
            classes_held_out, of which it has no image
        """
        return {name: source.summary()
                for name, source in zip(self.domains, self.sources, strict=True)}

    def describe(self):
        """Return the summary as text, one or a few lines for each source."""
        return "\n".join(describe_source(name, summary)
                         for name, summary in self.summary().items())

    def identity(self):
        """What must be the same when a run goes on: {name of a source: {"images", "names"}}.

        images is the number of the whole source, before the split, and names a hash of the names
        and labels in their order. Sources that are no files are left out.
        """
        identity = {}
        for name, source in zip(self.domains, self.sources, strict=True):
            if isinstance(source, FileSource):
                identity[name] = source.identity()
        return identity

    @property
    def source_lengths(self):
        """Number of images of each source in this split."""
        return [len(source) for source in self.sources]

    @property
    def is_shapes(self):
        """True if the classes are those of shapes."""
        return self.class_names == list(CLASSES)

    def is_built_in(self, source_index):
        """True if a source is shapes or text, of which it is known what each image shows."""
        return not isinstance(self.sources[source_index], FileSource)

    def source_of(self, k):
        """Return the index of the source of image k."""
        return self.mixture.locate(k)[0]

    def scene_or_text(self, k):
        """Return the Scene or Text that image k of a built-in source shows."""
        index, number = self.mixture.locate(k)
        return self.sources[index].draw(number)

    def report_broken(self, k, broken):
        """Print the broken files that image k replaces, each of them once.

        broken: pairs (name, reason)
        Raises: ValueError if over 1% of the files of a source are broken
        """
        source = self.source_of(k)
        names, total = self.broken_names[source], self.source_lengths[source]
        for name, reason in sorted(broken):
            if name in names:
                continue
            names.add(name)
            count = len(names)
            print(f"broken image {count}, replaced by another: {name} ({reason})", file=sys.stderr)
            if count > max(1, total // 100) or len(broken) >= TRIES:
                raise ValueError(
                    f"--data has {count} broken images of {total}, such as {name} ({reason}); "
                    "at most 1% may be; remove or mend those named above")


def describe_source(name, summary):
    """Return the summary of a source as text; see ImageData.summary."""
    title = f"data {name}={summary['data']}" if name else f"data {summary['data']}"
    classes = f"classes: {summary['classes']:,}" if summary["classes"] else "no classes"
    if "images_in_all" not in summary:
        return f"{title}, {summary['split']}: images are drawn when needed, {classes}"
    lines = [f"{title}, {summary['split']}: images: {summary['images']:,} of "
             f"{summary['images_in_all']:,} (held out of training: {summary['held_out']:,}), "
             f"{classes}"]
    if summary["passed_over"]:
        lines.append(f"  passed over: {describe_passed_over(summary['passed_over'])}")
    if summary.get("missing_ids"):
        lines.append(f"  no image has the class ids {', '.join(summary['missing_ids'])}; "
                     "they are no classes")
    held_out = summary.get("classes_held_out")
    if held_out:
        lines.append(f"  classes without an image to train on: {len(held_out):,} "
                     f"({', '.join(held_out[:10])}{' ...' if len(held_out) > 10 else ''}); "
                     "lower --hold_out")
    return "\n".join(lines)


class Arrays:
    """The images of an .npz, to be used as ImageData: arr_0, n H W 3, uint8 or floats in [0, 1].

    sample.py and ADM's evaluation suite write such files. They are mapped into memory rather than
    read, unless they are compressed.
    Raises: ValueError if there are no such images, or too many of them are compressed
    """
    is_shapes = False
    domains = ["images"]           # one source, as of an ImageData

    def __init__(self, path):
        if not self.contains_images(path):
            raise ValueError(f"{path} is no whole .npz of arr_0, or mu and sigma; "
                             "write images by np.savez")
        self.path = path
        self.images = open_array(path)

    @staticmethod
    def contains_images(path):
        if not os.path.isfile(path):
            return False
        try:
            with zipfile.ZipFile(path) as archive:
                return "arr_0.npy" in archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError):         # the latter: of a later version
            return False

    def __len__(self):
        return len(self.images)

    def summary(self):
        """As that of ImageData."""
        height, width = self.images.shape[1:3]
        return {"images": {"data": self.path, "images": len(self), "height": height,
                           "width": width}}

    def describe(self):
        height, width = self.images.shape[1:3]
        return f"data {self.path}: {len(self):,} images of {width} x {height}"

    def __getitem__(self, k):
        pixels = np.array(self.images[k])
        if pixels.dtype != np.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            if not 0 <= low <= high <= 1:         # nan is not, either
                raise ValueError(f"{self.path} has floats of {low:.3g} to {high:.3g}; "
                                 "scale them to [0,1], or store uint8")
            pixels = np.rint(pixels * 255).astype(np.uint8)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return dict(image=image, text="", label=0, number=k, broken=[])

    @property
    def source_lengths(self):
        return [len(self)]

    def is_built_in(self, source_index):
        return False

    def source_of(self, k):
        return 0


def open_array(path):
    """Map arr_0 of an .npz into memory, which np.load does for .npy files alone.

    Returns: n H W 3, uint8 or floats of any byte order
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("arr_0.npy")
        with damage_of(path), archive.open(info) as file:
            shape, is_fortran, dtype = read_array_header(file)
            header_size = file.tell()
        check_array(path, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        if info.file_size != header_size + size:
            raise ValueError(f"{path} is damaged: arr_0 of {shape} has {info.file_size:,} bytes")
        if info.compress_type != zipfile.ZIP_STORED:
            check_compressed(path, size, info.compress_size)
            with damage_of(path), archive.open(info) as file:
                return np.lib.format.read_array(file)
    # The header of a file in a zip has 30 bytes, the last four of which are the lengths of the
    # name and of the extra field that follow. Source: PKWARE's APPNOTE.TXT, 4.3.7.
    name_size, extra_size = struct.unpack("<HH", read_bytes(path, info.header_offset + 26, 4))
    offset = info.header_offset + 30 + name_size + extra_size + header_size
    with damage_of(path):
        return np.memmap(path, dtype, "r", offset, shape, order="F" if is_fortran else "C")


# What a damaged .npz raises. RuntimeError: it is encrypted, or compressed in another way;
# OSError: a wrong position; the others from AttributeError on: NumPy reads a header as the text of
# a Python dict.
NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError,
              OSError, AttributeError, LookupError, MemoryError, SyntaxError, TypeError,
              tokenize.TokenError)


@contextlib.contextmanager
def damage_of(path):
    """Turn what zipfile and numpy raise for a damaged file into a ValueError that names it."""
    try:
        yield
    except NPZ_ERRORS as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); write it again by "
                         f"np.savez") from None


def read_array_header(file):
    """Read the header of an .npy. Returns: shape, whether in Fortran's order, dtype

    Raises: NPZ_ERRORS if there is none
    """
    version = np.lib.format.read_magic(file)
    length_bytes = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(length_bytes, "little")
    if length > HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes")
    header = io.BytesIO(length_bytes + file.read(length))
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(header)
    return np.lib.format.read_array_header_2_0(header)            # 3.0 has other names of fields


def check_array(path, shape, dtype):
    """Raises: ValueError if arr_0 of an .npz holds no images"""
    is_image = len(shape) == 4 and shape[3] == 3 and min(shape) > 0
    if not is_image or not (dtype == np.uint8 or dtype.kind == "f"):
        raise ValueError(f"{path} has arr_0 of {shape}, {dtype}; "
                         "images are n H W 3, uint8 or floats, at least one")


def check_compressed(path, size, compressed_size):
    """Raises: ValueError if compressed images would take too much memory, or can't be that many"""
    memory = memory_of_machine() or 8 * 10**9
    limit = memory // 2                           # the rest is for models and features
    if size > limit:
        raise ValueError(f"{path} has {size / 1e9:,.1f} GB of compressed images, of which at most "
                         f"{limit / 1e9:,.1f} GB can be read; {SAVE_UNCOMPRESSED}")
    # 1000 times is more than images shrink, and about the most that deflate can do (1032).
    if size > 1000 * compressed_size + 2**20:
        raise ValueError(f"{path} has {size:,} bytes in {compressed_size:,}, which are no images; "
                         f"{SAVE_UNCOMPRESSED}")


def memory_of_machine():
    """Return the bytes of memory that this machine has; None where they are unknown (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- loading
def load_images(data, numbers):
    """Load images by number, in order to measure something on them.

    data: ImageData or Arrays
    Returns: b H W 3, uint8
    Raises: ValueError if one is broken or they differ in size
    """
    return stack_images(load_items(data, numbers))


def load_items(data, numbers):
    """Load the items data[k] of numbers k in threads, which decode images side by side."""
    with ThreadPoolExecutor(cores_of_process()) as threads:
        return list(threads.map(data.__getitem__, numbers))


def stack_images(items):
    """Stack the images of items data[k]; see load_images."""
    broken = dict(pair for item in items for pair in item["broken"])
    if broken:
        names = sorted(broken)
        raise ValueError(f"broken images can't be measured: {' '.join(names)}; "
                         f"remove or mend them ({broken[names[0]]})")
    sizes = {tuple(item["image"].shape[1:]) for item in items}
    if len(sizes) > 1:
        raise ValueError(f"images of different sizes, {sizes}; --size centre-crops those of --data")
    return rearrange(torch.stack([item["image"] for item in items]), "b c h w -> b h w c")


def check_batch(data, batch):
    """Raises: ValueError if an epoch has fewer images than a batch."""
    if len(data) < batch:
        raise ValueError(
            f"--batch {batch} must be at most the {len(data)} images of --data; lower it, "
            "and --micro_batch with it")


def batches(data, batch, micro_batch, start=0, rank=0, world=1, workers=2, stop=sys.maxsize):
    """Load this process's micro-batches of the steps from start to before stop.

    A step takes images step * batch, step * batch + 1, ...; micro-batch 0 is the first micro_batch
    of them, and so on. This process loads micro-batches rank, rank + world, ... of each step.

    workers: processes that load images; 0: this one does
    Yields: (step, micro, images, labels, texts)
        micro: number of the micro-batch within its step
        images: b 3 H W, uint8
        labels: b, int64
        texts: list of b captions or conversations
    Raises: ValueError, also when over 1% of the files of a source turn out to be broken
    """
    check_batch(data, batch)
    if batch % (micro_batch * world) != 0:
        raise ValueError(f"--batch {batch} must be a multiple of --micro_batch {micro_batch} x "
                         f"{world} processes; lower --micro_batch")
    accumulation = batch // (micro_batch * world)
    prefetch_factor = None                        # micro-batches that each worker has ready
    if workers > 0:                               # together at least a step's, and one more each
        prefetch_factor = math.ceil(accumulation / workers) + 1
    # fork starts workers in 0.1 s, other methods in 4 to 10 s; it is only safe on Linux.
    use_fork = workers > 0 and sys.platform == "linux"
    loader = DataLoader(
        data,
        batch_sampler=micro_batch_numbers(batch, micro_batch, start, stop, rank, world),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=prefetch_factor,
        worker_init_fn=functools.partial(start_worker, os.getpid()),
        generator=torch.Generator(),              # leaves the global random state alone
        multiprocessing_context="fork" if use_fork else None)
    return read_batches(data, loader, batch, micro_batch)


def micro_batch_numbers(batch, micro_batch, start, stop, rank, world):
    """Yield the numbers of the images of each micro-batch of this process."""
    first_of_each = range(start * batch, stop * batch, micro_batch)
    for first in first_of_each[rank::world]:
        yield range(first, first + micro_batch)


def read_batches(data, loader, batch, micro_batch):
    """Yield what batches promises. Broken files are counted here, in the main process."""
    for lists in read_lists(loader, max(WORKER_TIMEOUT, SECONDS_OF_IMAGE * micro_batch)):
        for k, broken in zip(lists["number"], lists["broken"], strict=True):
            data.report_broken(k, broken)
        # The images of a micro-batch are consecutive, so the first one tells where it belongs.
        step, position = divmod(lists["number"][0], batch)
        micro = position // micro_batch
        images = torch.from_numpy(lists["image"])
        labels = torch.tensor(lists["label"])
        yield step, micro, images, labels, lists["text"]


def collate(items):
    """Combine the items of a micro-batch into lists of their values, in a worker."""
    lists = {key: [item[key] for item in items] for key in items[0]}
    # An array is handed over to the main process faster than a tensor.
    lists["image"] = torch.stack(lists["image"]).numpy()
    return lists


def start_worker(trainer, worker):
    """Leave signals to the main process, whose id is `trainer`, and end when it has ended."""
    if hasattr(os, "setpgrp"):                                    # not on Windows
        os.setpgrp()                              # Ctrl-C and torchrun signal the whole group
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)                 # how the main process ends us
    threading.Thread(target=end_with, args=(trainer,), daemon=True).start()


def end_with(trainer):
    """End this process when the one that started it has ended, even by kill -9."""
    while os.getppid() == trainer:                # an orphan gets another parent
        time.sleep(1)
    os._exit(1)


def read_lists(loader, seconds):
    """Yield what the loader yields, for each of which its workers have so many seconds.

    Raises: ValueError if a worker is killed or hangs, or raises one
    """
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    if workers:
        handle_killed_workers()
    while True:
        done, hung = threading.Event(), threading.Event()
        if workers:
            threading.Thread(target=kill_if_silent, args=(workers, done, hung, seconds),
                             daemon=True).start()
        try:
            lists = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ValueError) as error:
            if hung.is_set():
                raise ValueError(
                    f"the processes that load images were silent for {seconds} s; is --data "
                    "on a disk or network that hangs? --workers 0 shows where; if images are "
                    "only large, give more --workers") from None
            if str(error).startswith("DataLoader worker"):        # was killed, or has exited
                raise dead_worker(error) from None
            if isinstance(error, ValueError):     # of a worker, whose traceback is in the message
                raise ValueError(str(error).rpartition("ValueError: ")[2].rstrip()) from None
            raise
        finally:
            done.set()
        yield lists


def kill_if_silent(workers, done, hung, seconds):
    """Kill the workers unless `done` is set in time. What waits for them then raises an error.

    DataLoader's own timeout does not notice a worker that hangs in the middle of a batch.
    """
    for _ in range(seconds):
        if done.wait(1):                          # a run that Ctrl-Z stops counts no seconds
            return
    hung.set()
    for worker in workers:
        worker.kill()


def handle_killed_workers():
    """From now on, a killed worker raises a ValueError instead of torch's RuntimeError.

    Both interrupt the main process wherever it is.
    """
    # Windows has no such signal, and other threads than the main one set no handlers.
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not isinstance(handler, functools.partial):  # not done yet
            signal.signal(signal.SIGCHLD, functools.partial(handle_killed_worker, handler))


def handle_killed_worker(torch_handler, number, frame):
    """Handler of SIGCHLD around torch's own. Raises: ValueError if a worker was killed"""
    try:
        torch_handler(number, frame)
    except RuntimeError as error:
        if stop_request.name is None:              # else the workers may be stopped, too
            raise dead_worker(error) from None


def dead_worker(error):
    """Return the ValueError to raise instead of DataLoader's error about a dead worker.

    It is no OSError, since it can come while a checkpoint is saved, where those mean a full disk.
    """
    return ValueError(f"a process that loads images has died ({str(error).strip(' .')}); "
                      "if memory ran out, lower --workers or --micro_batch")
