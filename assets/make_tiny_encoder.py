"""Pretrain the shipped `tiny` encoder on the built-in world, without labels; writes tiny_encoder.safetensors.

Its tokens regress a descriptor that classical image analysis computes from the pixels (as MaskFeat, arXiv
2112.09133, regresses HOG). For each 16 px patch that is, at 8 x 8 points, the distance to the nearest
outline, signed and squashed at two ranges, and the share of the foreground; then the colour of the nearest
thing and of the ground; and for the whole image its rotation-invariant spectrum. Distances vary smoothly
where pixels jump, every token knows where things lie beyond its patch, and the spectrum brings shape within
reach of a linear probe: latents that are easy to generate and, unlike labels, hold the whole picture. A fixed
random rotation spreads the descriptor over the channels. The file was made with these settings, from other
random numbers.
Labels are used only by the linear probe that is printed on the way.
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
from safetensors.torch import save_file
from scipy import ndimage
from timm.models.vision_transformer import VisionTransformer

import runtime
from data import batches, open_data
from model import TINY

HERE = Path(__file__).resolve().parent
SIDE, PATCH = TINY["img_size"], TINY["patch_size"]
AXIS = (np.arange(SIDE, dtype=np.float32) + 0.5) * 2 / SIDE - 1
PLANE = np.stack([np.ones((SIDE, SIDE), np.float32), *np.meshgrid(AXIS, AXIS), np.outer(AXIS, AXIS)], 2)
RANGES = (3, 12)                    # pixels: the outline's exact place; the way to the next thing


def geometry(image):
    """Descriptor of the patches of a picture (64, 64, 3) uint8: (16, 198) float32, row by row.

    Squares of 2 x 2 px: share of the foreground; signed distance to its outline, tanh at two ranges. Then the
    colour of the nearest foreground and of the ground. Weighted so that each part has a say in a mean square.
    """
    x = image.astype(np.float32) / 127.5 - 1
    border = np.median(np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]), 0)
    even = ~ndimage.binary_dilation(np.abs(x - border).max(2) > 0.3, iterations=2)
    ground = PLANE @ np.linalg.lstsq(PLANE[even], x[even], rcond=None)[0]           # bilinear
    strength = np.linalg.norm(x - ground, axis=2)
    full = ndimage.maximum_filter(strength, 7)                              # of the object that is near
    share = np.where(full > 0.3, strength / np.maximum(full, 0.3), 0)       # 0.3: far below any object
    inside = share > 0.5
    inside[SIDE // 2, SIDE // 2] |= not inside.any()                        # distances need something
    row, column = ndimage.distance_transform_edt(~ndimage.binary_erosion(inside), return_distances=False,
                                                 return_indices=True)
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    distance = ndimage.gaussian_filter(distance, 0.7)                       # between whole pixels
    fine = np.stack([share - 0.5] + [np.tanh(-distance / r) for r in RANGES], 2)
    fine = fine.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3))
    coarse = np.concatenate([4 * x[row, column], 6 * ground - 3], 2)
    coarse = coarse.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH, 6).mean((1, 3))
    fine = rearrange(fine, "(h p) (w q) k -> (h w) (k p q)", p=PATCH // 2, q=PATCH // 2)
    return np.concatenate([fine, coarse.reshape(-1, 6)], 1).astype(np.float32)


def spectrum(x):
    """Shift- and rotation-invariant descriptor of images b 3 64 64: b 56, variance about 0.4.

    Distance from the median border colour -> amplitude spectrum -> on 14 rings, the mean and the 4-, 6- and
    10-fold variation around the ring, which squares and crosses, triangles, stars have; logarithm.
    """
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    distance = (x - border[:, :, None, None]).square().sum(1).sqrt()
    distance = distance / distance.amax((1, 2), keepdim=True).clamp(min=0.1)
    amplitude = torch.fft.fftshift(torch.fft.fft2(distance), dim=(1, 2)).abs()[:, None]  # zero: 32
    radius, angle = torch.linspace(2, 24, 14)[:, None], torch.arange(40) * (torch.pi / 40)
    rings = torch.stack([radius * angle.cos(), radius * angle.sin()], -1) / 32 + 1 / 64     # 14 40 2
    around = F.grid_sample(amplitude, rings.expand(len(x), -1, -1, -1), align_corners=False)[:, 0]
    folds = torch.fft.rfft(around, dim=2).abs()[:, :, [0, 2, 3, 5]] / 40
    return (folds + 0.3).log().flatten(1)


@torch.no_grad()
def mean_tokens(model, n, seed):
    """Mean-pooled tokens and class ids of n single-object scenes."""
    data, rows = open_data("shapes", 64, seed=seed, objects=1), []
    for _, _, images, labels, _ in batches(data, 500, 500, stop=n // 500, workers=0):
        rows.append((model.encode(images.float() / 127.5 - 1).mean(1), labels))
    return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])


def linear_probe(model, train=6_000, test=3_000):
    """Accuracy over the 36 classes of a linear classifier on mean-pooled tokens, on scenes not trained on."""
    (x, y), (x_test, y_test) = mean_tokens(model, train, 101), mean_tokens(model, test, 202)
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    probe = nn.Linear(x.shape[1], 36)
    opt = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1500)
    for _ in range(1500):
        rows = torch.randint(len(x), (1000,))
        opt.zero_grad()
        F.cross_entropy(probe(x[rows]), y[rows]).backward()
        opt.step()
        schedule.step()
    return (probe(x_test).argmax(1) == y_test).float().mean().item()


class TokenRegressor(nn.Module):
    """The encoder, and the fixed map from descriptors to the tokens that it regresses."""

    def __init__(self, descriptors):                                    # a sample of them, n k
        super().__init__()
        c = TINY["embed_dim"]
        self.encoder = VisionTransformer(**TINY)
        self.encoder.norm = nn.LayerNorm(c, eps=1e-6, elementwise_affine=False)    # as Encoder will use it
        axes = torch.linalg.eigh((descriptors.T @ descriptors).double()).eigenvectors[:, -c:].float()
        self.register_buffer("project", axes @ torch.linalg.qr(torch.randn(c, c)).Q)        # k c

    def encode(self, x):                                                # b 3 H W in [-1,1] -> b n c
        return self.encoder.norm(self.encoder.blocks(self.encoder.patch_embed(x) + self.encoder.pos_embed))

    def targets(self, descriptors):                                     # b n k -> b n c
        return F.layer_norm(descriptors @ self.project, self.project.shape[1:])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=40_000, help="scenes, a multiple of 500; used repeatedly")
    p.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=32, help="images per step")
    p.add_argument("--spectrum", type=float, default=0.8, help="weight of the spectrum")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the matmuls")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE / "tiny_encoder.safetensors")
    args = p.parse_args()
    runtime.setup()
    timm.layers.set_fused_attn(False)      # on few tokens plain bf16 products are faster on CPU
    torch.manual_seed(args.seed)
    data = open_data("shapes", SIDE, seed=args.seed, objects=(1, 1, 1, 2, 3, 4))
    images = torch.cat([x for _, _, x, _, _ in batches(data, 500, 500, stop=args.images // 500, workers=1)])
    with multiprocessing.Pool() as pool:                                # N 3 H W uint8 -> N n 198
        patches = torch.from_numpy(np.stack(pool.map(geometry, images.permute(0, 2, 3, 1).numpy())))
    whole = torch.cat([spectrum(x.float() / 127.5 - 1) for x in images.split(500)])
    whole = args.spectrum * (whole - whole.mean(0))                     # N 56

    def descriptor(rows):                                               # b n 254
        return torch.cat([patches[rows], whole[rows, None].expand(-1, patches.shape[1], -1)], 2)

    model = TokenRegressor(descriptor(torch.arange(min(4000, args.images))).flatten(0, 1))
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start, device = time.time(), torch.device("cpu")
    for step in range(args.steps):
        rows = torch.randint(args.images, (args.batch,))
        for group in opt.param_groups:
            group["lr"] = args.lr * runtime.lr_factor(step, 100, 100, args.steps, 0.01, "cosine")
        with runtime.autocast(device, args.dtype):
            z = model.encode(images[rows].float() / 127.5 - 1)
        loss = (z.float() - model.targets(descriptor(rows))).square().mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 500 == 0:
            print(f"step {step}/{args.steps} | error {loss.item():.4f} | {time.time() - start:.0f} s",
                  flush=True)
        if step % 5000 == 4999 or step == args.steps - 1:
            print(f"linear probe, 36 classes: {linear_probe(model):.3f}", flush=True)
            state = {k: v.half().contiguous() for k, v in model.encoder.state_dict().items()}
            save_file(state, args.out)
    print(f"{args.out.name}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
