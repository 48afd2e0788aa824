"""What the evaluations of all stages share: images to measure, what training has seen of them,
checks, warnings and reports. The numbers themselves are in metrics.py.
"""
import sys
import zipfile
from pathlib import Path

import torch

import progress
import storage
from data import Arrays, open_data, parse_specs
from release import training_data

BUILT_IN = ("shapes", "text")    # worlds of data.py, whose images never end
RESULT_SUFFIXES = (".json", ".jsonl", ".txt")      # of a line of JSON


# ---------------------------------------------------------------------------- images
def is_npz(specs):
    """True if --data or --samples names one .npz."""
    return len(specs) == 1 and (specs[0].endswith(".npz") or zipfile.is_zipfile(specs[0]))


def check_paths(specs, flag):
    """Raise FileNotFoundError if --data or --samples names a path that does not exist."""
    paths, _ = parse_specs(specs)
    for paths_of_source in paths.values():
        for path in paths_of_source:
            if path not in BUILT_IN and not Path(path).exists():
                raise FileNotFoundError(f"{flag} {path} does not exist; give an .npz, a folder or "
                                        f"tars")


def open_images(specs, size=None, hold_out=0, objects=(1, 2, 3, 4)):
    """The images that --data or --samples names: Arrays or ImageData of the held-out split.

    size: side to centre-crop to, pixels; None: as they are. An .npz is never cropped.
    hold_out: number of images that training held out; 0: all. objects: counts in scenes of shapes.
    Raises FileNotFoundError, ValueError.
    """
    if not is_npz(specs):
        return open_data(specs, size, split="val", hold_out=hold_out, objects=objects)
    check_paths(specs, "--data")
    return Arrays(specs[0])


def report_data(data, rank):
    """Say, on stderr, which images are read."""
    if rank == 0:
        print(data.describe(), file=sys.stderr)


# ---------------------------------------------------------------------------- reference
# What training has seen of the images that a model is compared with.
HELD_OUT, TRAIN, OVERLAP, OTHER = "held out", "train", "may overlap train", "other data"


def choose_reference(args, state, source):
    """The specs and hold-out of --data and --hold_out, by default of what training held out.

    args: data and hold_out, each None if it was not given. state: dict of the checkpoint, from the
    file `source`.
    """
    specs, hold_out = training_data(state, source)
    if args.data:
        return args.data, args.hold_out or 0
    if not specs:
        raise ValueError(f"{source} does not say what it was trained on; give --data")
    return specs, hold_out if args.hold_out is None else args.hold_out


def split_of(data, specs, hold_out, state, source, is_of_other_stage=False):
    """HELD_OUT, TRAIN, OVERLAP or OTHER: what training has seen of the images of a reference.

    data: ImageData of them; None, of statistics. specs, hold_out, state, source: as in
    choose_reference(). is_of_other_stage: whether the checkpoint's hold-out is not that of the
    model, as of a DiT's checkpoint for its decoder.
    Raises ValueError if training held out fewer images than --hold_out.
    """
    trained_specs, trained_hold_out = training_data(state, source)
    files = paths_of_files(specs)
    trained_files = paths_of_files(trained_specs)
    if not files:                                      # training never sees these built-in images
        return HELD_OUT
    if not overlap(files, trained_files):
        return OTHER
    if files != trained_files:                         # then it is not known which were held out
        return OVERLAP
    if hold_out > trained_hold_out:
        raise ValueError(f"--hold_out {hold_out} is more than the {trained_hold_out} images that "
                         f"the training of {source} held out: it has seen the others; give at "
                         f"most --hold_out {trained_hold_out}, or other images by --data")
    if hold_out == 0:
        return TRAIN
    has_changed = state.get("data") not in (None, data.identity())
    return OVERLAP if has_changed or is_of_other_stage else HELD_OUT


def paths_of_files(specs):
    """The paths that --data names, without the built-in worlds: a set."""
    if not specs or is_npz(specs):
        return set(specs)
    paths, _ = parse_specs(specs)
    names = [name for of_source in paths.values() for name in of_source]
    return {Path(name).resolve() for name in names if name not in BUILT_IN}


def overlap(files, others):
    """Whether a path of one set is in the other set, or inside a folder that is."""
    for file in files:
        for other in others:
            if Path(file).is_relative_to(other) or Path(other).is_relative_to(file):
                return True
    return False


def warn_of_split(split):
    """Warn, on stderr, of numbers of images that the model knows."""
    if split == TRAIN:
        print("warning: the model was trained on the reference images, so the numbers look too "
              "good; give other images by --data, or train with --hold_out N", file=sys.stderr)
    if split == OVERLAP:
        print("warning: the training may have seen some of the reference images: their folder is "
              "in or around its --data, has changed since, or was held out of another stage; then "
              "the numbers look too good", file=sys.stderr)


# ---------------------------------------------------------------------------- checks and reports
def prepare_output(path, suffixes=RESULT_SUFFIXES):
    """Make the folder of an output file: what fails, fails before the work. None: no output.

    suffixes: that it can have. Others would be a slip that overwrites a checkpoint or images.
    """
    if path is None:
        return
    storage.check_out(path, "the output")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    storage.check_suffix(path, suffixes, "the output")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def check_n(n, available):
    """Raise ValueError unless n images can be taken of those of a reference, and compared."""
    if n > available:
        raise ValueError(f"--n {n} is more than the {available} reference images; try --n "
                         f"{available}")
    if n < 2:
        raise ValueError(f"{n} image is too few to measure a distance; give at least 2")


def check_eval_side(args, val, side):
    """Raise ValueError if a training run's images, of `side` pixels, are too small to evaluate."""
    is_built_in = [val.is_built_in(source) for source in range(len(val.domains))]
    smallest = 32 if any(is_built_in) else 11          # for read_scene(); for the window of SSIM
    if args.eval_every and side < smallest:
        raise ValueError(f"images of {side} pixels are too small to evaluate; make them at least "
                         f"{smallest}, by --size or --decoder_patch, or give --eval_every 0")


def warn_of_few_images(n, channels, protocol):
    """Warn, on stderr, of a Fréchet distance that says less than it seems to.

    n: number of images. channels: of the features. protocol: number of images with which papers
    use this reference.
    """
    reasons = []
    if n < 10_000:
        reasons.append(f"distances of {n} images come out too large")
    if n <= channels:                                  # the covariance is singular
        reasons.append(f"{n} images give no full covariance of {channels} features")
    if n < 100:                                        # fewer than 10 for each of IS's ten parts
        reasons.append(f"precision, recall, KID and Inception Score of {n} images are mostly noise")
    if n != protocol:
        reasons.append(f"the reference's protocol has {protocol} images, not {n}")
    for reason in reasons:
        print(f"warning: {reason}; compare with numbers of the same n only", file=sys.stderr)


def environment(device):
    """What ran: commit, version of torch and device, to be kept with results."""
    return dict(commit=progress.git_commit(), torch=torch.__version__, device=device.type)


def report(results, seconds, path=None):
    """Print results as a table and as a line of JSON, and write that line to the file `path`."""
    for key, value in results.items():
        text = f"{value:.4f}" if isinstance(value, float) else f"{value}"
        print(f"{key:>24}  {text}")
    print(f"{'seconds':>24}  {seconds:.1f}")
    line = storage.to_json(results)                    # null for the PSNR of equal images
    print(line)
    if path:
        storage.write_whole(path, lambda f: f.write(f"{line}\n".encode()))
