"""Stage 2: train a DiT or DiT^DH by flow matching on the latents of a frozen RAE.

    python train_dit.py                                             the built-in world, laptop size
    python train_dit.py --data photos/ --rae runs/decoder/last.pt   your own images
    python train_dit.py --data imagenet/ --rae dinov2-b --model DiTDH-S     a published autoencoder
    torchrun --nproc_per_node=8 train_dit.py --recipe rae --model DiTDH-XL --rae dinov2-b \\
        --data imagenet/ --micro_batch 32                           the paper

Writes OUT/last.pt (all that sampling and an exact resume need), OUT/log.jsonl, OUT/preview_*.png.
"""
import argparse
import copy
import os
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

import evaluation
import metrics
import pictures
import progress
import release
import run_flags
import runtime
import sample
import saving
import speed
import storage
from data import (
    batches,
    check_amounts,
    check_batch,
    fit_defaults,
    memory_of_machine,
    open_data,
)
from eval_fid import evaluate_generation
from model import (
    DIT_SIZES,
    TIME_LAWS,
    build_dit,
    check_heads,
    flow_matching_loss,
    sample_times,
    time_weight,
)
from run_flags import at_least

# ---------------------------------------------------------------------------- flags
# Laptop size, for the built-in world. Every flag defaults to None; resolve() fills in these values.
DEFAULTS = dict(
    run_flags.RUN_DEFAULTS, **sample.SAMPLING_DEFAULTS, out="runs/dit",
    data=["shapes"], hold_out=0, flip="on", cache=0, rae=None, init=None, recipe=None,
    model=None, width=128, depth=4, heads=4, head_width=192, head_depth=1, head_heads=4,
    class_dropout=0.1, label_std=1.0, compile=False,
    steps=2400, lr=3e-3, lr_end=0.02, warmup=None, decay_start=None, decay_end=None,
    weight_decay=0.0, clip=1.0, ema=0.998, time_law="logit_normal",
    shift_base=4096, prediction="v",
    log_every=50, save_every=500, preview_every=500,
    eval_every=0, eval_n=360, eval_features=None)
# The tiny encoder's tokens repeat each other, so it takes more noise to hide an image, and few
# dimensions of the latents vary, so x0 is easier to predict than v.
TINY_LATENTS = dict(shift_base=340, prediction="x0")
# How the published models were trained, for those who train on from them.
PUBLISHED_TRAINING = dict(lr=2e-4, ema=0.9995, time_law="logit_normal", label_std=0.02)
RECIPES = {
    # arXiv 2510.11690 and its release: 1251 steps an epoch, constant for 40 epochs, linear to 800.
    "rae": dict(PUBLISHED_TRAINING, **sample.PAPER_SAMPLING, steps=800 * 1251, batch=1024,
                lr_end=0.1, warmup=0, decay_start=40 * 1251, decay_end=800 * 1251, clip=1.0,
                dtype="fp32", shift_base=4096, prediction="v",
                save_every=5000, preview_every=5000),       # four epochs: they cost seconds
}
# Flags that --init takes from its checkpoint, as the weights were trained with them.
OF_INIT = ("width", "depth", "heads", "head_width", "head_depth", "head_heads", "shift_base",
           "prediction")
# Flags that a resumed run must keep: they say what is trained on what. Rates, horizons and how
# often to report may change.
FIXED = ("recipe", "rae", "data", "seed", "batch", "micro_batch", "model", "width", "depth",
         "heads", "head_width", "head_depth", "head_heads", "class_dropout", "shift_base",
         "prediction", "flip", "cache", "hold_out", "weight_decay", "dtype")


def make_parser():
    p = run_flags.Parser(__doc__, DEFAULTS)
    # data
    p.add_argument("--data", nargs="+",
                   help="Images: shapes, a folder, tars, or several NAME=PATH:WEIGHT to mix.")
    p.add_argument("--hold_out", type=at_least(0), help="Images kept for evaluation.")
    p.add_argument("--flip", choices=("on", "off"), help="Mirror half of the images.")
    p.add_argument("--cache", type=at_least(0),
                   help="Images to encode once and keep as latents; 0: encode every batch.")
    p.add_argument("--rae",
                   help="Autoencoder: a checkpoint of train_decoder.py, or a published one by "
                        f"name: {', '.join(release.PUBLISHED_RAES)} (default: that of --init, "
                        "else the shipped one).")
    # model
    p.add_argument("--model", choices=DIT_SIZES,
                   help="Size of the paper: sets width, depth, heads, head_*.")
    p.add_argument("--width", type=at_least(1),
                   help="Width of the backbone, a multiple of 4 x heads.")
    p.add_argument("--depth", type=at_least(1), help="Blocks of the backbone.")
    p.add_argument("--heads", type=at_least(1), help="Attention heads of the backbone.")
    p.add_argument("--head_width", type=at_least(0), help="Width of the wide head; 0: a plain DiT.")
    p.add_argument("--head_depth", type=at_least(1), help="Blocks of the wide head.")
    p.add_argument("--head_heads", type=at_least(1), help="Attention heads of the wide head.")
    p.add_argument("--class_dropout", type=at_least(0.0, 1),
                   help="Probability that the null class replaces a label, for guidance.")
    p.add_argument("--label_std", type=at_least(0.0),
                   help="Standard deviation of the initial class table; paper: 0.02.")
    p.add_argument("--init",
                   help="Checkpoint whose EMA weights to start from, or a published model: "
                        f"{', '.join(release.PUBLISHED_DITS)}.")
    p.add_argument("--compile", action="store_true", default=None,
                   help="Compile the blocks of all networks by torch.compile.")
    # objective
    p.add_argument("--time_law", choices=TIME_LAWS, help="Distribution of t before its shift.")
    p.add_argument("--shift_base", type=at_least(1e-9),
                   help="n of the time shift sqrt(m/n), m = tokens x channels (default: 4096; for "
                        "the tiny encoder 340).")
    p.add_argument("--prediction", choices=("v", "x0"),
                   help="What the last layer predicts (default: v; for the tiny encoder x0).")
    # optimisation
    p.add_argument("--recipe", choices=RECIPES,
                   help="The paper's batch, steps, learning rate, EMA, law of t, and sampling.")
    p.add_argument("--decay_start", type=at_least(0),
                   help="Step at which the learning rate begins to decay (default: steps / 2).")
    p.add_argument("--decay_end", type=at_least(0),
                   help="Step at which the decay ends (default: steps).")
    # evaluation in training
    p.add_argument("--eval_every", type=at_least(0),
                   help="Steps between evaluations of the EMA weights; 0: none.")
    p.add_argument("--eval_n", type=at_least(2), help="Images in each evaluation.")
    p.add_argument("--eval_features",
                   help="Features of the Fréchet distance: inception, fd-dinov2 or the name of an "
                        "encoder (default: the RAE's encoder).")
    run_flags.add_run_flags(p)
    sample.add_sampling_flags(p)
    return p


def parse_args(argv=None):
    return make_parser().parse(argv, resolve, check_flags)


def resolve(args):
    """A copy of args in which every flag has its value.

    Given flags win; then come, with --resume, the flags of that run; else presets; else DEFAULTS.
    """
    given = run_flags.given_flags(args)
    values = dict(DEFAULTS)
    if args.resume:
        out = given.get("out", DEFAULTS["out"])
        stored = run_flags.flags_of_run(out, "train_dit.py", "num_classes", make_parser())
        run_flags.check_unchanged(args, stored, FIXED)
        values |= stored
    else:
        values |= fit_defaults(args, DEFAULTS)
        values |= presets(args)
    values |= given
    if values["micro_batch"] is None:
        values["micro_batch"] = run_flags.default_micro_batch(values["batch"])
    if values["warmup"] is None:
        values["warmup"] = run_flags.default_warmup(values["steps"])
    if values["decay_start"] is None:
        values["decay_start"] = max(values["warmup"], values["steps"] // 2)
    if values["decay_end"] is None:
        values["decay_end"] = max(values["decay_start"], values["steps"])
    return argparse.Namespace(**values)


def presets(args):
    """Defaults of a new run that depend on the latents, the recipe and the size."""
    values = {}
    if args.init in release.PUBLISHED_DITS:
        values |= PUBLISHED_TRAINING | DIT_SIZES["DiTDH-XL"]
    elif args.init:
        trained = release.read_dit(args.init)["args"]
        values |= {name: trained[name] for name in OF_INIT if name in trained}
    elif release.encoder_name(args.rae) == "tiny":
        values |= TINY_LATENTS
    values |= RECIPES.get(args.recipe, {})
    values |= DIT_SIZES.get(args.model, {})
    return values


def check_flags(args):
    """Raise ValueError for flags that cannot be trained with, before any work is done."""
    run_flags.check_run_flags(args)
    check_amounts(args.data, args.batch, args.hold_out, args.eval_n if args.eval_every else 0)
    sample.check_sampling_flags(args)
    metrics.check_feature_name(args.eval_features, "--eval_features")
    check_heads(args.width, args.heads, "--width", "--heads", multiple=4)
    if args.head_width:
        check_heads(args.head_width, args.head_heads, "--head_width", "--head_heads", multiple=4)
    # A resumed run has its autoencoder in its checkpoint.
    needs_file = args.rae and not args.resume and not release.is_published_rae(args.rae)
    if needs_file and not Path(args.rae).exists():
        raise ValueError(f"--rae {args.rae} does not exist; train one by train_decoder.py, or "
                         f"leave the flag out")
    is_published = args.init in release.PUBLISHED_DITS or release.is_published_rae(args.rae)
    if args.release_dir and not is_published:
        names = " ".join([*release.PUBLISHED_DITS, *release.PUBLISHED_RAES])
        raise ValueError(f"--release_dir needs --init or --rae with one of {names}")
    if args.class_dropout == 0 and args.guidance != 1:
        raise ValueError(f"--class_dropout 0 trains no null class for --guidance {args.guidance}; "
                         f"add --guidance 1")
    if not args.warmup <= args.decay_start <= args.decay_end:
        raise ValueError(f"--warmup {args.warmup}, --decay_start {args.decay_start}, --decay_end "
                         f"{args.decay_end} must not decrease; lower --warmup")


# ---------------------------------------------------------------------------- data
def check_cache(n, channels, grid):
    """Raise ValueError if this machine has no memory for the cached latents of n images."""
    memory = memory_of_machine()
    if memory is None:
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size()))   # of this machine
    image_bytes = 2 * channels * grid ** 2                  # in half precision
    # Each process holds all latents, and twice while it puts those of all processes together.
    needed = 2 * n * image_bytes * processes
    limit = memory * 3 // 4                                 # the rest is for models and images
    if needed > limit:
        fitting = limit // (2 * image_bytes * processes)
        raise ValueError(
            f"--cache {n} takes {needed / 1e9:,.1f} GB of memory, and this machine has "
            f"{memory / 1e9:,.1f} GB, of which a quarter is for the rest: the latents of an image "
            f"take {image_bytes / 1e3:,.0f} kB, twice, in each of {processes} processes; give at "
            f"most --cache {fitting}, or leave it out, to encode every batch")


def encode_cache(data, rae, args, rank, world, device):
    """Latents n c h w, in half precision, and labels n of the first --cache images."""
    unit = args.micro_batch * world
    turns = -(-args.cache // unit)                          # rounded up
    encoded = []
    stream = batches(data, unit, args.micro_batch, 0, rank, world, args.workers, stop=turns)
    for _, _, images, labels, _ in progress.progress_bar(stream, "latents", total=turns):
        with runtime.autocast(device, args.dtype):
            latents = rae.encode(images.to(device).float() / 255)
        encoded.append((latents.half().cpu(), labels))

    # In the order of the images, which the processes encoded in turn.
    in_order = [part for turn in zip(*runtime.gather(encoded), strict=True) for part in turn]
    latents = torch.cat([part[0] for part in in_order])
    labels = torch.cat([part[1] for part in in_order])
    return latents, labels


def cached_batches(latents, labels, args, start, rank, world):
    """Yields like data.batches, but latents, of which each micro-batch is drawn at random."""
    for step in range(start, args.steps):
        for micro in range(rank, args.batch // args.micro_batch, world):
            rng = np.random.default_rng((args.seed, step, micro))
            chosen = rng.integers(args.cache, size=args.micro_batch)
            yield step, micro, latents[chosen], labels[chosen], None


# ---------------------------------------------------------------------------- model
def choose_autoencoder(args, resumed, init):
    """The dict of an autoencoder, as checkpoints hold it: that of the resumed run, of --rae, of the
    checkpoint of --init, whose weights know its latent space, or the shipped one.
    """
    if resumed:
        return resumed["rae"]
    if args.rae:
        return release.load_packed_rae(args.rae, args.release_dir)
    if init:
        return init["rae"]
    return release.load_packed_rae(release.SHIPPED_RAE)


def build_model(args, channels, grid, num_classes, init):
    """The DiT or DiTDH to train, with fresh weights or those of the checkpoint `init`."""
    torch.manual_seed(args.seed)
    model = build_dit(vars(args), channels, grid, num_classes)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight, std=args.label_std)
    if init is None:
        return model
    weights = dict(init["ema"])
    if init["num_classes"] != num_classes:                  # then only the null class is known
        table = "y_embedder.embedding_table.weight"
        new_classes = model.state_dict()[table][:-1]
        weights[table] = torch.cat([new_classes, weights[table][-1:]])
    return release.load_release(model, weights, f"--init {args.init}")


# ---------------------------------------------------------------------------- training
def flops_per_image(dit, rae, args):
    """FLOPs of a training step for each image: of the DiT forward and backward, and of the encoder.

    dit: a DiT or DiTDH in eval mode. The optimizer and the EMA count nothing.
    """
    device = dit.pos_embed.device
    x_t = torch.zeros(1, dit.in_channels, dit.grid, dit.grid, device=device)
    t = torch.zeros(1, device=device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    flops = speed.count_flops(dit, x_t, t, label).training
    if not args.cache:                                      # else each image is encoded just once
        side = rae.encoder.image_size
        image = torch.zeros(1, 3, side, side, device=device)
        flops += speed.count_flops(rae.encode, image).forward
    return flops


def main(args, data=None):
    """Train by the flags of parse_args. data: an ImageData in place of --data's training images."""
    rank, world, device = runtime.setup()
    lock = storage.lock(args.out, is_folder=True)
    accumulation = args.batch // (args.micro_batch * world)
    resumed = release.load_resumed(args, "train_dit.py") if args.resume else None
    init = release.read_dit(args.init, args.release_dir) if args.init and not resumed else None
    packed_rae = choose_autoencoder(args, resumed, init)
    channels, grid, _ = packed_rae["latent_var"].shape
    check_cache(args.cache, channels, grid)

    # ---------------------------------------------------------------- data
    if data is None:
        data = open_data(args.data, packed_rae["size"], args.seed, flip=args.flip == "on",
                         hold_out=args.hold_out, objects=1)
    check_batch(data, args.batch)
    identity = data.identity()
    run_flags.check_same_run(args, resumed, identity)
    change_of_data = saving.describe_change(resumed, identity, args.hold_out)
    # A decoder may draw larger images than its encoder sees; they are compared at the larger side.
    drawn_size = grid * packed_rae["decoder_patch"]
    val_data = open_data(args.data, max(packed_rae["size"], drawn_size), split="val",
                         hold_out=args.hold_out, objects=1)
    evaluation.check_eval_side(args, val_data, drawn_size)
    features = None
    if args.eval_features:
        features = metrics.feature_network(args.eval_features).to(device)

    # ---------------------------------------------------------------- model
    rae = release.unpack_rae(packed_rae).to(device)
    model = build_model(args, channels, grid, data.num_classes, init).to(device).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if resumed:
        release.load_release(model, resumed["model"], "the resumed model")
        release.load_release(ema, resumed["ema"], "the resumed EMA")
    if args.compile:
        runtime.compile_blocks(model)
        runtime.compile_blocks(rae.encoder)
    step_model = model
    if world > 1:
        step_model = runtime.data_parallel(model)

    # ---------------------------------------------------------------- optimiser
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=args.weight_decay, fused=True)
    start = 0
    if resumed:
        saving.load_optimizer(optimizer, resumed["opt"])
        start = resumed["step"]
    parameters = sum(p.numel() for p in model.parameters())
    log = progress.Log(args, rank, device, start, parameters, data)
    checkpoints = saving.Checkpoints(args, rank, log, lock,
                                     in_background=device.type != "cpu")
    checkpoints.begin(start)
    log.warn(change_of_data)
    run_flags.warn_of_flags(log, args, resumed)
    release.warn_of_tiny_encoder(log, packed_rae["encoder"], data)
    loss_by_time = runtime.LossByTime(device)
    image_flops = flops_per_image(ema, rae, args)

    def save(step, is_stop):
        checkpoints.save(
            step, is_stop, model=model.state_dict(), ema=ema.state_dict(),
            opt=optimizer.state_dict(), rae=packed_rae, args=run_flags.flags_as_dict(args),
            num_classes=data.num_classes, class_names=data.class_names,
            latent_shape=[channels, grid], data=identity)

    def draw_preview():
        labels = list(range(min(36, data.num_classes)))
        images = sample.generate(ema, rae, labels + labels, args, dtype=args.dtype)
        return pictures.draw_grid(images, data.class_names[:36])

    def evaluate(step):
        results = evaluate_generation(ema, rae, val_data, args, args.eval_n, rank, world,
                                      features=features)
        log.write(dict(step=step, **results))
        log.say(f"step {step} | " + metrics.format_results(results))

    # ---------------------------------------------------------------- loop
    if args.cache:
        latents, labels = encode_cache(data, rae, args, rank, world, device)
        stream = cached_batches(latents, labels, args, start, rank, world)
    else:
        stream = batches(data, args.batch, args.micro_batch, start, rank, world, args.workers,
                         stop=args.steps)
    for step, micro_batches in runtime.stop_request.catching(groupby(stream, key=itemgetter(0))):
        for _, micro, x0, labels, _ in micro_batches:
            is_last = micro // world == accumulation - 1
            x0 = runtime.to_device(x0, device).float()
            labels = runtime.to_device(labels, device)
            if not args.cache:                                          # still images, b 3 H W
                with runtime.autocast(device, args.dtype):
                    x0 = rae.encode(x0 / 255).float()                   # b c h w, unit variance
            runtime.seed_step(args.seed, step, micro)
            t = sample_times(len(x0), args.time_law, x0[0].numel(), args.shift_base, device)   # b
            eps = torch.randn_like(x0)                                  # b c h w
            with runtime.sync_gradients(step_model, is_last):
                with runtime.autocast(device, args.dtype):
                    loss = flow_matching_loss(step_model, x0, labels, t, eps)                  # b
                if args.prediction == "x0":
                    loss = time_weight(t) * loss                        # b
                (loss.mean() / accumulation).backward()
            loss_by_time.add(t, loss)
            log.flops += len(x0) * image_flops

        lr = args.lr * runtime.lr_factor(step, args.warmup, args.decay_start, args.decay_end,
                                         args.lr_end)
        grad_norm = runtime.optimizer_step([optimizer], model, args.clip, lr)
        runtime.update_ema(ema, model, args.ema, step)

        done = step + 1
        checkpoints.check(done, grad_norm, loss=loss.detach().mean())
        is_end = done == args.steps
        is_stop = runtime.stop_request.was_made()
        log.first_steps(done)
        if done % args.log_every == 0 or is_end:
            mean_loss, by_time = loss_by_time.means()
            log.step(done, mean_loss, grad_norm, lr, loss_by_t=by_time)
        if checkpoints.is_due(done, is_stop):
            save(done, is_stop)
        if is_stop and not is_end:
            checkpoints.say_stopped()
            break
        if args.preview_every and (done % args.preview_every == 0 or is_end):
            log.preview(done, draw_preview)
        if args.eval_every and (done % args.eval_every == 0 or is_end):
            evaluate(done)


if __name__ == "__main__":
    runtime.run(main, parse_args)
