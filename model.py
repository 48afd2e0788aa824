"""Representation autoencoders and the diffusion transformers that generate in their latent space.

Image -> frozen Encoder -> latents (b c h w) -> Decoder -> image; DiT or DiTDH draws new latents from noise.
arXiv: [RAE] 2510.11690, [LightningDiT] 2501.01423, [DDT] 2504.05741, [MAE] 2111.06377, [SD3] 2403.03206.

Shapes: b batch, h w latent grid, n = h*w tokens, c latent channels, d width, e head width, p patch side,
    k attention heads, dh = d/k head dimension, H W image height and width.
Time runs from data (t=0) to noise (t=1): x_t = (1-t)*x0 + t*eps, and the model predicts v = eps - x0.
"""
import contextlib
import math
import re
import warnings
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed, apply_rot_embed, build_rotary_pos_embed, build_sincos2d_pos_embed
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import normalize

import runtime

HERE = Path(__file__).resolve().parent
IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# name: (timm model, default side of its images in pixels, pixel mean and std)        Source: [RAE] section 3
ENCODERS = {
    "tiny": (None, 64, HALF),
    "dinov2-s": ("vit_small_patch14_reg4_dinov2.lvd142m", 256, IMAGENET),
    "dinov2-b": ("vit_base_patch14_reg4_dinov2.lvd142m", 256, IMAGENET),
    "dinov2-l": ("vit_large_patch14_reg4_dinov2.lvd142m", 256, IMAGENET),
    "siglip2-b": ("vit_base_patch16_siglip_256.v2_webli", 256, HALF),
    "siglip2-so400m": ("vit_so400m_patch14_siglip_224.v2_webli", 256, HALF),
    "mae-b": ("vit_base_patch16_224.mae", 256, IMAGENET),
    "webssl-l": ("vit_large_patch14_dinov2.webssl", 256, IMAGENET),     # not in timm: read_webssl
    "random": ("random", 64, HALF)}                                     # tiny's layout, never trained
WEBSSL = "facebook/webssl-dino300m-full2b-224"
# The shipped encoder (assets/make_tiny_encoder.py): 16 tokens x 192 channels. No CLS token, as in SigLIP.
TINY = dict(img_size=64, patch_size=16, embed_dim=192, depth=5, num_heads=4, class_token=False,
            global_pool="", num_classes=0)

# Named sizes set the flags of the training scripts; every DiTDH has the same head.   Source: [RAE] appendix
HEADS = {"DiT": dict(head_width=0), "DiTDH": dict(head_width=2048, head_depth=2, head_heads=16)}
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DIT_SIZES = {f"{family}-{size}": dict(width=width, depth=depth, heads=heads, **head)
             for family, head in HEADS.items() for size, (width, depth, heads) in DIT_SIZES.items()}
DECODER_SIZES = {                                       # XL keeps MLP 4096 (3.56 x), as its released weights
    size: dict(zip(("decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp"), numbers))
    for size, numbers in {"tiny": (192, 2, 4, 768), "B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096),
                          "XL": (1152, 28, 16, 4096)}.items()}
# Text-to-image; the release calls 3.1B 3.3B. The 21 heads of the wide head are our choice: none published.
T2I_SIZES = {size: dict(width=width, depth=16 if size == "0.5B" else 32, heads=32) for size, width in
             {"0.5B": 1280, "2.4B": 2048, "3.1B": 2304, "5.5B": 3072, "9.8B": 4096}.items()}
T2I_HEAD = dict(head_width=2688, head_depth=2, head_heads=21)           # Source: arXiv 2601.16208, table 10

# Official weights over DINOv2-B with decoder XL: image side, hub folders of decoder, statistics, DiTDH-XL and
# its weak guide, a DiTDH-S, scale of AutoGuidance.        Source: configs/stage2/sampling of bytetriper/RAE
HUB = "nyu-visionx/RAE-collections"
RELEASES = {"imagenet256": (256, "ViTXL_n08", "imagenet1k", "DiTDH-XL", "DiTDH-S_ep14", 1.42),
            "imagenet512": (512, "ViTXL_n08_i512", "imagenet1k_512", "DiTDH-XL_ep400", "DiTDH-S_ep20", 1.5)}
T2I_RELEASES = {"scale-rae-1.5b": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B",        # of train_t2i.py
                "scale-rae-7b": "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B"}
DECODER_HUB = "nyu-visionx/siglip2_decoder"


@contextlib.contextmanager
def fetching(what, advice):                  # what fails inside (hub, ssl, files) raises FileNotFoundError
    try:
        yield
    except Exception as error:
        raise FileNotFoundError(f"{what}: no download ({type(error).__name__}); {advice}") from error


# ------------------------------------------------------------------------------ encoder
def pixel_statistics(name):
    """Pixel mean and standard deviation (two triples in [0,1] units) that encoder `name` was trained with."""
    if name in ENCODERS or re.fullmatch(r"pixel(:[1-9]\d*)?|vae(:[1-9]\d*){2}|vae|diffusers:.+", name):
        return ENCODERS.get(name, (HALF,))[-1]
    if not timm.models.is_model_in_modules(name.split(".")[0], ["vision_transformer", "deit", "eva", "beit"]):
        raise ValueError(f"--encoder {name} is neither one of {' '.join(ENCODERS)} nor a ViT of timm's "
                         f"modules vision_transformer, deit, eva, beit: timm.list_models(module='eva')")
    with fetching(f"--encoder {name}", "timm has no weights of that name: timm.list_pretrained()"):
        config = timm.get_pretrained_cfg(name)
        return config.mean, config.std


class Pixels(nn.Module):
    """No encoder: a patch's pixels are its token. forward_features: b 3 H W -> b n 3*patch*patch."""
    num_prefix_tokens = 0

    def __init__(self, patch):
        super().__init__()
        self.patch, self.embed_dim = patch, 3 * patch * patch

    def forward_features(self, x):
        return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)


class VAE(nn.Module):
    """A small ViT that is trained together with the decoder, to a mean and a log-variance of each latent.

    forward_features: b 3 H W -> means b n c; posterior: both.                       Source: arXiv 1312.6114
    """
    num_prefix_tokens = 0

    def __init__(self, channels, patch, side):
        super().__init__()
        self.embed_dim = channels
        self.vit = timm.models.VisionTransformer(**{**TINY, "img_size": side, "patch_size": patch})
        self.moments = nn.Linear(self.vit.embed_dim, 2 * channels)

    def posterior(self, x):
        mean, logvar = self.moments(self.vit.forward_features(x)).float().chunk(2, -1)      # b n c
        return mean, logvar.clamp(-30, 20)

    def forward_features(self, x):
        return self.posterior(x)[0]


class DiffusersVAE(nn.Module):
    """AutoencoderKL of diffusers, a folder or a hub's name: Stable Diffusion's, FLUX's. Posterior means."""
    num_prefix_tokens = 0

    def __init__(self, source):
        super().__init__()
        with fetching(f"--encoder diffusers:{source}", "pip install diffusers, and connect or name a folder "
                      "with its config.json and diffusion_pytorch_model.safetensors"):
            from diffusers import AutoencoderKL
            source, folder = source.removesuffix("/vae"), "vae" * source.endswith("/vae")   # of a pipeline
            self.vae = AutoencoderKL.from_pretrained(source, subfolder=folder)
        self.embed_dim = self.vae.config.latent_channels
        self.patch_size = [2 ** (len(self.vae.config.block_out_channels) - 1)]

    def forward_features(self, x):
        return rearrange(self.vae.encode(x).latent_dist.mode(), "b c h w -> b (h w) c")


class Encoder(nn.Module):
    """A frozen vision transformer whose final tokens are the latents, or what papers compare it with.

    name: a key of ENCODERS, any timm ViT, pixel:PATCH (its pixels), vae:CHANNELS:PATCH (to be trained) or
        diffusers:SOURCE (an AutoencoderKL). image_size: side of its images, pixels (default: ENCODERS, 64 for
        pixel and vae, else 256); patch-14 ViTs see 14/16 of it: 256 px give the 16 x 16 grid of patch 16.
    Attributes: channels c, grid (tokens per side), mean, std (of pixels), backbone, trainable (a VAE).
    Raises: ValueError (unknown name, size no multiple of patch), FileNotFoundError (no weights, no network).
    Source: [RAE] section 3.1: no CLS and registers, final LayerNorm without affine: each token has mean 0 and
        variance 1 over its channels. Images are resized bicubically without antialias, as in the release.
    """
    def __init__(self, name, image_size=None):
        super().__init__()
        self.mean, self.std = pixel_statistics(name)
        kind, _, rest = name.partition(":")
        timm_name, side, _ = ENCODERS.get(name, (name, 64 if kind in ("pixel", "vae") else 256, None))
        self.name, self.image_size, self.trainable = name, image_size or side, kind == "vae"
        self.backbone = DiffusersVAE(rest) if kind == "diffusers" else None
        numbers = [int(x) for x in rest.split(":") if x.isdigit()] or [16, 8]
        known = {"tiny": 16, "random": 16, "webssl-l": 14, "pixel": numbers[0], "vae": numbers[-1]}
        patch = known[kind] if kind in known else \
            (self.backbone or timm.create_model(timm_name, depth=0).patch_embed).patch_size[0]
        stride = 16 if patch == 14 and kind == name else patch
        self.grid, self.input_size = self.image_size // stride, self.image_size * patch // stride
        if self.image_size % stride:
            raise ValueError(f"--size {self.image_size} must be a multiple of {stride} for --encoder {name}; "
                             f"try --size {max(stride, self.image_size // stride * stride)}")
        if kind in ("pixel", "vae"):
            self.backbone = Pixels(patch) if kind == "pixel" else VAE(numbers[0], patch, self.image_size)
        elif kind != "diffusers":
            self.backbone = load_vit(timm_name, self.input_size)
            self.backbone.norm = nn.LayerNorm(self.backbone.embed_dim, eps=1e-6, elementwise_affine=False)
        self.channels = self.backbone.embed_dim
        self.requires_grad_(False).eval()

    def train(self, mode=True):                  # frozen: dropout and drop path stay off in any training loop
        return super().train(False)

    def pixels(self, images):         # b 3 H W in [0,1] -> as the backbone wants them
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, size=(self.input_size, self.input_size), mode="bicubic")
        return normalize(images, self.mean, self.std)

    @torch.no_grad()
    def encode(self, images):         # b 3 H W in [0,1] -> b c h w, not by an RAE's statistics yet
        x = self.backbone.forward_features(self.pixels(images))         # b prefix+n c
        x = x[:, self.backbone.num_prefix_tokens:]                      # b n c
        return rearrange(x, "b (h w) c -> b c h w", h=self.grid)


def load_vit(name, size):
    """timm's ViT `name`, None: TINY, with its weights, its position table resampled to `size` pixels."""
    if name in (None, "random"):
        with torch.random.fork_rng([], name is not None):   # the random one is always the same
            name and torch.manual_seed(0)
            vit = timm.models.VisionTransformer(**TINY)
        vit.norm = nn.Identity()                                        # its file has no affine at all
        if name is None:
            load_release(vit, HERE / "assets" / "tiny_encoder.safetensors")
        vit.set_input_size(size)
        return vit
    if name.endswith(".webssl"):
        return read_webssl(timm.create_model(name[:-7], num_classes=0, img_size=size))
    local = HERE / "weights" / f"{name}.safetensors"            # a file placed by hand wins over the download
    how = {"act_layer": "gelu_tanh"} if "siglip" in name else {} if ".mae" in name else {"img_size": size}
    with fetching("no weights", f"put model.safetensors of hf.co/timm/{name} at weights/{local.name}"):
        vit = timm.create_model(name, pretrained=True, num_classes=0, **how,    # SigLIP trained with tanh
                                pretrained_cfg_overlay=dict(file=str(local)) if local.exists() else None)
    if "img_size" not in how:           # in the release DINOv2's table is antialiased, SigLIP's and MAE's not
        vit.patch_embed.set_input_size(img_size=size)
        vit.pos_embed.data = timm.layers.resample_abs_pos_embed(
            vit.pos_embed, vit.patch_embed.grid_size, None, vit.num_prefix_tokens, antialias=False)
    return vit


def read_webssl(vit):
    """Weights of WebSSL's DINO, in transformers' names, into timm's ViT of the same layout."""
    local = HERE / "weights" / "webssl-l.safetensors"
    with fetching("no weights", f"put model.safetensors of huggingface.co/{WEBSSL} at weights/{local.name}"):
        path = local if local.exists() else huggingface_hub.hf_hub_download(WEBSSL, "model.safetensors")
    state = {k: v for k, v in runtime.load_checkpoint(path).items() if "mask_token" not in k}
    for old, new in (("patch_embeddings.projection", "patch_embed.proj"), ("embeddings.position_", "pos_"),
                     ("pos_embeddings", "pos_embed"), ("embeddings.", ""), ("encoder.layer.", "blocks."),
                     (".attention.attention.", ".attn."), (".attention.output.dense", ".attn.proj"),
                     ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
                     ("layernorm.", "norm.")):
        state = {k.replace(old, new): v for k, v in state.items()}
    for k in [k for k in state if ".attn.query." in k]:                 # timm: one matrix
        parts = [state.pop(k.replace("query", part)) for part in ("query", "key", "value")]
        state[k.replace("query", "qkv")] = torch.cat(parts)
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], vit.patch_embed.grid_size, None, vit.num_prefix_tokens, antialias=True)
    return load_strict(vit, state, path)


# ------------------------------------------------------------------------------ decoder and RAE
def sincos_2d(d, grid):
    """Fixed sin-cos positions, (grid*grid, d): first half of d for the column, second for the row. [MAE]"""
    return build_sincos2d_pos_embed((grid, grid), d, interleave_sin_cos=True).roll(d // 2, 1)


def require_heads(width, heads, width_flag, heads_flag, multiple=1):
    """Raise ValueError unless heads divide width / multiple; 4 for rotary positions, pairs on two axes."""
    if width < 1 or width % (step := heads * multiple):
        raise ValueError(f"{width_flag} {width} must be a multiple of {heads_flag} {heads} x {multiple}; "
                         f"try {width_flag} {max(round(width / step), 1) * step}")


class DecoderLayer(nn.Module):
    """Pre-LN transformer layer; parameter names and LN eps 1e-12 of the released decoder (HF ViT-MAE)."""
    def __init__(self, d, heads, mlp):
        super().__init__()
        self.heads = heads
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(d, eps=1e-12), nn.LayerNorm(d, eps=1e-12)
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.proj, self.fc1, self.fc2 = nn.Linear(d, d), nn.Linear(d, mlp), nn.Linear(mlp, d)

    def forward(self, x):                                               # b n d
        a = self.layernorm_before(x)                                    # b n d
        q, k, v = (rearrange(f(a), "b n (k d) -> b k n d", k=self.heads)
                   for f in (self.query, self.key, self.value))
        a = rearrange(F.scaled_dot_product_attention(q, k, v), "b k n d -> b n (k d)")
        x = x + self.proj(a)                                            # b n d
        return x + self.fc2(F.gelu(self.fc1(self.layernorm_after(x))))  # b n d


class Decoder(nn.Module):
    """ViT decoder from latents to pixels.

    latent_channels: c. grid: tokens per side. patch: pixels per token side (2 x the encoder's upsamples).
    width, depth, heads, mlp: DECODER_SIZES has the paper's. forward: z b c h w (NOT normalised by dataset
        statistics; another grid is resized bilinearly) -> b 3 H W in the encoder's pixel normalisation.
    Source: [RAE] section 3.2; layout of [MAE] with a learned CLS token in front and fixed sin-cos positions.
    """
    def __init__(self, latent_channels, grid, patch, width, depth, heads, mlp):
        super().__init__()
        require_heads(width, heads, "--decoder_width", "--decoder_heads")
        self.grid, self.patch, self.checkpoint = grid, patch, False
        self.decoder_embed = nn.Linear(latent_channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(self.positions(), requires_grad=False)
        self.decoder_layers = nn.Sequential(*(DecoderLayer(width, heads, mlp) for _ in range(depth)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch * patch)

    def positions(self):                                                # 1 1+n d, zero for the CLS token
        return F.pad(sincos_2d(self.decoder_embed.out_features, self.grid), (0, 0, 1, 0))[None]

    def forward(self, z):                                               # b c h w -> b 3 H W
        return self.pixels(self.tokens(z))

    def tokens(self, z):                                                # b c h w
        x = self.decoder_embed(rearrange(z, "b c h w -> b h w c"))      # b h w d
        if x.shape[1:3] != (self.grid, self.grid):
            x = F.interpolate(x.movedim(3, 1), size=(self.grid, self.grid), mode="bilinear").movedim(1, 3)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)  # b 1+n d
        x = x + self.decoder_pos_embed                                  # b 1+n d
        for layer in self.decoder_layers:                               # b 1+n d
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoint and self.training else layer(x)
        return x

    def pixels(self, x):                                                # b 1+n d
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()      # b n p*p*3
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch)


class RAE(nn.Module):
    """Frozen encoder + trained decoder + statistics of the latents over a dataset.

    encoder: an Encoder, or only its name: then the RAE decodes without ever loading the encoder.
    latent_mean, latent_var: c h w each, or None (0 and 1). The released DINOv2-B has no mean: pass None.
    encode: images b 3 H W in [0,1] -> latents b c h w, (z - mean) / sqrt(var + 1e-5): each of unit variance.
    decode: latents b c h w -> images b 3 H W in [0,1], clamped.         Source: [RAE] section 3.1 and release
    """
    def __init__(self, encoder, decoder, latent_mean=None, latent_var=None):
        super().__init__()
        self.encoder, self.decoder = encoder if isinstance(encoder, nn.Module) else None, decoder
        mean, std = pixel_statistics(encoder) if self.encoder is None else (encoder.mean, encoder.std)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
        self.normalise_by(latent_mean, latent_var)

    def normalise_by(self, mean, var):                                  # c h w each, or None -> self
        shape = (self.decoder.decoder_embed.in_features, self.decoder.grid, self.decoder.grid)
        if wrong := [tuple(x.shape) for x in (mean, var) if x is not None and x.shape != shape]:
            raise ValueError(f"latent statistics of shape {wrong[0]} are not of this decoder's latents, "
                             f"{shape}; give those of the same encoder and image size")
        self.register_buffer("latent_mean", torch.zeros(1) if mean is None else mean.float())
        self.register_buffer("latent_std", torch.ones(1) if var is None else (var.float() + 1e-5).sqrt())
        return self.to(self.pixel_mean.device)

    @torch.no_grad()
    def encode(self, images):                                           # b 3 H W -> b c h w
        if self.encoder is None:
            raise ValueError("this RAE only decodes: its encoder is a name; pass Encoder(name) to encode")
        return (self.encoder.encode(images) - self.latent_mean) / self.latent_std

    def decode(self, latents):                                          # b c h w -> b 3 H W
        pixels = self.decoder(latents * self.latent_std + self.latent_mean)
        return (pixels * self.pixel_std + self.pixel_mean).clamp(0, 1)


# ------------------------------------------------------------------------------ diffusion transformers
class RoPE(nn.Module):
    """Rotary positions: adjacent pairs turn by row (first half of head) or column. [LightningDiT], EVA-02"""
    def __init__(self, head_dim, grid):
        super().__init__()
        sin, cos = build_rotary_pos_embed((grid, grid), dim=head_dim, in_pixels=False)  # n dh each
        self.register_buffer("freqs_cos", cos)                          # in the state dict, as in the release
        self.register_buffer("freqs_sin", sin)

    def forward(self, x):                                               # b k n dh
        return apply_rot_embed(x, self.freqs_sin, self.freqs_cos).to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU with adaLN: shift, scale, gate from c, one per image (b 1 d) or token (b n d)."""
    def __init__(self, d, heads):
        super().__init__()
        hidden = int(2 / 3 * int(4 * d))   # not rounded to a friendlier multiple: the released weights are so
        self.heads, self.norm1 = heads, nn.RMSNorm(d, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.norm2 = nn.RMSNorm(d, eps=1e-6)
        self.mlp = nn.ModuleDict({"w12": nn.Linear(d, 2 * hidden), "w3": nn.Linear(hidden, d)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, c, rope):                                      # x: b n d, c: b 1|n d
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        a = self.attn["qkv"](torch.addcmul(shift1, self.norm1(x), 1 + scale1))          # b n 3*d
        q, k, v = rearrange(a, "b n (three k d) -> three b k n d", three=3, k=self.heads)
        a = F.scaled_dot_product_attention(rope(q), rope(k), v)         # b k n dh
        x = x + gate1 * self.attn["proj"](rearrange(a, "b k n d -> b n (k d)"))         # b n d
        a = self.mlp["w12"](torch.addcmul(shift2, self.norm2(x), 1 + scale2))           # b n 2*hidden
        gate, a = a.chunk(2, -1)                                        # b n hidden
        return x + gate2 * self.mlp["w3"](F.silu(gate) * a)             # b n d


class FinalLayer(nn.Module):
    """adaLN and a linear map from d to the latent channels; flag: the name of d in the warning."""
    def __init__(self, d, channels, flag):
        super().__init__()
        if d < channels:
            warnings.warn(f"{flag} {d} is below the {channels} latent channels: by Theorem 1 of arXiv "
                          f"2510.11690 the loss stays above the sum of the eigenvalues of Cov(eps - x0) from "
                          f"the {d + 1}th on; try {flag} {channels} or more", stacklevel=3)
        self.norm_final, self.linear = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x, c):                                            # x: b n d, c: b 1|n d
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))  # b n c


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of t in [0,1] (not x 1000), W fixed and random, then an MLP; always fp32."""
    def __init__(self, d, features=256):
        super().__init__()
        self.W = nn.Parameter(torch.randn(features), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * features, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, t):                                               # b
        with torch.autocast(t.device.type, enabled=False):
            angle = 2 * math.pi * t.float()[:, None] * self.W           # b 256
            return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))  # b d


class LabelEmbedding(nn.Module):
    """Class table, last row the null class; in training a label becomes null with probability `dropout`."""
    def __init__(self, num_classes, d, dropout):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + 1, d)

    def forward(self, y):                                               # b
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(len(y), device=y.device) < self.dropout, self.num_classes, y)
        return self.embedding_table(y)[:, None]                         # b 1 d


class ConditionEmbedding(nn.Module):
    """Conditions as they are; in training, with probability `dropout`, a sample's all become the null one."""
    def __init__(self, d, dropout):
        super().__init__()
        self.dropout, self.dropout_embedding = dropout, nn.Parameter(torch.zeros(d))

    def forward(self, y):                                               # b n d
        if self.training:               # even with dropout 0, so that dropout_embedding always has a gradient
            drop = torch.rand(len(y), 1, 1, device=y.device) < self.dropout             # b 1 1
            y = torch.where(drop, self.dropout_embedding, y)            # b n d
        return y


class DiT(nn.Module):
    """LightningDiT on one token per latent position.

    in_channels: c. grid: tokens per side. width, depth, heads: of the blocks. num_classes: without the null,
        or None: conditioned on text, with SiLU twice on the condition, as Scale-RAE (arXiv 2601.16208).
    class_dropout: probability in [0,1] that training replaces a sample's condition by the null one.
    forward: x_t b c h w, t b in [0,1], y b int64 in [0, num_classes] (text: b n d) -> velocity b c h w.
    shift_base: the n of the time shift sqrt(m/n) that it is trained and sampled with, 4096 unless set.
    prediction: of the final layer: "v" as in the papers, or "x0", of which forward makes the velocity
        (x - x0) / t (arXiv 2511.13720: data of few dimensions are easier to predict than noise of many).
    checkpoint: True: training keeps no activations inside blocks, and computes them again going backward.
    Raises ValueError if width does not split into heads; warns if it is below c: Theorem 1 of [RAE].
    Source: [RAE] section 4, [LightningDiT]: RMSNorm, SwiGLU, RoPE, adaLN-zero, fixed absolute positions.
    """
    shift_base, prediction, checkpoint, head = 4096, "v", False, None

    def __init__(self, in_channels, grid, width, depth, heads, num_classes, class_dropout=0.1):
        super().__init__()
        self.in_channels, self.grid, self.num_classes, self.depth = in_channels, grid, num_classes, depth
        require_heads(width, heads, "--width", "--heads", multiple=4)
        self.text = num_classes is None
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = ConditionEmbedding(width, class_dropout) if self.text else \
            LabelEmbedding(num_classes, width, class_dropout)
        self.pos_embed = nn.Parameter(sincos_2d(width, grid)[None], requires_grad=False)
        e, head_depth, k = self.head or (width, 0, heads)
        if self.head:
            self.s_embedder, self.x_embedder = (PatchEmbed(None, 1, in_channels, d) for d in (width, e))
            self.s_projector = nn.Linear(width, e) if width != e else nn.Identity()
            self.enc_feat_rope, self.dec_feat_rope = RoPE(width // heads, grid), RoPE(e // k, grid)
        else:
            self.x_embedder, self.feat_rope = PatchEmbed(None, 1, in_channels, e), RoPE(e // k, grid)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)]
                                    + [Block(e, k) for _ in range(head_depth)])
        self.final_layer = FinalLayer(e, in_channels, "--head_width" if self.head else "--width")
        kinds = (nn.Conv2d,) if self.head and not self.text else (nn.Linear, nn.Conv2d)  # as in the releases
        for layer in [m for kind in kinds for m in self.modules() if isinstance(m, kind)]:
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(layer.bias)
        for embedder in (*self.y_embedder.children(), self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedder.weight, std=0.02)
        for name, p in self.named_parameters():
            if "adaLN" in name or "final_layer.linear" in name:  # blocks start as the identity, output as 0
                nn.init.zeros_(p)

    def null(self, y):                       # b, or b n d for text: the null condition in the shape of y
        return torch.zeros_like(y) + (self.y_embedder.dropout_embedding if self.text else self.num_classes)

    def run(self, blocks, x, c, rope):                                  # x: b n d, c: b 1|n d -> b n d
        for block in blocks:
            x = checkpoint(block, x, c, rope, use_reentrant=False) if self.checkpoint and self.training \
                else block(x, c, rope)
        return x

    def forward(self, noisy, t, y):                                     # b c h w, b, b or b n d
        c = self.t_embedder(t)[:, None] + self.y_embedder(y)            # b 1|n d
        c = F.silu(c) if self.text else c                               # b 1|n d
        x = self.x_embedder(noisy) + self.pos_embed                     # b n d
        x = self.run(self.blocks, x, c, self.feat_rope)                 # b n d
        return self.velocity(self.final_layer(x, c), noisy, t)          # b c h w

    def velocity(self, out, x, t):                                      # out: b n c, x: b c h w, t: b
        out = rearrange(out.float(), "b (h w) c -> b c h w", h=self.grid)
        return out if self.prediction == "v" else (x - out) / t.clamp(min=0.05).view(-1, 1, 1, 1)  # no 0 / 0


class DiTDH(DiT):
    """DiT with a wide head: a backbone of `width` conditions, token by token, a shallow head of `head_width`.

    Arguments and forward as DiT, with head_width (at least in_channels: Theorem 1), head_depth, head_heads.
    Source: [RAE] section 5, [DDT]; as released: SiLU twice on the condition, no fixed positions in the head,
        nor time for text: Scale-RAE, whose code (no weights are out) swaps the names of the two embedders.
    """
    def __init__(self, in_channels, grid, width, depth, heads, head_width, head_depth, head_heads,
                 num_classes, class_dropout=0.1):
        require_heads(head_width, head_heads, "--head_width", "--head_heads", multiple=4)
        self.head = (head_width, head_depth, head_heads)
        super().__init__(in_channels, grid, width, depth, heads, num_classes, class_dropout)

    def forward(self, noisy, t, y):                                     # b c h w, b, b or b n d
        time = self.t_embedder(t)[:, None]                              # b 1 d
        c = F.silu(time + self.y_embedder(y))                           # b 1|n d
        s = self.s_embedder(noisy) + self.pos_embed                     # b n d
        s = self.run(self.blocks[:self.depth], s, c, self.enc_feat_rope)                # b n d
        s = self.s_projector(F.silu(s if self.text else time + s))      # b n e
        x = self.x_embedder(noisy).float()                              # b n e: sums stay in fp32
        x = self.run(self.blocks[self.depth:], x, s, self.dec_feat_rope)                # b n e
        return self.velocity(self.final_layer(x, s), noisy, t)          # b c h w


# ------------------------------------------------------------------------------ flow matching
def time_shift(t, dim, base=4096):
    """t' = a*t / (1 + (a-1)*t), a = sqrt(dim/base), dim = tokens x channels, t in [0,1]. [RAE] eq 5, [SD3]"""
    a = math.sqrt(dim / base)
    return a * t / (1 + (a - 1) * t)


def flow_matching_loss(model, x0, y, t, eps):                           # x0, eps: b c h w, t: b in [0,1]
    """Squared error of v = model(x_t b c h w, t b, y), a mean per sample: b. eps: N(0,1). [RAE] section 2"""
    at = t.view(-1, 1, 1, 1)                                            # b 1 1 1
    x_t = (1 - at) * x0 + at * eps                                      # b c h w
    return (model(x_t, t, y) - (eps - x0)).square().flatten(1).mean(1)  # b


# ------------------------------------------------------------------------------ building and loading
def build_decoder(args, channels, grid):
    """Decoder; args is the dict of train_decoder's flags, or the `rae` of a checkpoint."""
    return Decoder(channels, grid, *(args[f"decoder_{k}"] for k in "patch width depth heads mlp".split()))


def build_dit(args, channels, grid, num_classes):
    """DiT for head_width 0, else DiTDH; args is the dict of train_dit's flags, as in its checkpoints."""
    head = [args[k] for k in ("head_width", "head_depth", "head_heads")] if args["head_width"] else []
    model = (DiTDH if head else DiT)(channels, grid, args["width"], args["depth"], args["heads"], *head,
                                     num_classes, args["class_dropout"])
    model.shift_base, model.prediction = args.get("shift_base", 4096), args.get("prediction", "v")
    return model


def load_strict(module, state, source):
    """load_state_dict that takes all or nothing, and lists what is missing, unexpected or misshapen."""
    own, given = ({k: tuple(getattr(v, "shape", "none")) for k, v in weights.items()}
                  for weights in (module.state_dict(), state))
    bad = [f"missing {k}" for k in own if k not in given] + [f"unexpected {k}" for k in given if k not in own]
    bad += [f"{k}: shape {given[k]}, the model has {own[k]}" for k in own if given.get(k, own[k]) != own[k]]
    if bad:
        raise ValueError(f"{source} does not fit {type(module).__name__}; build it with the flags it was "
                         f"trained with, or mend the file. {len(bad)} keys:\n  " + "\n  ".join(bad[:20]))
    module.load_state_dict(state)
    return module


def load_release(module, path_or_state, source="the given state"):
    """Load weights strictly, ours or those of the official releases, told apart by their layout.

    module: DiT, DiTDH or Decoder; an RAE takes the latent statistics of a stat.pt or checkpoint; of Scale-RAE
        a DiT, or a module of llm, mm_projector, latent_queries, diff_head_projector and dit.
    path_or_state: a file of torch.save or safetensors or its dict, bare or in ema, model, module, state_dict.
    Raises: ValueError listing missing, unexpected and misshapen keys; or if the file can't be read safely.
    """
    state = path_or_state
    if not isinstance(state, dict):
        source, state = path_or_state, runtime.load_checkpoint(path_or_state)
    if isinstance(module, RAE):
        mean, var = (state.get("rae", state).get(k, state.get(k[7:])) for k in ("latent_mean", "latent_var"))
        if var is None:
            raise ValueError(f"{source} has no latent statistics (mean, var); give a stat.pt")
        return module.normalise_by(mean, var)
    wrappers = ("rae", "decoder") * isinstance(module, Decoder) + ("ema", "model", "module", "state_dict")
    while inner := [state[k] for k in wrappers if isinstance(state.get(k), dict)]:
        state = inner[0]
    state, renames = {str(k).removeprefix("module."): v for k, v in state.items()}, ()
    if isinstance(module, Decoder):                     # names of HF ViT-MAE and of diffusers' AutoencoderRAE
        mine = [k for k in state if k.startswith("decoder.")] or state  # without encoder.* and the like
        state = {k.removeprefix("decoder."): state[k] for k in mine}
        if any("attention.to_q" in k for k in state):   # diffusers doesn't store its table
            state.setdefault("decoder_pos_embed", module.positions())
        renames = (("attention.attention.", ""), ("attention.output.dense", "proj"), ("output.dense", "fc2"),
                   ("attention.to_q", "query"), ("attention.to_k", "key"), ("attention.to_v", "value"),
                   ("attention.to_out.0", "proj"), ("intermediate.dense", "fc1"))
    elif any(k.startswith("diff_head.") for k in state):                # Scale-RAE: whole, or of it the DiT
        dit, tied = "" if isinstance(module, DiT) else "dit.", "llm.lm_head.weight" not in module.state_dict()
        state = {k: v for k, v in state.items() if dit or k.startswith("diff_head.")}
        state.pop("lm_head.weight" * tied, None)
        state.setdefault("diff_head.model.t_embedder.W",                # the release draws it anew, the same
                         torch.randn(256, generator=torch.Generator().manual_seed(114514)))
        renames = (("diff_head.model.", dit), ("dit_blocks.", "blocks."), ("lm_head.", "model.lm_head."),
                   ("model.", "llm."), ("llm.mm_projector", "mm_projector"), ("llm.latent_q", "latent_q"))
    for old, new in renames:
        state = {k.replace(old, new): v for k, v in state.items()}
    return load_strict(module, state, source)


def load_official(name, folder=None):
    """A release as the dict of a checkpoint of train_dit.py; the encoder's weights are not needed.

    name: a key of RELEASES; with "/guide" after it, its AutoGuidance model. folder: a copy of the hub
    repository; None: what is needed is downloaded, once.           Raises: FileNotFoundError, ValueError
    """
    release, guide = name.removesuffix("/guide"), name.endswith("/guide")
    side, decoder, stats, *dits, _ = RELEASES[release]
    files = [f"decoders/dinov2/wReg_base/{decoder}/model.pt", f"stats/dinov2/wReg_base/{stats}/stat.pt",
             f"DiTs/Dinov2/wReg_base/ImageNet{side}/{dits[guide]}/stage2_model.pt"]
    with fetching(release, f"connect, or copy huggingface.co/{HUB} to a folder: --release_dir FOLDER"):
        folder = folder or huggingface_hub.snapshot_download(HUB, allow_patterns=files)
    decoder, stats, dit = (runtime.load_checkpoint(Path(folder) / file) for file in files)
    mean, var, shape = stats.get("mean"), stats.get("var", torch.empty(0)), (768, side // 16, side // 16)
    if var.shape != shape or not (var > 0).all():
        raise ValueError(f"{files[1]} has statistics of shape {tuple(var.shape)}, {release} needs {shape}, "
                         f"all positive; copy the right one of huggingface.co/{HUB}")
    rae = dict(encoder="dinov2-b", size=side, **DECODER_SIZES["XL"], decoder_patch=16, decoder=decoder,
               latent_mean=torch.zeros_like(var) if mean is None else mean, latent_var=var)
    names = [name.split(",")[0] for name in map(timm.data.ImageNetInfo().index_to_description, range(1000))]
    args = dict(DIT_SIZES["DiTDH-S" if guide else "DiTDH-XL"], class_dropout=0.1)
    return dict(ema=dit, args=args, rae=rae, num_classes=1000, class_names=names, latent_shape=[*shape])


def unpack_rae(packed, encoder=True):
    """The RAE of a checkpoint's `rae`, in eval mode; encoder=False: it only decodes, no encoder is loaded."""
    with torch.device("meta"):                          # without memory: load_release needs every key anyway
        decoder = build_decoder(packed, *packed["latent_var"].shape[:2])
    load_release(decoder.to_empty(device="cpu"), packed["decoder"], "the RAE's decoder")
    encoder = Encoder(packed["encoder"], packed["size"]) if encoder else packed["encoder"]
    if "encoder_weights" in packed and isinstance(encoder, Encoder):    # of a VAE
        load_strict(encoder.backbone, packed["encoder_weights"], "the RAE's encoder")
    return RAE(encoder, decoder, packed["latent_mean"], packed["latent_var"]).requires_grad_(False).eval()


def revive(build, state, weights, source, device):    # the module of build() with these of a checkpoint's
    if weights not in state:
        raise ValueError(f"{source} holds no weights {weights}; use --weights ema")
    with torch.device("meta"):
        module = build()
    return load_release(module.to_empty(device=device), state[weights], source).requires_grad_(False).eval()


def load_dit(path, device="cpu", encoder=False, weights="ema", folder=None):
    """Frozen DiT, RAE (encoder=False: it only decodes; None: none) and dict of a checkpoint or a release."""
    official = str(path).removesuffix("/guide") in RELEASES
    state = load_official(str(path), folder) if official else runtime.load_checkpoint(path)
    if "llm" in state:
        raise ValueError(f"{path} is of text to image: for sample.py --prompt, eval_fid.py --shapes_eval")
    if "latent_shape" not in state:
        raise ValueError(f"{path} is no checkpoint of train_dit.py; give one of those")
    model = revive(lambda: build_dit(state["args"], *state["latent_shape"][:2], state["num_classes"]),
                   state, weights, path, device)
    return model, None if encoder is None else unpack_rae(state["rae"], encoder).to(device), state
