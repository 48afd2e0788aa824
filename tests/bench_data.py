"""Time and memory of data with very many images, on files that this script makes and deletes.

    python tests/bench_data.py --kind tar --n 1000000
    python tests/bench_data.py --kind tar --n 20000 --shards 3650       # 73 million

kind: tar (of 512 n bytes), jsonl (of 70 n bytes), folder (n files in 1,000 class folders) or
captions (the same with n .txt, as of stage 3). The images are empty: they are listed and chosen,
but not decoded. All shards are links to one file, whose index is mapped for each of them. Indexes
go to a temporary folder.
"""
import argparse
import functools
import io
import json
import multiprocessing
import os
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import index  # noqa: E402
from data import count_sources, open_data  # noqa: E402

CLASSES = 1000
ROWS_OF_WORKER = 50_000


def image_name(i):
    """As of ImageNet."""
    return f"n{i % CLASSES:08}/n{i % CLASSES:08}_{i:08}.JPEG"


def write_tar(path, n):
    with tarfile.open(path, "w") as archive:
        for i in range(n):
            archive.addfile(tarfile.TarInfo(image_name(i)), io.BytesIO())


def write_jsonl(path, n):
    with open(path, "w") as file:
        for i in range(n):
            name = image_name(i)
            file.write(json.dumps({"image": name, "label": name.split("/")[0]}) + "\n")


def write_folder(path, n):
    for i in range(CLASSES):
        (path / image_name(i)).parent.mkdir(parents=True)
    for i in range(n):
        (path / image_name(i)).touch()
    for folder in path.iterdir():
        os.utime(folder, (0, 0))


def write_captions(path, n):
    write_folder(path, n)
    for i in range(n):
        caption = (path / image_name(i)).with_suffix(".txt")
        caption.write_text(f"photograph number {i}")
        os.utime(caption, (0, 0))
    for folder in path.iterdir():
        os.utime(folder, (0, 0))


def no_chat(scene, rng):
    """A function of scenes, of which there are none: it says that conversations are wanted."""


def seconds(call, *arguments, **options):
    """Time a call. Returns: seconds, what the call returns"""
    start = time.perf_counter()
    result = call(*arguments, **options)
    return time.perf_counter() - start, result


def own_bytes():
    """Memory of this process that it has written to, and shares with no other. Linux."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return 1024 * int(line.split()[1])


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def read_rows(source, start, queue):
    """What a process that loads images does, without loading them."""
    before = own_bytes()
    began = time.perf_counter()
    for number in range(start, start + ROWS_OF_WORKER):
        source.images[source.order.index_of(number)]
    took = time.perf_counter() - began
    queue.put((took / ROWS_OF_WORKER, before, own_bytes(), resident_bytes()))


def measure_worker(source):
    queue = multiprocessing.get_context("fork").Queue()
    arguments = (source, len(source) // 2, queue)
    worker = multiprocessing.get_context("fork").Process(target=read_rows, args=arguments)
    worker.start()
    row_seconds, before, after, resident = queue.get()
    worker.join()
    print(f"a worker that reads {ROWS_OF_WORKER:,} rows: {1e6 * row_seconds:.1f} us a row; memory "
          f"of its own {before / 1e6:.1f} MB at first, {after / 1e6:.1f} MB then; "
          f"resident {resident / 1e6:.0f} MB")


WRITE = {"tar": write_tar, "jsonl": write_jsonl, "folder": write_folder, "captions": write_captions}


def main(args):
    print(f"{args.shards} x {args.kind} of {args.n:,} images; {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        os.environ["NANORAE_CACHE"] = f"{folder}/cache"
        suffix = f".{args.kind}" if args.kind in ("tar", "jsonl") else ""
        path = Path(folder) / f"images{suffix}"
        WRITE[args.kind](path, args.n)
        os.utime(path, (0, 0))                    # what is new has no index yet

        paths = [str(path)]
        for shard in range(1, args.shards):
            paths.append(f"{folder}/{shard:05}{suffix}")
            os.symlink(path, paths[-1])

        memory_before = resident_bytes()
        chat = no_chat if args.kind == "captions" else None
        hold_out = min(1000, args.n // 10)
        open_images = functools.partial(open_data, size=256, hold_out=hold_out, chat=chat)
        first_seconds, _ = seconds(open_images, str(path))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory_before
        print(f"open_data, which lists: {first_seconds:.2f} s, "
              f"{1e6 * first_seconds / args.n:.1f} us an image; peak {peak / 1e6:.0f} MB")
        for file in Path(folder, "cache").glob("*.index"):
            size = file.stat().st_size
            print(f"index: {size / 1e6:.1f} MB, {size / args.n:.0f} bytes an image")

        index.tables.clear()                      # as in another process
        count_seconds, _ = seconds(count_sources, paths, chat is not None)
        train_seconds, train = seconds(open_images, paths, split="train")
        val_seconds, _ = seconds(open_images, paths, split="val")
        print(f"with the index: count_sources {count_seconds:.3f} s, then open_data of train "
              f"{train_seconds:.3f} s, of val {val_seconds:.3f} s")
        identity_seconds, _ = seconds(train.identity)
        summary_seconds, _ = seconds(train.summary)
        print(f"identity() {identity_seconds:.3f} s, summary() {summary_seconds:.3f} s")
        measure_worker(train.sources[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(WRITE), default="tar")
    parser.add_argument("--n", type=int, default=1_000_000, help="Number of images")
    parser.add_argument("--shards", type=int, default=1, help="Number of times that it is read")
    parser.add_argument("--dir", help="Folder for the files; default: that of the system")
    main(parser.parse_args())
