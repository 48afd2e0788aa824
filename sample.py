"""Draw images from a trained DiT: time grids, solvers, guidance, pictures.

    python sample.py                                    the class grid of the shipped model
    python sample.py --ckpt runs/dit/last.pt --n 1000 --guidance 1 --out samples.npz
    torchrun --nproc_per_node=8 -- sample.py --release imagenet256 --n 50000 --labels balanced --out all.npz
Image i is a function of (seed, i), not of the batch or the processes; a killed run, given again, goes on.
"""
import argparse
import hashlib
import math
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import runtime
from model import RELEASES, load_dit, time_shift
from runtime import at_least

SHIPPED = str(Path(__file__).resolve().parent / "assets" / "tiny_dit.safetensors")


# ---------------------------------------------------------------------------------- time grids and solvers
def time_grid(steps, shift, release_grid=False):
    """Times from 1 to 0 for `steps` steps, shifted by a = `shift` (1: even): float64, steps + 1 of them.

    release_grid: the official one of `steps` points, one step fewer, that ends short of 0. Source: release
    """
    points, end = (steps, 0.999) if release_grid else (steps + 1, 1.0)
    return time_shift(1 - torch.linspace(0, end, points, dtype=torch.float64), shift ** 2, base=1)


def euler(velocity, x, times):
    """First-order solver, one evaluation a step.  velocity: (x, t: b) -> dx/dt. Returns x at times[-1]."""
    for t, t_next in pairwise(times.tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


def heun(velocity, x, times):
    """Second-order solver; two evaluations a step but one in the last: 2N - 1 in all. As euler."""
    for t, t_next in pairwise(times.tolist()):
        v = velocity(x, x.new_full((len(x),), t))
        if t_next != times[-1]:
            v = (v + velocity(x + (t_next - t) * v, x.new_full((len(x),), t_next))) / 2
        x = x + (t_next - t) * v
    return x


def euler_maruyama(velocity, x, times, fresh=None):
    """Stochastic, one evaluation a step: the reverse SDE dx = (v - g^2/2 score) dt + g dw, same marginals.

    score = -eps/t, eps = x + (1-t)*v; g^2 = 6*t_next within a step: finite, 0 in a step to t = 0; the 6 was
    tuned: errors of early steps fade. fresh: k -> N(0,1) like x, for step k.      Source: arXiv 2401.08740
    """
    for k, (t, t_next) in enumerate(pairwise(times.tolist())):
        v = velocity(x, x.new_full((len(x),), t))
        drift = v + 3 * t_next / t * (x + (1 - t) * v)
        new = torch.randn_like(x) if fresh is None else fresh(k)
        x = x - (t - t_next) * drift + math.sqrt(6 * t_next * (t - t_next)) * new
    return x


SOLVERS = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


# ---------------------------------------------------------------------------------- guidance
def guided(both, plain, scale, interval):
    """velocity(x, t): base + scale * (v - base) of both(x, t) in the interval, else plain(x, t)."""
    def velocity(x, t):
        inside = (interval[0] <= t) & (t <= interval[1])
        if scale == 1 or not inside.any():
            return plain(x, t)
        v, base = both(x, t)
        return torch.where(inside.view(-1, 1, 1, 1), base + scale * (v - base), v)
    return velocity


def cfg(model, y, null, scale, interval=(0, 1)):
    """Classifier-free guidance: velocity(x, t) = v_null + scale * (v_y - v_null) in the interval, else v_y.

    y: b class ids. null: the null class id. Both run as one batch. Source: arXiv 2207.12598, 2404.07724
    """
    labels = torch.cat([y, torch.full_like(y, null)])
    return guided(lambda x, t: model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2),
                  lambda x, t: model(x, t, y), scale, interval)


def autoguidance(model, weak, y, scale, interval=(0, 1)):
    """AutoGuidance: velocity(x, t) = v_weak + scale * (v - v_weak) for t in the interval, else v.

    weak: a smaller or earlier model on the same latents, given the same x, t, y.    Source: arXiv 2406.02507
    """
    return guided(lambda x, t: (model(x, t, y), weak(x, t, y)), lambda x, t: model(x, t, y), scale, interval)


# ---------------------------------------------------------------------------------- models and images
def load_models(args, device, encoder=False):
    """DiT, RAE, checkpoint dict and weak DiT (None without AutoGuidance) of the flags of parse_model_args."""
    model, rae, state = load_dit(args.ckpt, device, encoder, args.weights, args.release_dir)
    weak = None
    if args.guidance != 1 and args.weak_ckpt:
        weak, _, other = load_dit(args.weak_ckpt, device, None, folder=args.release_dir)
        same = all(torch.equal(other["rae"][k], state["rae"][k]) for k in ("latent_mean", "latent_var"))
        if not same or other["class_names"] != state["class_names"]:
            raise ValueError(f"--weak_ckpt {args.weak_ckpt} has other classes or latents than --ckpt; give a "
                             f"model trained on the same data and --rae")
    elif args.guidance != 1 and state["args"]["class_dropout"] == 0:
        raise ValueError(f"--guidance {args.guidance} needs a model trained with label dropout, and "
                         f"{args.ckpt} had --class_dropout 0; use --guidance 1 or --weak_ckpt")
    for module in (model, rae.decoder, weak) if args.compile else ():
        module and module.compile()
    return model, rae, state, weak


def noise(shape, seed, indices, *more):
    """Standard normal noise, (len(indices), *shape); the row of image i depends on (seed, i, *more) alone."""
    rows = [np.random.default_rng((seed, i, *more)).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def generate(model, rae, labels, args, indices=None, weak=None, dtype="fp32"):
    """Images of the given classes: uint8 b H W 3.

    labels: b class ids (num_classes: unconditional). indices: b image numbers for the noise; else 0, 1, ...
    args: the flags of add_sampling_flags. weak: that of AutoGuidance. dtype: of matmuls, fp32 unless asked.
    """
    device, shape = model.pos_embed.device, (model.in_channels, model.grid, model.grid)
    indices = range(len(labels)) if indices is None else indices
    x, y = noise(shape, args.seed, indices).to(device), torch.as_tensor(labels, device=device)
    scale = args.guidance if weak is not None or (y != model.num_classes).any() else 1  # CFG needs a label
    velocity = cfg(model, y, model.num_classes, scale, args.interval) if weak is None else \
        autoguidance(model, weak, y, scale, args.interval)
    times = time_grid(args.sampling_steps, math.sqrt(x[0].numel() / model.shift_base), args.release_grid)
    fresh = dict(fresh=lambda k: noise(shape, args.seed, indices, k + 1).to(device))
    more = fresh if args.solver == "euler_maruyama" else {}
    with runtime.autocast(device, dtype):
        images = rae.decode(SOLVERS[args.solver](velocity, x, times, **more))
    return rearrange((images.float() * 255).round().byte(), "b c h w -> b h w c").cpu()


def draw_grid(images, captions, columns=12):
    """A PIL picture of uint8 images n H W 3; image i stands under the caption of its class, i % classes."""
    classes = min(len(captions), len(images))
    side, gap, head, rows = images.shape[1], 2, 28, -(-len(images) // classes)
    columns, bands, band = min(columns, classes), -(-classes // columns), head + rows * (side + gap) + gap
    sheet = Image.new("RGB", (columns * (side + gap) + gap, bands * band), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for j in range(classes):
        left, top = gap + j % columns * (side + gap), j // columns * band
        text = captions[j].replace(" ", "\n")
        while len(text) > 3 and draw.textlength(max(text.split("\n"), key=len), font) > side:
            text = text[:-1]
        draw.multiline_text((left + side / 2, top + head / 2), text, "black", font, "mm", 1, "center")
        for row, image in enumerate(np.asarray(images)[j::classes]):
            sheet.paste(Image.fromarray(image), (left, top + head + gap + row * (side + gap)))
    return sheet


# ---------------------------------------------------------------------------------- command line
def add_sampling_flags(p):
    """The flags that generate() reads, shared by every script that samples."""
    p.add_argument("--sampling_steps", type=at_least(1), default=48, help="of the solver")
    p.add_argument("--solver", choices=SOLVERS, default="euler_maruyama", help="papers: euler, 50 steps")
    p.add_argument("--guidance", type=at_least(1.0), default=1.5, help="of CFG or AutoGuidance; 1: none")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), help="times where guidance acts")
    p.add_argument("--release_grid", action="store_true", help="the official time grid, ends short of 0")
    p.add_argument("--release_dir", help="a copy of the official hub repository; default: download, once")
    p.add_argument("--seed", type=at_least(0), default=0)


def check_sampling_flags(p, args, flag):                   # flag: the one that names a release
    if not 0 <= args.interval[0] < args.interval[1] <= 1:
        p.error(f"--interval {args.interval[0]} {args.interval[1]} must be two times 0 <= LOW < HIGH <= 1")
    if args.release_grid and args.sampling_steps < 2:
        p.error("--release_grid needs --sampling_steps 2 or more; try 50")
    if args.release_dir and getattr(args, flag) not in RELEASES:
        p.error(f"--release_dir needs --{flag} imagenet256 or imagenet512")


def parse_model_args(p, argv):
    """Add the flags of the model to draw from, and parse: what was given wins over what --release sets."""
    which = p.add_mutually_exclusive_group()
    which.add_argument("--ckpt", default=SHIPPED, help="checkpoint of train_dit.py, .pt or .safetensors")
    which.add_argument("--release", choices=RELEASES, help="official weights and guide; euler, 50 steps")
    p.add_argument("--weak_ckpt", help="a weaker model on the same latents: AutoGuidance replaces CFG")
    p.add_argument("--weights", choices=("ema", "model"), default="ema", help="which of the checkpoint's")
    add_sampling_flags(p)
    p.add_argument("--batch", type=at_least(1), default=72, help="images per forward; does not change them")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the matmuls")
    p.add_argument("--compile", action="store_true", help="torch.compile the models")
    args = p.parse_args(argv)
    if args.release:
        p.set_defaults(ckpt=args.release, weak_ckpt=f"{args.release}/guide", solver="euler",
                       sampling_steps=50, guidance=RELEASES[args.release][-1])
        args = p.parse_args(argv)
    check_sampling_flags(p, args, "release")
    return args


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--labels", nargs="+", help="class ids or names (spaces as _), balanced (all in turn), "
                   "random or none (unconditional); default: balanced, of a release eight")
    p.add_argument("--n", type=at_least(1), help="number of images (default: 3 for each label)")
    p.add_argument("--out", default="samples.png", help="X.png: grid; X.npz: arr_0, labels; else PNG folder")
    args = parse_model_args(p, argv)
    args.labels = args.labels or ("207 360 387 974 88 979 417 279".split() if args.release else ["balanced"])
    return args


def share(numbers, rank, world, batch):
    mine = numbers[rank::world]                            # this process's part, in batches
    return [mine[k:k + batch] for k in range(0, len(mine), batch)]


def parse_labels(labels, class_names, dropout):
    """Class ids of --labels; the null class, number len(class_names), for `none`, if trained with dropout."""
    null = len(class_names)
    if labels in (["balanced"], ["random"]):
        return [*range(null)]
    known = {str(i): i for i in range(null)} | ({"none": null} if dropout else {})
    known |= {name.replace(" ", "_"): i for i, name in enumerate(class_names) if class_names.count(name) == 1}
    if wrong := [label for label in labels if label.replace(" ", "_") not in known]:
        raise ValueError(f"--labels {' '.join(wrong)}: not among the model's {null} classes, 0 to {null - 1} "
                         f"or {class_names[0]} ...; `none`, the null class, needs label dropout")
    return [known[label.replace(" ", "_")] for label in labels]


def main(args):
    rank, world, device = runtime.setup()
    out, png = Path(args.out), Path(args.out).suffix not in (".png", ".npz")
    if out.is_dir() or png and out.exists():
        raise ValueError(f"--out {out} exists; delete it, or name another folder (or X.png, X.npz)")
    model, rae, state, weak = load_models(args, device)
    ids = parse_labels(args.labels, state["class_names"], state["args"]["class_dropout"])
    n, start = args.n or 3 * len(ids), time.time()
    if args.labels == ["random"]:
        ids = np.random.default_rng((args.seed, 0, 0, 1)).integers(len(ids), size=n)
    labels = np.resize(ids, n)                             # in turn
    # An image is a file of a folder named after all that it depends on: a killed run finds its own again.
    own = {k: v for k, v in vars(args).items() if k not in ("batch", "compile", "out")}
    last = [m.final_layer.linear for m in (model, weak) if m] + [rae.decoder.decoder_pred]
    own = [own, rae.latent_std.mean(), *(layer.bias.tolist() for layer in last)]
    folder = out.with_name(f"{out.name}.{hashlib.sha1(repr(own).encode()).hexdigest()[:8]}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    done = {int(file.stem) for file in folder.glob("*.png")}
    world > 1 and dist.barrier()                           # all have looked before the first one writes
    chunks = share([i for i in range(n) if i not in done], rank, world, args.batch)
    for chunk in tqdm(chunks, unit="batch", disable=rank > 0 or None):
        images = generate(model, rae, labels[chunk], args, chunk, weak, args.dtype).numpy()
        for i, image in zip(chunk, map(Image.fromarray, images)):
            runtime.whole_file(folder / f"{i:06d}.png", lambda f: image.save(f, "png", compress_level=1))
    world > 1 and dist.barrier()
    if rank == 0 and png:
        folder.rename(out)
    elif rank == 0:
        with open(folder / "all", "wb") as f:              # on disk, not in memory
            f.writelines(np.asarray(Image.open(folder / f"{i:06d}.png")).tobytes() for i in range(n))
        images = np.memmap(f.name, np.uint8, "r").reshape(n, rae.decoder.grid * rae.decoder.patch, -1, 3)
        if out.suffix == ".npz":
            runtime.whole_file(out, lambda f: np.savez(f, arr_0=images, labels=labels))
        else:
            draw_grid(images, [[*state["class_names"], "none"][label] for label in ids]).save(out)
        shutil.rmtree(folder)
    if rank == 0:
        print(f"{n} images in {time.time() - start:.1f} s, {args.sampling_steps} {args.solver} steps: {out}")


if __name__ == "__main__":
    runtime.run(main, parse_args)
