"""Stage 1: train a ViT decoder over a frozen encoder, and measure the statistics of its latents.

    python train_decoder.py                     the built-in world, the shipped encoder, laptop size
    python train_decoder.py --data photos/ --encoder dinov2-b --decoder B --micro_batch 8 --lr 1e-3
    torchrun --nproc_per_node=8 train_decoder.py --recipe rae --data imagenet/ --micro_batch 16

    loss = L1 + lpips * LPIPS + gram * Gram + feature * (distance in the shipped encoder)
    objective = loss + gan * lambda * GAN (from --gan_start on) + kl * KL (of a VAE)

Writes OUT/last.pt (decoder, latent statistics, all that an exact resume needs), OUT/preview_*.png,
and OUT/log.jsonl, where GAN and KL stand beside the loss.
"""
import argparse
import copy
from collections import defaultdict
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.parametrizations import spectral_norm

import evaluation
import metrics
import progress
import release
import run_flags
import runtime
import saving
import speed
import storage
from data import (
    batches,
    check_amounts,
    check_batch,
    fit_defaults,
    load_images,
    open_data,
    resize_images,
)
from eval_decoder import evaluate_reconstruction, reconstruction_picture
from model import (
    DECODER_SIZES,
    HALF_PIXELS,
    IMAGENET_PIXELS,
    RAE,
    Normalise,
    build_decoder,
    check_heads,
)
from muon import Muon
from run_flags import at_least

# ---------------------------------------------------------------------------- flags
# Laptop size, for the built-in world. Every flag defaults to None; resolve() fills in these values.
# What is None here depends on other flags.
DEFAULTS = dict(
    run_flags.RUN_DEFAULTS, out="runs/decoder",
    data=["shapes"], size=None, hold_out=None, stats_n=5000,
    encoder="tiny", decoder="tiny", decoder_width=None, decoder_depth=None, decoder_heads=None,
    decoder_mlp=None, decoder_patch=None, init=None, checkpoint_activations=False, compile=False,
    tau=0.2, noise_law="half_normal", lpips=None, gram=0.0, feature=0.0, kl=1e-4,
    gan=0.0, gan_start=None, disc=None, disc_start=None, disc_lr=None, disc_warmup=100,
    diffaug="on", cutout=0.0,
    recipe=None, steps=2000, optimizer="muon", lr=7e-3, lr_end=0.02, warmup=None, weight_decay=0.0,
    clip=1.0, ema=0.99,
    log_every=100, save_every=1000, preview_every=1000,
    eval_every=1000, eval_n=200, eval_features=None)
# What both papers have in common.
PAPER = dict(decoder="XL", size=256, batch=512, optimizer="adamw", lr_end=0.1, clip=0.0, lpips=1.0,
             ema=0.9978)
RECIPES = {
    # arXiv 2510.11690, appendix, and the configuration of its release: 2502 steps an epoch.
    "rae": dict(PAPER, encoder="dinov2-b", steps=16 * 2502, lr=2e-4, warmup=2502, tau=0.8,
                gan=0.75, gan_start=8 * 2502, disc="dino-s8", disc_start=6 * 2502, disc_lr=2e-4,
                disc_warmup=2502),
    # arXiv 2601.16208, table 7: 2500 steps an epoch.
    "scale_rae": dict(PAPER, encoder="siglip2-so400m", steps=80 * 2500, lr=4e-4, warmup=5000,
                      tau=0.0, decoder_patch=14, gram=100.0,
                      gan=10.0, gan_start=8 * 2500, disc="dino-s16", disc_start=7 * 2500,
                      disc_lr=5e-5, disc_warmup=2500),
}
# ViT under the discriminator's heads: name for release.load_vit, side of its images, mean and
# standard deviation of their pixels.
DISCRIMINATORS = {
    "tiny": ("tiny", 64, HALF_PIXELS),                      # the shipped encoder
    "dino-s8": ("vit_small_patch8_224.dino", 224, IMAGENET_PIXELS),
    "dino-s16": ("vit_small_patch16_224.dino", 224, IMAGENET_PIXELS),
}
# Encoders of the built-in world. LPIPS is off by default: VGG was trained on photographs at 224 px,
# and its weights are a download.
SMALL_ENCODERS = ("tiny", "random", "pixel", "vae")
# Flags that a resumed run must keep: they say what is trained on what. Rates, horizons and how
# often to report may change.
FIXED = ("recipe", "data", "decoder", "encoder", "size", "seed", "batch", "micro_batch",
         "decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp", "decoder_patch", "tau",
         "noise_law", "optimizer", "hold_out", "weight_decay", "dtype", "lpips", "gram", "feature",
         "kl", "gan", "gan_start", "disc", "disc_start", "diffaug", "cutout")


def make_parser():
    small = ", ".join(SMALL_ENCODERS)
    p = run_flags.Parser(__doc__, DEFAULTS)
    # data
    p.add_argument("--data", nargs="+",
                   help="Images: shapes, text, a folder, tars, or several NAME=PATH:WEIGHT to mix.")
    p.add_argument("--size", type=at_least(1, release.LARGEST_SIDE + 1),
                   help="Side of the images given to the encoder, in pixels (default: 256; for "
                        f"{small} 64).")
    p.add_argument("--hold_out", type=at_least(0),
                   help="Images of each source kept for evaluation (default: eval_n; of few "
                        "images a tenth, at least 2).")
    p.add_argument("--stats_n", type=at_least(0),
                   help="Images whose latents are measured; 0: all.")
    # model
    p.add_argument("--encoder",
                   help="Encoder: tiny (the shipped one), dinov2-s, dinov2-b, dinov2-l, siglip2-b, "
                        "siglip2-so400m, mae-b, webssl-l, or any ViT of timm; or a baseline: "
                        "random, pixel:PATCH, vae:CHANNELS:PATCH (trained with the decoder), "
                        "diffusers:SOURCE.")
    p.add_argument("--decoder", choices=DECODER_SIZES,
                   help="Size of the decoder, which sets decoder_width, _depth, _heads and _mlp; "
                        "paper: XL.")
    p.add_argument("--decoder_width", type=at_least(1),
                   help="Width of the decoder, a multiple of 4 and of decoder_heads (default: of "
                        "--decoder).")
    p.add_argument("--decoder_depth", type=at_least(1),
                   help="Layers of the decoder (default: of --decoder).")
    p.add_argument("--decoder_heads", type=at_least(1),
                   help="Attention heads of the decoder (default: of --decoder).")
    p.add_argument("--decoder_mlp", type=at_least(1),
                   help="Hidden width of the decoder's MLPs (default: of --decoder).")
    p.add_argument("--decoder_patch", type=at_least(1, release.LARGEST_PATCH + 1),
                   help="Pixels per token side that the decoder draws; twice the encoder's "
                        "upsamples by 2 (default: as the encoder).")
    p.add_argument("--init",
                   help="Checkpoint whose EMA weights to start from, an official model.pt, or a "
                        f"published autoencoder by name: {', '.join(release.PUBLISHED_RAES)}.")
    p.add_argument("--checkpoint_activations", action="store_true", default=None,
                   help="Recompute activations in the backward pass: less memory, a quarter more "
                        "time.")
    p.add_argument("--compile", action="store_true", default=None,
                   help="Compile the blocks of all networks by torch.compile.")
    # objective
    p.add_argument("--tau", type=at_least(0.0),
                   help="Strength of the noise on the latents; paper: 0.8.")
    p.add_argument("--noise_law", choices=("half_normal", "uniform"),
                   help="Distribution of a sample's noise level: |N(0, tau^2)| as in the paper, or "
                        "tau * U(0, 1) as in the release.")
    p.add_argument("--lpips", type=at_least(0.0),
                   help=f"Weight of LPIPS (default: 1; for {small} 0).")
    p.add_argument("--gram", type=at_least(0.0), help="Weight of the Gram loss; Scale-RAE: 100.")
    p.add_argument("--feature", type=at_least(0.0),
                   help="Weight of the distance between features of the shipped encoder.")
    p.add_argument("--kl", type=at_least(0.0),
                   help="Weight of a VAE's KL divergence, in nats per latent element.")
    p.add_argument("--gan", type=at_least(0.0),
                   help="Weight of lambda x GAN; RAE: 0.75, Scale-RAE: 10.")
    p.add_argument("--gan_start", type=at_least(0),
                   help="Step at which the GAN joins the objective (default: steps / 2).")
    p.add_argument("--disc", choices=DISCRIMINATORS,
                   help="Frozen network under the discriminator's heads (default: dino-s8; for "
                        f"{small} tiny).")
    p.add_argument("--disc_start", type=at_least(0),
                   help="Step at which the discriminator starts to train (default: 3/4 of "
                        "gan_start).")
    p.add_argument("--disc_lr", type=at_least(0.0),
                   help="Peak learning rate of the discriminator (default: 2e-4; for the tiny one "
                        "3e-3).")
    p.add_argument("--disc_warmup", type=at_least(0),
                   help="Steps of the discriminator's linear warm-up.")
    p.add_argument("--diffaug", choices=("on", "off"),
                   help="Augment the images that the discriminator sees.")
    p.add_argument("--cutout", type=at_least(0.0, 1),
                   help="Side of the square that diffaug greys, as a fraction of the image's; "
                        "papers: 0.")
    # optimisation
    p.add_argument("--recipe", choices=RECIPES,
                   help="Paper whose encoder, decoder, losses and schedule to use.")
    p.add_argument("--optimizer", choices=("adamw", "muon"),
                   help="Optimizer: adamw, as in the papers, or muon for the matrices of the "
                        "layers and AdamW for the rest, which takes half the steps.")
    # evaluation in training
    p.add_argument("--eval_every", type=at_least(0),
                   help="Steps between evaluations of the EMA weights; 0: none.")
    p.add_argument("--eval_n", type=at_least(2), help="Images in each evaluation.")
    p.add_argument("--eval_features",
                   help="Features of the Fréchet distance: inception, fd-dinov2 or the name of an "
                        "encoder (default: --encoder).")
    run_flags.add_run_flags(p)
    return p


def parse_args(argv=None):
    return make_parser().parse(argv, resolve, check_flags)


def resolve(args):
    """A copy of args in which every flag but decoder_patch has its value.

    Given flags win; then come, with --resume, the flags of that run; else presets; else DEFAULTS.
    """
    given = run_flags.given_flags(args)
    values = dict(DEFAULTS)
    if args.resume:
        out = given.get("out", DEFAULTS["out"])
        stored = run_flags.flags_of_run(out, "train_decoder.py", "disc", make_parser())
        run_flags.check_unchanged(args, stored, FIXED)
        values |= stored
    else:
        values |= fit_defaults(args, DEFAULTS)
        values |= RECIPES.get(args.recipe, {})
        decoder = args.decoder or values["decoder"]
        values |= DECODER_SIZES[decoder]
    values |= given
    resolved = argparse.Namespace(**values)

    is_small = resolved.encoder.split(":")[0] in SMALL_ENCODERS
    if resolved.size is None:
        resolved.size = 64 if is_small else 256
    if resolved.lpips is None:
        resolved.lpips = 0.0 if is_small else 1.0
    if resolved.disc is None:
        resolved.disc = "tiny" if is_small else "dino-s8"
    if resolved.disc_lr is None:
        resolved.disc_lr = 3e-3 if resolved.disc == "tiny" else 2e-4
    if resolved.warmup is None:
        resolved.warmup = run_flags.default_warmup(resolved.steps)
    if resolved.gan_start is None:
        resolved.gan_start = resolved.steps // 2
    if resolved.disc_start is None:
        resolved.disc_start = resolved.gan_start * 3 // 4
    if resolved.micro_batch is None:
        resolved.micro_batch = run_flags.default_micro_batch(resolved.batch)
    return resolved


def check_flags(args):
    """Raise ValueError for flags that cannot be trained with, before any work is done."""
    run_flags.check_run_flags(args)
    check_amounts(args.data, args.batch, args.hold_out, args.eval_n if args.eval_every else 0)
    metrics.check_feature_name(args.eval_features, "--eval_features")
    release.pixel_statistics(args.encoder)                  # knows all names
    check_heads(args.decoder_width, args.decoder_heads, "--decoder_width", "--decoder_heads")
    if args.decoder_width % 4:                              # sines and cosines of row and column
        raise ValueError(f"--decoder_width {args.decoder_width} must be a multiple of 4")
    in_order = args.disc_start <= args.gan_start < args.steps
    if args.gan > 0 and not args.resume and not in_order:
        raise ValueError(f"--disc_start {args.disc_start}, --gan_start {args.gan_start} and "
                         f"--steps {args.steps} must come in this order, the last alone; lower "
                         f"--gan_start, or give --gan 0")
    if args.cutout > 0 and args.diffaug == "off":
        raise ValueError(f"--cutout {args.cutout} is a part of --diffaug on")


# ---------------------------------------------------------------------------- latents
def latent_statistics(encoder, data, n, batch, rank=0, world=1, workers=0, device="cpu"):
    """Mean and variance of each latent element over n images, in one pass.

    encoder: Encoder. data: ImageData. n: a multiple of batch x world. batch: images per process and
    forward pass.
    Returns: mean and variance, c h w each, fp32; the same on all processes.
    Source: RAE, section 3.1. The release keeps a running average of its last 20 batches instead.
    """
    assert n % (batch * world) == 0                         # all n images are in whole batches
    total = 0
    squares = 0
    steps = n // (batch * world)
    stream = batches(data, batch * world, batch, 0, rank, world, workers, stop=steps)
    for _, _, images, _, _ in progress.progress_bar(stream, "latents", total=steps):
        latents = encoder.encode(images.to(device).float() / 255)       # b c h w
        # In fp64, since E[x^2] - E[x]^2 cancels; on the CPU, since some GPUs have no fp64.
        latents = latents.cpu().double()
        total += latents.sum(0)                                         # c h w
        squares += latents.square().sum(0)                              # c h w

    mean = runtime.all_sum(total) / n
    variance = runtime.all_sum(squares) / n - mean.square()
    # A latent that is the same in all images, as pixels of a white border, must keep a variance
    # above 0. That is far below the 1e-5 which RAE adds.
    variance = variance.clamp(min=1e-20)
    return mean.float(), variance.float()


def measure_latents(networks, data, args, log, device):
    """latent_statistics() of whole batches of at most --stats_n images of the data."""
    n = len(data)
    if args.stats_n > 0:
        n = min(n, args.stats_n)
    n = max(args.batch, n // args.batch * args.batch)
    log.say(f"measuring the latents of {n} images")
    mean, var = latent_statistics(
        networks.ema_encoder, data, n, args.micro_batch, runtime.process_rank(),
        runtime.world_size(), args.workers, device)
    if not (mean.isfinite().all() and var.isfinite().all()):
        raise ValueError(f"the latents of --encoder {args.encoder} are not finite; if it is a VAE, "
                         f"the run has diverged: lower --lr, or give --clip 1")
    if n == 1:
        log.warn("one image has no variance: latents will not be normalised; give more images")
    log.say(f"latents {tuple(mean.shape)}: variance {var.mean():.3f} over {n} images")
    return mean, var


def add_noise(latents, tau, law):                                       # [D1]
    """Noise-augmented decoding: latents + sigma * N(0, 1), with one sigma per sample.

    latents: b c h w, not normalised. tau: scale of sigma. law: distribution of sigma, |N(0, tau^2)|
    ("half_normal", the paper) or tau * U(0, 1) ("uniform", the release).
    Source: RAE, section 4.3.
    """
    b = len(latents)
    if law == "half_normal":
        sigma = tau * torch.randn(b, 1, 1, 1, device=latents.device).abs()
    else:
        sigma = tau * torch.rand(b, 1, 1, 1, device=latents.device)
    return latents + sigma * torch.randn_like(latents)


# ---------------------------------------------------------------------------- reconstruction loss
class ReconstructionLoss(nn.Module):                                    # [D2]
    """Weighted sum of L1, LPIPS, Gram and feature distance. What has weight 0 is not computed.

    forward: images, target b 3 H W in [0,1] -> the sum; a dict of its terms before weighting. All
        are scalars, means over the batch.
    Raises FileNotFoundError if a term needs VGG-16 and its weights cannot be had.
    """
    def __init__(self, lpips=0.0, gram=0.0, feature=0.0):
        super().__init__()
        self.weights = {"l1": 1.0, "lpips": lpips, "gram": gram, "feature": feature}
        self.feature_distance = FeatureDistance() if feature > 0 else None
        self.vgg = metrics.load_lpips() if lpips > 0 or gram > 0 else None

    def forward(self, images, target):                                  # b 3 H W each
        terms = {"l1": F.l1_loss(images, target)}                       # the pixel loss
        if self.vgg is not None:
            maps = vgg_maps(self.vgg, images)                           # five of b c h w
            target_maps = vgg_maps(self.vgg, target)                    # five of b c h w
        if self.weights["lpips"] > 0:
            terms["lpips"] = lpips_distance(self.vgg, maps, target_maps)
        if self.weights["gram"] > 0:
            terms["gram"] = gram_distance(maps, target_maps)
        if self.weights["feature"] > 0:
            terms["feature"] = self.feature_distance(images, target)
        loss = sum(self.weights[name] * term for name, term in terms.items())
        return loss, terms


def vgg_maps(vgg, images):
    """The five feature maps b c h w of VGG-16 that LPIPS compares, of images b 3 H W in [0,1]."""
    return vgg.net(vgg.scaling_layer(2 * images - 1))


def lpips_distance(vgg, maps, target_maps):
    """LPIPS: squared differences of normalised features, weighted by channel, averaged over space.

    vgg: lpips.LPIPS, whose layers `lins` hold the weights. maps, target_maps: of vgg_maps.
    Returns: a scalar, the mean over the batch. Source: arXiv 1801.03924, eq. 1.
    """
    distance = 0.0
    for linear, x, y in zip(vgg.lins, maps, target_maps, strict=True):
        difference = (F.normalize(x) - F.normalize(y)).square()         # b c h w
        distance = distance + linear(difference).mean().float()
    return distance


def gram_matrix(x):                                                     # b c h w
    """G = F F^T / (c h w) of each image, where F is c x (h w). Source: arXiv 1603.08155, eq. 3.

    In fp32 and not TF32, since matrices that are nearly equal are to be subtracted.
    """
    with torch.autocast(x.device.type, enabled=False), runtime.full_precision():
        x = rearrange(x.float(), "b c h w -> b c (h w)")
        return x @ x.mT / x[0].numel()                                  # b c c


def gram_distance(maps, target_maps):
    """Mean squared difference of Gram matrices: of texture, wherever it is in the image.

    maps, target_maps: of vgg_maps. Returns: a scalar, the mean over maps and batch.
    Source: arXiv 1603.08155, eq. 4, but as a mean. How the loss is normalised for which Scale-RAE
        gives the weight 100 is not published.
    """
    distance = 0.0
    for x, y in zip(maps, target_maps, strict=True):
        distance = distance + (gram_matrix(x) - gram_matrix(y)).square().mean()
    return distance / len(maps)


class FeatureDistance(nn.Module):
    """Mean squared difference of the shipped encoder's normalised tokens, over all of its blocks.

    A perceptual loss that knows the built-in world and needs no download.
    forward: images, target b 3 H W in [0,1] -> a scalar.
    """
    def __init__(self):
        super().__init__()
        self.encoder = release.load_encoder("tiny")

    def tokens(self, images):                                           # b 3 H W
        """Tokens b n c after each block, each with mean 0 and variance 1 over its channels."""
        images = resize_images(images, self.encoder.input_size)         # b 3 s s
        blocks = self.encoder.backbone.forward_intermediates(
            self.encoder.pixels(images), output_fmt="NLC", intermediates_only=True)
        return [F.layer_norm(x, x.shape[2:]) for x in blocks]

    def forward(self, images, target):                                  # b 3 H W each
        pairs = zip(self.tokens(images), self.tokens(target), strict=True)
        distances = [F.mse_loss(x, y) for x, y in pairs]
        return sum(distances) / len(distances)


# ---------------------------------------------------------------------------- discriminator
class DiscriminatorHead(nn.Module):
    """Convolutions over the tokens of one block: features b d n -> logits b n.

    The norms are per sample and channel, so that a sample's logits do not depend on its batch.
    Source: StyleGAN-T, arXiv 2301.09515, as in RAE's release.
    """
    def __init__(self, d):
        super().__init__()
        self.first = nn.Sequential(
            spectral_norm(nn.Conv1d(d, d, kernel_size=1)), nn.GroupNorm(d, d), nn.LeakyReLU(0.2))
        self.second = nn.Sequential(
            spectral_norm(nn.Conv1d(d, d, kernel_size=9, padding=4, padding_mode="circular")),
            nn.GroupNorm(d, d), nn.LeakyReLU(0.2))
        self.last = spectral_norm(nn.Conv1d(d, 1, kernel_size=1))

    def forward(self, x):                                               # b d n
        x = self.first(x)                                               # b d n
        x = (x + self.second(x)) / 2 ** 0.5                             # b d n, keeps the variance
        return self.last(x)[:, 0]                                       # b n


class Discriminator(nn.Module):
    """Five trained heads over the blocks of a frozen ViT.

    name: a key of DISCRIMINATORS.
    forward: images b 3 H W in [0,1] -> logits b 5*n; higher is more real.
    Source: RAE's release. Other than here, it zeroes the bias of the keys, to which attention is
        blind, and computes DINO's GELUs by the tanh approximation.
    """
    def __init__(self, name):
        super().__init__()
        vit_name, self.image_size, pixel_statistics = DISCRIMINATORS[name]
        self.normalise = Normalise(*pixel_statistics)
        self.vit = release.load_vit(vit_name, self.image_size).requires_grad_(False)
        # The last block, and the last one of each quarter of the depth: of 12 blocks 11, 2, 5, 8,
        # 11. The release has the last one twice.
        depth = len(self.vit.blocks)
        quarters = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
        self.blocks = [depth - 1, *quarters]
        self.heads = nn.ModuleList(DiscriminatorHead(self.vit.embed_dim) for _ in self.blocks)
        self.eval()

    def forward(self, images):                                          # b 3 H W
        size = (self.image_size, self.image_size)
        is_much_larger = images.shape[-1] > 2 * self.image_size
        x = F.interpolate(images, size, mode="bilinear", antialias=is_much_larger)      # b 3 s s
        maps = self.vit.forward_intermediates(
            self.normalise(x), norm=False, output_fmt="NLC",
            intermediates_only=True)                                    # of each block b n d
        logits = []
        for head, block in zip(self.heads, self.blocks, strict=True):
            logits.append(head(maps[block].mT).float())                 # b n
        return torch.cat(logits, dim=1)                                 # b 5*n

    def update_spectral_norms(self):
        """One power iteration of each spectral norm, to be called once a step.

        They iterate when a weight is read in train mode. All else runs in eval mode, so that the
        norms do not depend on the number of micro-batches.
        """
        self.heads.train()
        for module in self.heads.modules():
            if isinstance(module, nn.Conv1d):
                module.parametrizations.weight()
        self.heads.eval()


def hinge_loss(fake_logits, real_logits):                               # [D4]
    """Loss of the discriminator, a scalar. Source: arXiv 1705.02894; the release halves it."""
    return (F.relu(1 + fake_logits) + F.relu(1 - real_logits)).mean() / 2


def round_to_8_bits(images):
    """Images as a file would store them, lest rounding tells real ones from fakes."""
    return (images.detach().clamp(0, 1) * 255).round() / 255


# ---------------------------------------------------------------------------- augmentation
# DiffAug, arXiv 2006.10738, with the strengths of RAE's release. Each step takes images b 3 H W,
# draws random numbers for each image, and is differentiable: the decoder learns through it.
def augment(images, cutout=0.0):
    """What the discriminator sees of images b 3 H W in [0,1].

    cutout: side of a grey square, as a fraction of the image's; 0: none.
    """
    images = change_brightness(images)
    images = change_saturation(images)
    images = change_contrast(images)
    images = translate(images)
    return cut_out(images, cutout)


def uniform_per_image(images):
    """A number in [0,1) for each image, b 1 1 1."""
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def change_brightness(images):
    """Add up to 1/4 in either direction: the release's 1/2, for images in [-1,1]."""
    return images + (uniform_per_image(images) - 0.5) / 2


def change_saturation(images):
    """Multiply the distance from grey by 0 to 2."""
    grey = images.mean(1, keepdim=True)                                 # b 1 H W
    return grey + (images - grey) * 2 * uniform_per_image(images)


def change_contrast(images):
    """Multiply the distance from the image's mean by 0.5 to 1.5."""
    mean = images.mean((1, 2, 3), keepdim=True)                         # b 1 1 1
    return mean + (images - mean) * (uniform_per_image(images) + 0.5)


def translate(images):
    """Shift by up to 1/8 of the side, over grey."""
    b, _, height, width = images.shape
    most_down, most_right = height // 8, width // 8
    padded = F.pad(images, (most_right, most_right, most_down, most_down), value=0.5)
    # Position of each crop in the padded image, on the CPU, since slices need Python's integers.
    choices = torch.tensor([2 * most_down + 1, 2 * most_right + 1])
    corners = (torch.rand(b, 2) * choices).long().tolist()
    crops = []
    for image, (top, left) in zip(padded, corners, strict=True):
        crops.append(image[:, top:top + height, left:left + width])
    return torch.stack(crops)


def cut_out(images, cutout):
    """Grey a square of side cutout x the image's around a random point, which may be at an edge."""
    height, width = images.shape[2:]
    centre_row = uniform_per_image(images)                              # b 1 1 1
    centre_column = uniform_per_image(images)                           # b 1 1 1
    rows = torch.linspace(0, 1, height, device=images.device)[:, None]  # H 1
    columns = torch.linspace(0, 1, width, device=images.device)         # W
    in_rows = (rows - centre_row).abs() < cutout / 2                    # b 1 H 1
    in_columns = (columns - centre_column).abs() < cutout / 2           # b 1 1 W
    return images.masked_fill(in_rows & in_columns, 0.5)


# ---------------------------------------------------------------------------- optimisers
def make_optimizers(model, name, lr, weight_decay):
    """A list: AdamW; or, for name "muon", AdamW and Muon for the matrices of the layers."""
    matrices, others = [], []
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_in_layer = "blocks." in key or "layers." in key
        if name == "muon" and is_in_layer and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=weight_decay,
                                    fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr, weight_decay))
    return optimizers


def disc_lr(args, step):
    """Learning rate of the discriminator, whose schedule begins at its own first step."""
    return args.disc_lr * runtime.lr_factor(
        step - args.disc_start, args.disc_warmup, args.disc_warmup, args.steps - args.disc_start,
        args.lr_end, shape="cosine")


def average_gradients(module):
    """Replace gradients by their means over processes, for what is not in DDP."""
    for parameter in module.parameters():
        parameter.grad = runtime.all_mean(parameter.grad)


# ---------------------------------------------------------------------------- networks
class Networks:
    """All networks of stage 1, on the device.

    encoder: the Encoder. decoder: the Decoder. sizes: its arguments in the "rae" of checkpoints.
    ema_decoder, ema_encoder: those of the average weights, in eval mode. The encoder is the same
    unless it is a VAE, which is trained.
    trained, ema: ModuleLists of the decoder and, if the encoder is a VAE, its backbone.
    reconstruction_loss: a ReconstructionLoss. discriminator: a Discriminator, or None.
    """
    def __init__(self, encoder, args, device):
        self.encoder = encoder
        patch = args.decoder_patch or args.size // encoder.grid     # default: the encoder's
        self.sizes = dict(decoder_patch=patch, decoder_width=args.decoder_width,
                          decoder_depth=args.decoder_depth, decoder_heads=args.decoder_heads,
                          decoder_mlp=args.decoder_mlp)
        self.decoder = build_decoder(self.sizes, encoder.channels, encoder.grid).to(device)
        self.decoder.checkpoint = args.checkpoint_activations
        self.ema_decoder = copy.deepcopy(self.decoder)
        self.ema_encoder = encoder
        self.trained = nn.ModuleList([self.decoder])
        self.ema = nn.ModuleList([self.ema_decoder])
        if encoder.trainable:
            encoder.backbone.requires_grad_(True)
            self.ema_encoder = copy.deepcopy(encoder)
            self.trained.append(encoder.backbone)
            self.ema.append(self.ema_encoder.backbone)
            encoder.backbone.vit.set_grad_checkpointing(args.checkpoint_activations)
        self.ema.requires_grad_(False).eval()
        self.reconstruction_loss = ReconstructionLoss(args.lpips, args.gram, args.feature)
        self.reconstruction_loss.to(device)
        self.discriminator = None
        if args.gan > 0:
            self.discriminator = Discriminator(args.disc).to(device)
            self.discriminator.vit.set_grad_checkpointing(args.checkpoint_activations)

    def compile(self):
        """Compile the blocks of what training runs, which the EMA is not a part of."""
        runtime.compile_blocks(self.encoder)
        runtime.compile_blocks(self.decoder)
        runtime.compile_blocks(self.reconstruction_loss)
        if self.reconstruction_loss.vgg is not None:
            self.reconstruction_loss.vgg.net.compile()      # whole, as no two layers are alike
        if self.discriminator is not None:
            runtime.compile_blocks(self.discriminator)

    def load_initial(self, path):
        """Start from the decoder of --init, and from its encoder, too, if that is a VAE."""
        if release.is_published_rae(path):
            state = {"rae": release.load_packed_rae(path)}
            state["ema"] = state["rae"]["decoder"]
        else:
            state = storage.load_checkpoint(path)
        release.load_release(self.decoder, state, f"--init {path}")
        if self.encoder.trainable:
            weights = state.get("rae", {}).get("encoder_weights", {})
            release.load_strict(self.encoder.backbone, weights, f"--init {path}")
        self.ema.load_state_dict(self.trained.state_dict())

    def load_resumed(self, state):
        """Go on from a checkpoint."""
        release.load_release(self.decoder, state["model"], "the resumed decoder")
        release.load_release(self.ema_decoder, state["ema"], "the resumed EMA")
        if self.encoder.trainable:
            self.encoder.backbone.load_state_dict(state["encoder"])
            self.ema_encoder.backbone.load_state_dict(state["rae"]["encoder_weights"])
        if self.discriminator is not None:
            self.discriminator.heads.load_state_dict(state["disc"])

    def pack_rae(self, latent_mean, latent_var):
        """The autoencoder of the EMA weights, as the dict under "rae" of a checkpoint."""
        packed = dict(self.sizes, encoder=self.encoder.name, size=self.encoder.image_size,
                      latent_mean=latent_mean, latent_var=latent_var,
                      decoder=self.ema_decoder.state_dict())
        if self.encoder.trainable:
            packed["encoder_weights"] = self.ema_encoder.backbone.state_dict()
        return packed

    def state(self):
        """What load_resumed needs, but for what pack_rae returns."""
        encoder = self.encoder.backbone.state_dict() if self.encoder.trainable else {}
        heads = self.discriminator.heads.state_dict() if self.discriminator is not None else {}
        return dict(model=self.decoder.state_dict(), ema=self.ema_decoder.state_dict(),
                    encoder=encoder, disc=heads)


def build_networks(args, resumed, device):
    """Networks with fresh weights, those of --init, or those of the resumed checkpoint."""
    torch.manual_seed(args.seed)                            # the encoder of a VAE starts at random
    encoder = release.load_encoder(args.encoder, args.size).to(device)
    torch.manual_seed(args.seed)                            # so do the decoder and the heads
    networks = Networks(encoder, args, device)
    if resumed:
        networks.load_resumed(resumed)
    elif args.init:
        networks.load_initial(args.init)
    if args.compile:
        networks.compile()
    return networks


# ---------------------------------------------------------------------------- gradients of a step
class LossMeter:
    """Means of losses since the last line of the log, over micro-batches and processes.

    data: ImageData; the L1 distance is also averaged by its sources if it is a mixture.
    """
    def __init__(self, data, device):
        self.data = data
        self.device = device
        self.values = defaultdict(list)                     # of micro-batches, by name of the loss
        self.l1_by_source = runtime.MeanByGroup(len(data.domains), device)

    def add(self, **losses):
        """Add scalars of a micro-batch or a step by name."""
        for name, value in losses.items():
            self.values[name].append(value.detach())

    def add_l1_by_source(self, first, l1):
        """Add the L1 distances b of images first, first + 1, ... of the data."""
        sources = [self.data.source_of(first + i) for i in range(len(l1))]
        self.l1_by_source.add(runtime.to_device(torch.tensor(sources), self.device), l1)

    def means(self):
        """A dict of floats, the same on all processes; starts again."""
        means = {}
        for name, values in self.values.items():
            means[name] = runtime.all_mean(torch.stack(values).mean()).item()
        self.values.clear()
        _, source_means = self.l1_by_source.means()
        if len(self.data.domains) > 1:
            for name, mean in zip(self.data.domains, source_means, strict=True):
                if mean is not None:                        # none of its images was drawn
                    means[f"l1_{name}"] = mean
        return means


def adaptive_weight(rec_gradient, gan_gradient):                        # [D3]
    """lambda: what the GAN's gradient at the last layer is to be multiplied by to be as long as the
    reconstruction loss's. The constants are those of RAE's release.
    """
    return (rec_gradient.norm() / (gan_gradient.norm() + 1e-6)).clamp(max=1e4)


class MicroBatch(NamedTuple):
    """What a process computes in one forward and backward pass."""
    step: int
    micro: int                   # number in the step, over all processes
    images: torch.Tensor         # b 3 s s in [0,1], as the encoder sees them
    target: torch.Tensor         # b 3 S S in [0,1], as the decoder is to draw them
    is_last: bool                # of this process in the step


class Trainer:
    """Adds up the gradients of an optimizer step over the micro-batches of this process.

    networks: Networks. meter: LossMeter, which is told all losses. world: number of processes.
    """
    def __init__(self, networks, meter, args, device, world):
        self.encoder = networks.encoder
        self.decoder = networks.decoder
        self.parallel_decoder = networks.decoder            # for passes whose gradients it averages
        if world > 1:
            self.parallel_decoder = runtime.data_parallel(networks.decoder)
        self.reconstruction_loss = networks.reconstruction_loss
        self.discriminator = networks.discriminator
        self.meter = meter
        self.args = args
        self.device = device
        self.world = world
        self.accumulation = args.batch // (args.micro_batch * world)

    def prepare(self, micro_batches):
        """Turn what data.batches yields into MicroBatches on the device, one at a time."""
        for step, micro, images, _, _ in micro_batches:
            images = runtime.to_device(images, self.device).float() / 255               # b 3 H W
            is_last = micro // self.world == self.accumulation - 1
            yield MicroBatch(step, micro, resize_images(images, self.args.size),
                             resize_images(images, self.decoder.image_size), is_last)

    def noisy_latents(self, batch):
        """What the decoder learns to decode, latents b c h w with noise; and a VAE's KL, or 0.

        The latents are not normalised by their statistics. The same micro-batch always gives the
        same latents, since the random numbers are seeded by its number.
        """
        runtime.seed_step(self.args.seed, batch.step, batch.micro)
        if self.encoder.trainable:
            pixels = self.encoder.pixels(batch.images)                  # b 3 s s
            tokens, kl = self.encoder.backbone.sample_posterior(pixels)     # b n c, scalar
            latents = rearrange(tokens, "b (h w) c -> b c h w", h=self.encoder.grid)
        else:
            latents = self.encoder.encode(batch.images).float()
            kl = torch.zeros((), device=self.device)
        return add_noise(latents, self.args.tau, self.args.noise_law), kl

    def to_images(self, pixels):
        """Undo the encoder's pixel normalisation: b 3 S S -> b 3 S S in [0,1], not clamped."""
        return pixels * self.encoder.normalise.std + self.encoder.normalise.mean

    def plain_step(self, micro_batches, train_discriminator):
        """Gradients of the reconstruction loss, and of a VAE's KL divergence.

        train_discriminator: whether to add up the discriminator's, too, before the GAN starts.
        """
        for batch in self.prepare(micro_batches):
            with runtime.sync_gradients(self.parallel_decoder, batch.is_last):
                with runtime.autocast(self.device, self.args.dtype):
                    latents, kl = self.noisy_latents(batch)             # b c h w, scalar
                    images = self.to_images(self.parallel_decoder(latents))     # b 3 S S
                    loss, terms = self.reconstruction_loss(images, batch.target)
                    objective = loss + self.args.kl * kl
                (objective / self.accumulation).backward()
            if train_discriminator:
                self.discriminator_step(images, batch.target)
            self.record(batch, images, kl, loss=loss, **terms)

    def adversarial_step(self, micro_batches):
        """Gradients of L_rec + gan * lambda * L_gan (+ kl * KL of a VAE), and of the discriminator.

            lambda = |dL_rec/dW| / |dL_gan/dW|      W: weight of the decoder's last layer

        Both gradients are means over the whole batch: sums over micro-batches, then means over
        processes, of which the norms are taken at the very end. So lambda does not depend on how
        the batch is split, and it is known only when every image was decoded once.
        Pass 1 decodes without a graph, but for the last layer, and keeps the gradients of both
        losses at the pixels, which are as small as images.
        Pass 2 decodes again and sends rec_grad + gan * lambda * gan_grad through the decoder. No
        graph of VGG or of the discriminator takes memory by then.
        Source: arXiv 2012.09841, eq. 7; RAE's release, where each process has its own lambda.
        """
        last_layer = self.decoder.decoder_pred.weight
        rec_at_last = torch.zeros_like(last_layer)
        gan_at_last = torch.zeros_like(last_layer)
        pending = []
        for batch in self.prepare(micro_batches):                       # pass 1
            with torch.no_grad(), runtime.autocast(self.device, self.args.dtype):
                latents, kl = self.noisy_latents(batch)                 # b c h w, scalar
                tokens = self.decoder.tokens(latents)                   # b 1+n d
            with runtime.autocast(self.device, self.args.dtype):
                drawn = self.to_images(self.decoder.pixels(tokens))     # b 3 S S
                images = drawn.detach().requires_grad_()                # b 3 S S
                loss, terms = self.reconstruction_loss(images, batch.target)
                gan_loss = -self.discriminate(images).mean()
            rec_grad, = torch.autograd.grad(loss / self.accumulation, images)        # b 3 S S
            gan_grad, = torch.autograd.grad(gan_loss / self.accumulation, images)    # b 3 S S
            rec_at_last += torch.autograd.grad(drawn, last_layer, rec_grad, retain_graph=True)[0]
            gan_at_last += torch.autograd.grad(drawn, last_layer, gan_grad)[0]
            pending.append((batch, latents, kl, rec_grad, gan_grad))
            self.discriminator_step(images, batch.target)
            self.record(batch, images, kl, loss=loss, **terms, gan=gan_loss)

        gan_lambda = adaptive_weight(runtime.all_mean(rec_at_last), runtime.all_mean(gan_at_last))
        self.meter.add(gan_lambda=gan_lambda)
        for batch, latents, kl, rec_grad, gan_grad in pending:          # pass 2
            gradient = rec_grad + self.args.gan * gan_lambda * gan_grad             # b 3 S S
            with runtime.sync_gradients(self.parallel_decoder, batch.is_last):
                with runtime.autocast(self.device, self.args.dtype):
                    if self.encoder.trainable:              # the same again, with a graph
                        latents, kl = self.noisy_latents(batch)
                    images = self.to_images(self.parallel_decoder(latents))     # b 3 S S
                    # A scalar whose gradient at the images is `gradient`.
                    objective = (gradient * images).sum() + self.args.kl / self.accumulation * kl
                objective.backward()

    def discriminate(self, images):
        """Logits of the discriminator for images b 3 S S in [0,1], augmented."""
        if self.args.diffaug == "on":
            images = augment(images, self.args.cutout)
        return self.discriminator(images)

    def discriminator_step(self, fake, real):
        """Gradients of the discriminator's loss for fake and real images, b 3 S S each."""
        with runtime.autocast(self.device, self.args.dtype):
            fake_logits = self.discriminate(round_to_8_bits(fake))      # b 5*n
            real_logits = self.discriminate(round_to_8_bits(real))      # b 5*n
            loss = hinge_loss(fake_logits, real_logits)
        (loss / self.accumulation).backward()
        self.meter.add(disc=loss)

    def record(self, batch, images, kl, **losses):
        """Tell the meter the losses of a micro-batch."""
        if self.encoder.trainable:
            losses["kl"] = kl
        self.meter.add(**losses)
        first = batch.step * self.args.batch + batch.micro * self.args.micro_batch
        l1 = (images.detach() - batch.target).abs().mean((1, 2, 3))     # b
        self.meter.add_l1_by_source(first, l1)


# ---------------------------------------------------------------------------- speed
class ImageFlops(NamedTuple):
    """FLOPs of a training step for each image. What is decoded twice with the GAN counts once."""
    reconstruction: float        # encoder, decoder and reconstruction loss
    discriminator: float         # training of the discriminator; 0: there is none
    gan: float                   # gradient of the GAN's loss at the image

    def at(self, step, args):
        flops = self.reconstruction
        if step >= args.disc_start:
            flops += self.discriminator
        if step >= args.gan_start:
            flops += self.gan
        return flops


def count_image_flops(networks, args, device):
    """The ImageFlops of Networks. The optimizers and the EMA count nothing."""
    encoder, decoder = networks.ema_encoder, networks.ema_decoder       # in eval mode
    image = torch.zeros(1, 3, args.size, args.size, device=device)
    drawn = torch.zeros(1, 3, decoder.image_size, decoder.image_size, device=device)
    latents = torch.zeros(1, encoder.channels, encoder.grid, encoder.grid, device=device)
    encoding = speed.count_flops(encoder.encode, image)
    decoding = speed.count_flops(decoder, latents)
    loss = speed.count_flops(networks.reconstruction_loss, drawn, drawn)
    # Half of the loss's networks run on the target, without a backward pass.
    flops = decoding.training + (loss.forward + loss.frozen) / 2
    flops += encoding.training if encoder.trainable else encoding.forward
    if networks.discriminator is None:
        return ImageFlops(flops, 0, 0)

    side = networks.discriminator.image_size
    seen = torch.zeros(1, 3, side, side, device=device)
    vit = speed.count_flops(networks.discriminator.vit.forward_features, seen)
    both = speed.count_flops(networks.discriminator, drawn)             # the ViT and its heads
    training = vit.forward + both.training - vit.training               # the ViT is frozen
    return ImageFlops(flops, 2 * training, both.frozen)                 # 2: a fake and a real one


# ---------------------------------------------------------------------------- training
def main(args, data=None):
    """Train by the flags of parse_args. data: an ImageData in place of --data's training images."""
    rank, world, device = runtime.setup()
    lock = storage.lock(args.out, is_folder=True)
    resumed = release.load_resumed(args, "train_decoder.py") if args.resume else None

    # ---------------------------------------------------------------- data
    statistics_data = data
    if data is None:
        data = open_data(args.data, args.size, args.seed, crop="random", hold_out=args.hold_out)
        # Latents are measured on images as stage 2 sees them.
        statistics_data = open_data(args.data, args.size, args.seed, flip=True,
                                    hold_out=args.hold_out, objects=1)
    val_data = open_data(args.data, args.size, split="val", hold_out=args.hold_out)
    check_batch(data, args.batch)
    identity = data.identity()
    run_flags.check_same_run(args, resumed, identity)
    change_of_data = saving.describe_change(resumed, identity, args.hold_out)
    features = None
    if args.eval_features:
        features = metrics.feature_network(args.eval_features).to(device)

    # ---------------------------------------------------------------- model
    networks = build_networks(args, resumed, device)
    drawn_size = networks.decoder.image_size
    evaluation.check_eval_side(args, val_data, drawn_size)
    # An upsampling decoder draws larger images than its encoder sees: load them at the larger side.
    data.size = max(args.size, drawn_size)
    val_data.size = max(args.size, drawn_size)

    # ---------------------------------------------------------------- optimiser
    optimizers = make_optimizers(networks.trained, args.optimizer, args.lr, args.weight_decay)
    disc_optimizers = []
    if args.gan > 0:
        heads = networks.discriminator.heads
        disc_optimizers = [torch.optim.AdamW(heads.parameters(), args.disc_lr, betas=(0.9, 0.95),
                                             weight_decay=0.0, fused=device.type != "cpu")]
    all_optimizers = optimizers + disc_optimizers
    start = 0
    if resumed:
        for optimizer, state in zip(all_optimizers, resumed["opt"], strict=True):
            saving.load_optimizer(optimizer, state)
        start = resumed["step"]

    # ---------------------------------------------------------------- log and latent statistics
    parameters = sum(p.numel() for p in networks.trained.parameters())
    log = progress.Log(args, rank, device, start, parameters, data)
    checkpoints = saving.Checkpoints(args, rank, log, lock,
                                     in_background=device.type != "cpu")
    checkpoints.begin(start)
    meter = LossMeter(data, device)
    image_flops = count_image_flops(networks, args, device)
    log.warn(change_of_data)
    run_flags.warn_of_flags(log, args, resumed)
    release.warn_of_tiny_encoder(log, args.encoder, data)

    if resumed:
        latent_mean, latent_var = resumed["rae"]["latent_mean"], resumed["rae"]["latent_var"]
    else:
        latent_mean, latent_var = measure_latents(networks, statistics_data, args, log, device)
    rae = RAE(networks.ema_encoder, networks.ema_decoder, latent_mean, latent_var)
    rae = rae.to(device).eval()

    def save(step, is_stop):
        mean, var = latent_mean, latent_var
        if networks.encoder.trainable:                      # its latents have changed
            mean, var = measure_latents(networks, statistics_data, args, log, device)
        flags = run_flags.flags_as_dict(args)
        flags["decoder_patch"] = networks.decoder.patch     # is known only now
        checkpoints.save(
            step, is_stop, **networks.state(), rae=networks.pack_rae(mean, var), args=flags,
            opt=[optimizer.state_dict() for optimizer in all_optimizers], data=identity)

    def draw_preview():
        return reconstruction_picture(rae, load_images(val_data, range(12)), args.dtype)

    def evaluate(step):
        for source, name in enumerate(val_data.domains):
            results = evaluate_reconstruction(
                rae, val_data, args.eval_n, rank, world, args.micro_batch, source=source,
                vgg=networks.reconstruction_loss.vgg, features=features)
            log.write(dict(step=step, domain=name, **results))
            log.say(f"step {step} | {f'held out {name}'.strip()} | "
                    f"{metrics.format_results(results)}")

    # ---------------------------------------------------------------- loop
    trainer = Trainer(networks, meter, args, device, world)
    stream = batches(data, args.batch, args.micro_batch, start, rank, world, args.workers,
                     stop=args.steps)
    for step, micro_batches in runtime.stop_request.catching(groupby(stream, key=itemgetter(0))):
        train_discriminator = args.gan > 0 and step >= args.disc_start
        train_with_gan = args.gan > 0 and step >= args.gan_start
        if train_discriminator:
            networks.discriminator.update_spectral_norms()
        if train_with_gan:
            trainer.adversarial_step(micro_batches)
        else:
            trainer.plain_step(micro_batches, train_discriminator)
        log.flops += args.batch // world * image_flops.at(step, args)

        if networks.encoder.trainable:
            average_gradients(networks.encoder.backbone)    # DDP does so for the decoder alone
        lr = args.lr * runtime.lr_factor(step, args.warmup, args.warmup, args.steps, args.lr_end,
                                         shape="cosine")
        grad_norm = runtime.optimizer_step(optimizers, networks.trained, args.clip, lr)
        runtime.update_ema(networks.ema, networks.trained, args.ema, step)
        disc_grad_norm = 0.0
        if train_discriminator:
            average_gradients(heads)
            disc_grad_norm = runtime.optimizer_step(disc_optimizers, heads, args.clip,
                                                    disc_lr(args, step))

        done = step + 1
        checkpoints.check(done, grad_norm, disc_grad_norm, loss=meter.values["loss"][-1])
        is_end = done == args.steps
        is_stop = runtime.stop_request.was_made()
        log.first_steps(done)
        if done % args.log_every == 0 or is_end:
            means = meter.means()
            log.step(done, means.pop("loss"), grad_norm, lr, **means)
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
