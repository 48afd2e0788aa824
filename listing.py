"""Which images a folder, a tar or a .jsonl holds, with their labels and texts.

Nothing is decoded here. What is not read is counted with the reason: see PassedOver. Listing takes
about 14 us and 400 bytes an image; index.py keeps the result.
"""
import collections
import contextlib
import json
import os
import re
import reprlib
import shlex
import stat
import tarfile
from pathlib import Path
from typing import NamedTuple

# What cameras, phones, scanners, browsers and drawing programs write, one picture a file. Pillow
# opens more: icons, layered and vector files, films and those of science are passed over.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm",
    ".pnm", ".pfm", ".tga", ".pcx", ".qoi")
SIDECAR_SUFFIXES = (".cls", ".txt", ".json")
ROLES = {"human": "user", "gpt": "assistant"}    # of LLaVA and Scale-RAE -> of chat templates
# Pillow opens up to 179 million pixels; with three colours of 16 bits they have 1.07e9 bytes.
IMAGE_BYTES = 2**30 + 2**20
SIDECAR_BYTES = 2**20      # a whole book; the texts of all images are kept in memory
LINE_BYTES = 2**24         # of a .jsonl: a conversation, or even an image in base64
ARRAY_BYTES = 2**32        # of a .json, which is read at once; LLaVA's of 665,000 records has 1e9


class ListedImage(NamedTuple):
    """An image of a folder, tar or .jsonl that is not loaded yet."""
    path: str | None           # its file, or the tar that contains it; None: there is no image
    offset: int                # position of its first byte in that file
    size: int                  # bytes; -1: the whole file
    name: str                  # within the folder or tar, or "line 3: x.jpg" of a .jsonl
    label: int | str | None    # class id or class name
    texts: list                # captions to choose from, or one conversation [(role, text), ...]

    def full_name(self):
        if self.size == -1:
            return shown(self.path)
        return shown(f"{self.path}/{self.name}")


class PassedOver:
    """What is not read: how many files or folders for each reason, and the first of them."""

    def __init__(self):
        self.counts = collections.Counter()
        self.first = {}

    def add(self, reason, name):
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def add_all(self, other):
        self.counts.update(other.counts)
        self.first = other.first | self.first

    def summary(self):
        """Returns: {reason: {"count": n, "first": name}}, the most frequent reason first"""
        return {reason: {"count": count, "first": shown(self.first[reason])}
                for reason, count in self.counts.most_common()}


def describe_passed_over(summary):
    """Return the summary of a PassedOver as text: ".heic 120, broken links 1 (cat/3.jpg)"."""
    descriptions = []
    for reason, passed in list(summary.items())[:10]:             # one line is enough
        example = "" if re.fullmatch(r"\.\S+", reason) else f" ({passed['first']})"
        descriptions.append(f"{reason} {passed['count']:,}{example}")
    if len(summary) > 10:
        descriptions.append(f"and {len(summary) - 10} more kinds")
    return ", ".join(descriptions)


def shown(name):
    """Return a name on one line that can be printed, whatever bytes it has."""
    return repr(name) if re.search("[\x00-\x1f\x7f\ud800-\udfff]", name) else name


def read_bytes(path, offset=0, size=-1, limit=IMAGE_BYTES):
    """Read `size` bytes of a regular file from `offset` on; -1: all that follow.

    Raises: OSError; ValueError if these are more than `limit`, or it is a pipe or a device, which
        may never end
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("is no regular file")
    # Opened every time: forked workers would share the position of a file that is kept open.
    with open(path, "rb") as file:
        if size == -1:
            size = os.fstat(file.fileno()).st_size - offset
        if size > limit:
            raise ValueError(f"has {size:,} bytes, more than {limit:,}")
        file.seek(offset)
        return file.read(size)


# ---------------------------------------------------------------- listing images
def list_images(path, with_conversations, passed_over, origins):
    """List the images of a folder, a tar or a .jsonl.

    with_conversations: whether texts are needed, which then replace the labels
    passed_over: empty PassedOver, to which is added what is not read
    origins: set, to which are added the paths of the files and folders that are read for it
    Returns: list of ListedImage, in the order of their names or lines
    Raises: OSError; ValueError if there are none or a file beside them is malformed
    """
    check_path(path)
    if os.path.isdir(path):
        images = list_folder(path, with_conversations, passed_over, origins)
    elif path.lower().endswith((".jsonl", ".json")):
        images = list_records(path, with_conversations, passed_over, origins)
    else:
        images = list_tar(path, with_conversations, passed_over, origins)
    if not images:
        raise ValueError(f"--data {path} must hold images, .jpg or .png"
                         f"{advice_without_images(path, passed_over)}")
    return images


def check_path(path):
    """Raises: ValueError or FileNotFoundError if a path of --data is no folder and no file"""
    if not path.strip():
        raise ValueError("--data is empty, as if by a variable that is not set; give shapes or "
                         "text, a folder, .tar shards or .jsonl")
    if path in ("shapes", "text"):                # among other paths of one source
        raise ValueError(f"--data {path}: shapes and text stand alone; mix them with others as "
                         f"a=PATH:0.5 b={path}:0.5")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"--data {shown(path)} does not exist; give shapes or text, a folder, .tar shards, "
            ".jsonl, or a mixture: a=PATH:0.6 b=PATH:0.4") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ValueError(f"--data {path} is a pipe or a device; it must be a folder or a file")


def list_folder(path, with_conversations, passed_over, origins):
    """List the images of a folder and its subfolders, whose names are those of the classes."""
    files = {}
    for name in walk(path, passed_over, origins):
        files[name] = (os.path.join(path, name), 0, -1)
    # Without conversations, what lies beside the images of a folder is not read.
    sidecar_suffixes = SIDECAR_SUFFIXES if with_conversations else ()
    return list_files(path, files, sidecar_suffixes, with_conversations, passed_over, origins)


def walk(root, passed_over, origins):
    """Yield the names of all files in a folder and its subfolders, but for hidden ones.

    Links are followed, but no folder is read twice. origins: set, to which the paths of the folders
    are added. Raises: OSError if the root can't be read
    """
    real_root = os.path.realpath(root)
    # Real paths; a link to a folder above the root would lead back to it.
    seen = {str(parent) for parent in Path(real_root).parents}
    folders = collections.deque([("", real_root)])
    while folders:
        folder, real = folders.popleft()
        if real in seen:
            passed_over.add("links to folders that are read elsewhere", folder)
            continue
        seen.add(real)
        origins.add(os.path.join(root, folder))
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError:
            if folder == "":
                raise
            passed_over.add("unreadable folders", folder)
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = kind_of(entry)
            if kind == "folder" and entry.is_symlink():         # last, after the real folders
                folders.append((name, os.path.realpath(entry.path)))
            elif kind == "folder":
                folders.appendleft((name, os.path.join(real, entry.name)))
            elif kind == "file":
                yield name
            else:
                passed_over.add(kind, name)


def kind_of(entry):
    """Return "folder", "file", or why an entry of os.scandir is passed over."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:                               # a link to itself
        return "broken links"
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "broken links"
    return "pipes or devices"


def list_tar(path, with_conversations, passed_over, origins):
    """List the images of a tar, which are later read in place."""
    origins.add(path)
    files = {}
    end = 0                                       # of the last header
    try:
        # "r:" refuses compressed tars, of which no file could be read without all before it.
        with tarfile.open(path, "r:") as tar:
            for member in iter(tar.next, None):
                tar.members.clear()               # a list of a million would take a gigabyte
                if member.size < 0 or member.offset < end:
                    raise ValueError("a file has a size below 0")
                end = member.offset_data
                name = member.name.removeprefix("./")
                if member.isfile() and not member.issparse():
                    files[name] = (path, member.offset_data, member.size)
                elif not member.isdir() and not is_hidden(name):
                    passed_over.add("links, sparse or special files of a tar", name)
        # A whole tar ends in zeros; tarfile does not notice a cut between two files, nor what
        # follows the zeros. They fill up a record, of 10 KB by default.
        tail = read_bytes(path, tar.offset, 2**20)
        if tail[:512] != bytes(512):
            raise ValueError("cut short")
        if any(tail) or tar.offset + len(tail) < os.path.getsize(path):
            raise ValueError("bytes follow its end, such as a second tar; split it")
    # A chain of headers that have headers, and lengths beyond any memory, raise the last three.
    except (tarfile.TarError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"--data {path}: {advice_for_file(path, error)}") from None
    return list_files(path, files, SIDECAR_SUFFIXES, with_conversations, passed_over, origins)


def list_files(path, files, sidecar_suffixes, with_conversations, passed_over, origins):
    """List the images among files {name: (path, offset, size)}, by name, with their sidecars."""
    files = only_training_split(path, files, passed_over)
    images = []
    used = set()                                  # names of sidecars
    class_folders = {}                            # of those whose class it is: the first image
    for name in sorted(filter(is_image, files)):
        folder = os.path.dirname(name)
        sidecars = find_sidecars(files, name, sidecar_suffixes)
        used.update(sidecars.values())
        origins.update(files[sidecar][0] for sidecar in sidecars.values())
        with error_context(path, name):
            sidecars = read_sidecars(files, sidecars)
            record = parse_record(sidecars["json"]) if "json" in sidecars else {}
            label = None                          # conversations have none
            if not with_conversations:
                label = parse_label(record, sidecars)
                if label is None:
                    class_folders.setdefault(folder, name)
                    label = folder or None
            texts = parse_texts(record, sidecars, with_conversations)
        images.append(ListedImage(*files[name], name, label, texts))
    check_depths(path, class_folders)
    unused = [name for name in files if name not in used and not is_image(name)]
    count_unused(unused, sidecar_suffixes, passed_over)
    return images


def count_unused(names, sidecar_suffixes, passed_over):
    """Add to `passed_over` the files that are neither images nor read beside one."""
    for name in sorted(names):
        if is_hidden(name):
            continue
        suffix = os.path.splitext(name)[1].lower()
        if suffix in sidecar_suffixes:
            passed_over.add(f"{suffix} of no image", name)
        else:
            passed_over.add(suffix or "files without a suffix", name)


def list_records(path, with_conversations, passed_over, origins):
    """List the images of a .jsonl, one record a line; their paths are relative to its folder."""
    origins.add(path)
    images = []
    folder = os.path.dirname(path)
    for name, content in read_records(path):
        with error_context(path, name):
            record = parse_record(content)
            image = parse_image_path(record)
            label = None if with_conversations else parse_label(record, {})
            texts = parse_texts(record, {}, with_conversations, image is not None)
        if image is not None:
            images.append(ListedImage(os.path.join(folder, image), 0, -1, f"{name}: {image}",
                                      label, texts))
        elif with_conversations:
            images.append(ListedImage(None, 0, -1, name, label, texts))
        else:
            passed_over.add("conversations without an image", name)
    return images


def read_records(path):
    """Yield the name and the text of each line of a .jsonl, but for blank ones.

    A .json that is one array, as LLaVA has it, yields the name and the value of each record.
    """
    with open(path, "rb") as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"["):
            for number, record in enumerate(read_json_array(path), 1):
                yield f"record {number}", record
            return
        lines = iter(lambda: file.readline(LINE_BYTES), b"")
        for number, line in enumerate(lines, 1):
            if len(line) == LINE_BYTES:
                raise ValueError(f"--data {path}: line {number} has over {LINE_BYTES:,} bytes")
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield f"line {number}", line


def read_json_array(path):
    """Read a .json that is one array. Returns: list of values"""
    size = os.path.getsize(path)
    try:
        if size > ARRAY_BYTES:
            raise MemoryError
        with error_context(path, "array"):
            return json.loads(read_bytes(path, limit=ARRAY_BYTES))
    except MemoryError:
        raise ValueError(f"--data {path} has {size:,} bytes, too many to read at once; make it a "
                         f".jsonl: jq -c .[] {shlex.quote(path)} > x.jsonl") from None


def is_hidden(name):
    """True for what is hidden or in macOS's __MACOSX/."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or "__MACOSX" in parts


def is_image(name):
    """True for the name of an image that is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def find_sidecars(files, name, suffixes):
    """Find the .cls, .txt and .json of an image: those of v1.0.png are v1.0.cls or v1.cls.

    The key of WebDataset ends at the first dot, that of other sets at the last.
    Returns: dict of "cls", "txt" and "json" to the name of a file
    """
    base = os.path.basename(name)
    last_dot = os.path.splitext(name)[0]
    first_dot = name.removesuffix(base) + base.split(".")[0]
    sidecars = {}
    for suffix in suffixes:
        for key in (first_dot, last_dot):         # the last one found remains
            if key + suffix in files:
                sidecars[suffix[1:]] = key + suffix
    return sidecars


def read_sidecars(files, sidecars):
    """Read what find_sidecars has found. Returns: dict of "cls", "txt" and "json" to bytes"""
    contents = {}
    for kind, name in sidecars.items():
        try:
            contents[kind] = read_bytes(*files[name], limit=SIDECAR_BYTES)
        except ValueError as error:
            raise ValueError(f"has {name}, which {error}") from None
    return contents


@contextlib.contextmanager
def error_context(path, name):
    """Turn what malformed sidecars and records raise into a ValueError that names the image."""
    try:
        yield
    # JSON of any structure
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        if isinstance(error, RecursionError):
            error = "is nested too deeply"
        raise ValueError(
            f"--data {path}: {shown(name)} {error}; .cls must be an integer >= 0, .txt UTF-8, "
            ".json(l) {label/class, caption(s)/text, image, "
            'conversations: [{"from": "human" or "gpt", "value": text}, ...]}') from None


# ---------------------------------------------------------------- layouts and advice
def split_of(folder):
    """Return train, val, dev or test for the name of a folder such as Training_set or val2017."""
    pattern = r"(train|val|dev|test)(ing|id|idation)?[-_ ]?(set|split|data|images|\d+)?"
    match = re.fullmatch(pattern, folder.lower())
    return None if match is None else match[1]


def find_splits(files):
    """Find folders such as train/ and val/ beside each other in a folder or tar.

    One folder named test may be a class; two are not.
    Returns: dict of the folder in which they lie, "" or one that ends in "/", to a dict of "train",
        "val", "dev" or "test" to the name of its folder
    """
    splits = {}
    for folder in sorted({os.path.dirname(name) for name in filter(is_image, files)}):
        parent = ""
        for part in folder.split("/"):
            if split_of(part):
                splits.setdefault(parent, {}).setdefault(split_of(part), part)
            parent += f"{part}/"
    return {parent: names for parent, names in splits.items() if len(names) > 1}


def class_folders_in(files, prefix):
    """Return the folders of images in the folder `prefix`, which would be the classes."""
    images = [name for name in filter(is_image, files) if name.startswith(prefix)]
    return {os.path.dirname(name.removeprefix(prefix)) for name in images}


def only_training_split(path, files, passed_over):
    """Take the files of train/ alone, if it lies beside val/ or test/ with the same classes.

    Returns: files, by their names within train/
    Raises: ValueError if splits lie beside each other in another way, and would become classes
    """
    splits = find_splits(files)
    if not splits:
        return files
    parent, names = next(iter(splits.items()))
    train = names.get("train", next(iter(names.values())))
    prefix = f"{parent}{train}/"
    classes = class_folders_in(files, prefix) - {""}
    same_classes = all(class_folders_in(files, f"{parent}{name}/") == classes
                       for name in names.values())
    if len(splits) > 1 or "train" not in names or not classes or not same_classes:
        where = f" in {shown(parent[:-1])}" if parent else ""
        raise ValueError(f"--data {path} holds {' and '.join(sorted(names.values()))} side by side"
                         f"{where}, which would be mixed; {give_folder(path, prefix[:-1])}")

    kept = {}
    for name, place in files.items():
        if name.startswith(prefix):
            kept[name.removeprefix(prefix)] = place
        elif is_image(name):
            passed_over.add(f"images outside {prefix}", name)
    return kept


def check_depths(path, class_folders):
    """Raises: ValueError if classes lie at several depths; some are then none, or parts of one.

    class_folders: the folders that are classes, each with the name of an image in it
    """
    by_depth = {}                                 # depth -> folders
    for folder in class_folders:
        depth = folder.count("/") + 1 if folder else 0
        by_depth.setdefault(depth, []).append(folder)
    if len(by_depth) < 2:
        return
    examples = [shown(class_folders[min(by_depth[depth])]) for depth in sorted(by_depth)]
    most = max(by_depth.values(), key=len)
    meant = os.path.commonpath([os.path.dirname(folder) for folder in most])
    if meant and len(most) > len(class_folders) / 2:
        advice = give_folder(path, meant)
    else:
        advice = "move or remove those at one of the depths"
    raise ValueError(f"--data {path}: images lie at several depths ({', '.join(examples)}), but "
                     f"class folders must be at one; {advice}")


def give_folder(path, folder):
    """Return the advice to give a folder inside `path`, which is a folder or a tar."""
    if os.path.isdir(path):
        return f"give --data {shlex.quote(os.path.join(path, folder))}"
    return f"unpack it (tar -xf {shlex.quote(path)}) and give --data {shlex.quote(folder)}"


# What to type for files that are not read: the suffixes or the first bytes, and the command, in
# which {path} is a word of the shell and {text} a text of Python. An .npz is a zip, so it is first.
SAVE_ROWS = (
    "python -c \"import os, datasets; "
    "[os.makedirs('images/%s' % x['label'], exist_ok=True) or x['image'].save('images/%s/%d.png' "
    "% (x['label'], i)) for i, x in enumerate({rows})]\"")
SAVE_ARRAY = (
    "mkdir images; python -c \"import numpy as np; from PIL import Image; "
    "[Image.fromarray(np.uint8(np.rint(x * (255 if x.dtype.kind == 'f' else 1))))"
    ".save('images/%07d.png' % i) for i, x in enumerate(np.load({text}){array})]\"")
CONVERSIONS = [
    ((".gz", ".tgz"), b"\x1f\x8b", "gunzip < {path} > images.tar"),
    ((".bz2",), b"BZh", "bunzip2 < {path} > images.tar"),
    ((".xz",), b"\xfd7zXZ", "unxz < {path} > images.tar"),
    ((".zst",), b"\x28\xb5\x2f\xfd", "unzstd < {path} > images.tar"),
    ((".npy",), b"\x93NUMPY", SAVE_ARRAY.replace("{array}", "")),
    ((".npz",), None, SAVE_ARRAY.replace("{array}", "['arr_0']")),
    ((".zip",), b"PK\x03\x04", "python -m zipfile -e {path} images"),
    ((".parquet",), b"PAR1", SAVE_ROWS.replace(
        "{rows}", "datasets.load_dataset('parquet', data_files={text}, split='train')")),
    ((".arrow",), b"ARROW1", SAVE_ROWS.replace("{rows}", "datasets.Dataset.from_file({text})")),
]


def conversion(path):
    """Return the command that makes a tar or a folder of images of a file, or None."""
    with open(path, "rb") as file:
        start = file.read(16)
    for suffixes, magic, command in CONVERSIONS:
        if path.lower().endswith(suffixes) or (magic and start.startswith(magic)):
            return command.format(path=shlex.quote(path), text=repr(path))
    return None


def advice_for_file(path, error):
    """Say what to do with a file that is no whole tar, of which tarfile says `error`."""
    if is_image(os.path.basename(path)):
        return "one image; give its folder, or a tar"
    command = conversion(path)
    if command is not None:
        return f"no uncompressed tar, folder or .jsonl; make one by: {command}"
    return f"{error}; a file must be a .jsonl or a tar, whole and uncompressed"


def advice_without_images(path, passed_over):
    """Say what a path holds instead of images, and what to do with it."""
    advice = ""
    if passed_over.counts:
        advice = f"; it holds {describe_passed_over(passed_over.summary())}"
    if ".tar" in passed_over.counts:
        advice += f"; give shards as {path}/*.tar"
    elif ".arrow" in passed_over.counts:          # of datasets' save_to_disk
        train = os.path.join(path, "train")
        rows = f"datasets.load_from_disk({(train if os.path.isdir(train) else path)!r})"
        advice += f"; make them by: {SAVE_ROWS.replace('{rows}', rows)}"
    elif ".parquet" in passed_over.counts:
        rows = f"datasets.load_dataset({path!r}, split='train')"
        advice += f"; make them by: {SAVE_ROWS.replace('{rows}', rows)}"
    return advice


# ---------------------------------------------------------------- labels and texts
def parse_record(content):
    """Parse a .json or a line of a .jsonl, unless that is done. Returns: dict"""
    record = json.loads(content) if isinstance(content, bytes) else content
    if not isinstance(record, dict):
        raise ValueError(f"must be a json object, not a {type(record).__name__}")
    return record


def parse_image_path(record):
    """Return the path of a record's image, or None for a conversation without an image."""
    image = record.get("image") or []
    paths = image if isinstance(image, list) else [image]         # Scale-RAE has lists of one path
    if not paths and "conversations" in record:
        return None
    if len(paths) != 1 or not isinstance(paths[0], str):
        raise ValueError(f"images {reprlib.repr(paths)} must be one path")
    return paths[0]


def parse_label(record, sidecars):
    """Return the class of an image: that of its .cls or of its record, or None."""
    if "cls" in sidecars:
        label = int(sidecars["cls"].decode("utf-8-sig"))
    elif "label" in record:
        label = record["label"]
    else:
        label = record.get("class")
    is_class_id = type(label) is int and label >= 0               # True and False are not
    is_name = isinstance(label, str) and label.strip() != ""
    if not (is_class_id or is_name or label is None):
        raise ValueError(f"label {reprlib.repr(label)} must be an integer >= 0 or a name")
    return label


def parse_texts(record, sidecars, with_conversations, has_image=True):
    """Return the texts of an image, one of which is chosen whenever it is loaded.

    Without conversations, this is one string of all captions, empty if there are none.
    With conversations, it is one conversation or all captions, [] if there are none.
    """
    captions = parse_captions(record, sidecars)
    if not with_conversations:
        return ["\n".join(captions)]
    if "conversations" in record:
        return [parse_conversation(record["conversations"], has_image)]
    if count_image_marks(captions) > 0:
        raise ValueError("captions must not hold <image>")
    return captions


def parse_captions(record, sidecars):
    """Return the captions of an image: the lines of its .txt, else those of its record.

    Blank lines are left out. If all are blank, the one caption is "": learn it unconditionally.
    """
    if "txt" in sidecars:
        captions = sidecars["txt"].decode("utf-8-sig").split("\n")
    else:
        captions = record.get("captions", [])
        if not isinstance(captions, list):
            raise ValueError(f"captions {reprlib.repr(captions)} must be a list")
        if "caption" in record:
            captions = captions + [record["caption"]]
        elif "text" in record:
            captions = captions + [record["text"]]
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"caption {reprlib.repr(caption)} must be a string")
    stripped = [caption.strip() for caption in captions]
    not_blank = [caption for caption in stripped if caption]
    if captions and not not_blank:
        return [""]
    return not_blank


def parse_conversation(turns, has_image):
    """Convert turns {"from": "human", "value": text} to pairs (role, text), without "system".

    An image comes first if no turn says where <image> is.
    """
    messages = []
    for turn in turns:
        if turn["from"] != "system":
            messages.append((ROLES.get(turn["from"]), turn["value"]))
    image_marks = count_image_marks(text for role, text in messages)
    allowed_marks = 1 if has_image else 0

    asking = {role for role, text in messages[0::2]}
    answering = {role for role, text in messages[1::2]}
    alternating = asking == {"user"} and answering == {"assistant"} and len(messages) % 2 == 0
    if not alternating or image_marks > allowed_marks:
        raise ValueError("conversations must be human, gpt, human, gpt ... "
                         f"with at most {allowed_marks} <image>")
    if image_marks < allowed_marks:
        messages[0] = ("user", f"<image>\n{messages[0][1]}")
    return messages


def count_image_marks(texts):
    """Count <image> in texts. Raises: ValueError for half of a surrogate pair, which is no text."""
    return "\n".join(texts).encode().count(b"<image>")
