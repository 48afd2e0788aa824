"""Pretrain the shipped `tiny` encoder on the built-in world, without labels; writes tiny_encoder.safetensors.

Its tokens regress a descriptor that classical image analysis computes from the pixels (as MaskFeat, arXiv
2112.09133, regresses HOG). Foreground is parted from a smooth ground; for each 16 px patch the descriptor is
- of the object nearest to the patch: its centre, as waves of 128, 32 and 16 px, coarse to fine; its 3-, 4-
  and 5-fold angular moments (Hu, 1962), whose phases are its rotation and whose sizes tell shapes apart; its
  radial moments, its radius, and the colour near each quarter of the patch;
- at 8 x 8 points, the distance to the nearest outline, signed and squashed; and the colour of the ground.
Latents that are easy to generate: what an object is and where it lies stands in all tokens, in numbers that
noise hides one after another; and easy to decode, from the distances. A fixed random rotation spreads the
descriptor over the channels. Labels are used only by the linear probe that is printed on the way.
    python assets/make_tiny_encoder.py
"""
import argparse
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
from safetensors.torch import load_file, save_file
from scipy import ndimage
from timm.models.vision_transformer import VisionTransformer

import eval_fid
import runtime
from data import batches, open_data
from model import TINY
from train_decoder import make_optimizers

HERE = Path(__file__).resolve().parent
SIDE, PATCH = TINY["img_size"], TINY["patch_size"]
AXIS = (np.arange(SIDE, dtype=np.float32) + 0.5) * 2 / SIDE - 1
PLANE = np.stack([np.ones((SIDE, SIDE), np.float32), *np.meshgrid(AXIS, AXIS), np.outer(AXIS, AXIS)], 2)
WAVES = (2 * SIDE, SIDE / 2, SIDE / 4)      # px: the first tells every place apart, the last is one patch
RANGE = 6                                   # px at which distances are squashed
# Columns of each part of the descriptor, and its share of the energy of a token, so of its squared error.
PARTS = dict(centre=(12, 0.30), distance=(64, 0.26), rotation=(6, 0.18), colour=(12, 0.08), ground=(3, 0.07),
             radial=(2, 0.05), folds=(3, 0.03), radius=(1, 0.03))


def descriptor(image):
    """Descriptor of the patches of a picture (64, 64, 3) uint8: (16, 103) float32, columns as in PARTS."""
    x = image.astype(np.float32) / 127.5 - 1
    border = np.median(np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]), 0)
    even = ~ndimage.binary_dilation(np.abs(x - border).max(2) > 0.3, iterations=2)
    ground = PLANE @ np.linalg.lstsq(PLANE[even], x[even], rcond=None)[0]           # bilinear
    strength = np.linalg.norm(x - ground, axis=2)
    full = ndimage.maximum_filter(strength, 7)                              # of the object that is near
    share = np.where(full > 0.3, strength / np.maximum(full, 0.3), 0)       # 0.3: far below any object
    inside = share > 0.5
    inside[SIDE // 2, SIDE // 2] |= not inside.any()                        # distances need something
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    distance = ndimage.gaussian_filter(distance, 0.7)                       # between whole pixels
    numbers = ndimage.label(inside, np.ones((3, 3)))[0]
    pixels = np.bincount(numbers.ravel())
    whole = inside & (pixels[numbers] >= min(20, pixels[1:].max()))         # tips cut off are no objects
    nearest = ndimage.distance_transform_edt(~whole, return_distances=False, return_indices=True)
    own = np.unique(numbers[tuple(nearest)], return_inverse=True)[1].reshape(SIDE, SIDE)
    core = ndimage.distance_transform_edt(~ndimage.binary_erosion(inside), return_distances=False,
                                          return_indices=True)
    colour = x[tuple(core)]                                                 # away from soft edges

    def total(values):                                                      # of the pixels of each object
        return np.bincount(own.ravel(), (share * values).ravel())

    row, column = np.indices(own.shape) + 0.5
    area = np.maximum(total(1.0), 1)
    centre = np.stack([total(column), total(row)]) / area                   # 2 k
    radius = np.sqrt(area / np.pi)
    spot = ((column - centre[0][own]) + 1j * (row - centre[1][own])) / radius[own]
    r = np.maximum(np.abs(spot), 1e-3)
    moments = [(total((spot ** m * r ** (2 - m)).real) + 1j * total((spot ** m * r ** (2 - m)).imag)) / area
               for m in (3, 4, 5)]
    moments = np.stack([m / (np.abs(m) + 0.15) for m in moments])           # 3 k; a square's is 0.15
    waves = np.exp(2j * np.pi * centre[:, None] / np.array(WAVES)[:, None]).reshape(6, -1)
    objects = np.concatenate([waves.real, waves.imag, moments.real, moments.imag,
                              [total(r ** 2) / area, total(np.exp(-(r / 0.4) ** 2)) / area],
                              np.abs(moments), [np.log(radius)]])           # 24 k

    def patches(plane, points):                                             # 64 64 k -> 16 points*points*k
        plane = plane.reshape(4 * points, PATCH // points, 4 * points, PATCH // points, -1).mean((1, 3))
        return rearrange(plane, "(h p) (w q) k -> (h w) (p q k)", p=points, q=points)

    middle = own[PATCH // 2::PATCH, PATCH // 2::PATCH].ravel()
    waves, turns, radial, folds, size = np.split(objects.T[middle], (12, 18, 20, 23), axis=1)
    return np.concatenate([waves, patches(np.tanh(distance / RANGE), 8), turns, patches(colour, 2),
                           patches(ground, 1), radial, folds, size], 1).astype(np.float32)


@torch.no_grad()
def mean_tokens(model, n, seed):
    """Mean-pooled tokens and class ids of n single-object scenes."""
    data, rows = open_data("shapes", 64, seed=seed, objects=1), []
    for _, _, images, labels, _ in batches(data, 500, 500, stop=n // 500, workers=0):
        rows.append((model.encode(images.float() / 127.5 - 1).mean(1), labels))
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


def linear_probe(model, train=6_000, test=3_000):
    """Accuracy over the 36 classes of a linear classifier on mean-pooled tokens, on scenes not trained on."""
    return eval_fid.linear_probe(*mean_tokens(model, train, 101), *mean_tokens(model, test, 202), 36)


class TokenRegressor(nn.Module):
    """The encoder, and the fixed map from descriptors to the tokens that it regresses."""

    def __init__(self, descriptors):                                    # a sample of them, n k
        super().__init__()
        c, (widths, shares) = TINY["embed_dim"], zip(*PARTS.values())
        self.encoder = VisionTransformer(**TINY)
        self.encoder.norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)    # as Encoder will use it
        energy = torch.stack([part.var(0).sum() for part in descriptors.split(widths, 1)])
        scale = (c * torch.tensor(shares) / energy).sqrt().repeat_interleave(torch.tensor(widths))  # k
        self.register_buffer("mean", descriptors.mean(0))
        self.register_buffer("project", scale[:, None] * torch.linalg.qr(torch.randn(c, c)).Q[:len(scale)])

    def encode(self, x):                                                # b 3 H W in [-1,1] -> b n c
        return self.encoder.norm(self.encoder.blocks(self.encoder.patch_embed(x) + self.encoder.pos_embed))

    def targets(self, descriptors):                                     # b n k -> b n c
        return F.layer_norm((descriptors - self.mean) @ self.project, self.project.shape[1:])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=50_000, help="scenes, a multiple of 500; used repeatedly")
    p.add_argument("--steps", type=int, default=8_000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=64, help="images per step")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the matmuls")
    p.add_argument("--init", type=Path, help="start from the weights of this encoder")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE / "tiny_encoder.safetensors")
    args = p.parse_args()
    runtime.setup()
    timm.layers.set_fused_attn(False)      # on few tokens plain bf16 products are faster on CPU
    torch.manual_seed(args.seed)
    start = time.time()
    data = open_data("shapes", SIDE, seed=args.seed, objects=(1, 1, 1, 2, 3, 4))
    images = torch.cat([x for _, _, x, _, _ in batches(data, 500, 500, stop=args.images // 500, workers=1)])
    with multiprocessing.Pool() as pool:                                # N 3 H W uint8 -> N n k
        rows = pool.map(descriptor, images.permute(0, 2, 3, 1).numpy(), chunksize=50)
    descriptors = torch.from_numpy(np.stack(rows))
    print(f"{args.images} descriptors in {time.time() - start:.0f} s", flush=True)
    model = TokenRegressor(descriptors[:4000].flatten(0, 1))
    if args.init:
        model.encoder.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    opts = make_optimizers(model, "muon", args.lr, weight_decay=0.0)
    device = torch.device("cpu")
    for step in range(args.steps):
        rows = torch.randint(len(images), (args.batch,))
        with runtime.autocast(device, args.dtype):
            z = model.encode(images[rows].float() / 127.5 - 1)
        loss = (z.float() - model.targets(descriptors[rows])).square().mean()
        loss.backward()
        lr = args.lr * runtime.lr_factor(step, 100, 100, args.steps, 0.01, "cosine")
        runtime.step_optimizers(opts, model, 1.0, loss, step, lr)
        if step % 500 == 0:
            print(f"step {step}/{args.steps} | error {loss.item():.4f} | {time.time() - start:.0f} s",
                  flush=True)
        if step % 4000 == 3999 or step == args.steps - 1:
            print(f"linear probe, 36 classes: {linear_probe(model):.3f}", flush=True)
            state = {k: v.half().contiguous() for k, v in model.encoder.state_dict().items()}
            save_file(state, args.out)
    print(f"{args.out.name}: {args.out.stat().st_size / 1e6:.1f} MB, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
