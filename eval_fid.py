"""Stage 2's numbers: FID and its relatives, and verified accuracy on the built-in world.

    python eval_fid.py                                             the shipped model
    python eval_fid.py --ckpt runs/dit/last.pt --n 720 --guidance 1
    python eval_fid.py --release imagenet256 --data imagenet/val --n 10000
    python eval_fid.py --samples guided.npz --data VIRTUAL_imagenet256_labeled.npz
    python eval_fid.py --save_stats photos.npz --data photos/ --size 256

The images are drawn from a model, or exist already: --samples. They are compared with --data:
images, or an .npz of statistics, written by --save_stats, ADM's suite or pytorch-fid. Prints a
table and a line of JSON. metrics.py says what the numbers are and under which protocol papers
report them. train_dit.py calls evaluate_generation() on its EMA weights, so there is one road to
each number.
"""
import hashlib
import math
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import evaluation
import metrics
import progress
import run_flags
import runtime
import sample
import storage
from data import NPZ_ERRORS, Arrays, load_images, open_data, read_array_header
from evaluation import BUILT_IN
from metrics import KEEP_REFERENCES, KEEP_SAMPLES, EncoderFeatures, FeatureSet
from run_flags import at_least

# What a FID is computed from, and by. They stand here, too, for those who look for them here.
Moments, distance = metrics.Moments, metrics.distance

MODEL_N = 720          # images of a model: 20 for each of the 36 classes of the built-in world
PROTOCOL_N = 50_000    # samples that papers compare with a reference of as many images or more
# The built-in worlds never end. As many of their images are taken as there are samples; for
# --save_stats, BUILT_IN_N.
BUILT_IN_N = 10_000
BUILT_IN_SIZE = 64     # side, pixels

# Flags that do something without a model. The others say how to draw.
FILE_FLAGS = ("samples", "save_stats", "data", "size", "n", "batch", "features", "inception", "out")


# ---------------------------------------------------------------------------- generation
def evaluate_generation(model, rae, val, args, n, rank=0, world=1, batch=72, weak=None,
                        dtype="fp32", features=None, reference=None):
    """Distances of n generated images to n held-out ones, and verified accuracy on the shapes.

    model: DiT in eval mode. rae: with its encoder. val: ImageData of the held-out split, whose
    first n images are the reference. args: sampling flags. weak: DiT of AutoGuidance. dtype: of
    the matmuls that draw.
    features: FeatureNetwork of the distances; default: the RAE's own encoder. For another one,
    metrics.feature_network("dinov2-s").to(device).
    reference: a merged FeatureSet; then val may be None.
    Labels are balanced: image i has class i % num_classes. Returns a dict, the same on all
    processes.
    """
    if features is None:
        features = EncoderFeatures(rae.encoder)
    fake = FeatureSet(features, KEEP_SAMPLES)
    real = FeatureSet(features, KEEP_REFERENCES)       # stays empty if there is a reference
    is_verified = val is not None and val.is_shapes    # read_scene() can read nothing else
    counts = torch.zeros(3, dtype=torch.float64)       # right colour, right class, unsure
    batches = runtime.split_numbers(n, batch, rank, world)
    for numbers in progress.progress_bar(batches, "evaluate"):
        labels = [number % model.num_classes for number in numbers]
        images = sample.generate(model, rae, labels, args, numbers, weak, dtype)       # b H W 3
        fake.add(images, numbers)
        if reference is None:
            real.add(load_images(val, numbers), numbers)
        if is_verified:
            counts += metrics.verify(images, labels)
    fake.merge()
    if reference is None:
        reference = real.merge()

    results = dict(n=n, labels="balanced", guidance=args.guidance,
                   sampling_steps=args.sampling_steps, solver=args.solver)
    results |= runtime.on_rank_0(lambda: metrics.compare(reference, fake))
    right_colour, right_class, unsure = (runtime.all_sum(counts) / n).tolist()
    if is_verified:
        results["right_colour"] = right_colour
        results["right_colour_and_shape"] = right_class
        results["unsure"] = unsure
    return results


# ---------------------------------------------------------------------------- saved statistics
def save_statistics(path, feature_set):
    """Write a merged FeatureSet to an .npz, with ADM's names for means and covariances."""
    arrays = dict(
        mu=feature_set.pooled.mean,                    # f
        sigma=feature_set.pooled.cov,                  # f f
        rows=feature_set.features,                     # k f, for precision, recall and KID
        n=feature_set.n,
        side=feature_set.image_size,                   # (H, W)
        features=feature_set.network.name,
        sha1=feature_set.sha1)                         # of the images
    if feature_set.spatial.n > 0:                      # of Inception, for sFID
        arrays["mu_s"] = feature_set.spatial.mean
        arrays["sigma_s"] = feature_set.spatial.cov
    storage.write_whole(path, lambda f: np.savez(f, **arrays))


# Statistics in an .npz: number of dimensions, and kinds of numbers in NumPy's letters.
STATISTICS = {"mu": (1, "f"), "sigma": (2, "f"), "mu_s": (1, "f"), "sigma_s": (2, "f"),
              "rows": (2, "f"), "n": (0, "iu"), "side": (1, "iu"), "features": (0, "U"),
              "sha1": (0, "U")}
LARGEST_ARRAY = 2 ** 28          # bytes: a covariance of 5,792 features; Inception has 2048


def read_statistics(path):
    """The arrays of STATISTICS in an .npz, by name; none of them if mu or sigma is missing.

    Raises ValueError for arrays that can't be statistics.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in STATISTICS:                    # ADM's file has 2 GB of images as well
                if f"{name}.npy" in archive.namelist():
                    arrays[name] = read_array(archive, name)
    except NPZ_ERRORS as error:
        raise ValueError(f"{path} has statistics that can't be read ({error}); copy or make them "
                         f"again") from error
    if "mu" not in arrays or "sigma" not in arrays:
        return {}
    check_statistics(arrays, path)
    return arrays


def read_array(archive, name):
    """One array of an .npz. Its header is checked before memory is taken. Raises ValueError."""
    num_dimensions, kinds = STATISTICS[name]
    with archive.open(f"{name}.npy") as f:
        shape, _, dtype = read_array_header(f)
    if len(shape) != num_dimensions or dtype.kind not in kinds or min(shape, default=1) < 1:
        raise ValueError(f"{name} of {shape}, {dtype}")
    if math.prod(shape) * dtype.itemsize > LARGEST_ARRAY:
        raise ValueError(f"{name} of {shape}, more than {LARGEST_ARRAY} bytes")
    with archive.open(f"{name}.npy") as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def check_statistics(arrays, path):
    """Raise ValueError unless arrays of read_statistics() are a mean, a covariance, and features of
    one network.
    """
    problem = None
    for mean_name, cov_name in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean_name not in arrays or cov_name not in arrays:
            continue
        mean, cov = arrays[mean_name], arrays[cov_name]
        f = len(mean)
        if cov.shape != (f, f):
            problem = f"{cov_name} of {cov.shape} for {f} features"
        elif not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            problem = f"{mean_name} or {cov_name} with numbers that are not finite"
        elif cov.diagonal().min() < 0:
            problem = f"{cov_name} with negative variances"
        elif np.abs(cov - cov.T).max() > 1e-3 * np.abs(cov).max():     # more than rounding
            problem = f"{cov_name} that is not symmetric"
    if "rows" in arrays and arrays["rows"].shape[1] != len(arrays["mu"]):
        problem = f"rows of {arrays['rows'].shape} for {len(arrays['mu'])} features"
    elif "rows" in arrays and not np.isfinite(arrays["rows"]).all():
        problem = "rows with numbers that are not finite"
    if "n" in arrays and arrays["n"] < 2:
        problem = f"n {arrays['n']}, less than 2 images"
    if "side" in arrays and arrays["side"].shape != (2,):
        problem = f"side of {arrays['side'].shape}, not height and width"
    if problem is not None:
        raise ValueError(f"{path} has {problem}; copy or make the statistics again")


def load_statistics(path, network):
    """The FeatureSet of statistics in an .npz, or None if it has no mu and sigma.

    path: a file of save_statistics(), or of ADM's suite or pytorch-fid, whose features are those
    of Inception. Raises ValueError if `network` is another network than that of the file, or the
    arrays can't be statistics.
    """
    arrays = read_statistics(path)
    if not arrays:
        return None
    name = str(arrays.get("features", "inception"))
    channels = len(arrays["mu"])
    if (name, channels) != (network.name, network.channels):
        raise ValueError(f"{path} has statistics of {channels} features of {name}, not the "
                         f"{network.channels} of {network.name}; give --features {name}, or other "
                         f"statistics")

    feature_set = FeatureSet(network, keep=0)
    feature_set.n = int(arrays["n"]) if "n" in arrays else None        # the others do not say
    n = feature_set.n or 2             # any n will do: only mean and covariance are read later
    set_moments(feature_set.pooled, n, arrays["mu"], arrays["sigma"])
    if "mu_s" in arrays and "sigma_s" in arrays:
        set_moments(feature_set.spatial, n, arrays["mu_s"], arrays["sigma_s"])
    feature_set.features = torch.empty(0)
    if "rows" in arrays:
        feature_set.features = torch.from_numpy(arrays["rows"].astype(np.float32))
    if "side" in arrays:
        feature_set.image_size = tuple(arrays["side"].tolist())
    if "sha1" in arrays:
        feature_set.sha1 = str(arrays["sha1"])
    else:                                              # of other programs: what they are, instead
        content = arrays["mu"].tobytes() + arrays["sigma"].tobytes()
        feature_set.sha1 = hashlib.sha1(content).hexdigest()[:12]
    return feature_set


def set_moments(moments, n, mean, cov):
    """Give empty Moments the mean f and the covariance f f, two arrays, of n features."""
    mean = torch.from_numpy(mean.astype(np.float64))
    scatter = torch.from_numpy(cov.astype(np.float64)) * (n - 1)
    moments.combine(n, mean, scatter)


def load_reference(specs, size, network, n=None, rank=0, world=1, batch=72):
    """The FeatureSet of --data: saved statistics, or those of its images.

    size: side to centre-crop images to, pixels; None: as they are. n: images; None: all.
    """
    statistics = None
    has_images = True
    if evaluation.is_npz(specs) and zipfile.is_zipfile(specs[0]):
        statistics = load_statistics(specs[0], network)
        has_images = Arrays.contains_images(specs[0])
    if statistics is not None and (len(statistics.features) > 0 or not has_images):
        return statistics

    data = evaluation.open_images(specs, size)
    evaluation.report_data(data, rank)
    n = min(n or len(data), len(data))
    measured = metrics.measure_images(data, n, network, KEEP_REFERENCES, rank, world, batch)
    if statistics is None:
        return measured
    # ADM's file has statistics of all of ImageNet, and 10,000 images for precision and recall.
    statistics.features = measured.features
    statistics.image_size = measured.image_size
    return statistics


# ---------------------------------------------------------------------------- flags
def parse_args(argv=None):
    p = run_flags.Parser(__doc__, sample.MODEL_DEFAULTS)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--samples", nargs="+",
                        help="Images to measure in place of a model's: a folder, tars, or an .npz "
                             "with arr_0, n H W 3.")
    source.add_argument("--save_stats", metavar="X.npz",
                        help="File to write the statistics of --data to, which is then a --data "
                             "itself.")
    p.add_argument("--data", nargs="+",
                   help="Reference: images, or an .npz of statistics (default: what the model was "
                        "trained on).")
    p.add_argument("--size", type=at_least(1),
                   help="Side to centre-crop the images of --data to, in pixels, for --samples and "
                        "--save_stats (default: as they are).")
    p.add_argument("--hold_out", type=at_least(0),
                   help="Images that training held out, of which the reference is taken (default: "
                        "as in training; 0, any image, with --data).")
    p.add_argument("--n", "--num_images", type=at_least(2),
                   help=f"Images to measure (default: all; of a model at most {MODEL_N}).")
    p.add_argument("--features",
                   help="Features of the distances: inception, fd-dinov2 or the name of an encoder "
                        "(default: the model's own encoder; inception for files and --release).")
    p.add_argument("--inception", metavar="PATH",
                   help=f"File {metrics.INCEPTION_FILE} (default: download once).")
    p.add_argument("--out", type=Path, help="File to write the line of JSON to as well.")
    sample.add_model_flags(p, text=False)
    return p.parse(argv, resolve, lambda args: sample.check_model_flags(args, text=False))


def check_given_flags(args):
    """Raise ValueError for flags that contradict each other. args: None where none was given."""
    has_files = args.samples is not None or args.save_stats is not None
    if has_files:
        source = "--samples" if args.samples else "--save_stats"
        for name in run_flags.given_flags(args):
            if name not in FILE_FLAGS:
                raise ValueError(f"--{name} does nothing with {source}; leave it out")
    if has_files and not args.data:
        raise ValueError("--samples and --save_stats need --data, the reference")
    if args.size and not has_files:
        raise ValueError("--size does nothing with new images, which have the size that the model "
                         "draws; leave it out")
    if args.release and not args.data:
        raise ValueError(f"--release {args.release} needs --data: a folder or tars of ImageNet, "
                         f"its reference images")
    metrics.check_feature_flags(args)


def resolve(args):
    """A copy of args with defaults filled in. Raises ValueError as check_given_flags()."""
    check_given_flags(args)
    args = sample.resolve_model_flags(args, text=False)
    uses_inception = args.samples or args.save_stats or args.release or args.inception
    if args.features is None and uses_inception:       # as papers do
        args.features = "inception"
    return args


# ---------------------------------------------------------------------------- main
# The three sources of images. Each function returns results, the feature network, and the
# FeatureSet of a reference that was given as such, or None.
def evaluate_model(args, features, rank, world, device):
    """Draw images from a model, and compare them with held-out images or with --data."""
    uses_npz = args.data is not None and evaluation.is_npz(args.data)
    val, statistics = None, None
    if args.data and not uses_npz:
        # Fail before a model is loaded; only that tells the size.
        val = open_data(args.data, None, split="val", hold_out=args.hold_out or 0, objects=1)

    model, rae, state, weak = sample.load_models(args, device, with_encoder=True)
    if features is None:
        features = EncoderFeatures(rae.encoder)
    # An upsampling decoder draws larger images than its encoder sees: compare at the larger side.
    size = max(rae.encoder.image_size, rae.decoder.image_size)
    specs, hold_out = evaluation.choose_reference(args, state, args.ckpt)
    if uses_npz:
        check_sizes(specs, None, (size, size))
        statistics = load_reference(specs, None, features, None, rank, world, args.batch)
        n = args.n or MODEL_N
    else:
        if val is None:
            val = open_data(specs, size, split="val", hold_out=hold_out, objects=1)
        val.size = size
        n = args.n or min(MODEL_N, len(val))
        evaluation.check_n(n, len(val))
        evaluation.report_data(val, rank)
    split = evaluation.split_of(val, specs, hold_out, state, args.ckpt)
    if rank == 0:
        evaluation.warn_of_split(split)

    results = evaluate_generation(model, rae, val, args, n, rank, world, args.batch, weak,
                                  args.dtype, features, statistics)
    results |= dict(guidance_interval=list(args.interval), release_grid=args.release_grid,
                    weights=args.weights, checkpoint=args.ckpt, seed=args.seed, dtype=args.dtype,
                    tf32=runtime.uses_tf32(device),
                    reference=" ".join(specs), reference_split=split)
    return results, features, statistics


def is_built_in(specs):
    """True if a built-in world is among the specs of --data."""
    return any(spec in BUILT_IN for spec in specs)


def image_size(data):
    """(H, W) of the first image of ImageData or an .npz."""
    return tuple(data[0]["image"].shape[1:])


def check_sizes(specs, size, drawn_size):
    """Raise ValueError, before any features are computed, unless the images of --data, cropped to
    `size`, have the (H, W) of those that are drawn or given.
    """
    height, width = drawn_size
    arrays = {}
    if evaluation.is_npz(specs) and zipfile.is_zipfile(specs[0]):
        arrays = read_statistics(specs[0])
    if "side" in arrays:
        real_size = tuple(arrays["side"].tolist())
    elif arrays and not Arrays.contains_images(specs[0]):
        return                                         # of pytorch-fid, which does not say
    else:
        real_size = image_size(evaluation.open_images(specs, size))
    if arrays:
        advice = (f"make statistics of such images by --data IMAGES --size {width} --save_stats "
                  f"X.npz, and give that by --data")
    elif evaluation.is_npz(specs):
        advice = f"an .npz is not cropped: write {height} x {width} pixels to it"
    else:
        advice = f"crop the reference by --size {width}"
    metrics.check_image_size(real_size, drawn_size, advice)


def reference_size(args):
    """Side to centre-crop the images of --data to, pixels, or None: as they are."""
    if args.size is None and is_built_in(args.data):
        return BUILT_IN_SIZE
    return args.size


def evaluate_samples(args, features, rank, world):
    """Compare the images of --samples with --data."""
    samples = evaluation.open_images(args.samples)
    evaluation.report_data(samples, rank)
    n = args.n or len(samples)
    if n > len(samples):
        raise ValueError(f"--n {n} is more than the {len(samples)} of --samples; try --n "
                         f"{len(samples)}")
    check_sizes(args.data, reference_size(args), image_size(samples))
    reference_n = n if is_built_in(args.data) else None
    reference = load_reference(args.data, reference_size(args), features, reference_n, rank, world,
                               args.batch)
    fake = metrics.measure_images(samples, n, features, KEEP_SAMPLES, rank, world, args.batch)
    results = dict(n=n, samples=" ".join(args.samples), reference=" ".join(args.data))
    results |= runtime.on_rank_0(lambda: metrics.compare(reference, fake))
    return results, features, reference


def write_statistics(args, features, rank, world):
    """Write the statistics of --data to the file --save_stats."""
    n = args.n
    if n is None and is_built_in(args.data):
        n = BUILT_IN_N
    reference = load_reference(args.data, reference_size(args), features, n, rank, world,
                               args.batch)
    if rank == 0:
        save_statistics(args.save_stats, reference)
    results = dict(n=reference.pooled.n, save_stats=args.save_stats, reference_sha1=reference.sha1)
    return results, features, reference


def main(args):
    rank, world, device = runtime.setup()
    start = time.time()
    evaluation.prepare_output(args.out)
    evaluation.prepare_output(args.save_stats, [".npz"])
    # Fail before a feature network is downloaded.
    if args.samples:
        evaluation.check_paths(args.samples, "--samples")
    if args.data:
        evaluation.check_paths(args.data, "--data")
    features = None
    if args.features:
        features = metrics.feature_network(args.features, args.inception).to(device)

    if args.save_stats:
        results, features, reference = write_statistics(args, features, rank, world)
    elif args.samples:
        results, features, reference = evaluate_samples(args, features, rank, world)
    else:
        results, features, reference = evaluate_model(args, features, rank, world, device)

    n = results["n"]
    if reference is not None:
        reference_n = reference.n
        protocol_n = min(reference.n or PROTOCOL_N, PROTOCOL_N)
    else:                                              # a model is compared with as many images
        reference_n = n
        protocol_n = n
    if rank == 0 and not args.save_stats:
        evaluation.warn_of_few_images(n, features.channels, protocol_n)
    results |= dict(features=features.name, reference_n=reference_n)
    results |= evaluation.environment(device)
    if rank == 0:
        evaluation.report(results, time.time() - start, args.out)
    return results


if __name__ == "__main__":
    runtime.run(main, parse_args)
