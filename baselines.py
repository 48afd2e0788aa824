"""What the papers compare a representation encoder with, as backbones of model.Encoder.

    pixel:PATCH             no encoder: the pixels of a patch are its token
    vae:CHANNELS:PATCH      a small VAE, trained together with its decoder
    diffusers:SOURCE        a published VAE, such as that of Stable Diffusion or FLUX
    random                  the layout of the shipped encoder, with weights that were never trained

release.load_encoder() takes these names. A backbone has the attributes embed_dim (channels c of its
tokens), num_prefix_tokens (tokens before those of the image, here always 0) and patch (pixels per
token side), and the method forward_features: pixels b 3 H W -> tokens b n c.
"""
from pathlib import Path

import timm
import torch
import torch.nn as nn
from einops import rearrange

from model import TINY_VIT
from storage import fetch_hub, fetching


class Pixels(nn.Module):
    """The pixels of a patch as its token. patch: pixels per token side."""
    num_prefix_tokens = 0

    def __init__(self, patch):
        super().__init__()
        self.patch = patch
        self.embed_dim = 3 * patch * patch

    def forward_features(self, x):                                  # b 3 H W
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)


class VAE(nn.Module):
    """A small ViT that gives a mean and a log-variance of each latent; its latents are the means.

    channels: c. patch: pixels per token side. image_size: side of the images, pixels.
    Source: arXiv 1312.6114
    """
    num_prefix_tokens = 0

    def __init__(self, channels, patch, image_size):
        super().__init__()
        self.embed_dim = channels
        self.patch = patch
        layout = dict(TINY_VIT, img_size=image_size, patch_size=patch)
        self.vit = timm.models.VisionTransformer(**layout)
        self.moments = nn.Linear(self.vit.embed_dim, 2 * channels)

    def posterior(self, x):                                         # b 3 H W
        """Mean and log-variance of the latents, b n c each, fp32."""
        tokens = self.vit.forward_features(x)                       # b n d
        mean, log_var = self.moments(tokens).float().chunk(2, dim=-1)               # b n c each
        return mean, log_var.clamp(-30, 20)             # limits as in Stable Diffusion's VAE

    def sample_posterior(self, x):                                  # b 3 H W
        """Tokens b n c drawn from the posterior, and its KL divergence from N(0, 1).

        The KL is a scalar, in nats per latent element. Source: arXiv 1312.6114, appendix B.
        """
        mean, log_var = self.posterior(x)                           # b n c each
        # KL = (mean^2 + var - 1 - log var) / 2
        kl = (mean.square() + log_var.exp() - 1 - log_var).mean() / 2
        eps = torch.randn(mean.shape, device=mean.device)           # b n c
        return mean + (log_var / 2).exp() * eps, kl                 # b n c, scalar

    def forward_features(self, x):                                  # b 3 H W
        mean, _ = self.posterior(x)
        return mean                                                 # b n c


class DiffusersVAE(nn.Module):
    """A published AutoencoderKL in the layout of diffusers; its latents are the posterior means.

    source: a folder or a name on the hub; one that ends in /vae is the part of a whole pipeline.
    Raises FileNotFoundError without diffusers, the files or a network.
    """
    num_prefix_tokens = 0

    def __init__(self, source):
        super().__init__()
        subfolder = "vae" if source.endswith("/vae") else ""
        advice = ("pip install diffusers, and connect or name a folder with its config.json and "
                  "diffusion_pytorch_model.safetensors")
        with fetching(f"--encoder diffusers:{source}", advice):
            from diffusers import AutoencoderKL
            if not Path(source).exists():
                fetch_hub(source.removesuffix("/vae"),
                          [f"{subfolder}*.json", f"{subfolder}*/diffusion_pytorch_model.*"])
            self.vae = AutoencoderKL.from_pretrained(source.removesuffix("/vae"),
                                                     subfolder=subfolder)
        self.embed_dim = self.vae.config.latent_channels
        num_halvings = len(self.vae.config.block_out_channels) - 1
        self.patch = 2 ** num_halvings

    def forward_features(self, x):                                  # b 3 H W
        latents = self.vae.encode(x).latent_dist.mode()             # b c h w
        return rearrange(latents, "b c h w -> b (h w) c")           # b n c


def random_vit():
    """A ViT in the layout of the shipped encoder with untrained weights, the same at each call."""
    with torch.random.fork_rng(devices=[]):             # leave the generator of the caller alone
        torch.manual_seed(0)
        vit = timm.models.VisionTransformer(**TINY_VIT)
    vit.norm = nn.Identity()
    return vit
