"""Pretrain the shipped `tiny` encoder on the built-in world, without labels; writes tiny_encoder.safetensors.

A masked and denoising autoencoder, with both corruptions in latent space: noise is added to the tokens, a
random part of them is taken away, and a light decoder repaints the whole image from the rest. (Masked
autoencoding, arXiv 2111.06377, masks the pixels instead.) So every token comes to speak of the whole image,
and robustly, which makes such latents easy to generate. The mean token also regresses a fixed
descriptor that is computed from the pixels, their rotation-invariant spectrum (as MaskFeat, arXiv 2112.09133,
regresses HOG), which brings shape within reach of a linear probe. The defaults made the file.
Labels are used only by the linear probe that is printed on the way.
    python assets/make_tiny_encoder.py
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from timm.models.vision_transformer import Block, VisionTransformer

import runtime
from data import batches, open_data
from model import TINY, sincos_2d

HERE = Path(__file__).resolve().parent


class MaskedAutoencoder(nn.Module):
    """Encoder on the whole image; light decoder on its tokens, noisy and partly masked, to patches."""

    def __init__(self, width=128, depth=2):
        super().__init__()
        d, p = TINY["embed_dim"], TINY["patch_size"]
        self.encoder, self.patch = VisionTransformer(**TINY), p
        self.encoder.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)  # as Encoder will use it
        self.embed, self.mask_token = nn.Linear(d, width), nn.Parameter(torch.zeros(width))
        self.register_buffer("pos", sincos_2d(width, TINY["img_size"] // p))
        self.blocks = nn.Sequential(*(Block(width, 4, qkv_bias=True) for _ in range(depth)),
                                    nn.LayerNorm(width), nn.Linear(width, 3 * p * p))
        self.describe = nn.Linear(d, 56)       # linear, as the probe is

    def encode(self, x):                                                # b 3 H W in [-1,1] -> b n c
        return self.encoder.norm(self.encoder.blocks(self.encoder.patch_embed(x) + self.encoder.pos_embed))

    def forward(self, x, noise, masked):
        """Error of the image x in [-1,1] repainted from noisy, masked tokens; and the clean tokens, b n c.

        noise: sigma of an image's noise is drawn from U(0, noise).
        masked: its share of masked tokens is drawn from U(0, masked).
        """
        z = self.encode(x).float()                                      # b n c
        y = z + noise * torch.rand(len(x), 1, 1) * torch.randn_like(z)
        hide = torch.rand(len(x), len(self.pos)) < masked * torch.rand(len(x), 1)   # b n
        y = torch.where(hide[..., None], self.mask_token, self.embed(y).float())    # b n d
        error = self.blocks(y + self.pos).float() \
            - rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        return error.square().mean() + 0.1 * error.abs().mean(), z


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


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    p.add_argument("--batch", type=int, default=64, help="images per step")
    p.add_argument("--noise", type=float, default=0.5, help="largest sigma of the noise on the tokens")
    p.add_argument("--masked", type=float, default=0.9375, help="largest share of masked tokens, in [0,1]")
    p.add_argument("--spectrum", type=float, default=0.3, help="weight of the spectrum; 0: repainting alone")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the matmuls")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=HERE / "tiny_encoder.safetensors")
    args = p.parse_args()
    runtime.setup()
    timm.layers.set_fused_attn(False)      # on few tokens plain bf16 products are faster on CPU
    torch.manual_seed(args.seed)
    model = MaskedAutoencoder()
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    data, start = open_data("shapes", 64, seed=args.seed, objects=(1, 1, 1, 2, 3, 4)), time.time()
    for step, _, images, _, _ in batches(data, args.batch, args.batch, stop=args.steps, workers=1):
        x = images.float() / 127.5 - 1
        for group in opt.param_groups:
            group["lr"] = args.lr * runtime.lr_factor(step, 100, 100, args.steps, 0.01, "cosine")
        with runtime.autocast(x.device, args.dtype):
            error, z = model(x, args.noise, args.masked)
            miss = (model.describe(z.mean(1)).float() - spectrum(x)).square().mean()
            loss = error + args.spectrum * miss
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step % 100 == 0:
            print(f"step {step}/{args.steps} | repainting {error.item():.4f} | spectrum {miss.item():.3f} | "
                  f"{time.time() - start:.0f} s", flush=True)
        if step % 1000 == 999 or step == args.steps - 1:
            print(f"linear probe, 36 classes: {linear_probe(model):.3f}", flush=True)
            state = {k: v.half().contiguous() for k, v in model.encoder.state_dict().items()}
            save_file(state, args.out)
    print(f"{args.out.name}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
