"""Our modules against others: encoders of transformers, decoder of diffusers, costs of the paper.

Random weights go from the judge to us, so that nothing is downloaded.
Run: python -m pytest tests/test_judges.py
"""
import contextlib
import re
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import release
from model import DECODER_SIZES, DIT_SIZES, Decoder, build_decoder, build_dit
from release import ENCODERS, load_encoder, load_release

# name: (class in transformers, its configuration, tokens before those of the patches), with the
# configurations of facebook/dinov2-with-registers-small, google/siglip2-base-patch16-256,
# google/siglip2-so400m-patch14-224 and facebook/vit-mae-base (but nothing is masked), each with the
# first LAYERS of its layers; everything else is the default of the class.
JUDGES = {
    "dinov2-s": ("Dinov2WithRegisters",
                 dict(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14), 5),
    "siglip2-b": ("SiglipVision", dict(image_size=256, vision_use_head=False), 0),
    "siglip2-so400m": ("SiglipVision",
                       dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16,
                            patch_size=14, vision_use_head=False), 0),
    "mae-b": ("ViTMAE", dict(mask_ratio=0.0), 1),
}
LAYERS = 3                                         # the others are like them, and take seconds
# Names of transformers 5, as regular expressions, and those of timm.
TIMM_NAMES = {
    r"^embeddings\.patch_embedding(s\.projection)?\.": "patch_embed.proj.",
    r"^embeddings\.position_embedding(s|\.weight)$": "pos_embed",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^embeddings\.cls_token$": "cls_token",
    r"^(encoder\.)?layers?\.": "blocks.",
    r"^(post_)?layernorm\.": "norm.",
    r"\.(layer_norm1|layernorm_before)\.": ".norm1.",
    r"\.(layer_norm2|layernorm_after)\.": ".norm2.",
    r"\.(attention|self_attn)\.(o|out)_proj\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
}


@torch.no_grad()
def randomise(module):
    """Random weights everywhere, of a size at which every one of them moves the output."""
    for name, weight in module.named_parameters():
        if weight.ndim == 1:
            is_bias = name.endswith("bias")
            weight.normal_(0.0 if is_bias else 1.0, 0.2)       # norms and layer scales around 1
        elif "token" in name or "position" in name:
            weight.normal_(0.0, 0.5)
        else:
            # Large queries and keys: attention is not uniform.
            gain = 2.0 if re.search("[qk]_proj|to_[qk]", name) else 1.0
            weight.normal_(0.0, gain * weight[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def timm_state(judge, name):
    """The judge's weights in the layout of the file that timm has of encoder `name`."""
    state = {}
    for key, value in judge.state_dict().items():
        for old, new in TIMM_NAMES.items():
            key = re.sub(old, new, key)
        state[key] = value
    for key in [key for key in state if ".q_proj." in key]:
        qkv = torch.cat([state.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"])
        state[re.sub(r"\.(attention|self_attn)\.q_proj\.", ".attn.qkv.", key)] = qkv
    width = qkv.shape[0] // 3
    state["pos_embed"] = state["pos_embed"].view(1, -1, width)
    if "reg_token" in state:                           # timm's table is of patches only
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
        del state["embeddings.mask_token"]
    # Weights of a head that the latents never see.
    with torch.device("meta"):
        whole = timm.create_model(ENCODERS[name][0], num_classes=0, depth=0)
    for key, value in whole.state_dict().items():
        if key.startswith("attn_pool."):
            state[key] = torch.zeros(value.shape)
    return state


def statistics_of_judge(transformers, name):
    """Pixel mean and std that the image processor of the judge of encoder `name` has."""
    constants = transformers.image_utils
    if "siglip" in name:
        return tuple(constants.IMAGENET_STANDARD_MEAN), tuple(constants.IMAGENET_STANDARD_STD)
    return tuple(constants.IMAGENET_DEFAULT_MEAN), tuple(constants.IMAGENET_DEFAULT_STD)


def build_judge(transformers, name, monkeypatch):
    """The judge of encoder `name` with random weights."""
    class_name, config, _ = JUDGES[name]
    config = getattr(transformers, f"{class_name}Config")(num_hidden_layers=LAYERS, **config)
    # Weights are drawn below; transformers' own initialisation would take seconds.
    monkeypatch.setattr(transformers.PreTrainedModel, "init_weights", lambda self: None)
    return randomise(getattr(transformers, f"{class_name}Model")(config))


def load_judges_weights(judge, name, side, folder, monkeypatch):
    """Our encoder with the weights of the judge, through a file as a user would place it."""
    path = folder / "weights" / f"{ENCODERS[name][0]}.safetensors"
    path.parent.mkdir()
    save_file(timm_state(judge, name), path)
    monkeypatch.setattr(release, "HERE", folder)

    original = timm.create_model

    def create_quickly(*args, **options):
        options.setdefault("weight_init", "skip")      # all weights come from the file
        options.setdefault("depth", LAYERS)
        return original(*args, **options)

    monkeypatch.setattr(timm, "create_model", create_quickly)
    encoder = load_encoder(name, side)
    path.unlink()                                      # pytest would keep up to 350 MB
    return encoder


@pytest.mark.parametrize("name, side, pixels", [
    ("dinov2-s", 592, 518), ("dinov2-s", 512, 448), ("dinov2-s", 256, 224),
    ("siglip2-b", 256, 256), ("siglip2-so400m", 256, 224), ("siglip2-so400m", 320, 280),
    ("mae-b", 256, 256)])
def test_encoder_equals_transformers(name, side, pixels, tmp_path, monkeypatch):
    # The names of version 4 differ.
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    class_name, _, tokens_before = JUDGES[name]
    judge = build_judge(transformers, name, monkeypatch)
    encoder = load_judges_weights(judge, name, side, tmp_path, monkeypatch)
    width, grid = judge.config.hidden_size, side // 16
    assert (encoder.grid, encoder.input_size, encoder.channels) == (grid, pixels, width)

    # In the file the last norm has random weights, which must not be used.
    norm = judge.post_layernorm if class_name == "SiglipVision" else judge.layernorm
    norm.weight.fill_(1)
    norm.bias.zero_()
    options = {}
    if class_name != "Dinov2WithRegisters":
        options["interpolate_pos_encoding"] = True
    if class_name == "ViTMAE":                         # patches stay in order
        options["noise"] = torch.arange(grid ** 2)[None].float()
    mean, std = statistics_of_judge(transformers, name)
    image_side = 288 if side == pixels else side       # resized for each of them
    images = torch.rand(1, 3, image_side, image_side)

    resized = F.interpolate(images, (pixels, pixels), mode="bicubic", antialias=False)
    x = (resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = judge(x, **options).last_hidden_state[:, tokens_before:]
    latents = encoder.encode(images)

    assert latents.shape == (1, width, grid, grid)
    assert 0.9 < expected.std() < 1.1
    tokens = latents.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - {"tiny", "random", "webssl-l"}))
def test_pixel_statistics_are_those_of_the_judges(name):
    transformers = pytest.importorskip("transformers")
    timm_name, _, ours = ENCODERS[name]
    config = timm.get_pretrained_cfg(timm_name)
    assert ours == (config.mean, config.std)
    assert ours == statistics_of_judge(transformers, name)


@pytest.mark.parametrize("grid, latent_grid", [(16, 16), (32, 32), (16, 32)])
def test_decoder_equals_diffusers(grid, latent_grid):
    # The first version with AutoencoderRAE.
    diffusers = pytest.importorskip("diffusers", minversion="0.40")
    torch.manual_seed(0)
    judge = randomise(diffusers.AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=16,
        encoder_num_hidden_layers=1, encoder_input_size=16 * grid, decoder_hidden_size=48,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        decoder_intermediate_size=80, patch_size=4))
    theirs = judge.decoder
    state = judge.state_dict()
    assert "encoder_mean" in state and "decoder.decoder_pos_embed" not in state

    ours = load_release(Decoder(64, grid, 4, 48, 2, 3, 80), state)

    # diffusers leaves base_size at 16, so that its positions are i * 16 / grid where the release
    # has i: right at grid 16 only. Hence its own table for base_size = grid.
    table = diffusers.models.embeddings.get_2d_sincos_pos_embed(
        48, grid, cls_token=True, extra_tokens=1, base_size=grid, output_type="pt")
    if grid == 16:
        assert torch.equal(theirs.decoder_pos_embed, table.float()[None])
    theirs.decoder_pos_embed.copy_(table)
    z = torch.randn(2, 64, latent_grid, latent_grid)
    tokens = z.flatten(2).transpose(1, 2)
    expected = theirs.unpatchify(theirs(tokens).logits)
    torch.testing.assert_close(ours(z), expected, atol=1e-5, rtol=0)


# 10^9 multiply-adds of one forward, c=768, grid 16, patch 16, as counted in the official models.
# The paper's own numbers leave out attention and the adaLN of the wide head.
GMACS = {"DiT-S": "6.20", "DiT-B": "23.3", "DiT-L": "81.1", "DiT-XL": "119.1",
         "DiTDH-S": "48.5", "DiTDH-B": "65.7", "DiTDH-L": "123.6", "DiTDH-XL": "161.6",
         "decoder-B": "23.3", "decoder-L": "81.3", "decoder-XL": "110.8"}


def no_autocast(*args, **options):
    """In place of torch.autocast, which the device "meta" does not have."""
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_of_one_forward(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", no_autocast)
    # Rightly, DiTs narrower than 768 warn.
    warnings.filterwarnings("ignore", message="--width .* is below the 768 latent channels")
    with torch.device("meta"):
        latents, t, y = torch.empty(1, 768, 16, 16), torch.empty(1), torch.empty(1).long()
        if name.startswith("decoder"):
            size = DECODER_SIZES[name.removeprefix("decoder-")]
            module = build_decoder({**size, "decoder_patch": 16}, 768, 16)
            inputs = (latents,)
        else:
            module = build_dit({**DIT_SIZES[name], "class_dropout": 0.0}, 768, 16, 1000)
            inputs = (latents, t, y)
        # With plain matmuls, attention counts, too.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*inputs)

    digits = len(GMACS[name].split(".")[1])
    billions = counter.get_total_flops() / 2e9
    assert f"{billions:.{digits}f}" == GMACS[name]
