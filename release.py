"""Published weights: their names, files, layouts, and strict loading.

What the authors published on huggingface.co, as far as this file uses it:

    nyu-visionx/RAE-collections                                     arXiv 2510.11690
        decoders, statistics of latents, DiTs: the files in PUBLISHED_RAES and PUBLISHED_DITS
    nyu-visionx/siglip2_decoder                                     arXiv 2601.16208
        config.json, model.pt
    nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B, nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B
        config.json, tokenizer.json, model.safetensors.index.json and its shards

n08 in the name of a decoder: it was trained with noise of tau = 0.8 on its latents; ViTXL alone:
without noise.

Most names stand in configs/ of github.com/bytetriper/RAE (at a4d18c4) and in inference/cli.py of
github.com/ZitengWangNYU/Scale-RAE. Less certain are the other noise levels, DINOv2-S and DINOv2-L:
they are known from third parties' download scripts and from the names of diffusers' conversions.
There the file in ViTXL and ViTXL_n05 is dinov2_decoder.pt, and diffusers' converter takes that or
model.pt; hence *.pt below. None of the files was at hand: tests use small ones of the same layout.

Every file is taken from a local copy (`folder`, the flag --release_dir), or downloaded once.
"""
import difflib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

import saving
import sharding
import storage
from baselines import VAE, DiffusersVAE, Pixels, random_vit
from llm import Qwen2, Tokenizer
from model import (
    DECODER_SIZES,
    DIT_SIZES,
    HALF_PIXELS,
    IMAGENET_PIXELS,
    RAE,
    TINY_VIT,
    Decoder,
    DiT,
    DiTDH,
    Encoder,
    build_decoder,
    build_dit,
)
from storage import fetching

HERE = Path(__file__).resolve().parent
SHIPPED_ENCODER = HERE / "assets" / "tiny_encoder.safetensors"
SHIPPED_RAE = HERE / "assets" / "tiny_rae.safetensors"
SHIPPED_DIT = HERE / "assets" / "tiny_dit.safetensors"
SHIPPED_T2I = HERE / "assets" / "tiny_t2i.safetensors"

# ---------------------------------------------------------------------------- tables of names
# Encoders: model of timm (or our own), default side of the images in pixels, pixel mean and std.
#                                                           Source: arXiv 2510.11690, section 3
ENCODERS = {
    "tiny": ("tiny", 64, HALF_PIXELS),
    "dinov2-s": ("vit_small_patch14_reg4_dinov2.lvd142m", 256, IMAGENET_PIXELS),
    "dinov2-b": ("vit_base_patch14_reg4_dinov2.lvd142m", 256, IMAGENET_PIXELS),
    "dinov2-l": ("vit_large_patch14_reg4_dinov2.lvd142m", 256, IMAGENET_PIXELS),
    "siglip2-b": ("vit_base_patch16_siglip_256.v2_webli", 256, HALF_PIXELS),
    "siglip2-so400m": ("vit_so400m_patch14_siglip_224.v2_webli", 256, HALF_PIXELS),
    "mae-b": ("vit_base_patch16_224.mae", 256, IMAGENET_PIXELS),
    "webssl-l": ("webssl", 256, IMAGENET_PIXELS),           # not in timm, see load_webssl
    "random": ("random", 64, HALF_PIXELS),                  # tiny's layout, never trained
}
WEBSSL_HUB = "facebook/webssl-dino300m-full2b-224"
WEBSSL_LAYOUT = "vit_large_patch14_dinov2"                  # in timm

RAE_HUB = "nyu-visionx/RAE-collections"
SIGLIP2_HUB = "nyu-visionx/siglip2_decoder"


class PublishedRAE(NamedTuple):
    encoder: str                 # key of ENCODERS
    image_size: int              # pixels
    channels: int                # c of the latents, which have one token for each 16 x 16 pixels
    hub: str                     # repository
    decoder: str                 # file in it, or a pattern that one file fits
    statistics: str              # file in it; None: mean 0, variance 1


# A noise level other than that of the name alone, n08, follows after a colon.
PUBLISHED_RAES = {
    "dinov2-b": PublishedRAE(
        "dinov2-b", 256, 768, RAE_HUB, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b:n00": PublishedRAE(
        "dinov2-b", 256, 768, RAE_HUB, "decoders/dinov2/wReg_base/ViTXL/*.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b:n05": PublishedRAE(
        "dinov2-b", 256, 768, RAE_HUB, "decoders/dinov2/wReg_base/ViTXL_n05/*.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b:n10": PublishedRAE(
        "dinov2-b", 256, 768, RAE_HUB, "decoders/dinov2/wReg_base/ViTXL_n10/*.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b-512": PublishedRAE(
        "dinov2-b", 512, 768, RAE_HUB, "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
    "dinov2-s": PublishedRAE(
        "dinov2-s", 256, 384, RAE_HUB, "decoders/dinov2/wReg_small/ViTXL_n08/model.pt",
        "stats/dinov2/wReg_small/imagenet1k/stat.pt"),
    "dinov2-l": PublishedRAE(
        "dinov2-l", 256, 1024, RAE_HUB, "decoders/dinov2/wReg_large/ViTXL_n08/model.pt",
        "stats/dinov2/wReg_large/imagenet1k/stat.pt"),
    "mae-b": PublishedRAE(
        "mae-b", 256, 768, RAE_HUB, "decoders/mae/base_p16/ViTXL_n08/model.pt",
        "stats/mae/base_p16/ImageNet1k/stat.pt"),
    "siglip2-b": PublishedRAE(
        "siglip2-b", 256, 768, RAE_HUB, "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
        "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
    # Of Scale-RAE, trained without noise. Its patches of 14 pixels make images of 224.
    "siglip2-so400m": PublishedRAE(
        "siglip2-so400m", 256, 1152, SIGLIP2_HUB, "model.pt", None),
}


class PublishedDiT(NamedTuple):
    rae: str                     # key of PUBLISHED_RAES
    size: str                    # key of DIT_SIZES
    file: str                    # in RAE_HUB
    guide_size: str              # of the weak model for AutoGuidance
    guide_file: str
    guidance: float              # scale of AutoGuidance


# Source: configs/stage2/sampling of github.com/bytetriper/RAE
PUBLISHED_DITS = {
    "imagenet256": PublishedDiT(
        "dinov2-b",
        "DiTDH-XL", "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
        "DiTDH-S", "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt", 1.42),
    "imagenet512": PublishedDiT(
        "dinov2-b-512",
        "DiTDH-XL", "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
        "DiTDH-S", "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt", 1.5),
}

# Text to image: repositories on the hub. All draw through the autoencoder "siglip2-so400m".
PUBLISHED_T2I = {
    "scale-rae-1.5b": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B",
    "scale-rae-7b": "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B",
}


# ---------------------------------------------------------------------------- files
def hub_folder(name, hub, patterns, folder=None):
    """Folder with those files of a repository on the hub that fit `patterns`.

    name: what the user asked for, for the error. folder: a local copy of RAE_HUB, or a folder that
    holds copies of other repositories under their own names; None: the files are downloaded, once.
    """
    own_name = hub.split("/")[1]
    if folder is None:
        copy = "FOLDER" if hub == RAE_HUB else f"FOLDER/{own_name}"
        advice = f"connect, or copy huggingface.co/{hub} to {copy} and add --release_dir FOLDER"
        with fetching(name, advice):                    # the hub's client keeps what it fetched
            return storage.fetch_hub(hub, patterns)
    if hub == RAE_HUB:
        return Path(folder)
    return Path(folder) / own_name


def find_file(folder, pattern, hub):
    """Path of the file in a folder that fits a pattern. Raises FileNotFoundError."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"file {folder / pattern} does not exist; copy it there from "
                                f"huggingface.co/{hub}")
    return paths[0]


def check_file(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist; copy it there from the model's "
                                f"repository")


def read_json(path):
    """The dict in a JSON file. Raises FileNotFoundError; ValueError if there is none."""
    check_file(path)
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:      # no UTF-8, no JSON, or thousands of brackets
        raise ValueError(f"{path} can't be read ({error}); cut short? copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} can't be read (no dict, {type(content).__name__}); copy it again")
    return content


def read_weights(folder):
    """Weights of model.safetensors in a folder, or of its shards, under their published names."""
    files = [Path(folder) / "model.safetensors"]
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        files = [Path(folder) / name for name in shard_names(index)]
    weights = {}
    for file in files:
        check_file(file)
        try:
            weights.update(load_file(str(file)))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} can't be read ({error}); cut short? copy it "
                             f"again") from error
    return weights


def shard_names(index):
    """Names of the files that an index of shards lists. Raises ValueError unless they lie beside
    it.
    """
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name != "" for name in names):
        raise ValueError(f"{index} has no weight_map of names of weights to names of files; copy "
                         f"it again")
    return sorted(set(names))


# ---------------------------------------------------------------------------- strict loading
def load_strict(module, state, source, device="cpu"):
    """Load a state dict that fits exactly. Returns the module.

    module: one of build_empty() gets its memory here, on `device`, once the state is known to fit.
    source: where the state is from, for the error.
    Raises ValueError that lists missing, unexpected and misshapen keys, and weights that are not
    finite; then nothing is loaded.
    """
    # Compared before anything is loaded: load_state_dict loads what fits before it raises.
    own_state = module.state_dict()
    problems = [f"missing {key}" for key in own_state if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own_state]
    for key, own in own_state.items():
        if key in state:
            problem = weight_problem(state[key], tuple(own.shape))
            if problem is not None:
                problems.append(f"{key}: {problem}")
    if problems:
        first_problems = "\n  ".join(problems[:20])       # hundreds if the sizes are wrong
        raise ValueError(f"{source} does not fit {type(module).__name__}; build it with the flags "
                         f"it was trained with, or mend the file. {len(problems)} keys:\n  "
                         f"{first_problems}")
    check_finite(state, source)
    if any(own.is_meta for own in own_state.values()):
        module.to_empty(device=device)
    module.load_state_dict(state)
    return module


def weight_problem(value, shape=None):
    """What keeps a value of a file from being weights or statistics of a shape, or None."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__}, not a tensor"
    is_float = value.is_floating_point() and value.element_size() >= 2      # not fp8
    if not is_float or value.layout != torch.strided or value.is_meta:
        return f"{value.dtype}, {value.layout} on {value.device}; dense floats are needed"
    if shape is not None and value.shape != shape:
        return f"shape {tuple(value.shape)}, the model has {shape}"
    # A file of some bytes can hold one number that is repeated along all dimensions of its tensor.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"shape {tuple(value.shape)}, of which the file holds only a part"
    return None


def check_finite(state, source):
    """Raise ValueError if a number in a state dict of floats is nan or infinite."""
    not_finite = [key for key, value in state.items() if not is_finite(value)]
    if not_finite:
        raise ValueError(f"{source} has weights that are not finite, {not_finite[0]} and "
                         f"{len(not_finite) - 1} more; its training diverged: take an earlier "
                         f"checkpoint")


def is_finite(tensor):
    """Whether no number of a tensor is nan or infinite."""
    if tensor.numel() == 0:
        return True
    # Both are nan if any number is. They take a tenth of the time of a copy.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def load_release(module, path_or_state, source="the given state", device="cpu"):
    """Load weights strictly, ours or those of an official release. Returns the module.

    module: a DiT, DiTDH, Decoder or T2I (of Scale-RAE's weights, a DiT takes only its part); an RAE
        takes the latent statistics of a stat.pt or of a checkpoint.
    path_or_state: a file of torch.save or safetensors, or its dict, in which the weights may stand
        under ema, model, module or state_dict.
    device: where a module of build_empty() gets its memory.
    Raises ValueError: keys or shapes that don't fit, or a file that can't be read safely.
    """
    state = path_or_state
    if not isinstance(state, dict):
        source = path_or_state
        state = storage.load_checkpoint(path_or_state)
    if isinstance(module, RAE):
        return load_statistics(module, state, source)
    if isinstance(module, Decoder):
        return load_strict(module, decoder_weights(state, module), source, device)
    state = unwrap(state, WRAPPERS)
    if any(key.startswith("diff_head.") for key in state):
        state = weights_from_scale_rae(state, module)
    return load_strict(module, state, source, device)       # a DiT's names are the release's


def load_statistics(rae, state, source):
    """Latent statistics from a stat.pt (mean, var) or a checkpoint of ours into an RAE."""
    if isinstance(state.get("rae"), dict):
        state = state["rae"]
    mean = state.get("latent_mean", state.get("mean"))          # None in the released DINOv2-B
    var = state.get("latent_var", state.get("var"))
    if var is None:
        raise ValueError(f"{source} has no latent statistics (mean, var); give a stat.pt")
    check_statistics(mean, var, source)
    return rae.normalise_by(mean, var)


# ---------------------------------------------------------------------------- layouts of weights
WRAPPERS = ("ema", "model", "module", "state_dict")     # the EMA before the trained weights


def unwrap(state, wrappers):
    """The innermost dict of nested dicts under these names, in this order of preference.

    Keys lose the prefix "module." of DistributedDataParallel.
    """
    for wrapper in wrappers:
        if isinstance(state.get(wrapper), dict):
            return unwrap(state[wrapper], wrappers)
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def rename(state, names):
    """A state dict in whose keys each (old, new) of names was replaced, one after another."""
    renamed = {}
    for key, value in state.items():
        for old, new in names:
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


# Parts of the names of a decoder's weights and ours, replaced one after another. The official
# model.pt has the names of HF's ViT-MAE.
DECODER_NAMES = [
    ("attention.attention.", ""),               # ViT-MAE: before query, key and value
    ("attention.output.dense", "proj"),         # before the other output.dense
    ("attention.to_q", "query"),                # diffusers' AutoencoderRAE
    ("attention.to_k", "key"),
    ("attention.to_v", "value"),
    ("attention.to_out.0", "proj"),
    ("intermediate.dense", "fc1"),              # both
    ("output.dense", "fc2"),
]


def decoder_weights(state, decoder):
    """Weights of a Decoder under our names, from the official layout, diffusers' or our own."""
    state = unwrap(state, ("rae", "decoder", *WRAPPERS))
    if any(key.startswith("decoder.") for key in state):        # of a whole autoencoder
        state = {key.removeprefix("decoder."): value for key, value in state.items()
                 if key.startswith("decoder.")}
    if any("attention.to_q" in key for key in state):           # diffusers stores no positions,
        state.setdefault("decoder_pos_embed", decoder.positions())      # which are fixed
    return rename(state, DECODER_NAMES)


def weights_from_scale_rae(state, module):
    """A release of Scale-RAE under the names of a t2i.T2I; for a DiT only its part."""
    wants_only_dit = isinstance(module, (DiT, DiTDH))
    # The frequencies of the time embedding are in no file: the release draws them with this seed.
    generator = torch.Generator().manual_seed(114514)
    frequencies = torch.randn(256, generator=generator)
    weights = {}
    for key, value in {"diff_head.model.t_embedder.W": frequencies, **state}.items():
        if key == "lm_head.weight" and "llm.lm_head.weight" not in module.state_dict():
            continue                                # some files hold a copy of the tied embedding
        if key.startswith("diff_head.") or not wants_only_dit:
            weights[name_from_scale_rae(key, "" if wants_only_dit else "dit.")] = value
    return weights


def name_from_scale_rae(key, dit_prefix):
    """Our name of one weight. An unknown one stays as it is, so that strict loading lists it."""
    if key.startswith("diff_head.model."):
        key = key.removeprefix("diff_head.model.").replace("dit_blocks.", "blocks.")
        return dit_prefix + key
    if key.startswith(("model.mm_projector.", "model.latent_queries")):
        return key.removeprefix("model.")
    if key.startswith("model."):
        return "llm." + key.removeprefix("model.")
    if key.startswith("lm_head."):
        return "llm." + key
    return key                                      # diff_head_projector


def vit_from_webssl(state):
    """WebSSL's DINO, in transformers' names, under the names of timm's ViT."""
    # The mask token served WebSSL's own training; timm has none.
    state = {key: value for key, value in state.items() if "mask_token" not in key}
    state = rename(state, [
        ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.cls_token", "cls_token"),
        ("encoder.layer.", "blocks."),
        (".attention.attention.", ".attn."),
        (".attention.output.dense.", ".attn.proj."),
        (".layer_scale1.lambda1", ".ls1.gamma"),
        (".layer_scale2.lambda1", ".ls2.gamma"),
        ("layernorm.", "norm."),
    ])
    for query in [key for key in state if ".attn.query." in key]:
        names = [query.replace("query", name) for name in ("query", "key", "value")]
        weights = [state.pop(name) for name in names]
        state[query.replace("query", "qkv")] = torch.cat(weights)       # one matrix in timm
    return state


# ---------------------------------------------------------------------------- encoders
def pixel_statistics(name):
    """Mean and std of pixels in [0,1], three floats each, that encoder `name` was trained with.

    Raises ValueError for an unknown name.
    """
    if name in ENCODERS:
        _, _, statistics = ENCODERS[name]
        return statistics
    if re.fullmatch(r"pixel(:[1-9]\d*)?|vae(:[1-9]\d*:[1-9]\d*)?|diffusers:.+", name):
        check_baseline(name)
        return HALF_PIXELS
    layout = name.split(".")[0]
    if not timm.models.is_model_in_modules(layout, ["vision_transformer", "deit", "eva", "beit"]):
        raise ValueError(f"--encoder {name} is neither one of {' '.join(ENCODERS)}, nor "
                         f"pixel:PATCH, vae:CHANNELS:PATCH or diffusers:SOURCE, nor a ViT of "
                         f"timm's modules vision_transformer, deit, eva, beit: "
                         f"timm.list_models(module='eva')")
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"--encoder {name}: timm has no weights of that name; see "
                         f"timm.list_pretrained()") from error
    return config.mean, config.std


def load_encoder(name, image_size=None):
    """A frozen model.Encoder with its pretrained weights, or a baseline of baselines.py.

    name: a key of ENCODERS, the name of any ViT of timm, pixel:PATCH, vae:CHANNELS:PATCH or
        diffusers:SOURCE.
    image_size: side of its images, pixels; default: as in ENCODERS, 64 for pixel and vae, else 256.
    Raises ValueError: an unknown name, or a size that is no multiple of the patch;
        FileNotFoundError: no weights and no network.
    """
    pixel_mean, pixel_std = pixel_statistics(name)
    image_size = image_size or default_image_size(name)
    if name.startswith(("pixel", "vae", "diffusers:")):
        backbone = load_baseline(name, image_size)
        grid = latent_grid(name, image_size, backbone.patch)
        input_size = image_size
    else:
        timm_name = ENCODERS[name][0] if name in ENCODERS else name
        patch = patch_size(timm_name)
        # A patch-14 ViT sees 14/16 of the image: 256 px give the 16 x 16 grid of patch 16.
        grid = latent_grid(name, image_size, stride=16 if patch == 14 else patch)
        input_size = grid * patch
        backbone = load_vit(timm_name, input_size)
        # Without an affine part, each token has mean 0 and variance 1 over its channels.
        backbone.norm = nn.LayerNorm(backbone.embed_dim, eps=1e-6, elementwise_affine=False)
    encoder = Encoder(name, backbone, image_size, input_size, grid, pixel_mean, pixel_std)
    encoder.trainable = name.startswith("vae")
    return encoder


def default_image_size(name):
    if name in ENCODERS:
        _, image_size, _ = ENCODERS[name]
        return image_size
    if name.startswith(("pixel", "vae")):
        return 64                                   # that of the built-in world
    return 256


def check_baseline(name):
    """Raise ValueError if pixel:PATCH or vae:CHANNELS:PATCH has numbers that no memory has room
    for.
    """
    kind, _, details = name.partition(":")
    if kind == "diffusers" or not details:
        return
    *channels, patch = map(int, details.split(":"))
    if patch > LARGEST_PATCH:
        raise ValueError(f"--encoder {name} has patches of {patch} pixels; give at most "
                         f"{LARGEST_PATCH}")
    if channels and channels[0] > WIDEST:
        raise ValueError(f"--encoder {name} has {channels[0]} channels; give at most {WIDEST}")


def load_baseline(name, image_size):
    """The backbone, one of baselines.py, of pixel..., vae... or diffusers:..."""
    kind, _, details = name.partition(":")
    if kind == "diffusers":
        return DiffusersVAE(details)
    if kind == "pixel":
        return Pixels(int(details or 16))
    channels, patch = (details or "16:8").split(":")
    return VAE(int(channels), int(patch), image_size)


def latent_grid(name, image_size, stride):
    """Tokens per side, one for each `stride` pixels. Raises ValueError unless they fit."""
    if image_size % stride:
        nearest = max(stride, image_size // stride * stride)
        raise ValueError(f"--size {image_size} must be a multiple of {stride} for --encoder "
                         f"{name}; try --size {nearest}")
    return image_size // stride


def patch_size(timm_name):
    """Pixels per token side of a ViT of load_vit, without loading it."""
    if timm_name in ("tiny", "random"):
        return TINY_VIT["patch_size"]
    if timm_name == "webssl":
        return 14
    without_blocks = timm.create_model(timm_name, depth=0)
    return without_blocks.patch_embed.patch_size[0]


def load_vit(timm_name, size):
    """A pretrained ViT for images of `size` pixels, its table of positions resampled to them.

    timm_name: a model of timm; or "tiny", the shipped one, "random" or "webssl".
    Raises FileNotFoundError if there are no weights and no network.
    """
    if timm_name == "tiny":
        vit = timm.models.VisionTransformer(**TINY_VIT)
        vit.norm = nn.Identity()                    # its file has no affine part
        load_release(vit, SHIPPED_ENCODER)
        vit.set_input_size(size)
        return vit
    if timm_name == "random":
        vit = random_vit()
        vit.set_input_size(size)
        return vit
    if timm_name == "webssl":
        return load_webssl(size)
    return load_timm(timm_name, size)


def load_timm(timm_name, size):
    """A ViT with timm's weights, from weights/ in the checkout or downloaded once."""
    options = dict(num_classes=0)
    if "siglip" in timm_name:
        options["act_layer"] = "gelu_tanh"          # as it was trained
    # In the papers' code DINOv2's table is resampled with antialias, which timm also does when it
    # loads weights for another size; those of SigLIP and MAE are resampled without, below.
    antialias = not ("siglip" in timm_name or ".mae" in timm_name)
    if antialias:
        options["img_size"] = size
    local_file = HERE / "weights" / f"{timm_name}.safetensors"
    if local_file.exists():
        check_patches(local_file, timm_name)
        options["pretrained_cfg_overlay"] = dict(file=str(local_file))
        try:
            vit = timm.create_model(timm_name, pretrained=True, **options)
        except Exception as error:                  # timm's readers of layouts raise many kinds
            raise ValueError(f"weights/{local_file.name} does not fit {timm_name}: "
                             f"{error}") from error
    else:
        advice = (f"put model.safetensors of hf.co/timm/{timm_name} at weights/{local_file.name}, "
                  f"beside release.py")
        with fetching(f"weights of {timm_name}", advice):
            repository = timm.get_pretrained_cfg(timm_name).hf_hub_id
            if repository:
                storage.fetch_hub(repository, ["model.safetensors"])
            vit = timm.create_model(timm_name, pretrained=True, **options)
    check_finite(vit.state_dict(), f"the file of {timm_name}")
    if not antialias:
        vit.patch_embed.set_input_size(img_size=size)
        vit.pos_embed.data = resample_positions(vit, vit.pos_embed, antialias=False)
    return vit


def check_patches(path, timm_name):
    """Raise ValueError if weights that were placed by hand have patches of another size, which timm
    would resample without a word.
    """
    patch = patch_size(timm_name)
    kernel = storage.load_checkpoint(path).get("patch_embed.proj.weight")
    if isinstance(kernel, torch.Tensor) and kernel.shape[2:] != (patch, patch):
        raise ValueError(f"weights/{path.name} does not fit {timm_name}: patches of "
                         f"{' x '.join(str(n) for n in kernel.shape[2:])} pixels, not {patch} x "
                         f"{patch}; put model.safetensors of hf.co/timm/{timm_name} there")


def load_webssl(size):
    """WebSSL's DINO ViT-L, from weights/ in the checkout or downloaded once."""
    vit = timm.create_model(WEBSSL_LAYOUT, num_classes=0, img_size=size)
    path = HERE / "weights" / "webssl-l.safetensors"
    if not path.exists():
        advice = f"put model.safetensors of huggingface.co/{WEBSSL_HUB} at weights/{path.name}"
        with fetching("weights of webssl-l", advice):
            path = storage.fetch_hub(WEBSSL_HUB, ["model.safetensors"]) / "model.safetensors"
    weights = storage.load_checkpoint(path)
    try:
        state = vit_from_webssl(weights)
        positions = state["pos_embed"]                  # 1 1+n c, of 224 pixels
        state["pos_embed"] = resample_positions(vit, positions, antialias=True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit WebSSL's ViT ({type(error).__name__}: {error}); "
                         f"copy model.safetensors of huggingface.co/{WEBSSL_HUB} again") from error
    return load_strict(vit, state, path)


def resample_positions(vit, table, antialias):
    """A table of positions 1 n c, resized bicubically to the grid that the ViT has now."""
    return timm.layers.resample_abs_pos_embed(table, vit.patch_embed.grid_size, None,
                                              vit.num_prefix_tokens, antialias=antialias)


def warn_of_tiny_encoder(log, encoder, data):
    """Warn, on the screen and in the log, if the shipped encoder meets images unknown to it.

    encoder: name of the run's encoder. data: ImageData.
    """
    is_built_in = [data.is_built_in(source) for source in range(len(data.domains))]
    if encoder == "tiny" and not all(is_built_in):
        log.warn("the shipped encoder has only seen coloured shapes; its latents say little about "
                 "photographs: train a decoder by train_decoder.py --encoder dinov2-b, or take a "
                 "published autoencoder by train_dit.py --rae dinov2-b")


# ---------------------------------------------------------------------------- autoencoders
def find_published_rae(name):
    """The row of PUBLISHED_RAES. Raises ValueError for an unknown name or noise level."""
    name = str(name)
    if name not in PUBLISHED_RAES:
        family = name.partition(":")[0]
        known = [key for key in PUBLISHED_RAES if key.partition(":")[0] == family]
        raise ValueError(f"no autoencoder {name} is published; give one of "
                         f"{' '.join(known or PUBLISHED_RAES)}")
    return PUBLISHED_RAES[name]


def is_published_rae(path_or_name):
    """True for the names of PUBLISHED_RAES, whatever noise level follows them."""
    return str(path_or_name).partition(":")[0] in PUBLISHED_RAES


def published_rae(name, folder=None):
    """A published autoencoder as the dict under "rae" of our checkpoints.

    name: a key of PUBLISHED_RAES. folder: local copy of its files, see hub_folder; None: they are
    downloaded, once. The encoder's weights are not among them, see load_encoder.
    Raises ValueError: unknown name, damaged file; FileNotFoundError: no file and no network.
    """
    published = find_published_rae(name)
    if published.hub == SIGLIP2_HUB:
        sizes, decoder = read_scale_rae_decoder(name, folder)
    else:
        sizes = dict(DECODER_SIZES["XL"], decoder_patch=16)
        files = [published.decoder, published.statistics]
        folder = hub_folder(name, published.hub, files, folder)
        decoder = storage.load_checkpoint(find_file(folder, published.decoder, published.hub))
    mean, var = read_statistics(name, folder)
    return dict(encoder=published.encoder, size=published.image_size, **sizes, decoder=decoder,
                latent_mean=mean, latent_var=var)


def read_scale_rae_decoder(name, folder):
    """Sizes (as flags) and weights of Scale-RAE's decoder."""
    folder = hub_folder(name, SIGLIP2_HUB, ["config.json", "model.pt"], folder)
    config = read_json(folder / "config.json")
    usual = DECODER_SIZES["XL"]
    sizes = dict(
        decoder_width=config.get("decoder_hidden_size", usual["decoder_width"]),
        decoder_depth=config.get("decoder_num_hidden_layers", usual["decoder_depth"]),
        decoder_heads=config.get("decoder_num_attention_heads", usual["decoder_heads"]),
        decoder_mlp=config.get("decoder_intermediate_size", usual["decoder_mlp"]),
        decoder_patch=config.get("patch_size", 14))
    return sizes, storage.load_checkpoint(find_file(folder, "model.pt", SIGLIP2_HUB))


def read_statistics(name, folder):
    """Mean and variance of the latents, c h w each, of a published autoencoder."""
    published = PUBLISHED_RAES[name]
    grid = published.image_size // 16
    shape = (published.channels, grid, grid)
    if published.statistics is None:
        return torch.zeros(shape), torch.full(shape, 1 - 1e-5)      # RAE adds 1e-5 to the variance
    path = find_file(folder, published.statistics, published.hub)
    statistics = storage.load_checkpoint(path)
    mean, var = statistics.get("mean"), statistics.get("var")
    check_statistics(mean, var, path)
    if var.shape != shape:
        raise ValueError(f"{path} has statistics of shape {tuple(var.shape)}, {name} needs "
                         f"{shape}; copy the right one of huggingface.co/{published.hub}")
    if mean is None:                                # DINOv2-B was released without, and trained so
        mean = torch.zeros_like(var)
    return mean, var


def load_packed_rae(path_or_name, folder=None):
    """The dict under "rae" of read_rae()."""
    return read_rae(path_or_name, folder)["rae"]


def read_rae(path_or_name, folder=None):
    """The dict of a checkpoint of any stage, each of which has an autoencoder under "rae", or of a
    published autoencoder.

    path_or_name: a file, or a key of PUBLISHED_RAES. folder: see published_rae.
    Raises FileNotFoundError, ValueError.
    """
    if is_published_rae(path_or_name):
        state = dict(rae=published_rae(str(path_or_name), folder))
    else:
        check_source(path_or_name, "train_decoder.py")
        state = storage.load_checkpoint(path_or_name)
    if "rae" not in state:
        raise ValueError(f"{path_or_name} is no checkpoint of train_decoder.py, as it holds no "
                         f"autoencoder; give one of those, or one of {' '.join(PUBLISHED_RAES)}")
    check_packed_rae(state["rae"], path_or_name)
    return state


def encoder_name(path_or_name=None):
    """Name of the encoder of an autoencoder, whose weights are not loaded for it.

    path_or_name: as for load_packed_rae; None: the shipped one. Raises as load_packed_rae.
    """
    if path_or_name is None:
        path_or_name = SHIPPED_RAE
    if is_published_rae(path_or_name):
        return find_published_rae(path_or_name).encoder
    return load_packed_rae(path_or_name)["encoder"]


def unpack_rae(packed, with_encoder=True, source="the checkpoint"):
    """A frozen RAE in eval mode from the dict under "rae" of a checkpoint.

    with_encoder: False for an RAE that only decodes, for which no encoder is loaded.
    source: the checkpoint's path, for errors.
    Raises ValueError: weights that don't fit; FileNotFoundError: no weights of the encoder.
    """
    channels, grid = packed["latent_var"].shape[:2]
    decoder = build_empty(lambda: build_decoder(packed, channels, grid))
    load_release(decoder, packed["decoder"], f"{source}: the decoder")  # of any layout
    encoder = None
    if with_encoder:
        encoder = load_encoder(packed["encoder"], packed["size"])
        if (encoder.channels, encoder.grid) != (channels, grid):
            raise ValueError(f"{source} has statistics of {channels} x {grid} x {grid} latents, "
                             f"and its encoder {encoder.name} gives {encoder.channels} x "
                             f"{encoder.grid} x {encoder.grid}; copy or train it again")
        if "encoder_weights" in packed:                         # of a VAE
            load_strict(encoder.backbone, packed["encoder_weights"], f"{source}: the encoder")
    rae = RAE(encoder, decoder, packed["latent_mean"], packed["latent_var"],
              pixel_statistics(packed["encoder"]))
    return rae.requires_grad_(False).eval()


def load_rae(path_or_name, with_encoder=True, folder=None):
    """A frozen RAE from a checkpoint or by its published name."""
    return unpack_rae(load_packed_rae(path_or_name, folder), with_encoder, path_or_name)


def build_empty(build):
    """The module that build() makes, on the device meta, where nothing is drawn and nothing takes
    memory. load_strict() gives it both if all of its weights are there.
    """
    with torch.device("meta"):
        return build()


def materialize(build, state, weights, source, device):
    """The module that build() makes, with weights of a checkpoint, frozen, in eval mode.

    state: dict of the checkpoint. weights: "ema" or "model". source: its path, for errors.
    Raises ValueError if these weights are missing or don't fit.
    """
    if weights not in state:
        given = [name for name in ("ema", "model") if name in state]
        raise ValueError(f"{source} holds no weights {weights}; use --weights {given[0]}")
    module = load_release(build_empty(build), state[weights], source, device)
    return module.requires_grad_(False).eval()


# ---------------------------------------------------------------------------- DiTs
def published_dit(name, folder=None):
    """A published DiT with its autoencoder as the dict of a checkpoint of train_dit.py.

    name: key of PUBLISHED_DITS; with "/guide" after it, its weak model for AutoGuidance.
    folder: local copy of the repository on the hub; None: what is needed is downloaded, once.
    Raises FileNotFoundError, ValueError.
    """
    published = PUBLISHED_DITS[name.removesuffix("/guide")]
    if name.endswith("/guide"):
        size, file = published.guide_size, published.guide_file
    else:
        size, file = published.size, published.file
    dit_folder = hub_folder(name.removesuffix("/guide"), RAE_HUB, [file], folder)
    weights = storage.load_checkpoint(find_file(dit_folder, file, RAE_HUB))
    packed = published_rae(published.rae, folder)
    # The null class, which guidance needs, was trained by a dropout of 0.1.
    return dict(ema=weights, args=dict(DIT_SIZES[size], class_dropout=0.1), rae=packed,
                num_classes=1000, class_names=imagenet_names(),
                latent_shape=list(packed["latent_var"].shape))


def imagenet_names():
    """Names of the 1000 classes of ImageNet, the first of several for each class."""
    info = timm.data.ImageNetInfo()
    return [info.index_to_description(i).split(",")[0] for i in range(1000)]


def read_dit(path_or_name, folder=None):
    """The dict of a checkpoint of train_dit.py, or of a published DiT, see published_dit.

    Raises FileNotFoundError; ValueError if it is the checkpoint of another stage.
    """
    name = str(path_or_name)
    if name.removesuffix("/guide") in PUBLISHED_DITS:
        state = published_dit(name, folder)
    else:
        check_source(name, "train_dit.py")
        state = storage.load_checkpoint(name)
    check_checkpoint(state, "train_dit.py", name)
    return state


def load_dit_alone(path_or_name, device="cpu", weights="ema", folder=None):
    """Frozen DiT and dict of a checkpoint or a published name, without the autoencoder."""
    state = read_dit(path_or_name, folder)
    channels, grid = state["latent_shape"][:2]

    def build():
        return build_dit(state["args"], channels, grid, state["num_classes"])

    return materialize(build, state, weights, path_or_name, device), state


def load_dit(path_or_name, device="cpu", with_encoder=False, weights="ema", folder=None):
    """Frozen DiT, its RAE, and the dict of a checkpoint of train_dit.py or a published name.

    with_encoder: False for an RAE that only decodes. weights: "ema" or "model". folder: see
    published_dit. Raises FileNotFoundError, ValueError.
    """
    model, state = load_dit_alone(path_or_name, device, weights, folder)
    rae = unpack_rae(state["rae"], with_encoder, path_or_name).to(device)
    return model, rae, state


# ---------------------------------------------------------------------------- text to image
def published_t2i(name, folder=None):
    """A release of Scale-RAE as the dict of a checkpoint of train_t2i.py.

    name: a key of PUBLISHED_T2I. folder: holds copies of its repository and of SIGLIP2_HUB, each in
    a folder of its own name; None: they are downloaded, once.
    Raises FileNotFoundError, ValueError.
    """
    files = ["*.json", "*.safetensors"]
    model_folder = hub_folder(name, PUBLISHED_T2I[name], files, folder)
    packed = published_rae("siglip2-so400m", folder)
    config = read_json(model_folder / "config.json")
    # asked: its training had questions about images, so its answers can be a verifier.
    return dict(model=read_weights(model_folder), args=scale_rae_flags(config, model_folder),
                rae=packed, llm=qwen2_arguments(config, model_folder),
                latent_shape=list(packed["latent_var"].shape),
                tokenizer=Tokenizer(model_folder / "tokenizer.json").json, asked=1)


def scale_rae_flags(config, source):
    """Flags of train_t2i.py from the dict of Scale-RAE's config.json."""
    flags = dict(
        width=config.get("diffusion_model_hidden_size"),
        depth=config.get("diffusion_model_depth"),
        heads=config.get("diffusion_model_heads"))
    if not all(isinstance(value, int) for value in flags.values()):
        raise ValueError(f"{source}/config.json has a DiT of width {flags['width']}, depth "
                         f"{flags['depth']}, heads {flags['heads']}; one number each is needed: "
                         f"wide heads were not released")
    # Of its code: a connector of one layer. Of its finetuning: 1024 tokens of context.
    return dict(flags, head_width=0, connector="linear", context=1024,
                class_dropout=config.get("diffusion_class_dropout_prob", 0.1),
                shift_base=config.get("diffusion_base_dim") or 4096)


# ---------------------------------------------------------------------------- Qwen2
def load_qwen2(source, folder_flag="--llm"):
    """Qwen2 in fp32 and its Tokenizer.

    source: name on the hub, or a folder with config.json, tokenizer.json and model.safetensors or
    its shards. The embedding has as many rows as the file, which may be more than there are tokens.
    folder_flag: the flag that source was given with, for errors.
    Raises FileNotFoundError: no such file or repository; ValueError: another model, wrong keys.
    """
    folder = Path(source)
    if not folder.is_dir():
        files = ["config.json", "tokenizer.json", "model.safetensors.index.json",
                 "model*.safetensors"]
        with fetching(f"{folder_flag} {source}: no such folder",
                      f"connect, or copy huggingface.co/{source} to a folder and name it"):
            folder = storage.fetch_hub(str(source), files)
    arguments = qwen2_arguments(read_json(folder / "config.json"), source)
    state = {}
    for key, weight in read_weights(folder).items():
        # Some files hold a copy of the embedding as the output layer, although it is tied.
        if key == "lm_head.weight" and arguments["tie_word_embeddings"]:
            continue
        state[key.removeprefix("model.")] = weight
    check_qwen2(arguments, folder / "config.json")
    model = build_empty(lambda: Qwen2(**arguments))
    return load_strict(model, state, source), Tokenizer(folder / "tokenizer.json")


QWEN2_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
               "num_attention_heads")
# What llm.Qwen2 can compute; these are also the defaults of the public code.
QWEN2_OPTIONS = dict(hidden_act="silu", use_sliding_window=False, rope_type="default")


def qwen2_arguments(config, source):
    """The arguments of llm.Qwen2 from the dict of a config.json.

    source: where it is from, for the error. Raises ValueError if it is another model's.
    """
    # The positions: of version 5 of transformers, of version 4, or of neither.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source} has rope_parameters {rope}, no dict; give a Qwen2 model")
    defaults = dict(num_key_value_heads=config.get("num_attention_heads"), rope_theta=1e4,
                    rms_norm_eps=1e-6, tie_word_embeddings=False)           # of the public code
    values = dict(defaults, **QWEN2_OPTIONS)
    values["rope_type"] = rope.get("type", "default")
    values.update(config)
    values.update(rope)

    checked = {key: values.get(key) for key in ("model_type", *QWEN2_OPTIONS, *QWEN2_SIZES)}
    is_qwen = "qwen" in str(checked["model_type"])
    has_sizes = None not in checked.values()
    has_options = all(checked[key] == value for key, value in QWEN2_OPTIONS.items())
    if not (is_qwen and has_sizes and has_options):
        raise ValueError(f"{source} has {checked}; give a Qwen2 model, which has numbers and "
                         f"{QWEN2_OPTIONS}")
    return {key: values[key] for key in (*QWEN2_SIZES, *defaults)}


# ---------------------------------------------------------------------------- what files must hold
class Rule(NamedTuple):
    """What a value of a file must be: its type, and the range of a number or a few choices."""
    type: type                   # float: whole numbers as well
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()
    is_optional: bool = False


# Bounds on sizes, so that no file makes the machine build for minutes. The weights decide in the
# end, but a layer is built before they are compared.
WIDEST = 2 ** 14       # 4 times the widest published model, DiT-9.8B
DEEPEST = 256          # 9 times the deepest published one; built in two seconds
LARGEST_SIDE = 4096    # pixels: 8 times the largest published
LARGEST_PATCH = 64     # pixels: twice the largest of timm's; its 12288 numbers are one channel each
LARGEST_GRID = 128     # tokens per side: 4 times the largest published; 16384 tokens in all
LARGEST_VOCABULARY = 2 ** 20     # 7 times that of Qwen2
LONGEST_CONTEXT = 2 ** 17        # tokens, of Qwen2.5

AUTOENCODER = {
    "encoder": Rule(str),
    "size": Rule(int, 1, LARGEST_SIDE),
    "decoder_width": Rule(int, 1, WIDEST),
    "decoder_depth": Rule(int, 0, DEEPEST),
    "decoder_heads": Rule(int, 1, WIDEST),
    "decoder_mlp": Rule(int, 1, 4 * WIDEST),
    "decoder_patch": Rule(int, 1, LARGEST_SIDE),
    "decoder": Rule(dict),
    "encoder_weights": Rule(dict, is_optional=True),             # of a VAE
    "latent_mean": Rule(torch.Tensor),
    "latent_var": Rule(torch.Tensor),
}
DIT_FLAGS = {
    "width": Rule(int, 1, WIDEST),
    "depth": Rule(int, 0, DEEPEST),
    "heads": Rule(int, 1, WIDEST),
    "head_width": Rule(int, 0, WIDEST),
    "class_dropout": Rule(float, 0, 1),
    "prediction": Rule(str, choices=("v", "x0"), is_optional=True),      # of DiTBase
    "shift_base": Rule(float, 1e-9, 1e9, is_optional=True),
}
HEAD_FLAGS = {                                                   # unless head_width is 0
    "head_depth": Rule(int, 0, DEEPEST),
    "head_heads": Rule(int, 1, WIDEST),
}
T2I_FLAGS = DIT_FLAGS | {
    "connector": Rule(str, choices=("linear", "mlp2")),
    "context": Rule(int, 1, LONGEST_CONTEXT),
    "plan": Rule(int, 0, LONGEST_CONTEXT, is_optional=True),
    "regression": Rule(float, 0, is_optional=True),
}
QWEN2 = {
    "vocab_size": Rule(int, 1, LARGEST_VOCABULARY),
    "hidden_size": Rule(int, 1, WIDEST),
    "intermediate_size": Rule(int, 1, 4 * WIDEST),
    "num_hidden_layers": Rule(int, 0, DEEPEST),
    "num_attention_heads": Rule(int, 1, WIDEST),
    "num_key_value_heads": Rule(int, 1, WIDEST),
    "rope_theta": Rule(float, 1, 1e12),
    "rms_norm_eps": Rule(float, 0, 1),
    "tie_word_embeddings": Rule(bool),
}
TRAINING_DATA = {
    "data": Rule(list),
    "hold_out": Rule(int, 0, is_optional=True),
}
WEIGHTS = {"ema": Rule(dict, is_optional=True), "model": Rule(dict, is_optional=True)}
CHECKPOINTS = {                  # by the script that writes them
    "train_decoder.py": {"rae": Rule(dict)},
    "train_dit.py": WEIGHTS | {
        "args": Rule(dict), "rae": Rule(dict), "num_classes": Rule(int, 1),
        "class_names": Rule(list), "latent_shape": Rule(list)},
    "train_t2i.py": WEIGHTS | {
        "args": Rule(dict), "rae": Rule(dict), "llm": Rule(dict), "tokenizer": Rule(str),
        "asked": Rule(int, 0), "latent_shape": Rule(list)},
}
READERS = {                      # of these checkpoints
    "train_decoder.py": "eval_decoder.py --rae, train_dit.py --rae and train_t2i.py --rae",
    "train_dit.py": "sample.py, eval_fid.py and train_dit.py --init",
    "train_t2i.py": "sample.py --prompt, eval_t2i.py and train_t2i.py --init",
}
PUBLISHED = {                    # in the layout of these checkpoints
    "train_decoder.py": PUBLISHED_RAES,
    "train_dit.py": PUBLISHED_DITS,
    "train_t2i.py": PUBLISHED_T2I,
}


def check_source(path_or_name, script):
    """Raise unless it exists, or is the name of a published model in the layout of a script's
    checkpoints. load_checkpoint() sees what kind of file it is.

    FileNotFoundError: neither, with the published name that it may be meant to be, or the folder of
    a sharded checkpoint; ValueError: a published model of another kind.
    """
    name = str(path_or_name).removesuffix("/guide")
    names = list(PUBLISHED[script])
    if (Path(name) / ".metadata").is_file():
        raise FileNotFoundError(sharding.how_to_convert(Path(name).parent / "last.pt"))
    if name in names or Path(name).exists():
        return
    for other, others in PUBLISHED.items():
        if name in others:
            raise ValueError(f"{name} is a published model for {READERS[other]}; here a checkpoint "
                             f"of {script} is needed, or one of {' '.join(names)}")
    advice = f"give a checkpoint of {script}, or one of {' '.join(names)}"
    near = difflib.get_close_matches(name, names, 1)
    if near:
        advice = f"did you mean the published {near[0]}? Else {advice}"
    raise FileNotFoundError(f"file {name} does not exist; {advice}")


def script_of(state):
    """The script that wrote a checkpoint; None for what is not one of ours."""
    if "llm" in state:
        return "train_t2i.py"
    if "num_classes" in state or "latent_shape" in state:
        return "train_dit.py"
    if "rae" in state:
        return "train_decoder.py"
    return None


def check_checkpoint(state, script, source):
    """Raise ValueError unless a dict is a checkpoint of a script, one of CHECKPOINTS.

    source: path of its file, for the message. Of the weights, only types are checked here; the rest
    is up to load_strict().
    """
    given = script_of(state)
    if given is None:
        raise ValueError(f"{source} is no checkpoint of {script}, as it holds weights without the "
                         f"flags that they were trained with, or something else; give one of those")
    if given != script:
        raise ValueError(f"{source} is a checkpoint of {given}, for {READERS[given]}; give one of "
                         f"{script} here")
    check_values(state, CHECKPOINTS[script], source)
    check_packed_rae(state["rae"], source)
    if script == "train_decoder.py":
        return

    if "ema" not in state and "model" not in state:
        raise ValueError(f"{source} has no weights, neither ema nor model; copy or train it again")
    latent_shape = list(state["rae"]["latent_var"].shape)
    if state["latent_shape"] not in (latent_shape, latent_shape[:2]):
        raise ValueError(f"{source} has a model of latents {state['latent_shape']} and an "
                         f"autoencoder of {latent_shape}; copy or train it again")
    flags = state["args"]
    check_values(flags, DIT_FLAGS if script == "train_dit.py" else T2I_FLAGS, f"{source}: args")
    check_split(flags, "width", "heads", 4, source)              # 4: rotary positions in 2-D
    if flags["head_width"] > 0:
        check_values(flags, HEAD_FLAGS, f"{source}: args")
        check_split(flags, "head_width", "head_heads", 4, source)

    if script == "train_dit.py":
        check_class_names(state, source)
    else:
        if not state["tokenizer"].startswith("{"):
            raise ValueError(f"{source} has a tokenizer that is no JSON; copy or train it again")
        check_qwen2(state["llm"], f"{source}: llm")


def check_qwen2(arguments, source):
    """Raise ValueError unless a dict has arguments of llm.Qwen2 that go together."""
    check_values(arguments, QWEN2, source)
    check_split(arguments, "hidden_size", "num_attention_heads", 2, source)
    check_split(arguments, "num_attention_heads", "num_key_value_heads", 1, source)


def load_resumed(args, script):
    """The checkpoint OUT/last.pt with which a run goes on, checked. Raises ValueError."""
    source = f"{args.out}/last.pt"
    state = saving.load_resumable(args)
    check_checkpoint(state, script, source)
    needed = ["model"]
    if args.ema > 0:
        needed.append("ema")
    for name in needed:
        # With "weights", they lie in a folder, see sharding.py.
        if name not in state and "weights" not in state:
            raise ValueError(f"{source} has no {name} to go on with; copy or train it again")
    return state


def check_packed_rae(packed, source):
    """Raise ValueError unless this is an autoencoder as checkpoints hold it under "rae"."""
    if not isinstance(packed, dict):
        raise ValueError(f"{source} has rae {describe(packed)}, not a dict; copy or train it again")
    check_values(packed, AUTOENCODER, f"{source}: rae")
    check_split(packed, "decoder_width", "decoder_heads", 1, source)
    var = packed["latent_var"]
    check_statistics(packed["latent_mean"], var, source)
    if var.ndim != 3 or not var.shape[1] == var.shape[2] <= LARGEST_GRID:
        raise ValueError(f"{source} has statistics of shape {tuple(var.shape)}; c h w are needed, "
                         f"with h = w of at most {LARGEST_GRID}; copy or train it again")
    try:
        pixel_statistics(packed["encoder"])
    except ValueError as error:
        raise ValueError(f"{source} has an encoder that does not exist ({error}); copy or train it "
                         f"again") from error


def check_statistics(mean, var, source):
    """Raise ValueError unless latent statistics are finite, and variances positive.

    mean, var: tensors of one shape; mean may be None.
    """
    statistics = {"variance": var}
    if mean is not None:
        statistics["mean"] = mean
    for name, value in statistics.items():
        problem = weight_problem(value)
        if problem is None and not is_finite(value):
            problem = "with numbers that are not finite"
        if problem is None and value.shape != var.shape:
            problem = f"of shape {tuple(value.shape)}, and the variance {tuple(var.shape)}"
        if problem is not None:
            raise ValueError(f"{source} has a latent {name} {problem}; copy or train it again")
    if not (var > 0).all():
        raise ValueError(f"{source} has latent variances down to {var.min():g}, which must be all "
                         f"positive; copy or train it again")


def check_class_names(state, source):
    """Raise ValueError unless a checkpoint of classes has a name for each of them."""
    names = state["class_names"]
    if len(names) != state["num_classes"] or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source} has {len(names)} class_names for {state['num_classes']} "
                         f"classes; a text for each is needed; copy or train it again")


def training_data(state, source):
    """What the model of a checkpoint was trained on: the specs of --data, and --hold_out.

    Returns ([], 0) if it does not say, as published models. Raises ValueError.
    """
    flags = state.get("args", {})
    if not isinstance(flags, dict):
        raise ValueError(f"{source} has args {describe(flags)}, no dict; copy or train it again")
    if "data" not in flags:
        return [], 0
    check_values(flags, TRAINING_DATA, f"{source}: args")
    if not flags["data"] or not all(isinstance(spec, str) for spec in flags["data"]):
        raise ValueError(f"{source} has args in which data is no list of texts; copy or train it "
                         f"again")
    return flags["data"], flags.get("hold_out", 0)


def check_values(values, rules, source):
    """Raise ValueError unless a dict from a file obeys a table of Rules.

    source: the file, and where in it the dict stands.
    """
    for name, rule in rules.items():
        if name not in values:
            if rule.is_optional:
                continue
            raise ValueError(f"{source} has no {name}; copy or train it again")
        value = values[name]
        wanted = None
        if not has_type(value, rule.type):
            wanted = f"of type {rule.type.__name__}"
        elif rule.choices and value not in rule.choices:
            wanted = f"one of {' '.join(rule.choices)}"
        elif rule.type in (int, float) and not rule.low <= value <= rule.high:     # nan, too
            wanted = f"from {rule.low:g} to {rule.high:g}"
        if wanted is not None:
            raise ValueError(f"{source} has {name} {describe(value)}, which must be {wanted}; "
                             f"copy or train it again")


def has_type(value, wanted):
    """isinstance(), but True and False are no numbers, and a whole number can stand for a float."""
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def describe(value):
    """A short number or text as it is, the type of everything else: for messages."""
    is_plain = value is None or isinstance(value, (int, float, str))
    if is_plain and len(repr(value)) < 40:
        return repr(value)
    return f"of type {type(value).__name__}"


def check_split(values, width, heads, multiple, source):
    """Raise ValueError unless a width of a file splits into its heads, see model.check_heads."""
    if values[width] % (values[heads] * multiple):
        raise ValueError(f"{source} has {width} {values[width]}, no multiple of {heads} "
                         f"{values[heads]} x {multiple}; copy or train it again")
