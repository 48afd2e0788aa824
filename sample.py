"""Draw images from a trained DiT: time grids, solvers, guidance, pictures.

    python sample.py                                    the class grid of the shipped model
    python sample.py --prompt "two red circles and a blue star" "a green ring above a red cross"
    python sample.py --ckpt runs/dit/last.pt --n 1000 --guidance 1 --out samples.npz
    torchrun --nproc_per_node=8 -- sample.py --release imagenet256 --n 50000 --out all.npz

Image number i is a function of (seed, i), whatever the batch size and the number of processes.
Give the command of a killed run again, and it goes on.
"""
import argparse
import hashlib
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

import release
import runtime
from model import time_shift
from release import PUBLISHED_DITS, PUBLISHED_T2I, SHIPPED_DIT, SHIPPED_T2I
from runtime import at_least
from t2i import VERIFIERS, load_t2i


# ---------------------------------------------------------------------------- time grids
def time_grid(steps, shift, release_grid=False):                        # [S1]
    """Times from 1 (noise) to 0 (data) for a solver: steps + 1 of them, fp64.

    shift: a of the time shift a t / (1 + (a-1) t). release_grid: the official grid of `steps`
    points, which ends short of 0, at a shifted 0.001.
    """
    if release_grid:
        t = 1 - torch.linspace(0, 0.999, steps, dtype=torch.float64)
    else:
        t = 1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return time_shift(t, dim=shift ** 2, base=1)        # a = sqrt(dim / base), which is `shift`


# ---------------------------------------------------------------------------- solvers
# A solver is a function (velocity, x, times) -> x at the last time, where velocity(x b c h w, t b)
# is dx/dt.
def euler(velocity, x, times):                                          # [S2]
    """First-order solver with one evaluation of the velocity in each step."""
    for t, t_next in pairwise(times.tolist()):
        v = velocity(x, x.new_full((len(x),), t))
        x = x + (t_next - t) * v
    return x


def heun(velocity, x, times):
    """Second-order solver with two evaluations in each step but the last: 2 N - 1 in N steps.

    The last step is Euler's, since the velocity at t = 0 itself is not trained.
    """
    for t, t_next in pairwise(times.tolist()):
        v = velocity(x, x.new_full((len(x),), t))
        if t_next != times[-1]:
            x_next = x + (t_next - t) * v
            v_next = velocity(x_next, x.new_full((len(x),), t_next))
            v = (v + v_next) / 2
        x = x + (t_next - t) * v
    return x


def euler_maruyama(velocity, x, times, noise_of_step=None):
    """Stochastic solver with one evaluation in each step.

    It integrates the reverse SDE with the same marginals as the ODE,
        dx = (v - g^2/2 score) dt + g dw,  score = -eps / t,  eps = x + (1-t) v,
    with g^2 = 6 t_next within a step: finite, and 0 in the step that ends at t = 0. The 6 was tuned
    on the built-in world. Fresh noise makes errors of early steps fade.
    noise_of_step: k -> N(0,1) like x, for step k = 1, 2, ... Source: arXiv 2401.08740
    """
    for k, (t, t_next) in enumerate(pairwise(times.tolist()), start=1):
        v = velocity(x, x.new_full((len(x),), t))
        eps = x + (1 - t) * v
        drift = v + 3 * t_next / t * eps                # v - g^2/2 score
        w = noise_of_step(k) if noise_of_step else torch.randn_like(x)
        x = x - (t - t_next) * drift + math.sqrt(6 * t_next * (t - t_next)) * w
    return x


SOLVERS = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


# ---------------------------------------------------------------------------- guidance
def guide(v, v_base, scale, t, interval):                               # [S3]
    """Velocity pushed away from a worse one, at times t b within the interval, else v itself."""
    inside = (interval[0] <= t) & (t <= interval[1])                    # b
    guided = v_base + scale * (v - v_base)                              # b c h w
    return torch.where(inside.view(-1, 1, 1, 1), guided, v)             # b c h w


def needs_guidance(scale, t, interval):
    """Whether guidance acts at any of the times t b."""
    inside = (interval[0] <= t) & (t <= interval[1])
    return scale != 1 and bool(inside.any())


def cfg(model, y, null, scale, interval=(0, 1)):
    """Velocity (x, t) -> v under classifier-free guidance; both conditions run in one batch.

    y: condition, class ids b or text b n d. null: the null condition, broadcast to y.
    Source: arXiv 2207.12598; the interval: 2404.07724.
    """
    null = torch.as_tensor(null, device=y.device, dtype=y.dtype).expand_as(y)
    y_both = torch.cat([y, null])                                       # 2b

    def velocity(x, t):                                                 # b c h w, b
        if not needs_guidance(scale, t, interval):
            return model(x, t, y)
        v, v_null = model(torch.cat([x, x]), torch.cat([t, t]), y_both).chunk(2)
        return guide(v, v_null, scale, t, interval)
    return velocity


def autoguidance(model, weak, y, scale, interval=(0, 1)):
    """Velocity (x, t) -> v guided by a smaller or earlier model on the same latents.

    Source: arXiv 2406.02507.
    """
    def velocity(x, t):                                                 # b c h w, b
        v = model(x, t, y)
        if not needs_guidance(scale, t, interval):
            return v
        return guide(v, weak(x, t, y), scale, t, interval)
    return velocity


# ---------------------------------------------------------------------------- drawing
def noise(shape, seed, indices, step=0):
    """Standard normal noise, len(indices) x shape; that of image i depends on (seed, i, step)
    alone.
    """
    samples = []
    for i in indices:
        rng = np.random.default_rng((seed, i, step))
        samples.append(rng.standard_normal(shape, np.float32))
    return torch.from_numpy(np.stack(samples))


@torch.no_grad()
def draw(model, y, args, indices, weak=None):                           # [S4]
    """Draw latents b c h w from conditions y.

    y: class ids b or text conditions b n d. args: sampling flags. indices: b image numbers, for the
    noise. weak: DiT of AutoGuidance, which replaces classifier-free guidance.
    """
    def noise_of_step(k):
        shape = (model.in_channels, model.grid, model.grid)
        return noise(shape, args.seed, indices, k).to(y.device)

    x = noise_of_step(0)                                                # b c h w
    null = model.null_condition(y)
    if weak:
        velocity = autoguidance(model, weak, y, args.guidance, args.interval)
    elif (y != null).any():
        velocity = cfg(model, y, null, args.guidance, args.interval)
    else:
        velocity = cfg(model, y, null, 1, args.interval)                # y is null already
    shift = math.sqrt(x[0].numel() / model.shift_base)
    times = time_grid(args.sampling_steps, shift, args.release_grid)
    if args.solver == "euler_maruyama":
        return euler_maruyama(velocity, x, times, noise_of_step)
    return SOLVERS[args.solver](velocity, x, times)


def draw_prompts(t2i, prompts, args, indices):
    """Latents b c h w of b prompts. indices: b image numbers, for the noise and the plans."""
    if not t2i.plan:
        unique = list(dict.fromkeys(prompts))                           # each prompt is read once
        conditions = t2i.conditions(unique)                             # u n d
        y = conditions[[unique.index(prompt) for prompt in prompts]]    # b n d
        return draw(t2i.dit, y, args, indices)
    # Plans of the same prompt differ: each of its tokens is drawn with a number in [0,1).
    normal = noise((t2i.plan,), args.seed, indices, step=10 ** 6)       # a step no solver reaches
    uniform = torch.special.ndtr(normal).clamp(max=1 - 1e-7)            # b plan
    return draw(t2i.dit, t2i.conditions(prompts, uniform), args, indices)


def best_of(t2i, prompts, args, indices):
    """Latents b c h w of b prompts: of --best_of candidates each, the one that --verifier likes
    best.
    """
    n = args.best_of
    candidates = [prompt for prompt in t2i.fit(prompts) for _ in range(n)]
    numbers = [i * n + j for i in indices for j in range(n)]
    latents = draw_prompts(t2i, candidates, args, numbers)              # b*n c h w
    if n == 1:
        return latents
    scores = VERIFIERS[args.verifier](t2i, latents, candidates)
    best = []
    for first in range(0, len(latents), n):
        best.append(max(range(first, first + n), key=scores.__getitem__))
    return latents[best]


@torch.no_grad()
def to_images(rae, latents):
    """Images uint8 b H W 3 on the CPU, decoded from latents b c h w."""
    images = rae.decode(latents).float()                                # b 3 H W in [0,1]
    return rearrange((images * 255).round().byte(), "b c h w -> b h w c").cpu()


def generate(model, rae, labels, args, indices=None, weak=None, dtype="fp32"):
    """Draw images uint8 b H W 3 of b class ids (num_classes: unconditional).

    args: sampling flags. indices: image numbers, for the noise (default: 0, 1, ...). weak: DiT of
    AutoGuidance. dtype: precision of matmuls.
    """
    if indices is None:
        indices = range(len(labels))
    device = rae.pixel_mean.device
    y = torch.as_tensor(labels, device=device)
    with runtime.autocast(device, dtype):
        return to_images(rae, draw(model, y, args, indices, weak))


def generate_prompts(t2i, rae, prompts, args, indices=None, dtype="fp32"):
    """Draw images uint8 b H W 3 of b prompts. As generate; args also has best_of and verifier."""
    if indices is None:
        indices = range(len(prompts))
    with runtime.autocast(rae.pixel_mean.device, dtype):
        return to_images(rae, best_of(t2i, prompts, args, indices))


def draw_grid(images, captions, columns=12):
    """A PIL picture of uint8 images n H W 3; image i stands under caption i % len(captions)."""
    letter, line, margin = 6, 12, 2                                     # pixels, of the 11 px font
    side = images.shape[1] + margin
    captions = [text.replace("_", " ") for text in captions[:len(images)]]
    captions = [wrap(text, images.shape[1] // letter) for text in captions]
    columns = min(columns, len(captions))
    head = 4 + line * max(len(lines) for lines in captions)
    per_caption = math.ceil(len(images) / len(captions))
    band = head + per_caption * side + margin                           # height of a caption's row
    size = (columns * side + margin, math.ceil(len(captions) / columns) * band)
    sheet = Image.new("RGB", size, "white")
    page = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, image in enumerate(np.asarray(images)):
        number, place = divmod(i, len(captions))                        # of the images of a caption
        left = place % columns * side + margin
        top = place // columns * band + head
        sheet.paste(Image.fromarray(image), (left, top + number * side))
        if number == 0:
            centre = (left - margin / 2 + side / 2, top - head / 2)
            text = "\n".join(captions[place])
            page.multiline_text(centre, text, "black", font, "mm", 1, "center")
    return sheet


# ---------------------------------------------------------------------------- flags
# Sampling flags default to None, since presets (--release, --recipe) set some of them.
SAMPLING_DEFAULTS = dict(sampling_steps=48, solver="euler_maruyama", guidance=1.5,
                         interval=[0.0, 1.0], release_grid=False, release_dir=None)
MODEL_DEFAULTS = dict(SAMPLING_DEFAULTS, seed=0, ckpt=None, release=None, weak_ckpt=None,
                      weights="ema", batch=72, dtype="fp32", compile=False)
PAPER_SAMPLING = dict(solver="euler", sampling_steps=50)                # of both papers


def add_sampling_flags(p):
    """The flags that draw() reads, shared by all scripts that sample."""
    p.add_argument("--sampling_steps", type=at_least(1), help="Steps of the solver; papers: 50.")
    p.add_argument("--solver", choices=SOLVERS, help="Solver of the ODE or SDE; papers: euler.")
    p.add_argument("--guidance", type=at_least(1.0),
                   help="Scale of classifier-free guidance or AutoGuidance; 1: none.")
    p.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="Times between which guidance acts.")
    p.add_argument("--release_grid", action="store_true", default=None,
                   help="Use the official time grid, which ends short of 0.")
    p.add_argument("--release_dir",
                   help="Folder with a copy of the hub's repository (default: download once).")


def check_sampling_flags(args):
    """Raise ValueError for sampling flags that cannot be used."""
    low, high = args.interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"--interval {low} {high} must be two times 0 <= LOW < HIGH <= 1")
    if args.release_grid and args.sampling_steps < 2:
        raise ValueError("--release_grid needs --sampling_steps 2 or more; try 50")


def add_model_flags(p, classes=True, text=True):
    """The flags of the model to draw from, and of drawing. See MODEL_DEFAULTS.

    classes, text: whether the script draws classes and whether it draws prompts.
    """
    scripts = []
    releases = []
    if classes:
        scripts.append("train_dit.py")
        releases += PUBLISHED_DITS
        p.add_argument("--weak_ckpt",
                       help="Weaker model on the same latents, for AutoGuidance instead of "
                            "classifier-free guidance.")
    if text:
        scripts.append("train_t2i.py")
        releases += PUBLISHED_T2I
    source = p.add_mutually_exclusive_group()
    source.add_argument("--ckpt",
                        help=f"Checkpoint of {' or '.join(scripts)} (default: the shipped one).")
    source.add_argument("--release", choices=releases,
                        help="Published model, drawn from as in its paper: 50 Euler steps.")
    p.add_argument("--weights", choices=("ema", "model"), help="Weights of the checkpoint to take.")
    add_sampling_flags(p)
    p.add_argument("--seed", type=at_least(0), help="Seed of the noise.")
    p.add_argument("--batch", type=at_least(1),
                   help="Images per forward pass; does not change them.")
    p.add_argument("--dtype", choices=("bf16", "fp32"), help="Precision of matmuls.")
    p.add_argument("--compile", action="store_true", default=None,
                   help="Compile the models by torch.compile.")


def add_verifier_flags(p):
    """The flags of choosing the best of several candidates, for text to image."""
    p.add_argument("--best_of", type=at_least(1), default=1,
                   help="Candidates for each image of a prompt (default: 1).")
    p.add_argument("--verifier", choices=VERIFIERS, default="answer",
                   help="What chooses among them, looking at latents (default: answer).")


def resolve_model_flags(args, text):
    """A copy of args with the flags of add_model_flags filled in. text: draw from prompts."""
    values = dict(MODEL_DEFAULTS)
    if args.release in PUBLISHED_DITS:
        values |= PAPER_SAMPLING
        values["ckpt"] = args.release
        values["weak_ckpt"] = f"{args.release}/guide"
        values["guidance"] = PUBLISHED_DITS[args.release].guidance
    elif args.release in PUBLISHED_T2I:
        values |= PAPER_SAMPLING
        values["ckpt"] = args.release
        values["guidance"] = 1.0
    elif text:
        values["ckpt"] = str(SHIPPED_T2I)
    else:
        values["ckpt"] = str(SHIPPED_DIT)
    return argparse.Namespace(**(vars(args) | values | runtime.given_flags(args)))


def check_model_flags(args, text):
    """Raise ValueError for flags of add_model_flags that do not go together."""
    check_sampling_flags(args)
    if args.release_dir and not args.release:
        names = " ".join([*PUBLISHED_DITS, *PUBLISHED_T2I])
        raise ValueError(f"--release_dir needs --release with one of {names}")
    if args.release and text and args.release not in PUBLISHED_T2I:
        raise ValueError(f"--release {args.release} draws classes, not prompts; try one of "
                         f"{' '.join(PUBLISHED_T2I)}")
    if args.release and not text and args.release in PUBLISHED_T2I:
        raise ValueError(f"--release {args.release} draws from text alone; give a --prompt, or one "
                         f"of {' '.join(PUBLISHED_DITS)}")
    if text and args.weak_ckpt:
        raise ValueError(f"--weak_ckpt {args.weak_ckpt} is for class models; leave it out with "
                         f"prompts")


def parse_args(argv=None):
    p = runtime.Parser(__doc__, MODEL_DEFAULTS)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--labels", nargs="+", help="Class ids or names, or `balanced` (all classes "
                      "in turn), `random`, `none` (unconditional). Default: balanced, for a "
                      "release eight classes.")
    what.add_argument("--prompt", nargs="+",
                      help="Texts to draw instead of classes, each in quotes.")
    p.add_argument("--n", type=at_least(1),
                   help="Number of images (default: 3 for each label or prompt).")
    p.add_argument("--out", default="samples.png",
                   help="X.png: a grid; X.npz: arr_0 and labels; else a folder of PNG files "
                        "(default: samples.png).")
    add_model_flags(p)
    add_verifier_flags(p)
    return p.parse(argv, resolve, check_flags)


def resolve(args):
    """A copy of args in which every flag has its value."""
    return resolve_model_flags(args, text=args.prompt is not None)


def check_flags(args):
    """Raise ValueError for flags that cannot be used together."""
    check_model_flags(args, text=args.prompt is not None)
    if args.best_of > 1 and not args.prompt:
        raise ValueError(f"--best_of {args.best_of} needs --prompt: the language model compares "
                         f"images with prompts")
    for prompt in args.prompt or []:
        if not prompt.strip() or "<image>" in prompt:
            raise ValueError(f"--prompt {prompt!r} must say what to draw, in words and without "
                             f"<image>")


# ---------------------------------------------------------------------------- models and labels
# Classes of ImageNet that the release draws: golden retriever, otter, lesser panda, geyser, macaw,
# valley, balloon, arctic fox.
EIGHT_CLASSES = ["207", "360", "387", "974", "88", "979", "417", "279"]


def load_models(args, device, with_encoder=False):
    """The models of the flags, for classes: (DiT, RAE, checkpoint dict, weak DiT or None).

    Raises FileNotFoundError; ValueError if a model does not fit the flags or the other model.
    """
    model, rae, state = release.load_dit(args.ckpt, device, with_encoder, args.weights,
                                         args.release_dir)
    weak = None
    if args.guidance != 1 and args.weak_ckpt:
        weak = load_weak_model(args, state, device)
    elif args.guidance != 1 and state["args"]["class_dropout"] == 0:
        raise ValueError(f"--guidance {args.guidance} needs a model trained with label dropout, "
                         f"and {args.ckpt} had --class_dropout 0; use --guidance 1 or --weak_ckpt")
    if args.compile:
        model.compile()
        rae.decoder.compile()
    if args.compile and weak:
        weak.compile()
    return model, rae, state, weak


def load_weak_model(args, state, device):
    """The DiT of --weak_ckpt. state: dict of the model's checkpoint, whose latents it must
    share.
    """
    weak, weak_state = release.load_dit_alone(args.weak_ckpt, device, folder=args.release_dir)
    same_latents = all(torch.equal(weak_state["rae"][key], state["rae"][key])
                       for key in ("latent_mean", "latent_var"))
    if not same_latents or weak_state["class_names"] != state["class_names"]:
        raise ValueError(f"--weak_ckpt {args.weak_ckpt} has other classes or latents than --ckpt; "
                         f"give a model trained on the same data and --rae")
    return weak


def load_t2i_models(args, device, with_encoder=False):
    """The models of the flags, for text: (T2I, RAE, checkpoint dict). Raises as load_models."""
    t2i, rae, state = load_t2i(args.ckpt, device, with_encoder, args.weights, args.release_dir)
    if args.best_of > 1 and not state["asked"]:
        raise ValueError(f"--best_of {args.best_of} needs a model that was asked questions in "
                         f"training, and {args.ckpt} never was (train with --questions above 0); "
                         f"use --best_of 1")
    if args.guidance != 1 and state["args"]["class_dropout"] == 0:
        raise ValueError(f"--guidance {args.guidance} needs a model trained with dropout of its "
                         f"conditions, and {args.ckpt} had --class_dropout 0; use --guidance 1")
    if args.compile:
        t2i.compile()
        rae.decoder.compile()
    return t2i, rae, state


def parse_labels(labels, class_names, dropout):
    """Class ids of --labels: ids, names, `none`, `balanced` or `random` (both: all classes).

    `none`, the null class, has number len(class_names) and needs a model trained with dropout.
    Raises ValueError for labels that the model does not know.
    """
    num_classes = len(class_names)
    if labels in (["balanced"], ["random"]):
        return list(range(num_classes))
    names = [name.replace(" ", "_") for name in class_names]
    known = {str(i): i for i in range(num_classes)}
    if dropout:
        known["none"] = num_classes
    for i, name in enumerate(names):
        if names.count(name) == 1:
            known[name] = i
    labels = [label.replace(" ", "_") for label in labels]
    unknown = [label for label in labels if label not in known]
    if unknown:
        raise ValueError(f"--labels {' '.join(unknown)}: not among the model's {num_classes} "
                         f"classes, 0 to {num_classes - 1} or {class_names[0]} ...; `none`, the "
                         f"null class, needs label dropout")
    return [known[label] for label in labels]


# ---------------------------------------------------------------------------- files
def parts_folder(out, args, rae, *models):
    """Folder beside `out` for the images drawn so far, so that a killed run can go on.

    Its name holds a hash of the flags and a trace of the models' weights. The code is not in it:
    delete the folder after an edit.
    """
    flags = dict(vars(args), batch=0, compile=0, out=0)                 # those do not change images
    biases = [rae.decoder.decoder_pred.bias.tolist()]
    for model in models:
        dit = getattr(model, "dit", model)                              # a T2I has one inside
        biases.append(dit.final_layer.linear.bias.tolist())
    depends_on = repr((flags, rae.latent_std.mean(), biases))
    digest = hashlib.sha1(depends_on.encode()).hexdigest()[:8]
    out = Path(out)
    return out.with_name(f"{out.name}.{digest}.parts")


def save_png(image, path):
    """Write a PIL image as a PNG file that is there whole or not at all."""
    runtime.write_whole(path, lambda f: image.save(f, "png", compress_level=1))


def draw_files(files, draw_images, batch, rank=0, world=1):
    """Draw image i to the PNG file files[i], unless it is there already.

    draw_images: list of numbers -> images uint8 b H W 3. Each process draws its part.
    """
    batches = runtime.split_numbers(len(files), batch, rank, world)
    for numbers in tqdm(batches, disable=True if rank > 0 else None):
        missing = [i for i in numbers if not files[i].exists()]
        if not missing:
            continue
        for i, pixels in zip(missing, draw_images(missing).numpy(), strict=True):
            save_png(Image.fromarray(pixels), files[i])
    if world > 1:
        dist.barrier()


def collect(files, out, labels, captions):
    """Write the drawn files as one: an .npz of arr_0 and labels, or a grid under captions."""
    folder = files[0].parent
    width, height = Image.open(files[0]).size
    # Mapped to disk: 50,000 images of 256 px are 10 GB.
    images = np.memmap(folder / "all", np.uint8, "w+", shape=(len(files), height, width, 3))
    for i, file in enumerate(files):
        images[i] = Image.open(file)
    if out.suffix == ".npz":
        runtime.write_whole(out, lambda f: np.savez(f, arr_0=images, labels=labels))
    else:
        draw_grid(images, captions).save(out)
    shutil.rmtree(folder)


def main(args):
    rank, world, device = runtime.setup()
    start = time.time()
    out = Path(args.out)
    is_folder = out.suffix not in (".png", ".npz")
    if out.is_dir() or is_folder and out.exists():
        raise ValueError(f"--out {out} exists; delete it, or name another folder (or X.png, X.npz)")

    # ---------------------------------------------------------------- models, and what to draw
    if args.prompt:
        model, rae, state = load_t2i_models(args, device)
        weak = None
        captions = args.prompt
        labels = list(range(len(captions)))                             # numbers of prompts
        n = args.n or 3 * len(labels)
        if rank == 0:
            report_cut_prompts(model, captions)
    else:
        model, rae, state, weak = load_models(args, device)
        class_names = state["class_names"]
        names = args.labels or (EIGHT_CLASSES if args.release else ["balanced"])
        labels = parse_labels(names, class_names, state["args"]["class_dropout"])
        n = args.n or 3 * len(labels)
        if names == ["random"]:
            rng = np.random.default_rng((args.seed, 0, 0, 1))           # apart from the noise's
            labels = rng.integers(len(labels), size=n)
        captions = [[*class_names, "none"][label] for label in labels]
    labels = np.resize(labels, n)                                       # in turn, if n is larger

    # ---------------------------------------------------------------- images
    def draw_images(numbers):
        if args.prompt:
            prompts = [args.prompt[i] for i in labels[numbers]]
            return generate_prompts(model, rae, prompts, args, numbers, args.dtype)
        return generate(model, rae, labels[numbers], args, numbers, weak, args.dtype)

    models = [model, weak] if weak else [model]
    parts = parts_folder(out, args, rae, *models)
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{i:06d}.png" for i in range(n)]
    draw_files(files, draw_images, math.ceil(args.batch / args.best_of), rank, world)

    # ---------------------------------------------------------------- output
    if rank == 0:
        if is_folder:
            parts.rename(out)
        else:
            collect(files, out, labels, captions)
        seconds = time.time() - start
        print(f"{n} images in {seconds:.1f} s, {args.sampling_steps} {args.solver} steps: {out}")


def report_cut_prompts(t2i, prompts):
    """Say how many prompts are longer than the model can read."""
    fitting = t2i.fit(prompts)
    cut = sum(prompt != fit for prompt, fit in zip(prompts, fitting, strict=True))
    if cut:
        print(f"{cut} prompts are longer than the model's context of {t2i.context} tokens allows, "
              f"and cut")


if __name__ == "__main__":
    runtime.run(main, parse_args)
