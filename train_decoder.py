"""Stage 1: train a ViT decoder over a frozen encoder, and measure the statistics of its latents.

    python train_decoder.py                          the built-in world over the shipped encoder, laptop size
    python train_decoder.py --data photos/ --encoder dinov2-b --decoder B --micro_batch 8 --lr 1e-3
    torchrun --nproc_per_node=8 train_decoder.py --data imagenet/ --encoder dinov2-b --decoder XL --batch 512
        --micro_batch 16 --steps 40032 --optimizer adamw --lr 2e-4 --warmup 2502 --lr_end 0.1 --tau 0.8
        --ema 0.9978
Writes OUT/last.pt (decoder, latent statistics, what an exact resume needs), log.jsonl and preview_*.png.
"""
import argparse
import contextlib
import copy

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import eval_fid
import runtime
from data import batches, check, open_data
from model import DECODER_SIZES, RAE, Encoder, build_decoder, load_release, pixel_statistics, require_heads
from runtime import at_least

SHAPING = ("data encoder size seed batch micro_batch decoder_width decoder_depth decoder_heads decoder_mlp "
           "decoder_patch tau noise_law optimizer hold_out weight_decay dtype").split()   # fixed in a run


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    # data
    p.add_argument("--data", nargs="+", default=["shapes"], help="shapes, folder, tars, NAME=PATH:WEIGHT ...")
    p.add_argument("--size", type=at_least(1), help="side of the images, pixels; default: tiny 64, else 256")
    p.add_argument("--hold_out", type=at_least(0), help="kept of each source to evaluate; default: eval_n")
    p.add_argument("--workers", type=at_least(0), default=1, help="loader processes of each training process")
    # model
    p.add_argument("--encoder", default="tiny", help="tiny, dinov2-s|b|l, siglip2-b|so400m, mae-b, timm ViT")
    p.add_argument("--decoder", choices=DECODER_SIZES, default="tiny", help="sets decoder_* to a named size")
    p.add_argument("--decoder_width", type=at_least(1), help="a multiple of 4 and of decoder_heads")
    p.add_argument("--decoder_depth", type=at_least(1))
    p.add_argument("--decoder_heads", type=at_least(1))
    p.add_argument("--decoder_mlp", type=at_least(1), help="hidden width of the MLPs")
    p.add_argument("--decoder_patch", type=at_least(1), help="pixels per token; default: as encoder")
    # optimisation
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
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    p.add_argument("--overwrite", action="store_true", help="start anew although OUT/last.pt exists")
    p.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases (pip install wandb)")
    args = p.parse_args(argv)
    for name, value in DECODER_SIZES[args.decoder].items():    # the size first, then what was given beside it
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.size = args.size or (64 if args.encoder == "tiny" else 256)
    args.hold_out = args.eval_n if args.hold_out is None else args.hold_out
    runtime.check_common(p, args)
    try:
        require_heads(args.decoder_width, args.decoder_heads, "--decoder_width", "--decoder_heads")
        pixel_statistics(args.encoder)
    except ValueError as error:
        p.error(str(error))
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
    micro, device = max(1, min(batch, n // world)), next(encoder.parameters()).device
    for _, _, images, _, _ in batches(data, micro * world, micro, 0, rank, world, workers,
                                      stop=n // (micro * world)):
        z = encoder.encode(images.to(device).float() / 255).double().cpu()
        moments = join(moments, (len(z), z.mean(0), (z - z.mean(0)).square().sum(0)))
    moments, *others = eval_fid.gather(moments)
    for part in others:
        moments = join(moments, part)
    n, mean, scatter = moments
    return mean.float(), (scatter / n).float()


def join(a, b):
    """(count, mean, sum of squared deviations) of two disjoint samples together."""
    n, delta = a[0] + b[0], b[1] - a[1]
    return n, a[1] + delta * (b[0] / n), a[2] + b[2] + delta.square() * (a[0] * b[0] / n)


def add_noise(z, tau, law):
    """Noise-augmented decoding: z + sigma * N(0,1), one sigma per sample.  z: b c h w, not yet normalised.

    Source: RAE section 4.3: sigma ~ |N(0, tau^2)|, "half_normal"; the release: tau * U(0,1), "uniform".
    """
    sigma = torch.randn(len(z), 1, 1, 1, device=z.device).abs() if law == "half_normal" else \
        torch.rand(len(z), 1, 1, 1, device=z.device)
    return z + tau * sigma * torch.randn_like(z)


# ---------------------------------------------------------------------------------- losses
def losses(images, target):
    """Terms of the reconstruction loss by name; their sum is minimised.  images, target: b 3 H W in [0,1]."""
    return dict(l1=(images - target).abs().mean())


# ---------------------------------------------------------------------------------- training
def make_optimizers(model, name, lr, weight_decay):
    """A list: AdamW; or, for name "muon", Muon for the matrices of the blocks and AdamW for the rest.

    Muon makes a matrix's update orthogonal; scaled to the size of AdamW's, both take the same lr.
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: arXiv 2502.16982
    """
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    inner = [k for k, p in trained.items() if p.ndim == 2 and ("blocks." in k or "layers." in k)]
    inner = {k: trained.pop(k) for k in inner if name == "muon"}
    opts = [torch.optim.AdamW(trained.values(), lr, (0.9, 0.95), weight_decay=weight_decay, fused=True)]
    if inner:
        opts += [torch.optim.Muon(inner.values(), lr, weight_decay, adjust_lr_fn="match_rms_adamw")]
    return opts


def main(args):
    rank, world, device = runtime.setup()
    accumulate = args.batch // (args.micro_batch * world)
    data = open_data(args.data, args.size, args.seed, "random", hold_out=args.hold_out)
    val = open_data(args.data, args.size, split="val", hold_out=args.hold_out)
    check(data, args.batch)
    eval_fid.check_n(args, val)
    encoder = Encoder(args.encoder, args.size).to(device)
    args.decoder_patch = args.decoder_patch or args.size // encoder.grid
    side = encoder.grid * args.decoder_patch               # of the decoder's images, 2 x size if it upsamples
    data.size = val.size = max(side, args.size)
    resumed = args.resume and runtime.resume(args, SHAPING)
    torch.manual_seed(args.seed)
    decoder = build_decoder(vars(args), encoder.channels, encoder.grid).to(device)
    ema = copy.deepcopy(decoder).requires_grad_(False).eval()
    opts = make_optimizers(decoder, args.optimizer, args.lr, args.weight_decay)
    start = 0
    if resumed:
        load_release(decoder, {"model": resumed["model"]})
        load_release(ema, {"ema": resumed["ema"]})
        for opt, state in zip(opts, resumed["opt"]):
            opt.load_state_dict(state)
        start = resumed["step"]
        latent_mean, latent_var = resumed["rae"]["latent_mean"], resumed["rae"]["latent_var"]
    log = runtime.Log(args, rank, device, start, sum(p.numel() for p in decoder.parameters()))
    if not resumed:
        centred = open_data(args.data, args.size, args.seed, flip=True, hold_out=args.hold_out, objects=1)
        n = min(args.stats_n or len(centred), len(centred)) // args.batch * args.batch or args.batch
        latent_mean, latent_var = latent_statistics(encoder, centred, n, args.micro_batch, rank, world,
                                                    args.workers)
        log.say(f"latents {tuple(latent_mean.shape)}: variance {latent_var.mean():.3f} over {n} images")
    step_model = DistributedDataParallel(decoder, broadcast_buffers=False) if world > 1 else decoder
    if args.compile:
        step_model = torch.compile(step_model)
    rae = RAE(encoder, ema, latent_mean, latent_var).to(device).eval()

    def save(step):
        if rank == 0:
            sizes = {k: v for k, v in vars(args).items() if k.startswith("decoder_")}
            packed = dict(encoder=args.encoder, size=args.size, decoder=ema.state_dict(), **sizes,
                          latent_mean=latent_mean, latent_var=latent_var)            # for model.unpack_rae
            runtime.save_checkpoint(f"{args.out}/last.pt", model=decoder.state_dict(), ema=ema.state_dict(),
                                    rae=packed, opt=[opt.state_dict() for opt in opts], step=step,
                                    args=runtime.plain(args))

    sums = {}
    for step, m, images, _, _ in batches(data, args.batch, args.micro_batch, start, rank, world, args.workers,
                                         stop=args.steps):
        last = m // world == accumulate - 1
        images = images.to(device).float() / 255
        with runtime.autocast(device, args.dtype):
            z = encoder.encode(eval_fid.resize(images, args.size)).float()       # b c h w, not normalised
        runtime.seed_step(args.seed, step, m)
        z = add_noise(z, args.tau, args.noise_law)
        quiet = contextlib.nullcontext() if world == 1 or last else step_model.no_sync()
        with quiet:                                                     # DDP averages gradients once a step
            with runtime.autocast(device, args.dtype):
                pixels = step_model(z) * rae.pixel_std + rae.pixel_mean  # b 3 H W in [0,1]
            terms = losses(pixels, eval_fid.resize(images, side))
            (sum(terms.values()) / accumulate).backward()
        for name, value in {**terms, "loss": sum(terms.values())}.items():
            sums[name] = sums.get(name, 0) + value.detach() / accumulate
        if not last:
            continue
        lr = args.lr * runtime.lr_factor(step, args.warmup, args.warmup, args.steps, args.lr_end, "cosine")
        norm = runtime.step_optimizers(opts, decoder, args.clip, sum(terms.values()), step, lr)
        runtime.update_ema(ema, decoder, args.ema, step)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            means = {k: runtime.all_mean(v).item() / (done - log.last_step) for k, v in sums.items()}
            log.step(done, means.pop("loss"), norm, lr, **means)
            sums = {}
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps) and rank == 0:
            picture = reconstruction_picture(rae, eval_fid.real_images(val, range(12)))
            picture.save(f"{args.out}/preview_{done:07d}.png")
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            metrics = eval_fid.evaluate_reconstruction(rae, val, args.eval_n, rank, world)
            log.write(dict(step=done, **metrics))
            log.say(f"step {done} | held-out " + eval_fid.one_line(metrics))


@torch.no_grad()
def reconstruction_picture(rae, images):
    """A PIL picture: originals in the upper row, reconstructions below.  images: uint8 b H W 3."""
    x = rearrange(images, "b h w c -> b c h w").to(rae.pixel_mean.device).float() / 255
    back = rae.decode(rae.encode(eval_fid.resize(x, rae.encoder.image_size)))
    rows = torch.cat([eval_fid.resize(x, back.shape[-1]), back]).float().cpu()
    sheet = rearrange(F.pad(rows, (1, 1, 1, 1), value=1.0), "(r b) c h w -> (r h) (b w) c", r=2)
    return Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8))


if __name__ == "__main__":
    runtime.run(main, parse_args)
