"""Draw images from a trained DiT: time grids, solvers, guidance, pictures.

    python sample.py                                    the class grid of the shipped model
    python sample.py --prompt "two red circles and a blue star" "a green ring above a red cross"
    python sample.py --ckpt runs/dit/last.pt --n 1000 --guidance 1 --out samples.npz
    torchrun --nproc_per_node=8 -- sample.py --release imagenet256 --n 50000 --labels balanced --out all.npz
Image i is a function of (seed, i), not of the batch or the processes; a killed run, given again, goes on.
"""
import argparse
import hashlib
import json
import math
import shutil
import time
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import runtime
from model import RELEASES, T2I_RELEASES, load_dit, time_shift
from runtime import at_least

ASSETS = Path(__file__).resolve().parent / "assets"
VERIFIERS = ("answer", "confidence", "likelihood", "answer_logits", "prompt_confidence")      # T2I.scores


# ---------------------------------------------------------------------------------- time grids and solvers
def time_grid(steps, shift, release_grid=False):
    """steps + 1 times from 1 to 0, shifted by a = `shift`. release_grid: the official steps, short of 0."""
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
    tuned: errors of early steps fade. fresh: k -> N(0,1) like x, for step k > 0.    Source: arXiv 2401.08740
    """
    for k, (t, t_next) in enumerate(pairwise(times.tolist()), 1):
        v = velocity(x, x.new_full((len(x),), t))
        drift = v + 3 * t_next / t * (x + (1 - t) * v)
        new = fresh(k) if fresh else torch.randn_like(x)
        x = x - (t - t_next) * drift + math.sqrt(6 * t_next * (t - t_next)) * new
    return x


SOLVERS = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


# ---------------------------------------------------------------------------------- guidance
def guided(model, y, both, scale, interval):
    """velocity(x, t): base + scale * (v - base), of both(x, t), for t in the interval, else the model's."""
    def velocity(x, t):
        inside = (interval[0] <= t) & (t <= interval[1])
        if scale == 1 or not inside.any():
            return model(x, t, y)
        v, base = both(x, t)
        return torch.where(inside.view(-1, 1, 1, 1), base + scale * (v - base), v)
    return velocity


def cfg(model, y, null, scale, interval=(0, 1)):           # y: b class ids or b n d; null: broadcasts to y
    """Classifier-free guidance by the null condition, in one batch.  Source: arXiv 2207.12598, 2404.07724"""
    pair = torch.cat([y, torch.as_tensor(null, device=y.device, dtype=y.dtype).expand_as(y)])
    return guided(model, y, lambda x, t: model(torch.cat([x, x]), torch.cat([t, t]), pair).chunk(2),
                  scale, interval)


def autoguidance(model, weak, y, scale, interval=(0, 1)):
    """AutoGuidance by a smaller or earlier model on the same latents.          Source: arXiv 2406.02507"""
    return guided(model, y, lambda x, t: (model(x, t, y), weak(x, t, y)), scale, interval)


# ---------------------------------------------------------------------------------- models and images
def load_models(args, device, encoder=False):
    """DiT or T2I, RAE, checkpoint dict and weak DiT (or None), of the flags of parse_model_args."""
    load = load_dit
    if args.text:
        from train_t2i import load_t2i as load             # that file imports this one
    model, rae, state = load(args.ckpt, device, encoder, args.weights, args.release_dir)
    if args.best_of > 1 and not state["asked"]:
        raise ValueError(f"--best_of {args.best_of} needs a model that was asked questions in training, and "
                         f"{args.ckpt} never was (train with --questions above 0); use --best_of 1")
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


def draw_prompts(t2i, prompts, args, indices):             # -> latents b c h w of b prompts
    texts = prompts if t2i.plan else [*dict.fromkeys(prompts)]         # plans differ, prompts need not
    luck = torch.special.ndtr(noise((t2i.plan,), args.seed, indices, 10 ** 6)).clamp(max=1 - 1e-7)
    y = t2i.conditions(texts, luck)
    return draw(t2i.dit, y if t2i.plan else y[[texts.index(x) for x in prompts]], args, indices)


def best_of(t2i, prompts, args, indices):
    """Latents b c h w for b prompts: of --best_of candidates each, the one that --verifier scores highest."""
    n = args.best_of
    prompts = [text for text in t2i.fit(prompts) for _ in range(n)]
    z = draw_prompts(t2i, prompts, args, [i * n + j for i in indices for j in range(n)])       # b*n c h w
    if n == 1:
        return z
    scores = t2i.scores(z, prompts, args.verifier)
    return z[[max(range(k, k + n), key=scores.__getitem__) for k in range(0, len(z), n)]]


def noise(shape, seed, indices, step=0):
    """Standard normal noise, (len(indices), *shape); the row of image i depends on (seed, i, step) alone."""
    rows = [np.random.default_rng((seed, i, step)).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def draw(model, y, args, indices, weak=None):              # y: b class ids or b n d
    """Latents b c h w of conditions y. indices: b image numbers, for the noise. weak: of AutoGuidance."""
    def eps(step):
        return noise((model.in_channels, model.grid, model.grid), args.seed, indices, step).to(y.device)
    x, null = eps(0), model.null(y)
    scale = args.guidance if weak or (y != null).any() else 1          # CFG needs a condition
    velocity = autoguidance(model, weak, y, scale, args.interval) if weak else \
        cfg(model, y, null, scale, args.interval)
    times = time_grid(args.sampling_steps, math.sqrt(x[0].numel() / model.shift_base), args.release_grid)
    more = dict(fresh=eps) if args.solver == "euler_maruyama" else {}
    return SOLVERS[args.solver](velocity, x, times, **more)


@torch.no_grad()
def to_images(rae, latents):                               # b c h w -> uint8 b H W 3, on the CPU
    return rearrange((rae.decode(latents).float() * 255).round().byte(), "b c h w -> b h w c").cpu()


def generate(model, rae, labels, args, indices=None, weak=None, dtype="fp32"):
    """Images uint8 b H W 3 of b class ids (num_classes: unconditional), or by a T2I of b prompts (str).

    indices: numbers of the images, for the noise; by default 0, 1, ... weak: DiT of AutoGuidance."""
    indices = range(len(labels)) if indices is None else indices
    with runtime.autocast(device := rae.pixel_mean.device, dtype):
        if isinstance(labels[0], str):
            return to_images(rae, best_of(model, labels, args, indices))
        return to_images(rae, draw(model, torch.as_tensor(labels, device=device), args, indices, weak))


def draw_grid(images, captions, columns=12):
    """A PIL picture of uint8 images n H W 3; image i stands under caption i % captions."""
    side, texts = images.shape[1] + 2, [wrap(text, images.shape[1] // 6) for text in captions[:len(images)]]
    classes, head = len(texts), 4 + 12 * max(map(len, texts))                # 6 and 12 pixels a letter
    columns, band = min(columns, classes), head + -(-len(images) // classes) * side + 2
    sheet = Image.new("RGB", (columns * side + 2, -(-classes // columns) * band), "white")
    page, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, image in enumerate(np.asarray(images)):
        left, top = i % classes % columns * side + 2, i % classes // columns * band + head
        sheet.paste(Image.fromarray(image), (left, top + i // classes * side))
        if i < classes:
            place = (left - 1 + side / 2, top - head / 2)
            page.multiline_text(place, "\n".join(texts[i]), "black", font, "mm", 1, "center")
    return sheet


# ---------------------------------------------------------------------------------- command line
def add_sampling_flags(p):
    """The flags that draw() reads, shared by every script that samples."""
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
    if args.release_dir and getattr(args, flag) not in (*RELEASES, *T2I_RELEASES):
        p.error(f"--release_dir needs --{flag} with one of {' '.join([*RELEASES, *T2I_RELEASES])}")


def parse_model_args(p, argv, text):
    """Add the flags of the model to draw from, and parse: what was given wins over what --release sets.

    text: the flag that asks for a text-to-image model, kept as args.text."""
    which = p.add_mutually_exclusive_group()
    which.add_argument("--ckpt", help="of train_dit.py, for prompts of train_t2i.py; default: shipped")
    which.add_argument("--release", choices=[*RELEASES, *T2I_RELEASES], help="official; euler, 50 steps")
    p.add_argument("--weak_ckpt", help="a weaker model on the same latents: AutoGuidance replaces CFG")
    p.add_argument("--weights", choices=("ema", "model"), default="ema", help="which of the checkpoint's")
    add_sampling_flags(p)
    p.add_argument("--batch", type=at_least(1), default=72, help="images per forward; does not change them")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the matmuls")
    p.add_argument("--compile", action="store_true", help="torch.compile the models")
    p.add_argument("--best_of", type=at_least(1), default=1, help="candidates for each image of a prompt")
    p.add_argument("--verifier", choices=VERIFIERS, default="answer", help="by what it chooses, in latents")
    args = p.parse_args(argv)
    p.set_defaults(text=bool(getattr(args, text) or getattr(args, "prompts", None)))
    if args.release in RELEASES:
        p.set_defaults(ckpt=args.release, weak_ckpt=f"{args.release}/guide", solver="euler",
                       sampling_steps=50, guidance=RELEASES[args.release][-1])
    elif args.release:
        p.set_defaults(ckpt=args.release, solver="euler", sampling_steps=50, guidance=1.0)
    else:
        p.set_defaults(ckpt=str(ASSETS / f"tiny_{'t2i' if p.get_default('text') else 'dit'}.safetensors"))
    args = p.parse_args(argv)
    check_sampling_flags(p, args, "release")
    if args.best_of > 1 and not args.text:
        p.error(f"--best_of {args.best_of} needs --{text}: the language model compares images with prompts")
    if args.release and (args.release in T2I_RELEASES) != args.text:
        p.error(f"--release {args.release} can't be given {'with' if args.text else 'without'} --{text}")
    if args.text and args.weak_ckpt:
        p.error(f"--weak_ckpt {args.weak_ckpt} is for class models; leave it out with --{text}")
    return args


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--labels", nargs="+", type=lambda name: name.replace(" ", "_"), help="class ids, names, "
                   "balanced (in turn), random or none (unconditional); default balanced, of a release eight")
    p.add_argument("--prompt", nargs="+", help="texts to draw instead of --labels, each in quotes")
    p.add_argument("--prompts", metavar="PATH", help="GenEval's .jsonl or DPG-Bench's folder of .txt: 4 "
                   "images each, into a folder --out as their scorers read it")
    p.add_argument("--n", type=at_least(1), help="number of images (default: 3 for each label or prompt)")
    p.add_argument("--out", default="samples.png", help="X.png: grid; X.npz: arr_0, labels; else PNG folder")
    args = parse_model_args(p, argv, "prompt")
    if bool(args.prompt) + bool(args.labels) + bool(args.prompts) > 1:
        p.error("--prompt, --prompts and --labels exclude each other; give one")
    if args.prompts and (args.n or Path(args.out).suffix):
        p.error("--prompts draws 4 images each into a folder; leave --n out, and give --out FOLDER")
    if bad := [text for text in args.prompt or () if not text.strip() or "<image>" in text]:
        p.error(f"--prompt {bad[0]!r} must say what to draw, in words and without <image>")
    args.labels = args.labels or ("207 360 387 974 88 979 417 279".split() if args.release else ["balanced"])
    return args


def share(n, rank, world, batch):                          # this process's part of n numbers, in batches
    return [range(k, min(n, k + batch * world), world) for k in range(rank, n, batch * world)]


def parse_labels(labels, class_names, dropout):
    """Class ids of --labels; `none`, if trained with dropout, is the null class, number len(class_names)."""
    null, names = len(class_names), [name.replace(" ", "_") for name in class_names]
    if labels in (["balanced"], ["random"]):
        return [*range(null)]
    known = {str(i): i for i in range(null)} | ({"none": null} if dropout else {})
    known |= {name: i for i, name in enumerate(names) if names.count(name) == 1}
    if wrong := [label for label in labels if label not in known]:
        raise ValueError(f"--labels {' '.join(wrong)}: not among the model's {null} classes, 0 to {null - 1} "
                         f"or {class_names[0]} ...; `none`, the null class, needs label dropout")
    return [known[label] for label in labels]


def read_prompts(path):
    """(name, prompt, line) of each of GenEval's evaluation_metadata.jsonl; DPG-Bench's *.txt, line: None."""
    path = Path(path)
    if path.is_dir():
        found = [(file.stem, file.read_text("utf-8").strip(), None) for file in sorted(path.glob("*.txt"))]
    else:
        try:
            lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
            found = [(f"{i:05d}", json.loads(line)["prompt"], line) for i, line in enumerate(lines)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--prompts {path}: {error!r}; every line must be JSON with a prompt") from None
    if bad := [name for name, text, _ in found if not text or "<image>" in text] or [path] * (not found):
        raise ValueError(f"--prompts {path}: no prompt in {bad[0]}; give a .jsonl, or a folder of .txt")
    return found


def finish_prompts(parts, suite):
    """GenEval: NAME/metadata.jsonl beside NAME/samples/0000.png to 0003.png; DPG-Bench: NAME.png, 2 x 2."""
    for name, _, line in suite:
        files = sorted((parts / name / "samples").iterdir())
        if line is not None:
            runtime.whole_file(parts / name / "metadata.jsonl", lambda f: f.write(f"{line}\n".encode()))
        elif files:
            tiles = np.stack([Image.open(file) for file in files])     # 4 h w c
            sheet = Image.fromarray(rearrange(tiles, "(r s) h w c -> (r h) (s w) c", r=2))
            runtime.whole_file(parts / f"{name}.png", lambda f: sheet.save(f, "png"))
            shutil.rmtree(parts / name)


def main(args):
    rank, world, device = runtime.setup()
    out, start, folder = Path(args.out), time.time(), Path(args.out).suffix not in (".png", ".npz")
    if out.is_dir() or folder and out.exists():
        raise ValueError(f"--out {out} exists; delete it, or name another folder (or X.png, X.npz)")
    suite = read_prompts(args.prompts) if args.prompts else []
    model, rae, state, weak = load_models(args, device)
    names = args.prompt or [text for _, text, _ in suite] or [*state["class_names"], "none"]
    ids = range(len(names)) if args.text else \
        parse_labels(args.labels, names[:-1], state["args"]["class_dropout"])
    if rank == 0 and args.text and (cut := sum(a != b for a, b in zip(names, model.fit(names)))):
        print(f"{cut} prompts are longer than the model's context of {model.context} tokens allows, and cut")
    n = args.n or (4 if suite else 3) * len(ids)
    if args.labels == ["random"]:
        ids = np.random.default_rng((args.seed, 0, 0, 1)).integers(len(ids), size=n)
    labels = np.resize(ids, n)                             # in turn
    # An image is a file of a folder named after all that it depends on: a killed run finds its own again.
    last = rae.decoder.decoder_pred, *(getattr(m, "dit", m).final_layer.linear for m in (model, weak) if m)
    own = vars(args) | dict(batch=0, compile=0, out=0), rae.latent_std.mean(), [m.bias.tolist() for m in last]
    parts = out.with_name(f"{out.name}.{hashlib.sha1(repr(own).encode()).hexdigest()[:8]}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{i:06d}.png" for i in range(n)]
    if suite:
        files = [parts / suite[i % len(ids)][0] / "samples" / f"{i // len(ids):04d}.png" for i in range(n)]
    for file in files[:len(suite)]:
        file.parent.mkdir(parents=True, exist_ok=True)
    for chunk in tqdm(share(n, rank, world, -(-args.batch // args.best_of)), disable=rank > 0 or None):
        if chunk := [i for i in chunk if not files[i].exists()]:
            what = [names[i] for i in labels[chunk]] if args.text else labels[chunk]
            images = generate(model, rae, what, args, chunk, weak, args.dtype).numpy()
            for i, image in zip(chunk, map(Image.fromarray, images)):
                runtime.whole_file(files[i], lambda f: image.save(f, "png", compress_level=1))
    world > 1 and dist.barrier()
    if rank == 0 and folder:
        finish_prompts(parts, suite)
        parts.rename(out)
    elif rank == 0:
        images = np.memmap(parts / "all", np.uint8, "w+", shape=(n, *Image.open(files[0]).size, 3))
        for i, file in enumerate(files):                   # on disk, not in memory
            images[i] = Image.open(file)
        if out.suffix == ".npz":
            runtime.whole_file(out, lambda f: np.savez(f, arr_0=images, labels=labels))
        else:
            draw_grid(images, [names[i] for i in ids]).save(out)
        shutil.rmtree(parts)
    if rank == 0:
        print(f"{n} images in {time.time() - start:.1f} s, {args.sampling_steps} {args.solver} steps: {out}")


if __name__ == "__main__":
    runtime.run(main, parse_args)
