"""Stage 1's numbers: how well an autoencoder reconstructs, and what an encoder's tokens tell.

    python eval_decoder.py                                         the shipped autoencoder
    python eval_decoder.py --rae runs/decoder/last.pt --n 1000
    python eval_decoder.py --rae dinov2-b --data photos/ --features inception --lpips
    python eval_decoder.py --probe dinov2-b --data imagenet/ --hold_out 50000

Prints a table and a line of JSON. metrics.py says what the numbers are. train_decoder.py calls
evaluate_reconstruction() on its EMA weights, so there is one road to each number.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import evaluation
import metrics
import progress
import release
import run_flags
import runtime
from data import load_images, load_items, open_data, resize_images, stack_images
from metrics import EncoderFeatures, FeatureSet
from run_flags import at_least
from shapes import Text, read_scene

DEFAULTS = dict(batch=72, dtype="fp32", seed=0, lpips=False)
RECONSTRUCTION_N = 720         # images, if there are as many: as eval_fid.py takes of a model
PROBE_N = 6000                 # images of the built-in world that a probe is trained on
PROBE_HELD_OUT = 3000          # and tested on
# Flags that do something with --probe, and those that do nothing without it.
PROBE_FLAGS = ("probe", "data", "hold_out", "n", "size", "batch", "seed", "out")
ONLY_PROBE_FLAGS = ("size", "seed")


# ---------------------------------------------------------------------------- reconstruction
@torch.no_grad()
def reconstruct(rae, images, dtype="fp32"):
    """Images and their reconstructions, both of the decoder's side S.

    images: uint8 b H W 3. dtype: of matmuls. Returns two tensors b 3 S S in [0,1].
    """
    device = rae.pixel_mean.device
    x = rearrange(images, "b h w c -> b c h w").to(device).float() / 255
    with runtime.autocast(device, dtype):
        latents = rae.encode(resize_images(x, rae.encoder.image_size))     # b c h w
        reconstructions = rae.decode(latents).float()                      # b 3 S S
    originals = resize_images(x, reconstructions.shape[-1])                # b 3 S S
    return originals, reconstructions


def to_uint8(images):                                                      # b 3 S S in [0,1]
    return to_8_bits(images).cpu()                                         # b S S 3


def to_8_bits(images):                                                     # b 3 S S in [0,1]
    images = (images * 255).round().byte()
    return rearrange(images, "b c h w -> b h w c")                         # b S S 3


def numbers_of_source(data, source, n):
    """Numbers of the first n images that are of one source of a mixture."""
    numbers = []
    number = 0
    while len(numbers) < n:
        if data.source_of(number) == source:
            numbers.append(number)
        number += 1
    return numbers


def readable(content, original, reconstruction):
    """Fraction of what an image shows that is still read in its reconstruction.

    content: the Scene or Text that was drawn. original, reconstruction: uint8 H W 3, arrays.
    Of a Text it is the fraction of its letters; of a Scene 1 if read_scene() finds the same objects
    in both images, else 0.
    """
    if isinstance(content, Text):
        return content.read(reconstruction)
    objects = read_scene(original)
    objects_left = read_scene(reconstruction)
    if objects is None or objects_left is None:        # unsure
        return 0.0
    names = sorted(thing.name for thing in objects)
    names_left = sorted(thing.name for thing in objects_left)
    return float(names == names_left)


def evaluate_reconstruction(rae, val, n, rank=0, world=1, batch=72, dtype="fp32", source=0,
                            vgg=None, features=None):
    """PSNR (dB), SSIM and Fréchet distance of the reconstructions of n held-out images.

    rae: with its encoder, in eval mode. val: ImageData or Arrays. source: index of the source
    of a mixture whose images are taken. vgg: network of metrics.load_lpips(), to measure LPIPS.
    features: FeatureNetwork of the Fréchet distance; default: the RAE's own encoder.
    Returns a dict, the same on all processes. On the built-in world it has "readable", too: the
    mean of readable().
    """
    if features is None:
        features = EncoderFeatures(rae.encoder)
    is_built_in = val.is_built_in(source)
    originals = FeatureSet(features, keep=0)
    reconstructions = FeatureSet(features, keep=0)
    psnr_sum, ssim_sum, lpips_sum, readable_sum = 0.0, 0.0, 0.0, 0.0

    source_numbers = numbers_of_source(val, source, n)
    batches = runtime.split_numbers(n, batch, rank, world)
    for positions in progress.progress_bar(batches, "evaluate"):
        numbers = [source_numbers[position] for position in positions]
        x, y = reconstruct(rae, load_images(val, numbers), dtype)          # b 3 S S
        if not torch.isfinite(y).all():
            raise ValueError("the decoder gives pixels that are not finite: its training diverged, "
                             "or --dtype bf16 overflows; take an earlier checkpoint, or fp32")
        if vgg:
            with torch.no_grad(), runtime.full_precision():
                lpips_sum += vgg(x, y, normalize=True).sum().item()        # normalize: from [0,1]
        x, y = to_8_bits(x), to_8_bits(y)                                  # b S S 3
        psnr_sum += metrics.psnr(x, y).sum().item()
        ssim_sum += metrics.ssim(x, y).sum().item()
        if is_built_in:
            pairs = zip(x.cpu().numpy(), y.cpu().numpy(), strict=True)
            for number, (image, reconstruction) in zip(numbers, pairs, strict=True):
                readable_sum += readable(val.scene_or_text(number), image, reconstruction)
        originals.add(x, numbers)
        reconstructions.add(y, numbers)

    sums = torch.tensor([psnr_sum, ssim_sum, lpips_sum, readable_sum], dtype=torch.float64)
    psnr, ssim, lpips, readable_fraction = (runtime.all_sum(sums) / n).tolist()
    originals.merge()
    reconstructions.merge()
    distance_name = features.distance_name
    if distance_name == "fid":
        distance_name = "rfid"                         # as papers call that of reconstructions
    results = {"n": n, "psnr": psnr, "ssim": ssim}
    results[distance_name] = runtime.on_rank_0(
        lambda: metrics.distance(originals.pooled, reconstructions.pooled))
    if vgg:
        results["lpips"] = lpips
    if is_built_in:
        results["readable"] = readable_fraction
    results["reference_sha1"] = originals.sha1
    results["samples_sha1"] = reconstructions.sha1
    return results


def reconstruction_picture(rae, images, dtype="fp32"):
    """A PIL picture with originals in the upper row and their reconstructions below.

    images: uint8 b H W 3. dtype: of matmuls.
    """
    originals, reconstructions = reconstruct(rae, images, dtype)
    x = torch.cat([originals, reconstructions]).cpu()                      # 2*b 3 S S
    x = F.pad(x, (1, 1, 1, 1), value=1.0)              # a white margin of one pixel
    sheet = rearrange(x, "(r b) c h w -> (r h) (b w) c", r=2)
    return Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8))


# ---------------------------------------------------------------------------- linear probe
def labelled_features(data, n, features, rank=0, world=1, batch=72):
    """Features n c and class ids n of the first n images, on all processes."""
    feature_set = FeatureSet(features, keep=n)
    labels = {}                                        # by number
    batches = runtime.split_numbers(n, batch, rank, world)
    for numbers in progress.progress_bar(batches, "evaluate"):
        items = load_items(data, numbers)
        feature_set.add(stack_images(items), numbers)
        for item in items:
            labels[item["number"]] = item["label"]
    feature_set.merge()                                # now its features are sorted by number
    for process_labels in runtime.gather(labels):
        labels.update(process_labels)
    return feature_set.features, torch.tensor([labels[number] for number in range(n)])


def evaluate_probe(encoder, specs, n, hold_out, seed=0, rank=0, world=1, batch=72):
    """Accuracy of a linear classifier of an encoder's mean token, on held-out images.

    specs: of --data. n: images to train on; None: all but those held out. hold_out: images to
    test on. Returns a dict, the same on all processes. Raises ValueError without classes.
    Source: arXiv 2510.11690, table 1d
    """
    size = encoder.image_size
    train = open_data(specs, size, split="train", hold_out=hold_out, objects=1)
    val = open_data(specs, size, split="val", hold_out=hold_out, objects=1)
    evaluation.report_data(train, rank)
    evaluation.report_data(val, rank)
    if not train.labelled:
        raise ValueError(f"--data {' '.join(specs)} has no classes to probe; give class folders")
    if n is None:
        n = len(train)
    features = EncoderFeatures(encoder)
    if n > len(train):
        raise ValueError(f"--n {n} is more than the {len(train)} images to train on; try --n "
                         f"{len(train)}, or leave it out")
    x, y = labelled_features(train, n, features, rank, world, batch)
    x_test, y_test = labelled_features(val, hold_out, features, rank, world, batch)
    accuracy = runtime.on_rank_0(
        lambda: metrics.linear_probe(x, y, x_test, y_test, train.num_classes, seed=seed))
    return dict(probe=encoder.name, n=n, held_out=hold_out, accuracy=accuracy)


# ---------------------------------------------------------------------------- flags
def parse_args(argv=None):
    p = run_flags.Parser(__doc__, DEFAULTS)
    p.add_argument("--rae", metavar="CKPT",
                   help="Autoencoder: a checkpoint of train_decoder.py or train_dit.py, or a "
                        f"published one by name: {', '.join(release.PUBLISHED_RAES)} (default: "
                        "the shipped one).")
    p.add_argument("--probe", metavar="ENCODER",
                   help="Encoder whose tokens to classify linearly, instead of reconstructions.")
    p.add_argument("--data", nargs="+",
                   help="Images: a folder, tars, or a mixture NAME=PATH:WEIGHT ...; to "
                        "reconstruct, also an .npz (default: those of training; to probe: "
                        "shapes).")
    p.add_argument("--hold_out", type=at_least(0),
                   help="Images that training held out, of which the measured ones are taken "
                        "(default: as in training; 0, any image, with --data). To probe: images "
                        f"to test on (default: {PROBE_HELD_OUT} of shapes).")
    p.add_argument("--n", "--num_images", type=at_least(2),
                   help=f"Images to measure (default: all, at most {RECONSTRUCTION_N}). To probe: "
                        f"images to train on (default: all, {PROBE_N} of shapes).")
    p.add_argument("--size", type=at_least(1),
                   help="Side of the images that a probed encoder sees, in pixels (default: as it "
                        "was trained).")
    p.add_argument("--batch", type=at_least(1), help="Images per forward pass.")
    p.add_argument("--features",
                   help="Features of the Fréchet distance: inception, fd-dinov2 or the name of an "
                        "encoder (default: the autoencoder's own encoder).")
    p.add_argument("--inception", metavar="PATH",
                   help=f"File {metrics.INCEPTION_FILE} (default: download once).")
    p.add_argument("--lpips", action="store_true", default=None,
                   help="Measure LPIPS as well, which needs the weights of VGG-16.")
    p.add_argument("--dtype", choices=("bf16", "fp32"),
                   help="Precision of matmuls.")
    p.add_argument("--seed", type=at_least(0),
                   help="Seed of the probe's weights and batches.")
    p.add_argument("--release_dir",
                   help="Folder with a copy of the hub's repository (default: download once).")
    p.add_argument("--out", type=Path, help="File to write the line of JSON to as well.")
    args = p.parse_args(argv)
    try:
        check_flags(args)
    except ValueError as error:
        p.error(str(error))
    return resolve(args)


def check_flags(args):
    """Raise ValueError for flags that contradict each other. args: None where none was given."""
    for name in run_flags.given_flags(args):
        if args.probe and name not in PROBE_FLAGS:
            raise ValueError(f"--{name} does nothing with --probe; leave it out")
        if not args.probe and name in ONLY_PROBE_FLAGS:
            raise ValueError(f"--{name} does nothing without --probe; leave it out")
    if args.probe:
        metrics.check_encoder_name(args.probe, "--probe")
    if args.probe and args.data and not args.hold_out:
        raise ValueError("--probe with --data needs --hold_out, the number of images to test on")
    metrics.check_feature_flags(args)
    if release.is_published_rae(args.rae) and not args.data:
        raise ValueError(f"--rae {args.rae} needs --data: a folder or tars of images")
    if args.release_dir and not release.is_published_rae(args.rae):
        names = " ".join(release.PUBLISHED_RAES)
        raise ValueError(f"--release_dir needs --rae with one of {names}")


def resolve(args):
    """A copy of args with defaults filled in."""
    values = vars(args) | DEFAULTS | run_flags.given_flags(args)
    if args.inception:
        values["features"] = "inception"
    if args.rae is None:
        values["rae"] = str(release.SHIPPED_RAE)
    if args.probe and not args.data:
        values["data"] = ["shapes"]
        values["n"] = args.n or PROBE_N
        values["hold_out"] = args.hold_out or PROBE_HELD_OUT
    return argparse.Namespace(**values)


# ---------------------------------------------------------------------------- main
def reconstruct_all(args, rank, world, device):
    """Evaluate --rae on each source of the reference. Returns results and the feature network."""
    # ---------------------------------------------------------------- checkpoint and data
    state = release.read_rae(args.rae, args.release_dir)
    specs, hold_out = evaluation.choose_reference(args, state, args.rae)
    packed_rae = state["rae"]
    # An upsampling decoder draws larger images than its encoder sees: compare at the larger side.
    grid = packed_rae["latent_var"].shape[1]
    size = max(packed_rae["size"], grid * packed_rae["decoder_patch"])
    # Stage 1 is trained on scenes of one to four objects, stage 2 on single objects with a class.
    objects = 1 if "num_classes" in state else (1, 2, 3, 4)
    val = evaluation.open_images(specs, size, hold_out, objects)
    n = args.n or min(RECONSTRUCTION_N, len(val))
    evaluation.check_n(n, len(val))
    evaluation.report_data(val, rank)
    is_of_decoder = release.script_of(state) == "train_decoder.py"
    split = evaluation.split_of(val, specs, hold_out, state, args.rae,
                                is_of_other_stage=not is_of_decoder)
    if rank == 0:
        evaluation.warn_of_split(split)

    # ---------------------------------------------------------------- models
    rae = release.unpack_rae(packed_rae, source=args.rae).to(device)
    if args.features:
        features = metrics.feature_network(args.features, args.inception).to(device)
    else:
        features = EncoderFeatures(rae.encoder)
    vgg = metrics.load_lpips().to(device) if args.lpips else None

    # ---------------------------------------------------------------- results
    by_source = {}
    for source, name in enumerate(val.domains):
        source_n = min(n, val.source_lengths[source])
        by_source[name] = evaluate_reconstruction(rae, val, source_n, rank, world, args.batch,
                                                  args.dtype, source, vgg, features)
    results = by_source
    if len(by_source) == 1:
        results = by_source[val.domains[0]]
    results |= dict(checkpoint=args.rae, seed=args.seed, dtype=args.dtype,
                    tf32=runtime.uses_tf32(device),
                    reference=" ".join(specs), reference_split=split)
    return results, features


def main(args):
    rank, world, device = runtime.setup()
    start = time.time()
    evaluation.prepare_output(args.out)
    if args.probe:
        encoder = release.load_encoder(args.probe, args.size).to(device)
        results = evaluate_probe(encoder, args.data, args.n, args.hold_out, args.seed, rank, world,
                                 args.batch)
        results["seed"] = args.seed
    else:
        results, features = reconstruct_all(args, rank, world, device)
        n = results.get("n")                           # of a mixture, each source has its own
        if n and rank == 0:
            evaluation.warn_of_few_images(n, features.channels, protocol=n)
        results |= dict(features=features.name, reference_n=n)
    results |= evaluation.environment(device)
    if rank == 0:
        evaluation.report(results, time.time() - start, args.out)
    return results


if __name__ == "__main__":
    runtime.run(main, parse_args)
