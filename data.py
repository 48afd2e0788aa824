"""Images in, resumable batches out: the built-in shapes, image folders, tar shards, and mixtures of them.

    data = open_data(["a=photos/faces:0.7", "b=shards/birds-{000..012}.tar:0.3"], size=256, crop="random")
    for step, m, images, labels, texts in batches(data, batch=64, micro_batch=16): ...

Image k is a function of (seed, k) for any number of processes and workers, so to resume is to start later.
"""
import glob
import io
import json
import os
import re
import signal
import sys
import tarfile

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, get_worker_info

from shapes import CLASSES, Scene

IMAGE = re.compile(r"(?!(.*/)?(\.|__MACOSX/)).*\.(jpe?g|png|webp|bmp|gif|tiff?|ppm)", re.IGNORECASE)
SHAPES_EPOCH = 1_000_000       # the shapes never end; this many are called an epoch
SHAPES_VAL = 2**40             # held-out scenes are numbered from here, where no training run arrives
PERIOD = 1000                  # images after which a mixture repeats its order of sources: weights to 0.1%
TRIES = 10                     # with 1% of the files broken, ten broken ones in a row are one case in 1e20


def require(fulfilled, message, error=ValueError):
    if not fulfilled:
        raise error(message)


def to_rgb(image):
    """A PIL image of any mode as upright RGB, transparent parts over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):               # 16-bit grey, which convert("RGB") alone would clip to white
        grey = np.asarray(image).clip(0, 65535) / 257                           # 65535 / 255
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, size, rng=None):
    """A PIL image's centre, size x size (Source: ADM); with rng, a random 2/3 of its side (Source: RAE)."""
    side = size if rng is None else round(1.5 * size)                           # 256 of 384 pixels
    while rng is None and min(image.size) >= 2 * size:   # means of 2x2, until less than a factor 2 is left
        image = image.resize(tuple(old // 2 for old in image.size), Image.BOX)
    image = image.resize(tuple(round(old * side / min(image.size)) for old in image.size), Image.BICUBIC)
    left, top = ((s - size) // 2 if rng is None else int(rng.integers(s - size + 1)) for s in image.size)
    return image.crop((left, top, left + size, top + size))


def read(path, offset, size):  # opens anew: forked workers would share the position of a handle kept open
    return np.fromfile(path, np.uint8, size, offset=offset).tobytes()


def list_tar(path):
    """Rows of the images of a tar; label and text from .cls, .txt, .json beside an image, or its folder."""
    rows, name = [], ""
    try:
        with tarfile.open(path, "r:") as tar:    # "r:": uncompressed, so that each file can be read alone
            files = {m.name.removeprefix("./"): (path, m.offset_data, m.size) for m in tar if m.isfile()}
        require(read(path, tar.offset, 512) == bytes(512), "cut short")         # tarfile accepts some cuts
        for name in sorted(filter(IMAGE.fullmatch, files)):
            beside = {suffix: f"{os.path.splitext(name)[0]}.{suffix}" for suffix in ("cls", "txt", "json")}
            beside = {suffix: read(*files[f]).decode() for suffix, f in beside.items() if f in files}
            record = json.loads(beside.get("json", "{}"))
            label = record.get("label", record.get("class", os.path.dirname(name) or None))
            label = int(beside["cls"]) if "cls" in beside else label
            require(type(label) is int and label >= 0 or type(label) in (str, type(None)), f"label {label!r}")
            text = beside.get("txt", record.get("caption", record.get("text", "")))
            rows.append((*files[name], name, label, text.strip()))
    except (tarfile.ReadError, ValueError, AttributeError) as error:
        raise ValueError(f"--data {path}: {name} {error}; tars must be whole and uncompressed (gunzip them), "
                         ".cls an integer >= 0, .txt UTF-8, .json {label/class, caption/text}") from None
    return rows


def list_source(paths, train, hold_out, objects):
    """Rows (path, offset, bytes, name, label, text), order of those in this split, class names, labelled."""
    if paths == ["shapes"]:
        return None, range(SHAPES_EPOCH), CLASSES, objects == (1,)
    rows = []
    for path in paths:
        require(os.path.exists(path), f"--data {path} does not exist; give shapes (alone), a folder, .tar "
                "shards, or a mixture: a=PATH:0.6 b=PATH:0.4", FileNotFoundError)
        found = list_tar(path) if os.path.isfile(path) else [    # glob follows links and passes over .hidden
            (os.path.join(path, name), 0, -1, name, os.path.dirname(name) or None, "")
            for name in sorted(glob.glob("**/*.*", root_dir=path, recursive=True)) if IMAGE.fullmatch(name)]
        require(found, f"--data {path} must hold images, .jpg or .png; give shards as {path}/*.tar")
        rows += found
    labels = {row[4] for row in rows}
    kinds = {type(row[4]): f"{row[3]} has {row[4]!r}" for row in rows}
    require(len(kinds) == 1, f"--data {paths[0]}: {', but '.join(kinds.values())}; give each image a class "
            "name (folder or .json), or each an integer (.cls or .json), or each none")
    names = range(max(labels) + 1) if int in kinds else sorted(labels) if str in kinds else ["image"]
    require(0 <= hold_out < len(rows), f"--hold_out {hold_out} must be below {paths[0]}'s {len(rows)} images")
    order = np.random.default_rng(0).permutation(len(rows))
    return rows, order[hold_out:] if train else order[:hold_out or None], [*map(str, names)], labels != {None}


class Data(Dataset):
    """What open_data returns: the images, listed and checked; data[k] reads number k = 0, 1, ... without end.

    specs: shapes, a folder (flat or of class folders), .tar shards, or a mixture, each name=PATH:weight
    size: side in pixels; seed: of order, crop and flip; crop: centre or random; flip: mirror half of them
    split: train or val; hold_out: images of each source in val, not train, for any seed; 0: all are in both
    objects: count(s) of objects in scenes of shapes, labelled if 1. Raises ValueError, FileNotFoundError.
    """

    def __init__(self, specs, size, seed=0, crop="centre", flip=False, split="train", hold_out=0,
                 objects=(1, 2, 3, 4)):
        self.size, self.crop, self.flip, train = size, crop, flip, split == "train"
        self.seed, self.first_scene = (seed, 0) if train else (0, SHAPES_VAL)   # one val split for all runs
        self.objects = (objects,) if isinstance(objects, int) else tuple(objects)
        groups, weights = {}, {}
        for spec in [specs] if isinstance(specs, str) else specs:
            mixed = re.match(r"[\w-]+=", spec) and not os.path.exists(spec)
            part = re.fullmatch(r"([\w-]+)=(.+):(\d*\.?\d+)", spec) if mixed else (spec, "", spec, 1)
            require(part and float(part[3]) == weights.setdefault(part[1], float(part[3])) > 0,
                    f"--data {spec} must be name=PATH:weight, a number above 0, always the same for a name")
            braces = re.search(r"\{(\d+)\.\.(\d+)\}", part[2])      # x-{000..012}.tar stands for 13 paths
            low, high = sorted(map(int, braces.groups())) if braces else (0, 0)
            groups.setdefault(part[1], []).extend(
                part[2].replace(braces[0], f"{i:0{len(braces[1])}}") if braces else part[2]
                for i in range(low, high + 1))
        require("" not in groups or len(groups) == 1, f"--data {specs}: all must be name=PATH:weight or none")
        sources = [list_source(paths, train, hold_out, self.objects) for paths in groups.values()]
        self.rows, self.order, names, labelled = zip(*sources)
        mixed_names = sorted(set().union(*names)) if all(labelled) else ["image"]
        self.class_names = mixed_names if len(names) > 1 else list(names[0])
        self.number = {name: i for i, name in enumerate(self.class_names)}
        self.labelled, self.num_classes = all(labelled), len(self.class_names) if all(labelled) else 1
        edges = np.cumsum([0, *weights.values()]) / sum(weights.values()) * PERIOD
        self.counts = np.diff(np.rint(edges).astype(int)).tolist()              # of each source in a period
        require(all(self.counts), f"--data weights must be at least 1/{PERIOD} of their sum, not {weights}")
        pattern = np.random.default_rng(0).permutation(np.repeat(range(len(sources)), self.counts)).tolist()
        self.turns = [(i, pattern[:at].count(i)) for at, i in enumerate(pattern)]
        self.shuffled, self.broken = {}, [set() for _ in sources]

    def __len__(self):
        return sum(map(len, self.order))

    def __getitem__(self, k):
        i, turn = self.turns[k % PERIOD]
        epoch, at = divmod(k // PERIOD * self.counts[i] + turn, n := len(self.order[i]))    # in source i
        broken, rng = [], np.random.default_rng((self.seed, k, 0))
        if self.rows[i] is None:
            scene = Scene.random(self.seed, self.first_scene + epoch * n + at, self.objects)
            image, label, text = scene.render(self.size), CLASSES[scene.objects[0].label], scene.caption()
        else:
            if self.shuffled.get(i, (None,))[0] != epoch:
                self.shuffled[i] = epoch, np.random.default_rng((self.seed, epoch, 1, i)).permutation(n)
            at, image = self.shuffled[i][1][at], None
            while image is None and len(broken) < TRIES:
                path, offset, size, name, label, text = self.rows[i][self.order[i][at]]
                try:
                    image = to_rgb(Image.open(io.BytesIO(read(path, offset, size))))
                except Exception:                # Pillow's decoders raise a dozen kinds
                    broken.append(path if size < 0 else f"{path}/{name}")
                    at = rng.integers(n)         # another image fills the place
            require(image or get_worker_info(), f"--data has {TRIES} broken images in a row: {broken}")
            image = image or Image.new("RGB", (1, 1))    # from a worker: the main process refuses it
            image = square(image, self.size, rng if self.crop == "random" else None)
            image = np.array(ImageOps.mirror(image) if self.flip and rng.random() < 0.5 else image)
        return dict(image=torch.from_numpy(image).permute(2, 0, 1).contiguous(), text=text, broken=broken,
                    label=self.number.get(str(label), 0), number=k)

    def received(self, first, images, labels, texts, broken):
        """Main process: names each broken file once; stops above 1% of a source's files (one is free)."""
        for k, names in enumerate(broken, first):
            i = self.turns[k % PERIOD][0]
            for name in sorted(set(names) - self.broken[i]):
                self.broken[i].add(name)
                count, n = len(self.broken[i]), len(self.order[i])
                print(f"broken image {count}, replaced by another: {name}", file=sys.stderr)
                require(count <= max(1, n // 100) and len(names) < TRIES, f"--data has {count} broken images "
                        f"of {n}, such as {name}; at most 1% may be; remove or mend those named above")
        return torch.from_numpy(images), torch.tensor(labels), texts


open_data = Data               # a verb, where it is called


def check(data, batch):
    require(len(data) >= batch, f"--batch {batch} must be at most the {len(data)} images of --data; lower it")


def collate(items):
    images = torch.stack([x["image"] for x in items]).numpy()    # a tensor takes longer to hand over
    labels, texts, broken = ([x[key] for x in items] for key in ("label", "text", "broken"))
    return items[0]["number"], images, labels, texts, broken


def start_worker(number):      # Ctrl-C reaches all processes, but the main one has to end the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(data, batch, micro_batch, start=0, rank=0, world=1, workers=2, stop=None):
    """This process's micro-batches m = rank, rank + world, ... of the steps from start to before stop.

    Yields (step, m, images uint8 b 3 H W, labels int64 b, texts), slice m of the images step * batch and on,
    for batch // (micro_batch * world) values of m a step. Raises ValueError, also for over 1% broken files.
    """
    check(data, batch)
    require(batch % (micro_batch * world) == 0, f"--batch {batch} must be a multiple of --micro_batch "
            f"{micro_batch} x {world} processes; lower --micro_batch")
    numbers = (range(first := step * batch + m * micro_batch, first + micro_batch)
               for step in range(start, sys.maxsize if stop is None else stop)
               for m in range(rank, batch // micro_batch, world))
    # fork starts in 0.1 s, other methods in 4 to 10; the generator spares the global random state
    loader = DataLoader(data, batch_sampler=numbers, collate_fn=collate, num_workers=workers,
                        worker_init_fn=start_worker, generator=torch.Generator(),
                        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
    return ((k // batch, k % batch // micro_batch, *data.received(k, *item)) for k, *item in loader)
