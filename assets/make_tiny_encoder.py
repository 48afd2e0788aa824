"""Pretrain the shipped `tiny` encoder on the built-in world, without labels.

    python assets/make_tiny_encoder.py

Writes tiny_encoder.safetensors. The tokens regress a descriptor that classical image analysis
computes from the pixels, as MaskFeat (arXiv 2112.09133) regresses HOG. Objects are separated from a
smooth ground. The descriptor of each 16 px patch has

- of the object that is nearest to the patch: its centre, as waves of 128, 32 and 16 px, coarse to
  fine; its 3-, 4- and 5-fold angular moments (Hu, 1962), whose phases are its rotation and whose
  sizes tell shapes apart; its radial moments; its radius; and its colour near each quarter of the
  patch;
- at 8 x 8 points, the distance to the nearest outline, signed and squashed; and the colour of the
  ground.

Such latents are easy to generate: what an object is and where it lies stands in all tokens, in
numbers that noise hides one after another. And they are easy to decode, from the distances. A fixed
random rotation spreads the descriptor over the channels. Labels are used only by the linear probe
that is printed on the way.
"""
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save
from scipy import ndimage
from timm.models.vision_transformer import VisionTransformer

import metrics
import progress
import run_flags
import runtime
import storage
from data import batches, open_data
from model import TINY_VIT
from train_decoder import make_optimizers

HERE = Path(__file__).resolve().parent
SIDE = TINY_VIT["img_size"]                 # px, 64
PATCH = TINY_VIT["patch_size"]              # px, 16: 4 x 4 patches
GRID = SIDE // PATCH
WAVES = (2 * SIDE, SIDE / 2, SIDE / 4)      # wavelengths in px: of two pictures, ..., of one patch
RANGE = 6                                   # px at which distances are squashed
FOREGROUND = 0.3                            # distance from the ground; all objects are far above it
SPECK = 20                                  # px; fewer are a tip that was cut off, not an object
CHUNK = 500                                 # scenes that are drawn together
FOLDS = (3, 4, 5)                           # of triangle, square and cross, star
# Each part of the descriptor: its columns, and its fraction of the energy of a token and so of the
# squared error.
PARTS = dict(
    centre=(12, 0.30),
    distance=(64, 0.26),
    rotation=(6, 0.18),
    colour=(12, 0.08),
    ground=(3, 0.07),
    radial=(2, 0.05),
    folds=(3, 0.03),
    radius=(1, 0.03),
)


# ---------------------------------------------------------------- the descriptor
def bilinear_basis():
    """Return 1, x, y, xy at each pixel, x and y in -1..1: array (SIDE, SIDE, 4)."""
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) * 2 / SIDE - 1
    x, y = np.meshgrid(axis, axis)
    return np.stack([np.ones((SIDE, SIDE), np.float32), x, y, np.outer(axis, axis)], 2)


BASIS = bilinear_basis()


def fit_ground(image):
    """Return a bilinear surface through what is like the border of the picture: 64 64 3."""
    border = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), 0)
    differs = np.abs(image - border).max(2) > FOREGROUND
    even = ~ndimage.binary_dilation(differs, iterations=2)
    return BASIS @ np.linalg.lstsq(BASIS[even], image[even], rcond=None)[0]


def measure_opacity(strength):
    """Return the opacity of the objects in each pixel, 64 64.

    strength: distance of each pixel's colour from the ground, 64 64
    """
    full = ndimage.maximum_filter(strength, 7)                   # that of the object that is near
    return np.where(full > FOREGROUND, strength / np.maximum(full, FOREGROUND), 0)


def signed_distance(inside):
    """Return the distance of each pixel to the nearest outline in pixels, negative inside."""
    to_inside = ndimage.distance_transform_edt(~inside)
    to_outside = ndimage.distance_transform_edt(inside)
    return ndimage.gaussian_filter(to_inside - to_outside, 0.7)  # values between whole pixels


def indices_of_nearest(mask):
    """Return the row and the column of the nearest pixel of a mask, for each pixel."""
    return tuple(ndimage.distance_transform_edt(
        ~mask, return_distances=False, return_indices=True))


def assign_objects(inside):
    """Return the number of the nearest object for each pixel, 64 64: 0, 1 ..."""
    numbers, _ = ndimage.label(inside, np.ones((3, 3)))
    areas = np.bincount(numbers.ravel())
    is_object = inside & (areas[numbers] >= min(SPECK, areas[1:].max()))
    nearest_number = numbers[indices_of_nearest(is_object)]
    _, consecutive = np.unique(nearest_number, return_inverse=True)
    return consecutive.reshape(SIDE, SIDE)


def measure_objects(owner, opacity):
    """Return what is measured of each object: a dict of arrays (columns, k) for k objects.

    owner: number of the object that each pixel belongs to, 64 64
    opacity: 64 64, in 0..1
    """
    def total(values):
        """Sum values over the pixels of each object, weighted with the opacity."""
        return np.bincount(owner.ravel(), (opacity * values).ravel())

    row, column = np.indices(owner.shape) + 0.5
    area = np.maximum(total(1.0), 1)                             # k, px
    centre = np.stack([total(column), total(row)]) / area        # 2 k: x, y
    radius = np.sqrt(area / np.pi)                               # k

    # Polar coordinates around the centre of each pixel's object, in units of its radius.
    position = ((column - centre[0][owner]) + 1j * (row - centre[1][owner])) / radius[owner]
    r = np.maximum(np.abs(position), 1e-3)
    moments = []
    for m in FOLDS:
        integrand = position ** m * r ** (2 - m)                 # r^2 exp(i m angle)
        moment = (total(integrand.real) + 1j * total(integrand.imag)) / area
        moments.append(moment / (np.abs(moment) + 0.15))         # 0.15: that of a square
    moments = np.stack(moments)                                  # 3 k

    wavelengths = np.array(WAVES)[:, None]                       # 3 1
    waves = np.exp(2j * np.pi * centre[:, None] / wavelengths)   # 2 3 k
    waves = waves.reshape(6, -1)
    return dict(
        centre=np.concatenate([waves.real, waves.imag]),
        rotation=np.concatenate([moments.real, moments.imag]),
        radial=np.stack([total(r ** 2) / area, total(np.exp(-(r / 0.4) ** 2)) / area]),
        folds=np.abs(moments),
        radius=np.log(radius)[None],
    )


def patch_means(plane, points):
    """Return the means of a plane over the cells of each patch: 16 (points points k).

    plane: 64 64, or 64 64 k
    points: cells in each row and each column of a patch
    """
    size = PATCH // points
    plane = plane.reshape(SIDE, SIDE, -1)
    cells = plane.reshape(GRID * points, size, GRID * points, size, -1).mean((1, 3))
    return rearrange(cells, "(h p) (w q) k -> (h w) (p q k)", p=points, q=points)


def descriptor(image):
    """Return the descriptor of each patch of a picture.

    image: (64, 64, 3), uint8
    Returns an array (16, 103), float32, with the columns of PARTS.
    """
    image = image.astype(np.float32) / 127.5 - 1
    ground = fit_ground(image)                                   # 64 64 3
    opacity = measure_opacity(np.linalg.norm(image - ground, axis=2))            # 64 64
    inside = opacity > 0.5
    if not inside.any():
        inside[SIDE // 2, SIDE // 2] = True                      # distances need something

    # Each pixel shows the colour of the nearest pixel in an object but not at its soft edge.
    colour = image[indices_of_nearest(ndimage.binary_erosion(inside))]
    owner = assign_objects(inside)
    objects = measure_objects(owner, opacity)
    owner_of_patch = owner[PATCH // 2::PATCH, PATCH // 2::PATCH].ravel()         # 16, at its centre
    columns = {name: values[:, owner_of_patch].T for name, values in objects.items()}
    columns["distance"] = patch_means(np.tanh(signed_distance(inside) / RANGE), 8)
    columns["colour"] = patch_means(colour, 2)
    columns["ground"] = patch_means(ground, 1)
    return np.concatenate([columns[name] for name in PARTS], 1).astype(np.float32)


# ---------------------------------------------------------------- the encoder
class TokenRegressor(nn.Module):
    """The encoder, and the fixed map from descriptors to the tokens that it regresses.

    descriptors: n k, a sample to measure means and variances on
    """
    def __init__(self, descriptors):
        super().__init__()
        channels = TINY_VIT["embed_dim"]
        self.encoder = VisionTransformer(**TINY_VIT)
        # Without weights, as the RAE uses it.
        self.encoder.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)

        widths = [width for width, _ in PARTS.values()]
        fractions = [fraction for _, fraction in PARTS.values()]
        # Scale each part to its fraction of the energy: the sum of the variances of its columns.
        energies = torch.stack([part.var(0).sum() for part in descriptors.split(widths, 1)])
        scales = (channels * torch.tensor(fractions) / energies).sqrt()
        scales = scales.repeat_interleave(torch.tensor(widths))              # k
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q        # c c, orthogonal
        self.register_buffer("mean", descriptors.mean(0))                    # k
        self.register_buffer("project", scales[:, None] * rotation[:len(scales)])    # k c

    def encode(self, x):                                         # b 3 H W in -1..1
        x = self.encoder.patch_embed(x) + self.encoder.pos_embed # b n c
        return self.encoder.norm(self.encoder.blocks(x))         # b n c

    def targets(self, descriptors):                              # b n k
        tokens = (descriptors - self.mean) @ self.project        # b n c
        return F.layer_norm(tokens, self.project.shape[1:])      # b n c


def to_input(images):
    """Return images of uint8 as float32 in -1..1."""
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------- linear probe
@torch.no_grad()
def mean_tokens(model, n, seed):
    """Return the mean tokens n c and the class ids n of n scenes of a single object."""
    data = open_data("shapes", SIDE, seed=seed, objects=1)
    tokens, all_labels = [], []
    for _, _, images, labels, _ in batches(data, 500, 500, stop=n // 500, workers=0):
        tokens.append(model.encode(to_input(images)).mean(1))
        all_labels.append(labels)
    return torch.cat(tokens), torch.cat(all_labels)


def probe_accuracy(model):
    """Return the accuracy on new scenes of a linear classifier of mean tokens."""
    train_tokens, train_labels = mean_tokens(model, 6000, seed=101)
    test_tokens, test_labels = mean_tokens(model, 3000, seed=202)
    return metrics.linear_probe(train_tokens, train_labels, test_tokens, test_labels, 36)


# ---------------------------------------------------------------- training
def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("--images", type=run_flags.at_least(CHUNK), default=50_000,
                   help=f"Number of scenes, a multiple of {CHUNK}; they are used repeatedly.")
    p.add_argument("--steps", type=run_flags.at_least(1), default=8_000, help="Optimizer steps.")
    p.add_argument("--batch", type=run_flags.at_least(1), default=64, help="Images per step.")
    p.add_argument("--lr", type=run_flags.at_least(1e-9), default=4e-3, help="Peak learning rate.")
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16",
                   help="Precision of the matrix products.")
    p.add_argument("--init", type=Path, help="Weights of an encoder to start from.")
    p.add_argument("--seed", type=run_flags.at_least(0), default=0,
                   help="Seed of scenes, weights and batches.")
    p.add_argument("--out", type=Path, default=HERE / "tiny_encoder.safetensors",
                   help="File to write (default: the shipped one).")
    args = p.parse_args(argv)
    if args.images % CHUNK:
        p.error(f"--images {args.images} must be a multiple of {CHUNK}; try "
                f"{max(1, round(args.images / CHUNK)) * CHUNK}")
    return args


def load_scenes(n, seed):
    """Return the pictures of n scenes, n 3 64 64, uint8, and their descriptors, n 16 103."""
    data = open_data("shapes", SIDE, seed=seed, objects=(1, 1, 1, 2, 3, 4))
    stream = batches(data, CHUNK, CHUNK, stop=n // CHUNK, workers=1)
    bar = progress.progress_bar(n, "scenes")
    loaded = []
    for _, _, images, _, _ in stream:
        loaded.append(images)
        bar.update(CHUNK)
    bar.close()
    images = torch.cat(loaded)
    with multiprocessing.Pool() as pool:
        pictures = images.permute(0, 2, 3, 1).numpy()            # n 64 64 3
        descriptors = pool.map(descriptor, pictures, chunksize=50)
    return images, torch.from_numpy(np.stack(descriptors))


def save_encoder(encoder, path):
    """Write the weights in half precision."""
    weights = {name: value.half().contiguous() for name, value in encoder.state_dict().items()}
    content = save(weights)
    storage.write_whole(path, lambda f: f.write(content))


def load_encoder(encoder, weights, path):
    """Load the weights of such a file, a dict. Raises ValueError if they do not fit."""
    expected = {name: value.shape for name, value in encoder.state_dict().items()}
    shapes = {name: getattr(value, "shape", None) for name, value in weights.items()}
    if shapes != expected:
        raise ValueError(f"--init {path} has other weights than the tiny encoder; give a file of "
                         f"this script")
    encoder.load_state_dict(weights)


def main(args):
    storage.check_out(args.out)
    storage.check_suffix(args.out, [".safetensors"])
    runtime.setup()
    timm.layers.set_fused_attn(False)      # for few tokens, plain bf16 products are faster on a CPU
    torch.manual_seed(args.seed)
    start = time.time()
    init = storage.load_checkpoint(args.init) if args.init else None
    images, descriptors = load_scenes(args.images, args.seed)
    print(f"{args.images} descriptors in {time.time() - start:.0f} s", flush=True)

    model = TokenRegressor(descriptors[:4000].flatten(0, 1))
    if args.init:
        load_encoder(model.encoder, init, args.init)
    optimizers = make_optimizers(model, "muon", args.lr, weight_decay=0.0)
    device = torch.device("cpu")

    for step in range(args.steps):
        batch = torch.randint(len(images), (args.batch,))        # b
        with runtime.autocast(device, args.dtype):
            tokens = model.encode(to_input(images[batch]))       # b n c
        error = tokens.float() - model.targets(descriptors[batch])
        loss = error.square().mean()
        loss.backward()
        lr = args.lr * runtime.lr_factor(step, 100, 100, args.steps, 0.01, "cosine")
        runtime.optimizer_step(optimizers, model, 1.0, lr)

        if step % 500 == 0:
            seconds = time.time() - start
            print(f"step {step}/{args.steps} | error {loss.item():.4f} | {seconds:.0f} s",
                  flush=True)
        if (step + 1) % 4000 == 0 or step + 1 == args.steps:
            print(f"linear probe, 36 classes: {probe_accuracy(model):.3f}", flush=True)
            save_encoder(model.encoder, args.out)
    megabytes = args.out.stat().st_size / 1e6
    print(f"{args.out.name}: {megabytes:.1f} MB, {time.time() - start:.0f} s")


if __name__ == "__main__":
    runtime.run(main, parse_args)
