"""Draw images from a trained DiT: time grids, solvers, guidance, pictures.

    python sample.py                                    the class grid of the shipped model
    python sample.py --ckpt runs/dit/last.pt --n 1000 --guidance 1 --out samples.npz
    torchrun --nproc_per_node=8 sample.py --n 50000 --out samples/
Time runs from 1 (noise) to 0 (data). Image i is a function of (seed, i), not of the batch or the processes.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import runtime
from model import load_dit, time_shift

SHIPPED = Path(__file__).resolve().parent / "assets" / "tiny_dit.safetensors"


# ---------------------------------------------------------------------------------- time grids and solvers
def time_grid(steps, shift, release_grid=False):
    """Times from 1 to 0 for `steps` steps, shifted by a = `shift` (1: even): float64, steps + 1 of them.

    release_grid: the official one, `steps` points, so one step fewer, the last time short of 0 (0.0069 for 50
        points and a = 6.93): the published numbers were made with it.         Source: RAE, integrators.py
    """
    points, end = (steps, 0.999) if release_grid else (steps + 1, 1.0)
    return time_shift(1 - torch.linspace(0, end, points, dtype=torch.float64), shift ** 2, base=1)


def euler(velocity, x, times):
    """First-order solver, one evaluation a step.  velocity: (x, t: b) -> dx/dt. Returns x at times[-1]."""
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


def heun(velocity, x, times):
    """Second-order solver; two evaluations a step but one in the last: 2N - 1 in all. As euler."""
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        v = velocity(x, x.new_full((len(x),), t))
        ahead = x + (t_next - t) * v
        if t_next != times[-1]:
            ahead = x + (t_next - t) / 2 * (v + velocity(ahead, x.new_full((len(x),), t_next)))
        x = ahead
    return x


def ancestral(velocity, x, times, fresh):
    """Stochastic, one evaluation a step: keeps of the noise what two times share, and draws the rest anew.

    fresh: k -> N(0,1) like x, for step k. Errors of early steps are forgotten where euler carries them on.
    Source: DDIM with eta = 1, arXiv 2010.02502 equations 12 and 16, for x_t = (1-t)*x0 + t*eps
    """
    for k, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        v = velocity(x, x.new_full((len(x),), t))
        x0, eps = x - t * v, x + (1 - t) * v
        kept = (1 - t) * t_next / (t * (1 - t_next))                   # ratio of signal to noise, t : t_next
        x = (1 - t_next) * x0 + t_next * (kept * eps + math.sqrt(1 - kept ** 2) * fresh(k))
    return x


SOLVERS = {"euler": euler, "heun": heun, "ancestral": ancestral}


# ---------------------------------------------------------------------------------- guidance
def cfg(model, y, null, scale, interval=(0, 1)):
    """Classifier-free guidance: velocity(x, t) = v_null + scale * (v_y - v_null) in the interval, else v_y.

    y: b class ids. null: the null class id. scale: 1 is conditional sampling. Both halves run as one batch.
    Source: arXiv 2207.12598; the interval: arXiv 2404.07724
    """
    def velocity(x, t):
        inside = (interval[0] <= t) & (t <= interval[1])
        if scale == 1 or not inside.any():
            return model(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null)])
        v, v_null = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        return torch.where(inside.view(-1, 1, 1, 1), v_null + scale * (v - v_null), v)
    return velocity


def autoguidance(model, weak, y, scale, interval=(0, 1)):
    """AutoGuidance: velocity(x, t) = v_weak + scale * (v - v_weak) for t in the interval, else v.

    weak: a smaller or earlier model on the same latents, given the same x, t, y.    Source: arXiv 2406.02507
    """
    def velocity(x, t):
        v, inside = model(x, t, y), (interval[0] <= t) & (t <= interval[1])
        if scale == 1 or not inside.any():
            return v
        v_weak = weak(x, t, y)
        return torch.where(inside.view(-1, 1, 1, 1), v_weak + scale * (v - v_weak), v)
    return velocity


# ---------------------------------------------------------------------------------- models and images
def load_weak(path, state, device):
    """The DiT of --weak_ckpt, or None without one; it must share the latents of the checkpoint `state`."""
    if not path:
        return None
    weak, _, other = load_dit(path, device)
    same = all(torch.equal(other["rae"][k], state["rae"][k]) for k in ("latent_mean", "latent_var"))
    if not same or other["class_names"] != state["class_names"]:
        raise ValueError(f"--weak_ckpt {path} has other classes or latents than --ckpt; give a model "
                         f"trained on the same data and --rae")
    return weak


def noise(shape, seed, indices, *more):
    """Standard normal noise, (len(indices), *shape); the row of image i depends on (seed, i, *more) alone."""
    rows = [np.random.default_rng((seed, i, *more)).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def generate(model, rae, labels, args, indices=None, weak=None, dtype="fp32"):
    """Images of the given classes: uint8 b H W 3.

    labels: b class ids (num_classes: unconditional). indices: b image numbers for the noise; else 0, 1, ...
    args: the flags of add_sampling_flags, and seed. weak: the model of AutoGuidance, used when given.
    dtype: of the matmuls; fp32 by default also while bf16 trains, so that all scripts agree.
    """
    device, shape = model.pos_embed.device, (model.in_channels, model.grid, model.grid)
    indices = range(len(labels)) if indices is None else indices
    x = noise(shape, args.seed, indices).to(device)
    y = torch.as_tensor(labels, device=device)
    if weak is not None:
        velocity = autoguidance(model, weak, y, args.guidance, args.interval)
    else:
        velocity = cfg(model, y, model.num_classes, args.guidance, args.interval)
    shift = math.sqrt(x[0].numel() / model.shift_base)
    times = time_grid(args.sampling_steps, shift, args.release_grid)
    fresh = [lambda k: noise(shape, args.seed, indices, k + 1).to(device)] * (args.solver == "ancestral")
    with runtime.autocast(device, dtype):
        x = SOLVERS[args.solver](velocity, x, times, *fresh)
        images = rae.decode(x)
    return rearrange((images.float() * 255).round().byte(), "b c h w -> b h w c").cpu()


def draw_grid(images, captions=(), columns=12, scale=1):
    """A PIL picture of uint8 images n H W 3. With captions: a column per class, `columns` in a band.

    captions: one per class; image i is of class i % classes.
    """
    classes = len(captions) or min(columns, len(images))
    side, gap, head = images.shape[1] * scale, 2, 28 if len(captions) else 0
    rows, bands, columns = -(-len(images) // classes), -(-classes // columns), min(columns, classes)
    band = head + rows * (side + gap) + gap
    sheet = Image.new("RGB", (columns * (side + gap) + gap, bands * band), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for j, caption in enumerate(captions):
        x, y = gap + j % columns * (side + gap) + side / 2, j // columns * band + head / 2
        text = caption.replace(" ", "\n")
        while draw.textlength(max(text.split("\n"), key=len), font) > side and len(text) > 3:
            text = text[:-1]
        draw.multiline_text((x, y), text, fill="black", font=font, anchor="mm", align="center", spacing=1)
    for i, image in enumerate(np.asarray(images)):
        row, j = divmod(i, classes)
        tile = Image.fromarray(image).resize((side, side), Image.NEAREST)
        top = j // columns * band + head + gap
        sheet.paste(tile, (gap + j % columns * (side + gap), top + row * (side + gap)))
    return sheet


# ---------------------------------------------------------------------------------- command line
def add_sampling_flags(p, guidance=1.5, steps=32):
    """The flags that generate() reads, shared by every script that samples."""
    p.add_argument("--sampling_steps", type=int, default=steps, help="solver steps, at least 1")
    p.add_argument("--solver", choices=SOLVERS, default="ancestral", help="the papers use euler, 50 steps")
    p.add_argument("--guidance", type=float, default=guidance, help="scale of CFG or AutoGuidance; 1: none")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                   help="times in [0,1] within which guidance acts")
    p.add_argument("--release_grid", action="store_true", help="the official time grid, ends short of 0")


def check_sampling_flags(p, args):
    if args.sampling_steps < 1 + args.release_grid:
        p.error(f"--sampling_steps {args.sampling_steps} must be at least {1 + args.release_grid}; try 50")
    if args.guidance < 1:
        p.error(f"--guidance {args.guidance} must be at least 1 (1 is none); try 1.5")
    if args.seed < 0:
        p.error(f"--seed {args.seed} must be at least 0")
    if not 0 <= args.interval[0] < args.interval[1] <= 1:
        p.error(f"--interval {args.interval[0]} {args.interval[1]} must be two times 0 <= LOW < HIGH <= 1")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--ckpt", default=SHIPPED, help="checkpoint of train_dit.py, .pt or .safetensors")
    p.add_argument("--weak_ckpt", help="a weaker model on the same latents: AutoGuidance replaces CFG")
    p.add_argument("--weights", choices=("ema", "model"), default="ema", help="which of the checkpoint's")
    p.add_argument("--labels", nargs="+", default=["all"],
                   help="class ids or names (spaces as _), `all` in turn, or `none`: unconditional")
    p.add_argument("--n", type=int, help="number of images (default: 3 for each label)")
    add_sampling_flags(p)
    p.add_argument("--batch", type=int, default=72, help="images per forward; does not change them")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the matmuls")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="samples.png", help="X.png: grid; X.npz: arr_0, labels; else PNG folder")
    args = p.parse_args(argv)
    check_sampling_flags(p, args)
    if args.batch < 1 or (args.n is not None and args.n < 1):
        p.error(f"--n {args.n} and --batch {args.batch} must be at least 1")
    return args


def share(n, rank, world, batch):
    """The image numbers below n of this process, in batches: image i belongs to process i % world."""
    mine = range(rank, n, world)
    return [mine[k:k + batch] for k in range(0, len(mine), batch)]


def parse_labels(labels, class_names):
    """Class ids of --labels; the null class id for `none`."""
    known = {name.replace(" ", "_"): i for i, name in enumerate(class_names)}
    known |= {str(i): i for i in range(len(class_names))} | {"none": len(class_names)}
    if labels == ["all"]:
        return list(range(len(class_names)))
    wrong = [label for label in labels if label.replace(" ", "_") not in known]
    if wrong:
        raise ValueError(f"--labels {' '.join(wrong)}: not among the model's {len(class_names)} classes, "
                         f"0 to {len(class_names) - 1} or {', '.join(list(known)[:2])} ...; or none")
    return [known[label.replace(" ", "_")] for label in labels]


def check_guidance(args, state, path, labels=()):
    null = state["num_classes"]
    if args.guidance != 1 and state["args"]["class_dropout"] == 0 and args.weak_ckpt is None:
        raise ValueError(f"--guidance {args.guidance} needs a model trained with label dropout, and {path} "
                         f"had --class_dropout 0; use --guidance 1 or --weak_ckpt")
    if null in labels and state["args"]["class_dropout"] == 0:
        raise ValueError(f"--labels none needs a model trained with label dropout, but {path} had none")


def main(args):
    rank, world, device = runtime.setup()
    model, rae, state = load_dit(args.ckpt, device, weights=args.weights)
    weak = load_weak(args.weak_ckpt, state, device)
    labels = parse_labels(args.labels, state["class_names"])
    check_guidance(args, state, args.ckpt, labels)
    n, start = args.n or 3 * len(labels), time.time()
    chunks = share(n, rank, world, args.batch)
    out, images = Path(args.out), []
    folder = out.suffix not in (".png", ".npz")
    (out if folder else out.parent).mkdir(parents=True, exist_ok=True)
    for chunk in tqdm(chunks, unit="batch", disable=rank > 0 or None):
        batch = generate(model, rae, [labels[i % len(labels)] for i in chunk], args, chunk, weak, args.dtype)
        if folder:
            for i, image in zip(chunk, batch.numpy()):
                Image.fromarray(image).save(out / f"{i:06d}.png")
        else:
            images.append(batch)
    if not folder:
        pairs = list(zip((i for chunk in chunks for i in chunk), torch.cat(images).numpy() if images else ()))
        if world > 1:
            everyone = [None] * world
            dist.all_gather_object(everyone, pairs)
            pairs = sorted((p for pairs in everyone for p in pairs), key=lambda p: p[0])
        images = np.stack([image for _, image in pairs])
        if rank == 0 and out.suffix == ".npz":
            np.savez(out, arr_0=images, labels=np.array([labels[i % len(labels)] for i in range(n)]))
        elif rank == 0:
            names = [*state["class_names"], "none"]
            draw_grid(images, [names[label] for label in labels]).save(out)
    if rank == 0:
        seconds = time.time() - start
        print(f"{n} images in {seconds:.1f} s, {args.sampling_steps} {args.solver} steps, guidance "
              f"{args.guidance}: {out}")


if __name__ == "__main__":
    runtime.run(main, parse_args)
