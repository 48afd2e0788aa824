"""Draw images from a trained DiT: time grids, solvers, guidance, pictures.

    python sample.py                                    the class grid of the shipped model
    python sample.py --out samples.gif                  an animation: the grid emerges from noise
    python sample.py --prompt "two red circles and a blue star" "a green ring above a red cross"
    python sample.py --ckpt runs/dit/last.pt --n 1000 --guidance 1 --out samples.npz
    torchrun --nproc_per_node=8 sample.py --release imagenet256 --num_images 50000 --out all.npz

Image number i is a function of (seed, i), whatever the batch size and the number of processes.
Give the command of a killed run again, and it goes on; only an animation starts anew.
`--num_images` is `--n`, which torchrun would take for a flag of its own.
"""
import argparse
import contextlib
import difflib
import glob
import hashlib
import math
import shutil
import time
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image

import progress
import release
import run_flags
import runtime
import storage
from data import parse_specs
from model import time_shift
from pictures import PICTURES, draw_grid, most_in_grid, save_animation, save_picture
from release import PUBLISHED_DITS, PUBLISHED_T2I, SHIPPED_DIT, SHIPPED_T2I
from run_flags import at_least
from shapes import unknown_words
from t2i import VERIFIERS, check_prompt, load_t2i


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
    if scale == 1:
        return False
    if interval[0] <= 0 and interval[1] >= 1:           # at all times: no need to look at t, for
        return True                                     # which Python would wait for the device
    inside = (interval[0] <= t) & (t <= interval[1])
    return bool(inside.any())


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
    samples = torch.empty(len(indices), *shape)

    def fill(i, own_samples):
        rng = np.random.default_rng((seed, i, step))
        rng.standard_normal(dtype=np.float32, out=own_samples)

    with ThreadPoolExecutor(runtime.cores_of_process()) as threads:
        filling = []
        for i, own_samples in zip(indices, samples.numpy(), strict=True):
            filling.append(threads.submit(fill, i, own_samples))
        wait_for(filling)
    return samples


def wait_for(tasks):
    """Wait for tasks of a ThreadPoolExecutor. Raises what one of them has raised."""
    for task in tasks:
        task.result()


def noise_ahead(shape, seed, indices, last_step, device):
    """Yield the noise() of the steps 0, 1, ..., last_step in turn, on the device.

    A thread draws the noise of a step while the device computes the step before.
    """
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(noise, shape, seed, indices, 0)
        for step in range(last_step + 1):
            samples = upcoming.result()
            if step < last_step:
                upcoming = thread.submit(noise, shape, seed, indices, step + 1)
            yield runtime.to_device(samples, device)                    # b c h w


def sampling_times(model, args):
    """The times of the solver for a DiT, shifted by the number of elements in its latents."""
    shift = math.sqrt(model.in_channels * model.grid ** 2 / model.shift_base)
    return time_grid(args.sampling_steps, shift, args.release_grid)


@torch.no_grad()
def draw(model, y, args, indices, weak=None, states=None):              # [S4]
    """Draw latents b c h w from conditions y.

    y: class ids b or text conditions b n d. args: sampling flags. indices: b image numbers, for the
    noise. weak: DiT of AutoGuidance, which replaces classifier-free guidance. states: empty dict
    that becomes {t: x_t b c h w} for all times of the solver, rounded to fp32.
    """
    null = model.null_condition(y)
    if weak:
        velocity = autoguidance(model, weak, y, args.guidance, args.interval)
    elif (y == null).all():                             # there is nothing to push away from
        velocity = cfg(model, y, null, 1)
    else:
        velocity = cfg(model, y, null, args.guidance, args.interval)
    times = sampling_times(model, args)
    is_stochastic = args.solver == "euler_maruyama"
    last_step = len(times) - 1 if is_stochastic else 0                  # that needs noise
    shape = (model.in_channels, model.grid, model.grid)                 # c h w
    noises = noise_ahead(shape, args.seed, indices, last_step, y.device)
    x = next(noises)                                                    # b c h w
    with progress.progress_bar(evaluations(args.solver, times), "velocity") as bar:
        velocity = watched(velocity, bar, states)
        if is_stochastic:
            x = euler_maruyama(velocity, x, times, lambda k: next(noises))      # k = 1, 2, ...
        else:
            x = SOLVERS[args.solver](velocity, x, times)
    if states is not None:
        states[times[-1].float().item()] = x                            # not evaluated at the end
    return x


def evaluations(solver, times):
    """How often a solver evaluates the velocity."""
    steps = len(times) - 1
    return 2 * steps - 1 if solver == "heun" else steps


def watched(velocity, bar, states):
    """The same velocity, which also advances a progress bar and keeps x in the dict `states`.

    Heun evaluates most times twice, first at a guess, then at the state, which replaces the guess.
    """
    def watched_velocity(x, t):                                         # b c h w, b
        bar.update()
        if states is not None:
            states[t[0].item()] = x                                     # all b times are equal
        return velocity(x, t)
    return watched_velocity


def draw_prompts(t2i, prompts, args, indices, states=None):
    """Latents b c h w of b prompts. indices: b image numbers, for the noise and the plans.

    states: as in draw().
    """
    if not t2i.plan:
        unique = list(dict.fromkeys(prompts))                           # each prompt is read once
        conditions = t2i.conditions(unique)                             # u n d
        y = conditions[[unique.index(prompt) for prompt in prompts]]    # b n d
        return draw(t2i.dit, y, args, indices, states=states)
    # Plans of the same prompt differ: each of its tokens is drawn with a number in [0,1).
    normal = noise((t2i.plan,), args.seed, indices, step=10 ** 6)       # a step no solver reaches
    uniform = torch.special.ndtr(normal).clamp(max=1 - 1e-7)            # b plan
    return draw(t2i.dit, t2i.conditions(prompts, uniform), args, indices, states=states)


def best_of(t2i, prompts, args, indices, states=None):
    """Latents b c h w of b prompts: of --best_of candidates each, the one that --verifier likes
    best. states: as in draw(), those of all candidates.
    """
    n = args.best_of
    candidates = [prompt for prompt in t2i.fit(prompts) for _ in range(n)]
    numbers = [i * n + j for i in indices for j in range(n)]
    latents = draw_prompts(t2i, candidates, args, numbers, states)      # b*n c h w
    if n == 1:
        return latents
    scores = VERIFIERS[args.verifier](t2i, latents, candidates)
    best = []
    for first in range(0, len(latents), n):
        best.append(max(range(first, first + n), key=scores.__getitem__))
    return latents[best]


@torch.no_grad()
def to_images(rae, latents):
    """Images uint8 b H W 3 on the CPU, decoded from latents b c h w.

    Raises ValueError if a number is not finite: its image would be black.
    """
    images = rae.decode(latents).float()                                # b 3 H W in [0,1]
    for name, numbers in (("latents", latents), ("pixels", images)):
        if not numbers.isfinite().all():
            raise ValueError(f"the model draws {name} that are not finite: a training that "
                             f"diverged, a damaged checkpoint, or too much --guidance; try an "
                             f"earlier checkpoint, or --guidance 1")
    return rearrange((images * 255).round().byte(), "b c h w -> b h w c").cpu()


def generate(model, rae, labels, args, indices=None, weak=None, dtype="fp32", states=None):
    """Draw images uint8 b H W 3 of b class ids (num_classes: unconditional).

    args: sampling flags. indices: image numbers, for the noise (default: 0, 1, ...). weak: DiT of
    AutoGuidance. dtype: precision of matmuls. states: as in draw().
    """
    if indices is None:
        indices = range(len(labels))
    device = rae.pixel_mean.device
    y = torch.as_tensor(labels, device=device)
    with runtime.autocast(device, dtype):
        return to_images(rae, draw(model, y, args, indices, weak, states))


def generate_prompts(t2i, rae, prompts, args, indices=None, dtype="fp32", states=None):
    """Draw images uint8 b H W 3 of b prompts. As generate; args also has best_of and verifier."""
    if indices is None:
        indices = range(len(prompts))
    with runtime.autocast(rae.pixel_mean.device, dtype):
        return to_images(rae, best_of(t2i, prompts, args, indices, states))


# ---------------------------------------------------------------------------- flags
# Bounds that catch a slip of the keyboard before it fills the memory: far beyond any use, as papers
# draw 50,000 images in 50 steps.
MOST_IMAGES, MOST_STEPS, MOST_CANDIDATES = 10 ** 6, 10 ** 4, 10 ** 4
# Sampling flags default to None, since presets (--release, --recipe) set some of them.
SAMPLING_DEFAULTS = dict(sampling_steps=48, solver="euler_maruyama", guidance=1.5,
                         interval=[0.0, 1.0], release_grid=False, release_dir=None)
MODEL_DEFAULTS = dict(SAMPLING_DEFAULTS, seed=0, ckpt=None, release=None, weak_ckpt=None,
                      weights="ema", batch=72, dtype="fp32", compile=False, best_of=1,
                      verifier="answer")
PAPER_SAMPLING = dict(solver="euler", sampling_steps=50)                # of both papers


def add_sampling_flags(p):
    """The flags that draw() reads, shared by all scripts that sample."""
    p.add_argument("--sampling_steps", type=at_least(1, MOST_STEPS + 1),
                   help="Steps of the solver; papers: 50.")
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
                            "classifier-free guidance (default: none; that of the --release).")
    if text:
        scripts.append("train_t2i.py")
        releases += PUBLISHED_T2I
        p.add_argument("--best_of", type=at_least(1, MOST_CANDIDATES + 1),
                       help="Candidates for each image of a prompt.")
        p.add_argument("--verifier", choices=VERIFIERS,
                       help="What chooses among the candidates of --best_of, looking at latents.")
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
                   help="Compile the blocks of all networks by torch.compile.")


def resolve_model_flags(args, text):
    """A copy of args with the flags of add_model_flags filled in. text: draw from prompts.

    Raises ValueError for given flags that would do nothing.
    """
    check_acting_flags(args)
    if args.release in PUBLISHED_DITS:
        preset = dict(PAPER_SAMPLING, ckpt=args.release, weak_ckpt=f"{args.release}/guide",
                      guidance=PUBLISHED_DITS[args.release].guidance)
    elif args.release in PUBLISHED_T2I:
        preset = dict(PAPER_SAMPLING, ckpt=args.release, guidance=1.0)
    elif text:
        preset = dict(ckpt=str(SHIPPED_T2I))
    else:
        preset = dict(ckpt=str(SHIPPED_DIT))
    values = vars(args) | MODEL_DEFAULTS | preset | run_flags.given_flags(args)
    return argparse.Namespace(**values)


def check_acting_flags(args):
    """Raise ValueError for given flags that would do nothing. args: None where none was given."""
    given = run_flags.given_flags(args)
    for name in ("weak_ckpt", "interval"):
        if name in given and args.guidance == 1:
            raise ValueError(f"--{name} does nothing without guidance, at --guidance 1; leave one "
                             f"of them out")
    has_guide = "weak_ckpt" in given or args.release in PUBLISHED_DITS
    if given.get("labels") == ["none"] and given.get("guidance", 1) != 1 and not has_guide:
        raise ValueError(f"--guidance {args.guidance} does nothing with --labels none, which it "
                         f"would push away from; leave it out")
    if "verifier" in given and given.get("best_of", 1) == 1:
        raise ValueError("--verifier chooses among the candidates of --best_of, and there is one; "
                         "add --best_of 8, or leave it out")


def check_model_flags(args, text):
    """Raise ValueError for flags of add_model_flags that do not go together."""
    check_sampling_flags(args)
    if args.release_dir and not args.release:
        names = " ".join([*PUBLISHED_DITS, *PUBLISHED_T2I])
        raise ValueError(f"--release_dir needs --release with one of {names}")
    if text and args.release in PUBLISHED_DITS:
        raise ValueError(f"--release {args.release} draws classes, not prompts; try one of "
                         f"{' '.join(PUBLISHED_T2I)}")
    if not text and args.release in PUBLISHED_T2I:
        raise ValueError(f"--release {args.release} draws from text alone; give a --prompt, or one "
                         f"of {' '.join(PUBLISHED_DITS)}")
    if text and args.weak_ckpt:
        raise ValueError(f"--weak_ckpt {args.weak_ckpt} is for class models; leave it out with "
                         f"prompts")


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, MODEL_DEFAULTS)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--labels", nargs="+", help="Class ids or names, or `balanced` (all classes "
                      "in turn), `random`, `none` (unconditional). Default: balanced, for a "
                      "release eight classes.")
    what.add_argument("--prompt", nargs="+",
                      help="Texts to draw instead of classes, each in quotes.")
    p.add_argument("--n", "--num_images", type=at_least(1, MOST_IMAGES + 1),
                   help="Number of images (default: 3 for each label or prompt, 1 in a .gif).")
    p.add_argument("--out",
                   help=f"A picture, {' '.join(PICTURES)}: a grid; X.gif: the grid emerging from "
                        f"noise; X.npz: arr_0, labels, names; without a suffix: a folder of PNG "
                        f"files (default: samples.png, with --prompt prompts.png).")
    add_model_flags(p)
    return p.parse(argv, resolve, check_flags)


def resolve(args):
    """A copy of args in which every flag has its value."""
    args = resolve_model_flags(args, text=args.prompt is not None)
    if args.out is None:
        args.out = "samples.png" if args.prompt is None else "prompts.png"
    return args


def check_flags(args):
    """Raise ValueError for flags that cannot be used together."""
    check_output(args.out)
    check_model_flags(args, text=args.prompt is not None)
    if args.best_of > 1 and not args.prompt:
        raise ValueError(f"--best_of {args.best_of} needs --prompt: the language model compares "
                         f"images with prompts")
    for prompt in args.prompt or []:
        check_prompt(prompt)
    if is_animation(args.out):
        check_animation_flags(args)


def check_output(out):
    """Raise ValueError if --out can't be written, or is there and would be mixed with."""
    storage.check_out(out)
    storage.check_suffix(out, OUT_SUFFIXES)
    if Path(out).is_dir() or Path(out).suffix == "" and Path(out).exists():
        raise ValueError(f"--out {out} exists; delete it, or name another folder (or X.png, X.npz)")


def check_animation_flags(args):
    """Raise ValueError for flags that do not go with an animation."""
    if args.best_of > 1:
        raise ValueError(f"--best_of {args.best_of} chooses among finished images, but --out "
                         f"{args.out} shows how each one emerges; use --best_of 1, or --out X.png")
    if args.n and args.n > MOST_ANIMATED:
        raise ValueError(f"--n {args.n} is too many for --out {args.out}, which shows at most "
                         f"{MOST_ANIMATED} images; use --n {MOST_ANIMATED}, or --out X.png")
    if args.sampling_steps > MOST_ANIMATED_STEPS:
        raise ValueError(f"--sampling_steps {args.sampling_steps} is too many for --out "
                         f"{args.out}, as all states of the solver are kept; use at most "
                         f"{MOST_ANIMATED_STEPS}, or --out X.png")
    if runtime.world_size() > 1:
        raise ValueError(f"--out {args.out} is drawn by one process, not {runtime.world_size()}; "
                         f"start it with python, or use --out X.png")


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
        runtime.compile_blocks(model)
        runtime.compile_blocks(rae)
        if weak:
            runtime.compile_blocks(weak)
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
        runtime.compile_blocks(t2i)
        runtime.compile_blocks(rae)
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
    counts = Counter(names)
    numbers = {name: i for i, name in enumerate(names) if counts[name] == 1}
    examples = f"{class_names[0]} to {class_names[-1]}"                 # names that are numbers
    if not all(name.isdecimal() for name in names):
        numbers |= {str(i): i for i in range(num_classes)}
        examples = f"0 to {num_classes - 1} or {class_names[0]} ..."
    if dropout:
        numbers["none"] = num_classes
    labels = [label.replace(" ", "_") for label in labels]
    unknown = [label for label in labels if label not in numbers]
    if unknown:
        advice = "; ".join(label_advice(label, names) for label in unknown)
        raise ValueError(f"--labels {' '.join(unknown)}: not among the model's {num_classes} "
                         f"classes, {examples}; {advice}")
    return [numbers[label] for label in labels]


def label_advice(label, names):
    """What to give in place of a label that the model does not know, or why it can't be given."""
    if label in ("balanced", "random"):
        return f"{label} must stand alone"
    if label == "none":
        return "`none`, the null class, needs a model trained with label dropout"
    if label in names:
        return f"{label} is the name of several classes, so give its number"
    near = [name for name in names if label.lower() in name.lower()]
    near += difflib.get_close_matches(label, names)
    if near:
        return f"in place of {label}, try {' or '.join(list(dict.fromkeys(near))[:3])}"
    return f"no name is like {label}"


# ---------------------------------------------------------------------------- animations
# A frame is the decoded state x_t of the solver itself, which is pure noise at t = 1. The model's
# estimate of x_0, x_t - t v, would show the final shapes after a third of the steps.
FRAMES = 24                                # after the first one, which is noise
MOST_ANIMATED = 72                         # images, since all their frames are in memory at once
# Since draw() keeps all states of a batch: 14 GB of 72 images in latents of 768 x 16 x 16.
MOST_ANIMATED_STEPS = 250


def frame_steps(steps):
    """The numbers of solver steps after which a frame is taken: 0, ..., steps, evenly spaced."""
    return np.unique(np.linspace(0, steps, FRAMES + 1).round().astype(int)).tolist()


def draw_frames(draw_images, rae, n, args):
    """Draw the n images of an animation. Returns the times of the solver in fp32, a list, and the
    frames, a dict: number of a step -> images uint8 n H W 3.

    draw_images: function of image numbers and of states, which it fills in as draw() does.
    """
    batches = defaultdict(list)
    for numbers in progress.progress_bar(runtime.split_numbers(n, args.batch), "batches"):
        states = {}
        draw_images(numbers, states)
        times = list(states)
        with runtime.autocast(rae.pixel_mean.device, args.dtype):
            for step in frame_steps(len(times) - 1):
                batches[step].append(to_images(rae, states[times[step]]))
    frames = {step: torch.cat(images) for step, images in batches.items()}
    return times, frames


def is_animation(out):
    """Whether --out asks for an animation."""
    return Path(out).suffix.lower() == ".gif"


# ---------------------------------------------------------------------------- files
# What --out can be: a picture of a grid; an animation; arrays; or a folder.
OUT_SUFFIXES = [*PICTURES, ".gif", ".npz", ""]


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
    digest = hashlib.sha1(depends_on.encode("utf-8", "replace")).hexdigest()[:8]
    out = Path(out)
    return out.with_name(f"{out.name}.{digest}.parts")


def stale_parts(parts):
    """Folders that stopped runs with other flags or weights have left beside the folder `parts`."""
    output_name, _, _ = parts.name.rsplit(".", 2)
    pattern = f"{glob.escape(output_name)}.{'[0-9a-f]' * 8}.parts"
    return [folder for folder in sorted(parts.parent.glob(pattern)) if folder != parts]


def report_stale_parts(parts):
    """Say which folders delete_parts() is going to delete."""
    for folder in stale_parts(parts):
        print(f"{folder} has images of a run with other flags or weights that was stopped; it is "
              f"deleted when this run is done (to keep it, stop now and name another --out)")


def delete_parts(parts):
    """Delete the folder of a finished run, and those that stopped runs with other flags have left.
    """
    for folder in [*stale_parts(parts), parts]:
        shutil.rmtree(folder, ignore_errors=True)                       # it may be renamed already


def draw_files(files, draw_images, batch, rank=0, world=1):
    """Draw image i to the PNG file files[i], unless it is there already.

    draw_images: list of numbers -> images uint8 b H W 3. Each process draws its part. Threads write
    the files of a batch while the next one is drawn.
    """
    batches = []
    for numbers in runtime.split_numbers(len(files), batch, rank, world):
        missing = [i for i in numbers if not files[i].exists()]
        if missing:
            batches.append(missing)
    with ThreadPoolExecutor(runtime.cores_of_process()) as threads:
        writing = []
        for numbers in progress.progress_bar(batches, "batches"):
            images = draw_images(numbers).numpy()
            wait_for(writing)                          # two batches in memory are enough
            writing = []
            for i, pixels in zip(numbers, images, strict=True):
                writing.append(threads.submit(save_picture, Image.fromarray(pixels), files[i]))
        wait_for(writing)
    if world > 1:
        dist.barrier()


@contextlib.contextmanager
def says_what_is_kept(files):
    """Context in which whoever stops the run is told how many of these files it has drawn."""
    try:
        yield
    except KeyboardInterrupt:
        num_drawn = sum(file.exists() for file in files)
        if num_drawn == 0:
            raise KeyboardInterrupt("stopped before an image was drawn; nothing is kept") from None
        raise KeyboardInterrupt(f"stopped; {num_drawn} of {len(files)} images are kept, and it "
                                f"goes on when the command is given again") from None


def save_npz(f, files, labels, names):
    """Write images, labels and their names to an open file as np.savez does, one image at a time:
    50,000 of 256 px are 10 GB. names: of classes or prompts; label i is names[i].
    """
    width, height = Image.open(files[0]).size
    header = dict(descr="|u1", fortran_order=False, shape=(len(files), height, width, 3))
    with zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.asarray(Image.open(file)).tobytes())
        with archive.open("labels.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels)
        with archive.open("names.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.array(names))


def save_grid(out, files, captions):
    """Write a grid of the drawn files under their captions, and say what it does not show."""
    shown = files[:most_in_grid(len(captions), *Image.open(files[0]).size)]
    if len(shown) < len(files):
        print(f"{out} shows {len(shown)} of the {len(files)} images, since viewers can't show a "
              f"larger grid; give --out X.npz or a folder to get all")
    images = np.stack([np.asarray(Image.open(file)) for file in shown])
    save_picture(draw_grid(images, captions), out)


def save_files(out, files, labels, names, captions):
    """Turn the drawn files into what the suffix of `out` says: their folder, an .npz or a grid."""
    if out.suffix == "":
        files[0].parent.rename(out)
    elif out.suffix.lower() == ".npz":
        storage.write_whole(out, lambda f: save_npz(f, files, labels, names))
    else:
        save_grid(out, files, captions)


# ---------------------------------------------------------------------------- main
def number_of_images(args, num_captions):
    """The number of images to draw. num_captions: of labels or prompts."""
    if args.n:
        return args.n
    if is_animation(args.out):
        return min(num_captions, MOST_ANIMATED)
    return 3 * num_captions


def choose_classes(args, state):
    """Class ids of the n images, an array, and the captions of the first ones, which repeat.

    state: dict of the model's checkpoint.
    """
    class_names = state["class_names"]
    names = args.labels or (EIGHT_CLASSES if args.release else ["balanced"])
    labels = parse_labels(names, class_names, state["args"]["class_dropout"])
    n = number_of_images(args, len(labels))
    if names == ["random"]:
        rng = np.random.default_rng((args.seed, 0, 0, 1))               # apart from the noise's
        labels = rng.integers(len(labels), size=n)
    captions = [[*class_names, "none"][label] for label in labels]
    return np.resize(labels, n), captions                               # in turn, if n is larger


def report_cut_prompts(t2i, prompts):
    """Say how many prompts are longer than the model can read."""
    fitting = t2i.fit(prompts)
    cut = sum(prompt != fit for prompt, fit in zip(prompts, fitting, strict=True))
    if cut:
        print(f"{cut} prompts are longer than the model's context of {t2i.context} tokens allows, "
              f"and cut")


def report_unknown_words(prompts, state):
    """Warn of prompts that ask for what the model has never seen, if it has only seen shapes.

    state: dict of the model's checkpoint.
    """
    specs = state["args"].get("data")
    if specs is None:                                                   # of a published model
        return
    paths, _ = parse_specs(specs)
    if any(path != "shapes" for own_paths in paths.values() for path in own_paths):
        return
    unknown = [word for prompt in prompts for word in unknown_words(prompt)]
    if unknown:
        print(f"the model has only ever seen coloured shapes, and draws some in place of "
              f"{', '.join(list(dict.fromkeys(unknown))[:5])}")


def main(args):
    out = Path(args.out)
    rank, world, device = runtime.setup()
    with storage.locked(out):
        storage.check_shared(out)
        sample_to(out, args, rank, world, device)


def sample_to(out, args, rank, world, device):
    """Draw the images of the flags, and write them to `out`."""
    start = time.time()
    if rank == 0:
        print(f"loading {args.ckpt}", flush=True)

    # ---------------------------------------------------------------- models, and what to draw
    if args.prompt:
        model, rae, state = load_t2i_models(args, device)
        models = [model]
        captions = names = args.prompt
        n = number_of_images(args, len(captions))
        labels = np.resize(range(len(captions)), n)                     # numbers of prompts
        if rank == 0:
            report_cut_prompts(model, captions)
            report_unknown_words(captions, state)
    else:
        model, rae, state, weak = load_models(args, device)
        models = [model, weak] if weak else [model]
        labels, captions = choose_classes(args, state)
        names = [*state["class_names"], "none"]
        n = len(labels)
    if rank == 0 and n < len(captions):
        print(f"--n {n} draws the first {n} of {len(captions)} classes or prompts")

    def draw_images(numbers, states=None):
        if args.prompt:
            prompts = [args.prompt[i] for i in labels[numbers]]
            return generate_prompts(model, rae, prompts, args, numbers, args.dtype, states)
        return generate(model, rae, labels[numbers], args, numbers, weak, args.dtype, states)

    # ---------------------------------------------------------------- images, and output
    if is_animation(out):
        times, frames = draw_frames(draw_images, rae, n, args)
        save_animation(out, times, frames, captions)
    else:
        parts = parts_folder(out, args, rae, *models)
        files = [parts / f"{i:06d}.png" for i in range(n)]
        if rank == 0:
            report_stale_parts(parts)
        with says_what_is_kept(files):
            draw_files(files, draw_images, math.ceil(args.batch / args.best_of), rank, world)
            if rank == 0:
                save_files(out, files, labels, names, captions)
        if rank == 0:
            delete_parts(parts)
    if rank == 0:
        print(f"{n} images in {time.time() - start:.1f} s, {args.sampling_steps} {args.solver} "
              f"steps: {out}")


if __name__ == "__main__":
    runtime.run(main, parse_args)
