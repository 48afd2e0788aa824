"""Listings that are kept: the images of a path in arrays instead of objects.

The listing of a folder, a tar or a .jsonl that may be large is written to an index, a file in
~/.cache/nanorae or in the folder that NANORAE_CACHE names (if that is empty, nothing is written).
Whoever reads the images later maps the index into memory, in milliseconds; all processes share
its pages. It can be deleted at any time. An index is only used if the path has the size and the
time of modification with which it was listed; of a folder, all its subfolders, and the captions
beside its images where they are read. Within a process, a path is listed once.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from ast import literal_eval
from pathlib import Path

import numpy as np

from listing import ListedImage, PassedOver, check_path, list_images, walk
from runtime import process_rank, world_size
from storage import Lock, write_whole

FORMAT = "nanoRAE index 1"
# Of fewer images, which are listed in 0.15 s, no index is written.
INDEXED = 10_000
TAR_BYTES, RECORD_BYTES = 1024, 64     # of an image, at least: header and content; a short line
# Of an image: where its line of the text starts and how many bytes the line, the name in it and
# what comes before its texts have; the number of its label; its place in a tar, as ListedImage.
ROW = np.dtype([("start", np.int64), ("offset", np.int64), ("size", np.int64),
                ("line", np.uint32), ("name", np.uint32), ("texts", np.uint32),
                ("label", np.int32)])
# What was modified this recently may change again without another time: the clocks of file systems
# step by up to 2 s (FAT).
SETTLED = 2 * 10**9        # ns
# What is passed over for these reasons may turn up without a change of any folder that was read.
MAY_RETURN = {"broken links", "unreadable folders"}


class ImageTable:
    """The images of one folder, tar or .jsonl: a sequence of ListedImage, made when asked for.

    path: of the folder, tar or .jsonl
    content: uint8. The number of bytes of the header, int64; the header, JSON; a ROW of each image;
        the text, with a line of each image: its name, label and texts, as ImageData.identity hashes
        them; and the stamps, JSON: [name, size, time of modification] of all that was read
    file: the index that `content` is mapped from; None: it is in memory only
    Raises: ValueError, LookupError, TypeError or RecursionError if `content` is something else
    """

    def __init__(self, path, content, file=None):
        self.path = path
        self.content = content
        self.file = file
        header_end = 8 + int.from_bytes(content[:8].tobytes(), "little")
        self.header = json.loads(content[8:header_end].tobytes())
        rows_end = header_end + self.header["images"] * ROW.itemsize
        text_end = rows_end + self.header["text_bytes"]
        stamps_end = text_end + self.header["stamps_bytes"]
        if self.header["format"] != FORMAT or stamps_end != len(content):
            raise ValueError(f"is no {FORMAT}")
        self.rows = content[header_end:rows_end].view(ROW)
        self.text = content[rows_end:text_end]
        self.stamps = content[text_end:]
        self.may_be_kept = len(self.stamps) > len("[]")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        start, offset, size, line_bytes, name_bytes, texts_start, label = self.rows[i].item()
        line = self.text[start:start + line_bytes].tobytes()
        try:
            name = line[:name_bytes].decode(errors="surrogatepass")
            texts = line[texts_start:-1].decode(errors="surrogatepass")
            texts = [""] if texts == "['']" else literal_eval(texts)   # which is slow
            label = self.header["labels"][label]
        except (ValueError, SyntaxError, LookupError) as error:
            raise ValueError(f"the index {self.file} is damaged at image {i}; delete it, and the "
                             f"next start writes it again") from error
        return ListedImage(self.path_of(name), offset, size, name, label, texts)

    def __reduce__(self):
        """Processes that are spawned map the index, too, rather than get a copy of it."""
        if self.file is None:
            return ImageTable, (self.path, self.content)
        return map_table, (self.path, self.file)

    def path_of(self, name):
        """Return the path of the file that holds the image of this name, or None."""
        if self.header["kind"] == "tar":
            return self.path
        if self.header["kind"] == "folder":
            return os.path.join(self.path, self.header["prefix"] + name)
        _, colon, image = name.partition(": ")    # "line 3: x.jpg"; "line 3" has no image
        return os.path.join(os.path.dirname(self.path), image) if colon else None

    def label_counts(self):
        """Return a dict of each label to the number of its images."""
        return dict(zip(self.header["labels"], self.header["label_counts"], strict=True))

    def passed_over(self):
        passed_over = PassedOver()
        passed_over.counts.update(self.header["passed_over"])
        passed_over.first.update(self.header["passed_over_first"])
        return passed_over

    def is_current(self):
        """Whether all that was read has the size and the time of modification that it had then."""
        if not self.may_be_kept or self.header["real_path"] != os.path.realpath(self.path):
            return False
        for name, size, modified in json.loads(self.stamps.tobytes()):
            try:
                state = os.stat(os.path.join(self.path, name) if name else self.path)
            except OSError:
                return False
            if (state.st_size, state.st_mtime_ns) != (size, modified):
                return False
        return True


# ---------------------------------------------------------------- tables, old and new
tables = {}     # that this process has made: (path, with_conversations) -> ImageTable


def open_table(path, with_conversations):
    """Return the ImageTable of a folder, a tar or a .jsonl, and list its images if need be.

    with_conversations: as of list_images, which raises the same
    """
    check_path(path)
    table = tables.get((path, with_conversations))
    if table is not None and table.is_current():
        return table
    file = index_file(path, with_conversations)
    table = read_index(path, file)
    if table is None and file is not None and may_be_large(path):
        table = list_in_turn(path, with_conversations, file)
    if table is None:
        table = list_table(path, with_conversations)
    if table.may_be_kept:
        tables[path, with_conversations] = table
    return table


def open_tables(paths, with_conversations):
    """Return the ImageTables of paths, in their order; see open_table.

    The processes of a run begin at different paths, so that they share the work of listing them.
    """
    start = len(paths) * process_rank() // world_size()
    opened = [open_table(path, with_conversations) for path in paths[start:] + paths[:start]]
    first = len(paths) - start
    return opened[first:] + opened[:first]


def may_be_large(path):
    """Whether a folder has, or a file can have, as many images as are worth an index."""
    if os.path.isdir(path):
        names = itertools.islice(walk(path, PassedOver(), set()), INDEXED)
        return len(list(names)) == INDEXED
    is_tar = not path.lower().endswith((".jsonl", ".json"))
    return os.path.getsize(path) >= INDEXED * (TAR_BYTES if is_tar else RECORD_BYTES)


def list_table(path, with_conversations):
    """List the images of a path, as list_images does. Returns: ImageTable"""
    started = time.time_ns()
    passed_over = PassedOver()
    origins = set()
    images = list_images(path, with_conversations, passed_over, origins)

    rows = np.empty(len(images), ROW)
    text = bytearray()
    labels = {}                                   # label -> its number
    for i, image in enumerate(images):
        name = image.name.encode(errors="surrogatepass")
        label = f"\t{image.label}\t".encode(errors="surrogatepass")
        texts = f"{image.texts}\n".encode(errors="surrogatepass")
        line = name + label + texts
        number = labels.setdefault(image.label, len(labels))
        rows[i] = (len(text), image.offset, image.size, len(line), len(name),
                   len(name) + len(label), number)
        text += line

    without_text = [i for i, image in enumerate(images) if not image.texts]
    stamps = json.dumps(stamps_of(path, origins, passed_over, started)).encode()
    header = {
        "format": FORMAT, "real_path": os.path.realpath(path), **layout(path, images[0]),
        "images": len(images), "text_bytes": len(text), "stamps_bytes": len(stamps),
        "labels": list(labels), "label_counts": np.bincount(rows["label"]).tolist(),
        "without_text": len(without_text), "first_without_text": next(iter(without_text), None),
        "passed_over": passed_over.counts, "passed_over_first": passed_over.first}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)           # so that the rows lie at multiples of 8 bytes
    size = len(header).to_bytes(8, "little")
    content = b"".join([size, header, rows.tobytes(), text, stamps])
    return ImageTable(path, np.frombuffer(content, np.uint8))


def layout(path, first):
    """How the path of an image follows from its name: see ImageTable.path_of. first: an image"""
    if first.size != -1:
        return {"kind": "tar"}
    if not os.path.isdir(path):
        return {"kind": "records"}
    inner = first.path.removeprefix(os.path.join(path, ""))       # train/cat/1.jpg of cat/1.jpg
    return {"kind": "folder", "prefix": inner.removesuffix(first.name)}


def stamps_of(path, origins, passed_over, started):
    """List [name, size, time of modification] of the paths `origins`, which are the path or in it.

    Returns: [] if a change would not show: something changed a moment ago, or is outside the path
    """
    if MAY_RETURN & passed_over.counts.keys():
        return []
    stamps = []
    for origin in sorted(origins):
        try:
            state = os.stat(origin)
        except OSError:                           # it was there a moment ago
            return []
        if state.st_mtime_ns > started - SETTLED:
            return []
        name = "" if origin == path else origin.removeprefix(os.path.join(path, ""))
        stamps.append([name, state.st_size, state.st_mtime_ns])
    return stamps


# ---------------------------------------------------------------- files
def index_file(path, with_conversations):
    """Return the path of the index of a folder, tar or .jsonl; None: it shall have none."""
    folder = os.environ.get("NANORAE_CACHE", "~/.cache/nanorae")
    if not folder:
        return None
    real_path = os.path.realpath(path)
    key = f"{real_path}\t{with_conversations}".encode(errors="surrogatepass")
    name = os.path.basename(real_path)[:100]      # for the eye; file names have at most 255 bytes
    return Path(os.path.expanduser(folder), f"{name}-{hashlib.sha1(key).hexdigest()[:16]}.index")


def map_table(path, file):
    """Map an index into memory. Raises: as ImageTable, and OSError"""
    return ImageTable(path, np.asarray(np.memmap(file, np.uint8, "r")), file)


def read_index(path, file):
    """Return the ImageTable of an index; None if it is not there, damaged, or out of date."""
    if file is None:
        return None
    try:
        table = map_table(path, file)
        return table if table.is_current() else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def list_in_turn(path, with_conversations, file):
    """List the images of a path and write their index, unless another process does it meanwhile."""
    with one_at_a_time(file):
        table = read_index(path, file)
        if table is not None:
            return table
        table = list_table(path, with_conversations)
        if not table.may_be_kept:
            return table
        try:
            write_whole(file, lambda f: f.write(table.content))
        except OSError:
            warn_once(file.parent)
    return read_index(path, file) or table


@contextlib.contextmanager
def one_at_a_time(file):
    """Context that one process enters, and others wait for, where there are locks.

    Where there are none, several may write the index at once: the same bytes.
    """
    lock = None
    while lock is None:
        try:
            lock = Lock(f"{file}.lock", file)
        except ValueError:                        # another process has it
            time.sleep(0.1)
        except OSError:                           # nothing can be written there
            break
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@functools.cache
def warn_once(folder):
    if process_rank() == 0:
        print(f"warning: no index can be written to {folder} (no permission, or no room?); images "
              "are listed at every start. NANORAE_CACHE=DIR names another folder", file=sys.stderr)
