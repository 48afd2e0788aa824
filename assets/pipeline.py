"""Draw the figure of the pipeline in the README, with pictures of the shipped models.

    python assets/pipeline.py --out assets/pipeline.png

Latents have many channels: they are shown in the colours of their three principal components.
"""
import math
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import pictures
import run_flags
import runtime
import sample
import storage
from data import SHAPES_VAL
from release import SHIPPED_DIT, load_dit
from shapes import CLASSES, Scene

LABEL = CLASSES.index("blue star")
SEED = 3                           # of the noise
GUIDANCE = 1.5
STEPS = 48
PICTURES_AT = (0, 16, 32, 40, 48)  # steps of which the latents are shown
PCA_SCENES = 360                   # ten of each class

FROZEN, TRAINED, PLAIN = "#d9e6f2", "#fbe3c8", "#f1f1f1"            # colours of boxes
GREY = "#555555"


# ---------------------------------------------------------------------------- pictures
def render(number, label):
    """A held-out scene of one object as an image 1 3 H W in [0,1]."""
    scene = Scene.random(0, SHAPES_VAL + number, 1, label)
    image = torch.from_numpy(scene.render())
    return rearrange(image, "h w c -> 1 c h w").float() / 255


class LatentColours:
    """Latents as colours: three principal components, each scaled to its spread.

    latents: b c h w, of the dataset.
    """
    def __init__(self, latents):
        tokens = rearrange(latents, "b c h w -> (b h w) c")
        self.mean = tokens.mean(0)                                      # c
        _, values, directions = torch.linalg.svd(tokens - self.mean, full_matrices=False)
        self.directions = directions[:3]                                # 3 c
        self.variance = values[:3].square() / len(tokens)               # 3

    def picture(self, x_t, t):
        """Colours h w 3 in [0,1] of 1 c h w latents at time t."""
        tokens = rearrange(x_t, "1 c h w -> h w c") - (1 - t) * self.mean
        components = tokens @ self.directions.T                         # h w 3
        # The variance of x_t = (1-t)*x0 + t*eps, so that data and noise are equally colourful.
        variance = (1 - t) ** 2 * self.variance + t ** 2                # 3
        return (0.5 + 0.22 * components / variance.sqrt()).clamp(0, 1).numpy()


@torch.no_grad()
def draw_states(model):
    """The (t, latents) of a sampling run at the steps PICTURES_AT."""
    y = torch.tensor([LABEL])
    x = sample.noise((model.in_channels, model.grid, model.grid), SEED, [0])        # 1 c h w
    velocity = sample.cfg(model, y, model.null_condition(y), GUIDANCE)
    times = sample.time_grid(STEPS, math.sqrt(x.numel() / model.shift_base))
    torch.manual_seed(SEED)
    states = [(1.0, x)]
    for first, last in pairwise(PICTURES_AT):
        x = sample.euler_maruyama(velocity, x, times[first:last + 1])
        states.append((float(times[last]), x))
    return states


def to_array(image):                                                    # 1 3 H W
    return image[0].movedim(0, 2).numpy()


# ---------------------------------------------------------------------------- drawing
# All places and sizes are in units of a hundredth of the figure's width.
class Figure:
    """A sheet to draw pictures, boxes, arrows and words on."""
    def __init__(self, width, height):
        self.figure, self.axes = plt.subplots(figsize=(11, 11 * height / width))
        self.axes.set_position((0, 0, 1, 1))
        self.axes.axis("off")
        self.limits = dict(xlim=(0, width), ylim=(0, height))

    def picture(self, x, y, size, image, above="", below=""):
        """An image H W 3 in a square around (x, y), with words above and below."""
        left, right, bottom, top = x - size / 2, x + size / 2, y - size / 2, y + size / 2
        self.axes.imshow(image, extent=(left, right, bottom, top), interpolation="nearest")
        frame = plt.Rectangle((left, bottom), size, size, fill=False, edgecolor=GREY, linewidth=1)
        self.axes.add_patch(frame)
        self.words(x, top + 1.6, above)
        self.words(x, bottom - 1.7, below, fontsize=10, color=GREY)

    def box(self, x, y, width, height, text, colour):
        corner = (x - width / 2, y - height / 2)
        patch = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=1",
                               facecolor=colour, edgecolor=GREY, linewidth=1)
        self.axes.add_patch(patch)
        self.words(x, y, text)

    def words(self, x, y, text, fontsize=11, **style):
        style = {"ha": "center", "va": "center", "fontsize": fontsize} | style
        self.axes.text(x, y, text, **style)

    def arrow(self, *points, dashed=False):
        """An arrow along (x, y) points, straight from each to the next."""
        style = dict(color=GREY, linewidth=1.3, linestyle="--" if dashed else "-")
        for start, end in pairwise(points[:-1]):
            self.axes.plot((start[0], end[0]), (start[1], end[1]), **style)
        head = FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=13,
                               shrinkA=0, shrinkB=0, **style)
        self.axes.add_patch(head)

    def heading(self, y, name, text):
        self.words(2.5, y, name, fontsize=13, ha="left", weight="bold")
        self.words(15.5, y, text, fontsize=11.5, ha="left", color=GREY)

    def save(self, path):
        self.axes.set(aspect="equal", **self.limits)   # imshow has changed them
        suffix = path.suffix.lower()
        storage.write_whole(path, lambda f: self.figure.savefig(f, dpi=130, format=suffix[1:]))


def draw_legend(figure, y):
    figure.box(79.5, y, 3, 2, "", TRAINED)
    figure.words(82, y, "trained", fontsize=10, ha="left")
    figure.box(91, y, 3, 2, "", FROZEN)
    figure.words(93.5, y, "frozen", fontsize=10, ha="left")


def draw_stage_1(figure, y, image, latents, reconstruction):
    figure.heading(y + 9.5, "Stage 1",
                   "train_decoder.py learns to decode a frozen encoder's latents")
    figure.picture(8.5, y, 11, image, below="image")
    figure.arrow((14.5, y), (19.5, y))
    figure.box(27, y, 14, 8, "encoder", FROZEN)
    figure.arrow((34.5, y), (39.5, y))
    figure.picture(45.5, y, 11, latents, below="latents $z$")
    figure.arrow((51.5, y), (62, y))
    figure.words(56.5, y + 1.6, "+ noise", fontsize=10, color=GREY)
    figure.box(69.5, y, 14, 8, "decoder", TRAINED)
    figure.arrow((77, y), (82, y))
    figure.picture(88, y, 11, reconstruction, below="reconstruction")
    # The loss compares both ends.
    loss_y = y - 10.5
    figure.arrow((8.5, y - 8.7), (8.5, loss_y), (34, loss_y), dashed=True)
    figure.arrow((88, y - 8.7), (88, loss_y), (63, loss_y), dashed=True)
    figure.words(48.5, loss_y, "loss: L1 + LPIPS + adversarial")


def draw_stage_2(figure, y, latents, noise, noisy_latents):
    figure.heading(y + 11, "Stage 2", "train_dit.py learns the velocity from data to noise")
    figure.picture(8.5, y, 11, latents, below="latents $x_0$ of an image")
    figure.words(17, y, "+", fontsize=14)
    figure.picture(25.5, y, 11, noise, below=r"noise $\epsilon$")
    figure.arrow((31.5, y), (36.5, y))
    figure.picture(43, y, 11, noisy_latents, below=r"$x_t = (1-t)\,x_0 + t\,\epsilon$")
    # DiT^DH: a deep, narrow backbone, then a shallow, wide head; both see the noisy latents.
    figure.words(65, y + 8.2, "DiT$^{DH}$", fontsize=12)
    figure.arrow((49, y), (54, y))
    figure.box(60, y, 11, 8, "deep\nbackbone", TRAINED)
    figure.arrow((66, y), (69, y))
    figure.arrow((49, y + 5.2), (69, y + 5.2))
    figure.box(73.5, y, 8, 13, "wide\nhead", TRAINED)
    figure.arrow((60, y - 8.6), (60, y - 4.6))
    figure.words(60, y - 10.2, "$t$, and a class or a prompt (stage 3, train_t2i.py)", fontsize=10)
    figure.arrow((78, y), (83, y))
    figure.words(91.5, y, "$v$\n\n" r"loss: $|v - (\epsilon - x_0)|^2$")


def draw_sampling(figure, y, states, images):
    figure.heading(y + 10, "Sampling",
                   f"sample.py goes from noise to latents in {STEPS} steps along the DiT's $v$")
    for k, (t, latents) in enumerate(states):
        x = 8 + 14.5 * k
        figure.picture(x, y, 9, latents, above=f"$t = {t:.2g}$")
        figure.picture(x, y - 10, 7, images[k])
        if k > 0:
            figure.arrow((x - 9.5, y), (x - 5, y))
    figure.words(37, y - 15.2, "the same latents decoded, to see what is there already",
                 fontsize=10, color=GREY)
    figure.arrow((71, y), (73.5, y))
    figure.box(79.5, y, 11, 8, "decoder", FROZEN)
    figure.arrow((85.5, y), (88, y))
    figure.picture(93.5, y, 10, images[-1], below="sample")


def draw_figure(path):
    model, rae, _ = load_dit(SHIPPED_DIT, with_encoder=True)
    scenes = [render(i, i % len(CLASSES)) for i in range(PCA_SCENES)]
    colours = LatentColours(rae.encode(torch.cat(scenes)))
    image = render(7, LABEL)
    x0 = rae.encode(image)
    eps = sample.noise(x0.shape[1:], SEED, [1])
    t = 0.6
    states = draw_states(model)

    figure = Figure(width=100, height=84)
    draw_legend(figure, 81)
    draw_stage_1(figure, 71.5, to_array(image), colours.picture(x0, 0), to_array(rae.decode(x0)))
    draw_stage_2(figure, 44, colours.picture(x0, 0), colours.picture(eps, 1),
                 colours.picture((1 - t) * x0 + t * eps, t))
    draw_sampling(figure, 18, [(t, colours.picture(x, t)) for t, x in states],
                  [to_array(rae.decode(x)) for _, x in states])
    figure.save(path)


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("--out", type=Path, default=Path("pipeline.png"), help="File to write.")
    return p.parse_args(argv)


def main(args):
    storage.check_out(args.out)
    storage.check_suffix(args.out, pictures.PICTURES)
    draw_figure(args.out)


if __name__ == "__main__":
    runtime.run(main, parse_args)
