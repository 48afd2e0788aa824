"""Images and texts in, resumable batches out: shapes, image folders, tar shards, .jsonl, mixtures of them.

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

from shapes import CLASSES, Scene, Text

IMAGE = re.compile(r"(?!(.*/)?(\.|__MACOSX/)).*\.(jpe?g|png|webp|bmp|gif|tiff?|ppm)", re.IGNORECASE)
SHAPES_EPOCH = 1_000_000       # the shapes never end; this many are called an epoch
SHAPES_VAL = 2**40             # held-out scenes are numbered from here, where no training run arrives
PERIOD = 1000                  # images after which a mixture repeats its order of sources: weights to 0.1%
TRIES = 10                     # with 1% of the files broken, ten broken ones in a row are one case in 1e20
ROLES = {"human": "user", "gpt": "assistant"}    # Source: LLaVA, Scale-RAE


def require(fulfilled, message, error=ValueError):
    if not fulfilled:
        raise error(message)


def to_rgb(image):             # a PIL image of any mode as upright RGB, transparent parts over white
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):               # 16 bits, which convert("RGB") would clip; 257 = 65535 / 255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def square(image, size, rng=None):  # its centre (Source: ADM); with rng a random 2/3 of it (Source: RAE)
    side = size if rng is None else round(1.5 * size)                           # 256 of 384 pixels
    while rng is None and min(image.size) >= 2 * size:   # means of 2x2, until less than a factor 2 is left
        image = image.resize(tuple(old // 2 for old in image.size), Image.BOX)
    image = image.resize(tuple(round(old * side / min(image.size)) for old in image.size), Image.BICUBIC)
    left, top = ((s - size) // 2 if rng is None else int(rng.integers(s - size + 1)) for s in image.size)
    return image.crop((left, top, left + size, top + size))


def read(path, offset, size):  # opens anew: forked workers would share the position of a handle kept open
    return np.fromfile(path, np.uint8, size, offset=offset).tobytes()


def conversation(turns, image):  # {"from", "value"} to (role, text), with <image> first if it is nowhere
    talk = [(ROLES.get(turn["from"]), turn["value"]) for turn in turns if turn["from"] != "system"]
    count = "\n".join(text for _, text in talk).encode().count(b"<image>")      # raises if one is no text
    require([role for role, _ in talk] == [*ROLES.values()] * max(1, len(talk) // 2) and count <= image,
            f"conversations must be human, gpt, human, gpt ... with at most {image:d} <image>")
    return talk if count == image else [("user", f"<image>\n{talk[0][1]}"), *talk[1:]]


def list_path(path, chat):     # rows (path, offset, bytes, name, label, texts) of a folder, tar or .jsonl
    require(os.path.exists(path), f"--data {path} does not exist; give shapes or text, a folder, .tar "
            "shards, .jsonl, or a mixture: a=PATH:0.6 b=PATH:0.4", FileNotFoundError)
    rows, name, files, lines = [], "", {}, os.path.isfile(path) and path.endswith(".jsonl")
    try:
        if os.path.isdir(path):                  # glob follows links and passes over .hidden
            found = glob.glob("**/*.*", root_dir=path, recursive=True)
            files = {f: (os.path.join(path, f), 0, -1) for f in found if chat or IMAGE.fullmatch(f)}
        elif not lines:
            with tarfile.open(path, "r:") as tar:    # "r:": uncompressed, so that each file can be read alone
                files = {m.name.removeprefix("./"): (path, m.offset_data, m.size) for m in tar if m.isfile()}
            require(read(path, tar.offset, 512) == bytes(512), "cut short")     # tarfile accepts some cuts
        for i, item in enumerate(open(path, "rb") if lines else sorted(filter(IMAGE.fullmatch, files)), 1):
            name, stem, record = (f"line {i}", "", item) if lines else (item, os.path.splitext(item)[0], "{}")
            side = {x: read(*files[f]) for x in ("cls", "txt", "json") if (f := f"{stem}.{x}") in files}
            info = {"class": os.path.dirname(name) or None, **json.loads(side.get("json", record))}
            label = None if chat else int(side["cls"]) if "cls" in side else info.get("label", info["class"])
            require(type(label) is int and label >= 0 or type(label) in (str, type(None)), f"label {label!r}")
            image = np.ravel(info.get("image") or []).tolist() if lines else [name]   # one path or a list
            require(len(image) == 1 or not image and "conversations" in info, f"images {image} must be one")
            place = os.path.join(os.path.dirname(path), *image) if image else None, 0, -1
            texts = info.get("captions", []) + [info[x] for x in ("caption", "text") if x in info][:1]
            texts = side["txt"].decode("utf-8-sig").split("\n") if "txt" in side else texts
            texts = [*filter(None, map(str.strip, texts))] or [""] * bool(texts)
            if chat and "conversations" in info:
                texts = [conversation(info["conversations"], image=bool(image))]
            elif chat:                           # encode() fails for half of a surrogate pair
                require(b"<image>" not in "".join(texts).encode(), "captions must not hold <image>")
            if chat or image:
                rows.append((*files.get(name, place), name, label, texts if chat else ["\n".join(texts)]))
    except (tarfile.ReadError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"--data {path}: {name} {error}; tars must be whole and uncompressed (gunzip them), "
                         ".cls an integer >= 0, .txt UTF-8, .json(l) {label/class, caption(s)/text, image, "
                         'conversations: [{"from": "human" or "gpt", "value": text}, ...]}') from None
    require(rows, f"--data {path} must hold images, .jpg or .png; give shards as {path}/*.tar")
    return rows


def list_source(paths, train, hold_out, objects, chat):  # rows, order of the split, class names, labelled
    if paths == ["shapes"]:
        return Scene, range(SHAPES_EPOCH), CLASSES, np.ravel(objects).tolist() == [1]
    if paths == ["text"]:
        require(not chat, "--data text has no conversations; it is for train_decoder.py")
        return Text, range(SHAPES_EPOCH), ["text"], False
    rows = [row for path in paths for row in list_path(path, chat)]
    bare = [f"{row[0]} ({row[3]})" for row in rows if not row[5]]
    require(not bare, f"--data {paths[0]}: {len(bare)} of {len(rows)} images have no text, first {bare[:1]}; "
            "put x.txt or x.json beside x.jpg (in .jsonl a caption), empty where it shall be unconditional")
    labels = {row[4] for row in rows}
    kinds = {type(row[4]): f"{row[3]} has {row[4]!r}" for row in rows}
    require(len(kinds) == 1, f"--data {paths[0]}: {', but '.join(kinds.values())}; give each image a class "
            "name (folder or .json), or each an integer (.cls or .json), or each none")
    names = range(max(labels) + 1) if int in kinds else sorted(labels) if str in kinds else ["image"]
    require(0 <= hold_out < len(rows), f"--hold_out {hold_out} must be below {paths[0]}'s {len(rows)} images")
    order = np.random.default_rng(0).permutation(len(rows))
    return rows, order[hold_out:] if train else order[:hold_out or None], [*map(str, names)], labels != {None}


class open_data(Dataset):      # a verb, where it is called, as functools.partial is
    """The images, listed and checked; data[k] reads number k = 0, 1, ... without end.

    specs: shapes, text, a folder (flat or of class folders), .tar shards, .jsonl; or several name=PATH:weight
    size: side in pixels, None: as they are; seed: of order, crop and flip; crop: centre or random; flip: half
    split: train or val; hold_out: images of each source in val, not train, for any seed; 0: all are in both
    objects: count(s) of objects in scenes of shapes, labelled if 1. Raises ValueError, FileNotFoundError.
    chat: texts are conversations [(role, text), ...], those on shapes by chat(scene, rng); None: captions
    """
    def __init__(self, specs, size, seed=0, crop="centre", flip=False, split="train", hold_out=0,
                 objects=(1, 2, 3, 4), chat=None):
        self.size, self.crop, self.flip, self.objects, self.chat = size, crop, flip, objects, chat
        self.seed, self.first, self.skip = (seed, 0, chat) if split == "train" else (0, SHAPES_VAL, None)
        groups, weights = {}, {}
        for spec in [specs] if isinstance(specs, str) else specs:
            mixed = re.match(r"[\w-]+=", spec) and not os.path.exists(spec)
            part = re.fullmatch(r"([\w-]+)=(.+):(\d*\.?\d+)", spec) if mixed else (spec, "", spec, 1)
            require(part and float(part[3]) == weights.setdefault(part[1], float(part[3])) > 0,
                    f"--data {spec} must be name=PATH:weight, a number above 0, always the same for a name")
            braces = re.search(r"\{(\d+)\.\.(\d+)\}", part[2] + "{0..0}")   # x-{000..012}.tar is 13 paths
            low, high = sorted(map(int, braces.groups()))
            groups.setdefault(part[1], []).extend(
                part[2].replace(braces[0], f"{i:0{len(braces[1])}}") for i in range(low, high + 1))
        require("" not in groups or len(groups) == 1, f"--data {specs}: all must be name=PATH:weight or none")
        sources = [list_source(paths, split == "train", hold_out, objects, chat) for paths in groups.values()]
        self.domains, (self.rows, self.order, names, labelled) = [*groups], zip(*sources)
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

    def place(self, k):            # of image k: its source, a number in the order of specs; epoch, turn in it
        i, turn = self.turns[k % PERIOD]
        return i, *divmod(k // PERIOD * self.counts[i] + turn, len(self.order[i]))

    def drawn(self, k):            # the Scene or Text that image k of a built-in world shows
        i, epoch, at = self.place(k)
        number = self.first + epoch * SHAPES_EPOCH + at
        if self.rows[i] is Text:
            return Text.random(self.seed, number)
        while (scene := Scene.random(self.seed, number, self.objects)) and self.skip and scene.held_out():
            number += 2 * SHAPES_VAL             # where neither split arrives
        return scene

    def __getitem__(self, k):
        i, epoch, at = self.place(k)
        n, broken, rng = len(self.order[i]), [], np.random.default_rng((self.seed, k, 0))
        if self.rows[i] in (Scene, Text):
            seen = self.drawn(k)
            image, label, texts = seen.render(self.size), None, [seen.caption()]
            if self.rows[i] is Scene:
                label = CLASSES[seen.objects[0].label]
                texts = [self.chat(seen, rng)] if self.chat else texts
        else:
            if self.shuffled.get(i, (None,))[0] != epoch:
                self.shuffled[i] = epoch, np.random.default_rng((self.seed, epoch, 1, i)).permutation(n)
            at, image, black = self.shuffled[i][1][at], None, Image.new("RGB", (1, 1))
            while image is None and len(broken) < TRIES:
                path, offset, size, name, label, texts = self.rows[i][self.order[i][at]]
                try:
                    image = to_rgb(Image.open(io.BytesIO(read(path, offset, size))) if path else black)
                except Exception:                # Pillow's decoders raise a dozen kinds
                    broken.append(path if size < 0 else f"{path}/{name}")
                    at = rng.integers(n)         # another image fills the place
            require(image or get_worker_info(), f"--data has {TRIES} broken images in a row: {set(broken)}")
            if self.size:
                image = square(image or black, self.size, rng if self.crop == "random" else None)
            image = np.array(ImageOps.mirror(image) if self.flip and rng.random() < 0.5 else image)
        text = texts[rng.integers(len(texts))][:]                # a copy
        text = [("user", text), ("assistant", "<image>")] if self.chat and isinstance(text, str) else text
        return dict(image=torch.from_numpy(image).permute(2, 0, 1).contiguous(), text=text, broken=broken,
                    label=self.number.get(str(label), 0), number=k)

    def start_worker(self, number):    # Ctrl-C reaches all processes, but the main one has to end the workers
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def collate(self, items):
        images, *rest = zip(*(item.values() for item in items))
        return torch.stack(images).numpy(), *map(list, rest)    # a tensor takes longer to hand over

    def received(self, images, texts, broken, labels, numbers):    # names a broken file once, stops above 1%
        for k, names in zip(numbers, broken):
            bad, n = self.broken[i := self.place(k)[0]], len(self.order[i])
            for name in sorted(set(names) - bad):
                bad.add(name)
                print(f"broken image {len(bad)}, replaced by another: {name}", file=sys.stderr)
                require(len(bad) <= max(1, n // 100) and len(names) < TRIES, f"--data has {len(bad)} broken "
                        f"images of {n}, such as {name}; at most 1% may be; remove or mend those named above")
        return torch.from_numpy(images), torch.tensor(labels), texts


def check(data, batch):
    require(len(data) >= batch, f"--batch {batch} must be at most the {len(data)} images of --data; lower it")


def batches(data, batch, micro_batch, start=0, rank=0, world=1, workers=2, stop=sys.maxsize):
    """This process's micro-batches m = rank, rank + world, ... of the steps from start to before stop.

    Yields (step, m, images uint8 b 3 H W, labels int64 b, texts), slice m of the images step * batch and on,
    for batch // (micro_batch * world) values of m a step. Raises ValueError, also for over 1% broken files.
    """
    check(data, batch)
    require(batch % (micro_batch * world) == 0, f"--batch {batch} must be a multiple of --micro_batch "
            f"{micro_batch} x {world} processes; lower --micro_batch")
    ranges = (range(k, k + micro_batch) for k in range(start * batch, stop * batch, micro_batch)[rank::world])
    # fork starts in 0.1 s, other methods in 4 to 10; the generator spares the global random state
    loader = DataLoader(data, batch_sampler=ranges, collate_fn=data.collate, num_workers=workers,
                        worker_init_fn=data.start_worker, generator=torch.Generator(),
                        multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
    return (((k := item[-1][0]) // batch, k % batch // micro_batch, *data.received(*item)) for item in loader)
