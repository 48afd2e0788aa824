"""Representation autoencoders and the diffusion transformers that generate in their latent space.

    image -> frozen Encoder -> latents b c h w -> Decoder -> image
    noise -> DiT or DiTDH, step by step -> latents b c h w

Shapes: b batch, h w latent grid, n = h*w tokens, c latent channels, d width, e width of the wide
    head, l text tokens, p patch side, k attention heads, dh = d/k, H W image height and width in
    pixels.
Time runs from data (t=0) to noise (t=1): x_t = (1-t)*x0 + t*eps, and the model predicts v = eps -
x0.

Sources: [RAE] arXiv 2510.11690, [Scale-RAE] 2601.16208, [LightningDiT] 2501.01423, [DDT]
    2504.05741, [MAE] 2111.06377, [SD3] 2403.03206.
"""
import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.layers import (
    PatchEmbed,
    apply_rot_embed,
    build_rotary_pos_embed,
    build_sincos2d_pos_embed,
)
from torch.utils.checkpoint import checkpoint

# Mean and standard deviation of pixels in [0,1], as encoders were trained with them.
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Arguments of timm's VisionTransformer for the shipped encoder (assets/make_tiny_encoder.py):
# 16 tokens of 192 channels, without a CLS token, as in SigLIP.
TINY_VIT = dict(img_size=64, patch_size=16, embed_dim=192, depth=5, num_heads=4, class_token=False,
                global_pool="", num_classes=0)

# Named sizes, as defaults for the flags of the training scripts.          Source: [RAE] appendix
NO_HEAD = dict(head_width=0)
WIDE_HEAD = dict(head_width=2048, head_depth=2, head_heads=16)
DIT_SIZES = {
    "DiT-S": dict(width=384, depth=12, heads=6, **NO_HEAD),
    "DiT-B": dict(width=768, depth=12, heads=12, **NO_HEAD),
    "DiT-L": dict(width=1024, depth=24, heads=16, **NO_HEAD),
    "DiT-XL": dict(width=1152, depth=28, heads=16, **NO_HEAD),
    "DiTDH-S": dict(width=384, depth=12, heads=6, **WIDE_HEAD),
    "DiTDH-B": dict(width=768, depth=12, heads=12, **WIDE_HEAD),
    "DiTDH-L": dict(width=1024, depth=24, heads=16, **WIDE_HEAD),
    "DiTDH-XL": dict(width=1152, depth=28, heads=16, **WIDE_HEAD),
}
DECODER_SIZES = {
    "tiny": dict(decoder_width=192, decoder_depth=2, decoder_heads=4, decoder_mlp=768),
    "B": dict(decoder_width=768, decoder_depth=12, decoder_heads=12, decoder_mlp=3072),
    "L": dict(decoder_width=1024, decoder_depth=24, decoder_heads=16, decoder_mlp=4096),
    # The MLP of XL is not 4 x its width, as in its released weights.
    "XL": dict(decoder_width=1152, decoder_depth=28, decoder_heads=16, decoder_mlp=4096),
}
# DiTs for text to image. Source: [Scale-RAE] table 10, where the 3.1B of the text is called 3.3B.
T2I_SIZES = {
    "0.5B": dict(width=1280, depth=16, heads=32),
    "2.4B": dict(width=2048, depth=32, heads=32),
    "3.1B": dict(width=2304, depth=32, heads=32),
    "5.5B": dict(width=3072, depth=32, heads=32),
    "9.8B": dict(width=4096, depth=32, heads=32),
}
# Width and depth are the paper's; it does not say how many attention heads, 21 is our choice.
T2I_HEAD = dict(head_width=2688, head_depth=2, head_heads=21)


def check_heads(width, heads, width_flag, heads_flag, multiple=1):
    """Raise ValueError unless width is a multiple of heads x multiple (4 for rotary positions in
    2-D).
    """
    if heads < 1:
        raise ValueError(f"{heads_flag} {heads} must be at least 1")
    unit = heads * multiple
    if width < 1 or width % unit:
        nearest = max(round(width / unit), 1) * unit
        raise ValueError(f"{width_flag} {width} must be a multiple of {heads_flag} {heads} x "
                         f"{multiple}; try {width_flag} {nearest}")


def sincos_2d(d, grid):
    """Fixed sine-cosine positions, (grid*grid, d): half of d for the column, half for the row.
    [MAE]
    """
    row_first = build_sincos2d_pos_embed((grid, grid), d, interleave_sin_cos=True)
    return row_first.roll(d // 2, 1)


# ------------------------------------------------------------------------------ encoder
class Normalise(nn.Module):
    """Pixels minus a mean, over a standard deviation, of three floats each.

    torchvision's function of this name copies both to the device at each call, and waits for it to
    look for a 0. They are buffers here, but not in checkpoints, since each encoder has its own.
    """
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images):                                          # b 3 H W
        return (images - self.mean) / self.std                          # b 3 H W


class Encoder(nn.Module):
    """A frozen vision transformer whose final tokens are the latents. # [L1]

    release.load_encoder(name) builds one with its weights.
    name: as in checkpoints and flags, such as "dinov2-b". backbone: a ViT of timm or one of
    baselines.py.
    image_size: side of the images, pixels. input_size: side at which the backbone sees them, pixels
    (patch 14 sees 224 of 256 px, which gives the same 16 x 16 grid as patch 16). grid: tokens per
    side. pixel_mean, pixel_std: three floats each, for pixels in [0,1].
    trainable: True for a VAE, which is trained together with its decoder.
    Source: [RAE] section 3.1: without CLS token and registers; the final LayerNorm has no affine
        part, so each token has mean 0 and variance 1 over its channels.
    """
    def __init__(self, name, backbone, image_size, input_size, grid, pixel_mean, pixel_std):
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.image_size = image_size
        self.input_size = input_size
        self.grid = grid
        self.channels = backbone.embed_dim
        self.mean = pixel_mean
        self.std = pixel_std
        self.normalise = Normalise(pixel_mean, pixel_std)
        self.trainable = False
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stay in eval mode: dropout and drop path of a frozen encoder are off in any training
        loop.
        """
        return super().train(False)

    def pixels(self, images):
        """Images b 3 H W in [0,1] as the backbone wants them: resized and normalised."""
        size = (self.input_size, self.input_size)
        if images.shape[-2:] != size:
            # As the release does it: bicubic, not antialiased.
            images = F.interpolate(images, size=size, mode="bicubic")
        return self.normalise(images)                                   # b 3 s s

    @torch.no_grad()
    def encode(self, images):
        """Latents b c h w of images b 3 H W in [0,1], not yet normalised by an RAE's statistics."""
        x = self.backbone.forward_features(self.pixels(images))         # b prefix+n c
        x = x[:, self.backbone.num_prefix_tokens:]                      # b n c
        return rearrange(x, "b (h w) c -> b c h w", h=self.grid)


# ------------------------------------------------------------------------------ decoder
class DecoderLayer(nn.Module):
    """Pre-LN transformer layer of the released decoder (HF ViT-MAE): LayerNorm eps 1e-12, exact
    GELU.
    """
    def __init__(self, d, heads, mlp):
        super().__init__()
        self.heads = heads
        self.layernorm_before = nn.LayerNorm(d, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(d, eps=1e-12)
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.proj = nn.Linear(d, d)
        self.fc1 = nn.Linear(d, mlp)
        self.fc2 = nn.Linear(mlp, d)

    def forward(self, x):                                               # b n d
        x = x + self.attention(self.layernorm_before(x))                # b n d
        return x + self.fc2(F.gelu(self.fc1(self.layernorm_after(x))))  # b n d

    def attention(self, x):                                             # b n d
        q = rearrange(self.query(x), "b n (k dh) -> b k n dh", k=self.heads)
        k = rearrange(self.key(x), "b n (k dh) -> b k n dh", k=self.heads)
        v = rearrange(self.value(x), "b n (k dh) -> b k n dh", k=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)                     # b k n dh
        return self.proj(rearrange(x, "b k n dh -> b n (k dh)"))        # b n d


class Decoder(nn.Module):
    """ViT decoder from latents to pixels. # [L2]

    latent_channels: c. grid: tokens per side. patch: pixels per token side; twice the encoder's
    upsamples. width, depth, heads, mlp: sizes of the transformer; DECODER_SIZES has the paper's.
    forward: latents b c h w, NOT normalised by dataset statistics (another grid is resized
        bilinearly) -> pixels b 3 H W in the encoder's normalisation.
    Source: [RAE] section 3.2; layout of [MAE] with a learned CLS token in front and fixed
    positions.
    """
    def __init__(self, latent_channels, grid, patch, width, depth, heads, mlp):
        super().__init__()
        check_heads(width, heads, "--decoder_width", "--decoder_heads")
        self.grid = grid
        self.patch = patch
        self.checkpoint = False          # True: keep no activations inside layers, recompute them
        self.decoder_embed = nn.Linear(latent_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(self.positions(), requires_grad=False)
        layers = [DecoderLayer(width, heads, mlp) for _ in range(depth)]
        self.decoder_layers = nn.Sequential(*layers)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch * patch)

    @property
    def image_size(self):
        """Side of the decoded images, pixels."""
        return self.grid * self.patch

    def positions(self):
        """Fixed positions 1 1+n d, zero for the CLS token."""
        table = sincos_2d(self.decoder_embed.out_features, self.grid)   # n d
        return F.pad(table, (0, 0, 1, 0))[None]

    def forward(self, z):                                               # b c h w
        return self.pixels(self.tokens(z))                              # b 3 H W

    def tokens(self, z):                                                # b c h w
        """All of the decoder but its last layer: tokens b 1+n d, the first of them CLS."""
        x = self.decoder_embed(rearrange(z, "b c h w -> b h w c"))      # b h w d
        if x.shape[1:3] != (self.grid, self.grid):
            x = rearrange(x, "b h w d -> b d h w")
            x = F.interpolate(x, size=(self.grid, self.grid), mode="bilinear")
            x = rearrange(x, "b d h w -> b h w d")
        x = rearrange(x, "b h w d -> b (h w) d")                        # b n d
        cls = self.trainable_cls_token.expand(len(x), -1, -1)           # b 1 d
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed         # b 1+n d
        for layer in self.decoder_layers:
            x = run_block(self, layer, x)                               # b 1+n d
        return x

    def pixels(self, x):                                                # b 1+n d
        """The last layer: tokens to pixels. Its weights are what the adversarial loss is balanced
        at.
        """
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()      # b n p*p*3
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)",
                         h=self.grid, p=self.patch, q=self.patch)       # b 3 H W


def run_block(model, block, *inputs):
    """block(*inputs); in training with model.checkpoint, its activations are recomputed going
    backward.
    """
    if model.checkpoint and model.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# ------------------------------------------------------------------------------ autoencoder
class RAE(nn.Module):
    """Frozen encoder, trained decoder, and statistics of the latents over a dataset. # [L3]

    encoder: an Encoder; None: this RAE only decodes, and pixel_statistics must be given.
    latent_mean, latent_var: c h w each; None: 0 and 1. The released DINOv2-B has no mean: pass
    None.
    pixel_statistics: mean and std of pixels, three floats each; default: the encoder's.
    encode: images b 3 H W in [0,1] -> latents b c h w of unit variance, (z - mean) / sqrt(var +
    1e-5).
    decode: latents b c h w -> images b 3 H W in [0,1], clamped.
    Source: [RAE] section 3.1; statistics of each latent element, not of each channel, as released.
    """
    def __init__(self, encoder, decoder, latent_mean=None, latent_var=None, pixel_statistics=None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        if pixel_statistics is None:
            pixel_statistics = (encoder.mean, encoder.std)
        mean, std = pixel_statistics
        # On the device of the decoder, which others may share, so that it must stay where it is.
        device = decoder.decoder_embed.weight.device
        self.register_buffer("pixel_mean", torch.tensor(mean, device=device).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std, device=device).view(3, 1, 1))
        self.normalise_by(latent_mean, latent_var)

    def normalise_by(self, mean, var):
        """Set the latent statistics, c h w each or None. Returns self; raises ValueError for other
        shapes.
        """
        shape = (self.decoder.decoder_embed.in_features, self.decoder.grid, self.decoder.grid)
        for statistic in (mean, var):
            if statistic is not None and statistic.shape != shape:
                raise ValueError(f"latent statistics of shape {tuple(statistic.shape)} are not of "
                                 f"this decoder's latents, {shape}; give those of the same encoder "
                                 f"and image size")
        latent_mean = torch.zeros(1) if mean is None else mean.float()
        latent_std = torch.ones(1) if var is None else (var.float() + 1e-5).sqrt()
        self.register_buffer("latent_mean", latent_mean.to(self.pixel_mean.device))
        self.register_buffer("latent_std", latent_std.to(self.pixel_mean.device))
        return self

    @torch.no_grad()
    def encode(self, images):                                           # b 3 H W
        if self.encoder is None:
            raise ValueError("this RAE only decodes, as it has no encoder; load it with one")
        return (self.encoder.encode(images) - self.latent_mean) / self.latent_std       # b c h w

    def decode(self, latents):                                          # b c h w
        pixels = self.decoder(latents * self.latent_std + self.latent_mean)             # b 3 H W
        return (pixels * self.pixel_std + self.pixel_mean).clamp(0, 1)  # b 3 H W


# ------------------------------------------------------------------------------ layers of DiT
class RoPE(nn.Module):
    """Rotary positions in 2-D: adjacent pairs of channels turn by the row (first half) or the
    column.

    The tables are part of the state dict, as in the release. Source: [LightningDiT], EVA-02
    """
    def __init__(self, head_dim, grid):
        super().__init__()
        sin, cos = build_rotary_pos_embed((grid, grid), dim=head_dim, in_pixels=False)  # n dh each
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def forward(self, x):                                               # b k n dh
        return apply_rot_embed(x, self.freqs_sin, self.freqs_cos).to(x.dtype)           # b k n dh


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x, rope):                                         # b n d
        qkv = self.qkv(x)                                               # b n 3*d
        q, k, v = rearrange(qkv, "b n (three k dh) -> three b k n dh", three=3, k=self.heads)
        x = F.scaled_dot_product_attention(rope(q), rope(k), v)         # b k n dh
        return self.proj(rearrange(x, "b k n dh -> b n (k dh)"))        # b n d


class SwiGLU(nn.Module):
    """MLP with a gated SiLU. As in the released weights, the hidden width is not rounded."""
    def __init__(self, d):
        super().__init__()
        hidden = int(2 / 3 * int(4 * d))        # as many weights as a plain MLP of width 4 d
        self.w12 = nn.Linear(d, 2 * hidden)
        self.w3 = nn.Linear(hidden, d)

    def forward(self, x):                                               # b n d
        gate, x = self.w12(x).chunk(2, dim=-1)                          # b n hidden
        return self.w3(F.silu(gate) * x)                                # b n d


def modulate(x, shift, scale):
    """x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Attention and MLP, each with adaLN: the condition gives its shift, scale and gate. # [L4]

    forward: x b n d, cond b 1 d (one condition for the image) or b n d (one for each token)
        -> b n d.
    """
    def __init__(self, d, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(d, eps=1e-6)
        self.attn = Attention(d, heads)
        self.norm2 = nn.RMSNorm(d, eps=1e-6)
        self.mlp = SwiGLU(d)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, cond, rope):                                   # x: b n d, cond: b 1|n d
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)        # b n d
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))            # b n d


class TokenEmbed(PatchEmbed):
    """Latents b c h w as tokens b n d, one for each latent position."""
    def __init__(self, channels, d):
        super().__init__(img_size=None, patch_size=1, in_chans=channels, embed_dim=d)

    def forward(self, x):                                               # b c h w
        # PatchEmbed transposes a view. Its strides would go on through the sums of all blocks,
        # whose matmuls and norms read tokens that lie together faster.
        return super().forward(x).contiguous()                          # b n d


class FinalLayer(nn.Module):
    """adaLN and a linear map from width d to the latent channels; warns if d is below them.

    width_flag: the flag that sets d, for the warning.                 Source: Theorem 1 of [RAE]
    """
    def __init__(self, d, channels, width_flag):
        super().__init__()
        if d < channels:
            warnings.warn(f"{width_flag} {d} is below the {channels} latent channels: by Theorem 1 "
                          f"of arXiv 2510.11690 the loss stays above the sum of the eigenvalues of "
                          f"Cov(eps - x0) from the {d + 1}th on, over {channels}; try {width_flag} "
                          f"{channels} or more", stacklevel=3)
        self.norm_final = nn.RMSNorm(d, eps=1e-6)
        self.linear = nn.Linear(d, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x, cond):                                         # x: b n d, cond: b 1|n d
        shift, scale = self.adaLN_modulation(cond).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # b n c


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of t in [0,1] (not x 1000) and an MLP, always in fp32.

    The frequencies W are random and fixed, and part of the weights: they must be loaded.
    """
    def __init__(self, d, features=256):
        super().__init__()
        self.W = nn.Parameter(torch.randn(features), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * features, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t):                                               # b
        with torch.autocast(t.device.type, enabled=False):
            angle = 2 * math.pi * t.float()[:, None] * self.W           # b features
            return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))              # b d


class LabelEmbedding(nn.Module):
    """A table of classes whose last row is the null class.

    In training a label becomes the null class with probability `dropout`, for classifier-free
    guidance.
    """
    def __init__(self, num_classes, d, dropout):
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, d)

    def forward(self, y):                                               # b
        if self.training and self.dropout > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout   # b
            y = torch.where(drop, self.num_classes, y)                  # b
        return self.embedding_table(y)[:, None]                         # b 1 d


class ConditionEmbedding(nn.Module):
    """Text conditions as they are; in training, all of a sample's become the null one with prob.
    `dropout`.

    The learned null condition takes part even with dropout 0, so that it always has a gradient
    (DDP).
    """
    def __init__(self, d, dropout):
        super().__init__()
        self.dropout = dropout
        self.dropout_embedding = nn.Parameter(torch.zeros(d))

    def forward(self, y):                                               # b n d
        if self.training:
            drop = torch.rand(len(y), 1, 1, device=y.device) < self.dropout             # b 1 1
            y = torch.where(drop, self.dropout_embedding, y)            # b n d
        return y


# ------------------------------------------------------------------------------ DiT and DiT^DH
class DiTBase(nn.Module):
    """What DiT and DiTDH share: embeddings of time, condition and position; the velocity they
    return.

    in_channels: c. grid: tokens per side. width: of the backbone. num_classes: without the null
    class;
        None: conditioned on text (b n d). class_dropout: probability in [0,1] that training
        replaces a sample's condition by the null one.
    """
    shift_base = 4096        # n of the time shift sqrt(m/n), in training and in sampling
    prediction = "v"         # what the last layer predicts: "v", or "x0", of which v is computed
    checkpoint = False       # True: training recomputes the activations inside blocks

    def __init__(self, in_channels, grid, width, num_classes, class_dropout):
        super().__init__()
        self.in_channels = in_channels
        self.grid = grid
        self.num_classes = num_classes
        self.reads_text = num_classes is None
        self.t_embedder = TimeEmbedding(width)
        if self.reads_text:
            self.y_embedder = ConditionEmbedding(width, class_dropout)
        else:
            self.y_embedder = LabelEmbedding(num_classes, width, class_dropout)
        self.pos_embed = nn.Parameter(sincos_2d(width, grid)[None], requires_grad=False)

    def initialise(self, xavier_layers):
        """Initialise the weights as released; blocks start as the identity, the output as zero."""
        for layer_type in xavier_layers:
            for layer in self.modules():
                if isinstance(layer, layer_type):
                    nn.init.xavier_uniform_(layer.weight.flatten(1))
                    nn.init.zeros_(layer.bias)
        if not self.reads_text:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)

    def null_condition(self, y):
        """The null condition in the shape of y: b, or b n d for text."""
        if self.reads_text:
            return torch.zeros_like(y) + self.y_embedder.dropout_embedding
        return torch.full_like(y, self.num_classes)

    def velocity(self, output, x_t, t):
        """Velocity b c h w from the output b n c of the last layer, x_t b c h w, t b.

        With prediction "x0" it is v = (x_t - x0) / t, t at least 0.05 so that it stays finite. Data
        of few dimensions are easier to predict than noise of many. Source: arXiv 2511.13720
        """
        output = rearrange(output.float(), "b (h w) c -> b c h w", h=self.grid)
        if self.prediction == "v":
            return output
        return (x_t - output) / t.clamp(min=0.05).view(-1, 1, 1, 1)


class DiT(DiTBase):
    """LightningDiT with one token for each latent position. # [L5]

    in_channels, grid, num_classes, class_dropout: see DiTBase. width, depth, heads: of the blocks.
    forward: x_t b c h w, t b in [0,1], y b int64 in [0, num_classes] (text: b n d) -> velocity b c
    h w.
    Raises ValueError if width is no multiple of 4 x heads; warns if it is below c (Theorem 1 of
    [RAE]).
    Source: [RAE] section 4, [LightningDiT]: RMSNorm, SwiGLU, RoPE, adaLN-zero, fixed absolute
        positions; for text, SiLU twice on the condition, as in [Scale-RAE].
    """
    def __init__(self, in_channels, grid, width, depth, heads, num_classes, class_dropout=0.1):
        check_heads(width, heads, "--width", "--heads", multiple=4)
        super().__init__(in_channels, grid, width, num_classes, class_dropout)
        self.x_embedder = TokenEmbed(in_channels, width)
        self.feat_rope = RoPE(width // heads, grid)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, in_channels, "--width")
        self.initialise([nn.Linear, nn.Conv2d])

    def forward(self, x_t, t, y):                                       # b c h w, b, b or b n d
        cond = self.t_embedder(t)[:, None] + self.y_embedder(y)         # b 1|n d
        if self.reads_text:
            cond = F.silu(cond)                                         # b n d
        x = self.x_embedder(x_t) + self.pos_embed                       # b n d
        for block in self.blocks:
            x = run_block(self, block, x, cond, self.feat_rope)         # b n d
        return self.velocity(self.final_layer(x, cond), x_t, t)         # b c h w


class DiTDH(DiTBase):
    """DiT with a wide head: a deep backbone conditions, token by token, a shallow head. # [L6]

    in_channels, grid, num_classes, class_dropout: see DiTBase. width, depth, heads: of the
    backbone. head_width, head_depth, head_heads: of the head; head_width at least in_channels
    (Theorem 1).
    forward: as DiT. Raises ValueError if a width is no multiple of 4 x its heads.
    Source: [RAE] section 5, [DDT]. As released: SiLU twice on the condition, no fixed positions in
        the head; for text the time is not added again before the head. [Scale-RAE]'s code swaps the
        names of the two embedders; no such weights are published.
    """
    def __init__(self, in_channels, grid, width, depth, heads, head_width, head_depth, head_heads,
                 num_classes, class_dropout=0.1):
        check_heads(width, heads, "--width", "--heads", multiple=4)
        check_heads(head_width, head_heads, "--head_width", "--head_heads", multiple=4)
        super().__init__(in_channels, grid, width, num_classes, class_dropout)
        self.depth = depth
        self.s_embedder = TokenEmbed(in_channels, width)
        self.x_embedder = TokenEmbed(in_channels, head_width)
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.enc_feat_rope = RoPE(width // heads, grid)
        self.dec_feat_rope = RoPE(head_width // head_heads, grid)
        backbone = [Block(width, heads) for _ in range(depth)]
        head = [Block(head_width, head_heads) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(backbone + head)            # one list, as in the release
        self.final_layer = FinalLayer(head_width, in_channels, "--head_width")
        if self.reads_text:
            self.initialise([nn.Linear, nn.Conv2d])
        else:
            self.initialise([nn.Conv2d])        # as released: linear layers keep PyTorch's default

    def forward(self, x_t, t, y):                                       # b c h w, b, b or b n d
        time = self.t_embedder(t)[:, None]                              # b 1 d
        cond = F.silu(time + self.y_embedder(y))                        # b 1|n d
        s = self.s_embedder(x_t) + self.pos_embed                       # b n d
        for block in self.blocks[:self.depth]:
            s = run_block(self, block, s, cond, self.enc_feat_rope)     # b n d
        if not self.reads_text:
            s = time + s                                                # b n d
        s = self.s_projector(F.silu(s))                                 # b n e
        x = self.x_embedder(x_t).float()                                # b n e: sums stay in fp32
        for block in self.blocks[self.depth:]:
            x = run_block(self, block, x, s, self.dec_feat_rope)        # b n e
        return self.velocity(self.final_layer(x, s), x_t, t)            # b c h w


# ------------------------------------------------------------------------------ flow matching
def time_shift(t, dim, base=4096):                                      # [L7]
    """Shift times in [0,1] towards noise, the more, the more dimensions (tokens x channels) there
    are.

    Noise hides high-dimensional latents less, as their dimensions repeat each other.
    Source: [RAE] eq 5, [SD3].
    """
    a = math.sqrt(dim / base)
    # t' = a t / (1 + (a-1) t)
    return a * t / (1 + (a - 1) * t)


TIME_LAWS = ("logit_normal", "uniform")


def sample_times(n, law, dim, base, device=None):                       # [L8]
    """n training times in [0,1], drawn by a law of TIME_LAWS and shifted for `dim` dimensions."""
    if law == "logit_normal":
        t = torch.randn(n, device=device).sigmoid()
    elif law == "uniform":
        t = torch.rand(n, device=device)
    else:
        raise ValueError(f"unknown law of t {law!r}; give one of {', '.join(TIME_LAWS)}")
    return time_shift(t, dim, base)


def flow_matching_loss(model, x0, y, t, eps):                           # [L9]
    """Squared error of the predicted velocity, a mean for each sample: b.

    model: (x_t b c h w, t b, y) -> velocity b c h w. x0: latents b c h w. y: condition.
    t: times b in [0,1]. eps: standard normal noise b c h w. Source: [RAE] section 2
    """
    time = t.view(-1, 1, 1, 1)                                          # b 1 1 1
    x_t = (1 - time) * x0 + time * eps                                  # b c h w
    v = eps - x0                                                        # b c h w
    return (model(x_t, t, y) - v).square().flatten(1).mean(1)           # b


def time_weight(t):                                                     # [L10]
    """Weight of the loss at times t b of a model that predicts x0: b.

    The error of its velocity grows like 1 / (t (1-t))^2 towards both ends: near data it is that of
    x0 divided by t, near noise x0 can only be guessed. This weight makes all times count alike,
    where the ends would drown the rest. With the 10, the weighted loss of the shipped model is
    about 0.1 at all times.
    """
    return (10 * t * (1 - t)).square()


# ------------------------------------------------------------------------------ building
def build_decoder(flags, channels, grid):
    """A Decoder from a dict with decoder_patch, decoder_width, decoder_depth, decoder_heads,
    decoder_mlp.
    """
    return Decoder(channels, grid, flags["decoder_patch"], flags["decoder_width"],
                   flags["decoder_depth"], flags["decoder_heads"], flags["decoder_mlp"])


def build_dit(flags, channels, grid, num_classes):
    """A DiT for head_width 0, else a DiTDH, from a dict of train_dit's flags, as checkpoints hold
    them.
    """
    backbone = (flags["width"], flags["depth"], flags["heads"])
    if flags["head_width"]:
        head = (flags["head_width"], flags["head_depth"], flags["head_heads"])
        model = DiTDH(channels, grid, *backbone, *head, num_classes, flags["class_dropout"])
    else:
        model = DiT(channels, grid, *backbone, num_classes, flags["class_dropout"])
    model.shift_base = flags.get("shift_base", 4096)
    model.prediction = flags.get("prediction", "v")
    return model
