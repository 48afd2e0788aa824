"""Stage 1: train a ViT decoder over a frozen encoder, and measure the statistics of its latents.

    python train_decoder.py                          the built-in world over the shipped encoder, laptop size
    python train_decoder.py --data photos/ --encoder dinov2-b --decoder B --micro_batch 8 --lr 1e-3
    torchrun --nproc_per_node=8 train_decoder.py --recipe rae --data imagenet/ --micro_batch 16
The loss is L1 + lpips*LPIPS + gram*Gram + feature*(distance in the tiny encoder) + gan*lambda*GAN, and of a
VAE + kl*KL. In the log, loss is the sum of the terms before GAN and KL, which stand beside it.
Writes OUT/last.pt (decoder, latent statistics, what an exact resume needs), log.jsonl and preview_*.png.
"""
import argparse
import contextlib
import copy
import functools
from itertools import groupby

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.transforms.functional import normalize

import eval_fid
import runtime
from data import batches, check, open_data
from model import (DECODER_SIZES, HALF, IMAGENET, RAE, Encoder, build_decoder, load_release,
                   load_strict, load_vit, pixel_statistics, require_heads)
from runtime import at_least

SHAPING = ("data encoder size seed batch micro_batch decoder_width decoder_depth decoder_heads decoder_mlp "
           "decoder_patch tau noise_law optimizer hold_out weight_decay dtype lpips gram feature kl gan "
           "gan_start disc disc_start diffaug cutout").split()    # fixed in a run
COMMON = dict(decoder="XL", size=256, batch=512, optimizer="adamw", lr_end=0.1, clip=0.0, lpips=1.0)
RECIPES = {                    # arXiv 2510.11690 and release, 2502 steps an epoch; 2601.16208, table 7, 2500
    "rae": dict(COMMON, encoder="dinov2-b", steps=16 * 2502, lr=2e-4, warmup=2502, ema=0.9978, tau=0.8,
                gan=0.75, gan_start=8 * 2502, disc="dino-s8", disc_start=6 * 2502, disc_lr=2e-4,
                disc_warmup=2502),
    "scale_rae": dict(COMMON, encoder="siglip2-so400m", steps=80 * 2500, lr=4e-4, warmup=5000, tau=0.0,
                      ema=0.9978, decoder_patch=14, gram=100.0, gan=10.0, gan_start=8 * 2500, disc="dino-s16",
                      disc_start=7 * 2500, disc_lr=5e-5, disc_warmup=2500)}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    # data
    p.add_argument("--data", nargs="+", default=["shapes"], help="shapes, text, folder, tar, a=PATH:SHARE")
    p.add_argument("--size", type=at_least(1), help="of images, px; default 256, tiny random pixel vae 64")
    p.add_argument("--hold_out", type=at_least(0), help="kept of each source to evaluate; default: eval_n")
    p.add_argument("--workers", type=at_least(0), default=1, help="loader processes of each training process")
    # model
    p.add_argument("--encoder", default="tiny", help="tiny, dinov2-s|b|l, siglip2-b|so400m, mae-b, webssl-l, "
                   "a timm ViT, random; pixel:PATCH, vae:CHANNELS:PATCH (trained), diffusers:FOLDER or name")
    p.add_argument("--decoder", choices=DECODER_SIZES, default="tiny", help="sets decoder_* to a named size")
    p.add_argument("--decoder_width", type=at_least(1), help="a multiple of 4 and of decoder_heads")
    p.add_argument("--decoder_depth", type=at_least(1))
    p.add_argument("--decoder_heads", type=at_least(1))
    p.add_argument("--decoder_mlp", type=at_least(1), help="hidden width of the MLPs")
    p.add_argument("--decoder_patch", type=at_least(1), help="pixels per token; default: as encoder")
    p.add_argument("--init", help="start from this decoder: a checkpoint's EMA, or an official model.pt")
    # optimisation
    p.add_argument("--recipe", choices=RECIPES, help="all that a paper says; single flags override it")
    p.add_argument("--lpips", type=at_least(0.0), help="of LPIPS; default 1, tiny random pixel vae 0")
    p.add_argument("--gram", type=at_least(0.0), default=0.0, help="weight of the Gram loss; Scale-RAE 100")
    p.add_argument("--feature", type=at_least(0.0), default=0.0, help="of the distance in the tiny encoder")
    p.add_argument("--gan", type=at_least(0.0), default=0.0, help="of lambda x GAN; papers 0.75, 10")
    p.add_argument("--gan_start", type=at_least(0), help="step where it joins the loss; default steps / 2")
    p.add_argument("--disc", choices=("tiny", "dino-s8", "dino-s16"), help="what the discriminator sees with")
    p.add_argument("--disc_start", type=at_least(0), help="step where it starts; default gan_start * 3/4")
    p.add_argument("--disc_lr", type=at_least(0.0), help="its peak rate; default: tiny 3e-3, dino 2e-4")
    p.add_argument("--disc_warmup", type=at_least(0), default=100, help="its own; then it decays as the lr")
    p.add_argument("--diffaug", choices=("on", "off"), default="on", help="augment what it sees")
    p.add_argument("--cutout", type=at_least(0.0, 1), default=0.0, help="side of what diffaug greys, a share")
    p.add_argument("--checkpoint_activations", action="store_true", help="less memory, a quarter more time")
    p.add_argument("--kl", type=at_least(0.0), default=1e-4, help="weight of a VAE's KL, nats a value")
    p.add_argument("--tau", type=at_least(0.0), default=0.2, help="strength of the latent noise (paper 0.8)")
    p.add_argument("--noise_law", choices=("half_normal", "uniform"), default="half_normal",
                   help="sigma of a sample: |N(0, tau^2)| as in the paper, tau * U(0,1) as in the release")
    p.add_argument("--batch", type=at_least(1), default=64, help="images per optimizer step, all processes")
    p.add_argument("--micro_batch", type=at_least(1), help="images per process and forward; default: all")
    p.add_argument("--steps", type=at_least(1), default=2000, help="optimizer steps in all")
    p.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="muon: for the layers' "
                   "matrices, in half of AdamW's steps; adamw: as in the paper")
    p.add_argument("--lr", type=at_least(1e-9), default=7e-3, help="peak learning rate; the paper uses 2e-4")
    p.add_argument("--lr_end", type=at_least(0.0, 1 + 1e-9), default=0.02, help="share of --lr; paper 0.1")
    p.add_argument("--warmup", type=at_least(0), default=100, help="steps of linear warm-up")
    p.add_argument("--weight_decay", type=at_least(0.0), default=0.0)
    p.add_argument("--clip", type=at_least(0.0), default=1.0, help="largest gradient norm; 0: none (release)")
    p.add_argument("--ema", type=at_least(0.0, 1), default=0.99, help="decay per step, <1; release 0.9978")
    # run
    p.add_argument("--out", default="runs/decoder", help="folder of the run")
    p.add_argument("--seed", type=at_least(0), default=0)
    p.add_argument("--stats_n", type=at_least(0), default=5000, help="images for latent statistics; 0: all")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default=runtime.DTYPE, help="bf16 where fast")
    p.add_argument("--compile", action="store_true", help="torch.compile the decoder")
    p.add_argument("--log_every", type=at_least(1), default=100, help="steps")
    p.add_argument("--save_every", type=at_least(1), default=1000, help="steps; the last is always saved")
    p.add_argument("--preview_every", type=at_least(0), default=1000, help="steps between pictures; 0: none")
    p.add_argument("--eval_every", type=at_least(0), default=1000, help="steps between evaluations; 0: none")
    p.add_argument("--eval_n", type=at_least(2), default=200, help="images per evaluation")
    p.add_argument("--eval_features", help="inception, fd-dinov2 or an encoder; default: --encoder")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    p.add_argument("--overwrite", action="store_true", help="start anew although OUT/last.pt exists")
    p.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases (pip install wandb)")
    p.set_defaults(**RECIPES.get(p.parse_args(argv).recipe, {}))
    args = p.parse_args(argv)
    small = args.encoder.split(":")[0] in ("tiny", "random", "pixel", "vae")    # of the built-in world
    args.disc = args.disc or ("tiny" if small else "dino-s8")
    usual = dict(lpips=float(not small), size=64 if small else 256, **DECODER_SIZES[args.decoder])
    if not args.resume:                                    # a resumed run's are its checkpoint's
        start = args.steps // 2 if args.gan_start is None else args.gan_start
        usual |= dict(gan_start=start, disc_start=start * 3 // 4,
                      disc_lr=3e-3 if args.disc == "tiny" else 2e-4)
    vars(args).update({k: v for k, v in usual.items() if getattr(args, k) is None})
    args.hold_out = args.eval_n if args.hold_out is None else args.hold_out
    runtime.check_common(p, args)
    eval_fid.check_features(p, args, "eval_features")
    if args.gan and not args.resume and not args.disc_start <= args.gan_start < args.steps:
        p.error(f"--disc_start {args.disc_start}, --gan_start {args.gan_start} and --steps {args.steps} must "
                f"come in this order, the last alone; lower --gan_start, or give --gan 0")
    try:
        require_heads(args.decoder_width, args.decoder_heads, "--decoder_width", "--decoder_heads")
        pixel_statistics(args.encoder)
    except ValueError as error:
        p.error(str(error))
    if args.cutout and args.diffaug == "off":
        p.error(f"--cutout {args.cutout} is a part of --diffaug on")
    if args.decoder_width % 4:
        p.error(f"--decoder_width {args.decoder_width} must be a multiple of 4")
    return args


# ---------------------------------------------------------------------------------- latents
def latent_statistics(encoder, data, n, batch, rank=0, world=1, workers=0):
    """Mean and variance of each latent element over n images: two fp32 tensors c h w.

    One streaming pass in fp64 (Welford, batch by batch), merged exactly over processes; the release keeps a
    running average of its last 20 batches instead.              Source: Chan et al. 1979; RAE section 3.1
    """
    moments = (0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    micro, device = max(1, min(batch, n // world)), next(encoder.parameters(), torch.empty(0)).device
    for _, _, images, _, _ in batches(data, micro * world, micro, 0, rank, world, workers,
                                      stop=n // (micro * world)):
        z = encoder.encode(images.to(device).float() / 255).double().cpu()
        moments = join(moments, (len(z), z.mean(0), (z - z.mean(0)).square().sum(0)))
    n, mean, scatter = functools.reduce(join, eval_fid.gather(moments))
    return mean.float(), (scatter / n).float()


def join(a, b):
    """(count, mean, sum of squared deviations) of two disjoint samples together."""
    n, delta = a[0] + b[0], b[1] - a[1]
    return n, a[1] + delta * (b[0] / n), a[2] + b[2] + delta.square() * (a[0] * b[0] / n)


def posterior(encoder, images, eps):
    """Latents b c h w of a VAE, drawn with eps b n c, and their KL divergence from N(0,1), nats a value."""
    mean, logvar = encoder.backbone.posterior(encoder.pixels(images))
    kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
    return rearrange(mean + (logvar / 2).exp() * eps, "b (h w) c -> b c h w", h=encoder.grid), kl


def add_noise(z, tau, law):
    """Noise-augmented decoding: z + sigma * N(0,1), one sigma per sample.  z: b c h w, not yet normalised.

    Source: RAE section 4.3: sigma ~ |N(0, tau^2)|, "half_normal"; the release: tau * U(0,1), "uniform".
    """
    sigma = torch.randn(len(z), 1, 1, 1, device=z.device).abs() if law == "half_normal" else \
        torch.rand(len(z), 1, 1, 1, device=z.device)
    return z + tau * sigma * torch.randn_like(z)


# ---------------------------------------------------------------------------------- losses
class Perceptual(nn.Module):
    """The terms of the reconstruction loss by name, means over a batch; those of weight 0 are left out.

    weights: dict of l1, lpips, gram, feature.
    forward: images, target b 3 H W in [0,1] -> dict of scalars, not yet weighted. l1: mean |difference|.
    lpips: package lpips on VGG-16, a mean over images.                     Source: arXiv 1801.03924
    gram: mean over VGG's five maps F (c x hw) of mean (G(images) - G(target))^2, G = F F^T / (c hw).
        Source: arXiv 1603.08155, eq 3 and 4, as a mean; the normalisation behind Scale-RAE's 100 is unknown
    feature: mean squared difference of the tiny encoder's tokens after each block, each normalised.
    Raises FileNotFoundError if VGG's weights are neither there nor to be had.
    """
    def __init__(self, weights):
        super().__init__()
        self.weights, self.vgg, self.encoder = weights, None, Encoder("tiny") if weights["feature"] else None
        if weights["lpips"] or weights["gram"]:
            self.vgg = eval_fid.load_lpips()

    def maps(self, images):                      # b 3 H W -> 5 maps b c h w
        return self.vgg.net(self.vgg.scaling_layer(2 * images - 1))

    def tokens(self, images):                    # b 3 H W -> a map b n c for each block
        x = self.encoder.pixels(eval_fid.resize(images, self.encoder.input_size))
        maps = self.encoder.backbone.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        return [F.layer_norm(x, x.shape[2:]) for x in maps]

    def forward(self, images, target):
        terms = dict(l1=(images - target).abs().mean())
        if self.vgg:
            pairs = [*zip(self.maps(images), self.maps(target))]
        if self.weights["lpips"]:
            terms["lpips"] = sum(lin((F.normalize(x) - F.normalize(y)).square()).mean().float()
                                 for lin, (x, y) in zip(self.vgg.lins, pairs))
        if self.weights["gram"]:
            terms["gram"] = sum((gram(x) - gram(y)).square().mean() for x, y in pairs) / len(pairs)
        if self.weights["feature"]:
            pairs = [*zip(self.tokens(images), self.tokens(target))]
            terms["feature"] = sum(F.mse_loss(x, y) for x, y in pairs) / len(pairs)
        return terms


def gram(x):                                     # b c h w -> b c c, in fp32: nearly equal ones are subtracted
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().flatten(2)
        return x @ x.mT / x[0].numel()


class Head(nn.Module):
    """One head of the discriminator, features b d n -> logits b n; norms are per sample and channel."""
    def __init__(self, d):
        super().__init__()
        self.first = nn.Sequential(spectral_norm(nn.Conv1d(d, d, 1)), nn.GroupNorm(d, d), nn.LeakyReLU(0.2))
        self.second = nn.Sequential(spectral_norm(nn.Conv1d(d, d, 9, padding=4, padding_mode="circular")),
                                    nn.GroupNorm(d, d), nn.LeakyReLU(0.2))
        self.last = spectral_norm(nn.Conv1d(d, 1, 1))

    def forward(self, x):
        x = self.first(x)                                               # b d n
        return self.last((x + self.second(x)) / 2 ** 0.5)[:, 0]         # b n


class Discriminator(nn.Module):
    """Five heads on blocks of a frozen ViT, spectral norm in all of their layers; only `heads` learn.

    name: tiny (the shipped encoder), dino-s8 or dino-s16. forward: images b 3 H W in [0,1] -> logits b 5n.
    Source: [RAE] and release; StyleGAN-T, arXiv 2301.09515. The release zeroes the keys' bias, which no
        attention feels, and takes tanh-GELUs; ours are DINO's own.
    """
    def __init__(self, name):
        super().__init__()
        patch = {"dino-s8": 8, "dino-s16": 16}.get(name)
        self.side, (self.mean, self.std) = 224 if patch else 64, IMAGENET if patch else HALF
        self.vit = load_vit(patch and f"vit_small_patch{patch}_224.dino", self.side).requires_grad_(False)
        last = len(self.vit.blocks)
        self.at = [last - 1] + [last * k // 4 - 1 for k in (1, 2, 3, 4)]        # of 12: 11, 2, 5, 8, 11
        self.heads = nn.ModuleList(Head(self.vit.embed_dim) for _ in self.at)
        self.eval()

    def forward(self, images):
        x = F.interpolate(images, size=(self.side, self.side), mode="bilinear",
                          antialias=images.shape[-1] > 2 * self.side)           # b 3 s s
        maps = self.vit.forward_intermediates(normalize(x, self.mean, self.std), norm=False, output_fmt="NLC",
                                              intermediates_only=True)
        return torch.cat([head(maps[k].mT).float() for head, k in zip(self.heads, self.at)], 1)

    def renew(self):                             # one power iteration of the spectral norms, once a step
        for m in self.heads.train().modules():
            hasattr(m, "parametrizations") and m.weight
        self.heads.eval()


def augment(images, cutout=0.0):
    """DiffAug: brightness, saturation, contrast, a shift by up to 1/8, each image's own. b 3 H W in [0,1].

    cutout: side of a square that is greyed, as a share of the image's; 0 in the release.
    Source: arXiv 2006.10738, strengths of the release.
    """
    b, _, h, w = images.shape
    bright, saturation, contrast = (torch.rand(3, b, 1, 1, 1, device=images.device))
    x = images + (bright - 0.5) / 2                                     # of [0,1]; the release: of [-1,1]
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = F.pad(mean + (x - mean) * (contrast + 0.5), [w // 8] * 2 + [h // 8] * 2, value=0.5)
    shift = (torch.rand(b, 2) * torch.tensor([h // 8 * 2 + 1, w // 8 * 2 + 1])).long().tolist()
    x = torch.stack([one[:, i:i + h, j:j + w] for one, (i, j) in zip(x, shift)])
    row, column = torch.rand(2, b, 1, 1, 1, device=x.device)            # of the square's centre
    y, z = (torch.linspace(0, 1, n, device=x.device) for n in (h, w))
    hole = ((y[:, None] - row).abs() < cutout / 2) & ((z - column).abs() < cutout / 2)         # b 1 h w
    return x.masked_fill(hole, 0.5)


# ---------------------------------------------------------------------------------- training
class Muon(torch.optim.Muon):
    """torch's in fp32; its bf16 products take 20 to 40 times as long on CPUs that have only AVX2.

    Makes the update of a matrix orthogonal, and scales it to the size of AdamW's, so that both take one lr.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: arXiv 2502.16982
    """
    @torch.no_grad()
    def step(self):
        for group, p in ((group, p) for group in self.param_groups for p in group["params"]):
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = p.grad.lerp(momentum, 0.95)                             # Nesterov's
            x = (x.mT if x.shape[0] > x.shape[1] else x) / x.norm().clamp(min=1e-7)
            for _ in range(5):                                          # Newton-Schulz iterations
                a = x @ x.mT
                x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(x if x.shape == p.shape else x.mT, alpha=0.2 * max(p.shape) ** 0.5 * group["lr"])


def make_optimizers(model, name, lr, weight_decay):
    """A list: AdamW; or, for name "muon", Muon for the matrices of the blocks and AdamW for the rest."""
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    inner = [k for k, p in trained.items() if p.ndim == 2 and ("blocks." in k or "layers." in k)]
    inner = {k: trained.pop(k) for k in inner if name == "muon"}
    opts = [torch.optim.AdamW(trained.values(), lr, (0.9, 0.95), weight_decay=weight_decay, fused=True)]
    if inner:
        opts += [Muon(inner.values(), lr, weight_decay, adjust_lr_fn="match_rms_adamw")]
    return opts


def main(args):
    rank, world, device = runtime.setup()
    accumulate = args.batch // (args.micro_batch * world)
    data = open_data(args.data, args.size, args.seed, "random", hold_out=args.hold_out)
    val = open_data(args.data, args.size, split="val", hold_out=args.hold_out)
    check(data, args.batch)
    eval_fid.check_n(args, val)
    judge = eval_fid.find_judge(args.eval_features).to(device) if args.eval_features else None
    torch.manual_seed(args.seed)                           # a VAE starts at random
    encoder = Encoder(args.encoder, args.size).to(device)
    args.decoder_patch = args.decoder_patch or args.size // encoder.grid
    side = encoder.grid * args.decoder_patch               # of the decoder's images, 2 x size if it upsamples
    data.size = val.size = max(side, args.size)
    eval_fid.check_side(args, val, side)
    resumed = args.resume and runtime.resume(args, SHAPING)
    args.disc_lr = resumed["args"]["disc_lr"] if args.disc_lr is None else args.disc_lr
    torch.manual_seed(args.seed)
    decoder = build_decoder(vars(args), encoder.channels, encoder.grid).to(device)
    decoder.checkpoint = args.checkpoint_activations
    if args.init and not resumed:
        began = runtime.load_checkpoint(args.init)
        load_release(decoder, began, f"--init {args.init}")
        if encoder.trainable:                              # both learned together
            weights = began.get("rae", {}).get("encoder_weights", {})
            load_strict(encoder.backbone, weights, f"--init {args.init}")
    encoder.backbone.requires_grad_(encoder.trainable)
    encoder.trainable and encoder.backbone.vit.set_grad_checkpointing(args.checkpoint_activations)
    trained = nn.ModuleList([decoder] + [encoder.backbone] * encoder.trainable)
    ema = copy.deepcopy(trained).requires_grad_(False).eval()
    opts = make_optimizers(trained, args.optimizer, args.lr, args.weight_decay)
    weights = dict(l1=1.0, lpips=args.lpips, gram=args.gram, feature=args.feature)
    perceptual, start = Perceptual(weights).to(device), 0
    disc, heads, disc_opts = None, nn.ModuleList(), []
    if args.gan:
        disc = Discriminator(args.disc).to(device)
        disc.vit.set_grad_checkpointing(args.checkpoint_activations)
        heads = disc.heads
        disc_opts = [torch.optim.AdamW(heads.parameters(), args.disc_lr, (0.9, 0.95), weight_decay=0.0)]
    if resumed:
        load_release(decoder, {"model": resumed["model"]})
        load_release(ema[0], {"ema": resumed["ema"]})
        if encoder.trainable:
            encoder.backbone.load_state_dict(resumed["encoder"])
            ema[1].load_state_dict(resumed["rae"]["encoder_weights"])
        for opt, state in zip(opts + disc_opts, resumed["opt"]):
            opt.load_state_dict(state)
        heads.load_state_dict(resumed["disc"])
        start = resumed["step"]
        latent_mean, latent_var = resumed["rae"]["latent_mean"], resumed["rae"]["latent_var"]
    log = runtime.Log(args, rank, device, start, sum(p.numel() for p in trained.parameters()))
    shown = encoder
    if encoder.trainable:                                  # with the EMA's weights
        shown = copy.deepcopy(encoder).requires_grad_(False)
        shown.backbone = ema[1]
    if not resumed or encoder.trainable:                   # to list the data takes a while
        centred = open_data(args.data, args.size, args.seed, flip=True, hold_out=args.hold_out, objects=1)
        n = min(args.stats_n or len(centred), len(centred)) // args.batch * args.batch or args.batch
        statistics = shown, centred, n, args.micro_batch, rank, world, args.workers
    if not resumed:
        latent_mean, latent_var = latent_statistics(*statistics)
        log.say(f"latents {tuple(latent_mean.shape)}: variance {latent_var.mean():.3f} over {n} images")
    step_model = DistributedDataParallel(decoder, broadcast_buffers=False) if world > 1 else decoder
    step_model = torch.compile(step_model) if args.compile else step_model
    rae = RAE(shown, ema[0], latent_mean, latent_var).to(device).eval()

    def save(step):
        mean, var, more = latent_mean, latent_var, {}
        if encoder.trainable:                              # the latents have changed
            (mean, var), more = latent_statistics(*statistics), dict(encoder_weights=ema[1].state_dict())
        if rank == 0:
            sizes = {k: v for k, v in vars(args).items() if k.startswith("decoder_")}
            packed = dict(encoder=args.encoder, size=args.size, decoder=ema[0].state_dict(), **sizes, **more,
                          latent_mean=mean, latent_var=var)                          # for model.unpack_rae
            runtime.save_checkpoint(f"{args.out}/last.pt", model=decoder.state_dict(), ema=packed["decoder"],
                                    rae=packed, opt=[opt.state_dict() for opt in opts + disc_opts], step=step,
                                    args=runtime.plain(args), disc=heads.state_dict(),
                                    encoder=trained[1].state_dict() if encoder.trainable else {})

    def latents(x, m):             # noisy, b c h w, and the KL divergence of a VAE: the same at each call
        runtime.seed_step(args.seed, step, m)
        if encoder.trainable:
            eps = torch.randn(len(x), encoder.grid ** 2, encoder.channels, device=device)
            z, kl = posterior(encoder, x, eps)
        else:
            z, kl = encoder.encode(x).float(), torch.zeros((), device=device)
        return add_noise(z, args.tau, args.noise_law), kl               # not normalised

    view = functools.partial(augment, cutout=args.cutout) if args.diffaug == "on" else torch.clone
    last_layer, std, mean, sums = decoder.decoder_pred.weight, rae.pixel_std, rae.pixel_mean, {}
    domains = torch.zeros(len(data.domains), 2, device=device)          # sums of l1 and counts, by source
    stream = batches(data, args.batch, args.micro_batch, start, rank, world, args.workers, stop=args.steps)
    for step, parts in groupby(stream, key=lambda part: part[0]):
        adversarial, teaching = (args.gan > 0 and step >= at for at in (args.gan_start, args.disc_start))
        held, norms = [], torch.zeros(2, *last_layer.shape, device=device)
        teaching and disc.renew()
        for _, m, images, _, _ in parts:
            images = images.to(device).float() / 255
            x, real = eval_fid.resize(images, args.size), eval_fid.resize(images, side)
            last = m // world == accumulate - 1
            with contextlib.nullcontext() if world == 1 or last or adversarial else step_model.no_sync():
                with runtime.autocast(device, args.dtype), torch.set_grad_enabled(not adversarial):
                    z, kl = latents(x, m)
                    pixels = step_model(z) if not adversarial else decoder.tokens(z)
                with runtime.autocast(device, args.dtype):
                    # With the GAN, first the gradients at the pixels, since lambda is a ratio over the whole
                    # batch, of both losses' gradients at the last layer; then the decoder's, after a second
                    # forward pass: no graph of VGG or discriminator is alive by then.
                    pixels = (decoder.pixels(pixels) if adversarial else pixels) * std + mean    # b 3 H W
                    fake = pixels.detach().requires_grad_() if adversarial else pixels
                    terms = perceptual(fake, real)
                    loss = sum(perceptual.weights[k] * v for k, v in terms.items())
                    if adversarial:
                        terms["gan"] = -disc(view(fake)).mean()
                if adversarial:
                    grads = [torch.autograd.grad(x / accumulate, fake)[0] for x in (loss, terms["gan"])]
                    for norm, g in zip(norms, grads):
                        norm += torch.autograd.grad(pixels, last_layer, g, retain_graph=True)[0]
                    held.append((x, m, z, *grads))
                else:
                    ((loss + args.kl * kl) / accumulate).backward()
            if teaching:                                   # fakes of the same noise; both in 8 bits
                with runtime.autocast(device, args.dtype):
                    no, yes = (disc(view((x.detach().clamp(0, 1) * 255).round() / 255)) for x in (fake, real))
                    terms["disc"] = (F.relu(1 + no) + F.relu(1 - yes)).mean() / 2
                (terms["disc"] / accumulate).backward()
            source = [data.place(step * args.batch + m * args.micro_batch + k)[0] for k in range(len(real))]
            error = (fake.detach() - real).abs().mean((1, 2, 3))        # b
            domains.index_add_(0, torch.tensor(source, device=device), torch.stack([error, error * 0 + 1], 1))
            for name, value in {**terms, "loss": loss, **({"kl": kl} if encoder.trainable else {})}.items():
                sums.setdefault(name, []).append(value.detach())
        if adversarial:
            losses_norm, gan_norm = runtime.all_mean(norms).flatten(1).norm(dim=1)
            ratio = (losses_norm / (gan_norm + 1e-6)).clamp(max=1e4)    # lambda
            sums.setdefault("gan_lambda", []).append(ratio)
        for x, m, z, grad, more in held:
            last, weight = m // world == accumulate - 1, torch.tensor(args.kl / accumulate, device=device)
            with contextlib.nullcontext() if world == 1 or last else step_model.no_sync():
                with runtime.autocast(device, args.dtype):
                    z, kl = latents(x, m) if encoder.trainable else (z, None)
                    pixels = step_model(z) * std + mean
                ends = (pixels, grad + args.gan * ratio * more), (kl, weight)
                torch.autograd.backward(*zip(*ends[:1 + encoder.trainable]))
        for p in [*trained[1:].parameters()] + [*heads.parameters()] * teaching:
            p.grad = runtime.all_mean(p.grad)              # DDP averages the decoder's gradients alone
        lr = args.lr * runtime.lr_factor(step, args.warmup, args.warmup, args.steps, args.lr_end, "cosine")
        norm = runtime.step_optimizers(opts, trained, args.clip, loss, step, lr)
        runtime.update_ema(ema, trained, args.ema, step)
        if teaching:                                       # its schedule covers its own life
            span = args.disc_warmup, args.disc_warmup, args.steps - args.disc_start, args.lr_end, "cosine"
            disc_lr = args.disc_lr * runtime.lr_factor(step - args.disc_start, *span)
            runtime.step_optimizers(disc_opts, heads, args.clip, terms["disc"], step, disc_lr)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            means = {k: runtime.all_mean(torch.stack(v).mean()).item() for k, v in sums.items()}
            means |= {f"l1_{name}": total / n for name, (total, n) in zip(
                data.domains, runtime.all_mean(domains).tolist()) if n and len(domains) > 1}
            log.step(done, means.pop("loss"), norm, lr, **means)
            sums, domains = {}, torch.zeros_like(domains)
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps) and rank == 0:
            picture = reconstruction_picture(rae, eval_fid.real_images(val, range(12)))
            picture.save(f"{args.out}/preview_{done:07d}.png")
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            for i, name in enumerate(val.domains):
                metrics = eval_fid.evaluate_reconstruction(
                    rae, val, args.eval_n, rank, world, args.micro_batch, domain=i, vgg=perceptual.vgg,
                    judge=judge)
                log.write(dict(step=done, domain=name, **metrics))
                log.say(f"step {done} | held-out {name} " + eval_fid.one_line(metrics))


@torch.no_grad()
def reconstruction_picture(rae, images):
    """A PIL picture: originals in the upper row, reconstructions below.  images: uint8 b H W 3."""
    rows = torch.cat(eval_fid.reconstruct(rae, images)).cpu()
    sheet = rearrange(F.pad(rows, (1, 1, 1, 1), value=1.0), "(r b) c h w -> (r h) (b w) c", r=2)
    return Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8))


if __name__ == "__main__":
    runtime.run(main, parse_args)
