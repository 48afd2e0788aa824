"""Our modules against other people's: encoders by transformers, decoder by diffusers, costs by the paper.

Random weights go from the judge to us, so nothing is downloaded; run: python -m pytest tests/test_judges.py
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

import model as model_module
from model import DECODER_SIZES, DIT_SIZES, ENCODERS, Decoder, Encoder, build_decoder, build_dit, load_release

# name: (class in transformers, its configuration, tokens before the patches), with the configurations of
# facebook/dinov2-with-registers-small, google/siglip2-base-patch16-256, google/siglip2-so400m-patch14-224
# (2 of its 27 layers) and facebook/vit-mae-base (but nothing masked); the rest is the class's default.
JUDGES = {
    "dinov2-s": ("Dinov2WithRegisters", dict(hidden_size=384, num_attention_heads=6, image_size=518,
                                             patch_size=14), 5),
    "siglip2-b": ("SiglipVision", dict(image_size=256, vision_use_head=False), 0),
    "siglip2-so400m": ("SiglipVision", dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16,
                                            num_hidden_layers=2, patch_size=14, vision_use_head=False), 0),
    "mae-b": ("ViTMAE", dict(mask_ratio=0.0), 1),
}
TIMM_NAMES = {                                                         # of transformers 5: of timm
    r"^embeddings\.patch_embedding(s\.projection)?\.": "patch_embed.proj.",
    r"^embeddings\.position_embedding(s|\.weight)$": "pos_embed",
    r"^embeddings\.register_tokens$": "reg_token", r"^embeddings\.cls_token$": "cls_token",
    r"^(encoder\.)?layers?\.": "blocks.", r"^(post_)?layernorm\.": "norm.",
    r"\.(layer_norm1|layernorm_before)\.": ".norm1.", r"\.(layer_norm2|layernorm_after)\.": ".norm2.",
    r"\.(attention|self_attn)\.(o|out)_proj\.": ".attn.proj.", r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
}


@torch.no_grad()
def shake(module):
    """Random weights everywhere, of a size at which every one of them moves the output."""
    for name, p in module.named_parameters():
        if p.ndim == 1:                                                # norms and layer scales around 1
            p.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
        elif "token" in name or "position" in name:
            p.normal_(0.0, 0.5)
        else:                                                          # large q, k: attention is not uniform
            p.normal_(0.0, (2.0 if re.search("[qk]_proj|to_[qk]", name) else 1.0) * p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def timm_state(judge, name):
    """The judge's weights in the layout of the file that timm has of encoder `name`."""
    state = {}
    for key, value in judge.state_dict().items():
        for old, new in TIMM_NAMES.items():
            key = re.sub(old, new, key)
        state[key] = value
    for key in [k for k in state if ".q_proj." in k]:
        qkv = torch.cat([state.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
        state[re.sub(r"\.(attention|self_attn)\.q_proj\.", ".attn.qkv.", key)] = qkv
    state["pos_embed"] = state["pos_embed"].view(1, -1, qkv.shape[0] // 3)
    if "reg_token" in state:                                           # timm's table is of patches only
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
        del state["embeddings.mask_token"]
    with torch.device("meta"):                                         # a head that the latents never see
        head = timm.create_model(ENCODERS[name][0], num_classes=0, depth=0).state_dict()
    return {**{k: torch.zeros(v.shape) for k, v in head.items() if k.startswith("attn_pool.")}, **state}


def pixel_statistics(constants, name):
    """Mean and standard deviation that the image processor of the judge of encoder `name` has."""
    family = "STANDARD" if "siglip" in name else "DEFAULT"
    return tuple(tuple(getattr(constants, f"IMAGENET_{family}_{which}")) for which in ("MEAN", "STD"))


@pytest.mark.parametrize("name, side, pixels", [
    ("dinov2-s", 592, 518), ("dinov2-s", 512, 448), ("dinov2-s", 256, 224), ("siglip2-b", 256, 256),
    ("siglip2-so400m", 256, 224), ("siglip2-so400m", 320, 280), ("mae-b", 256, 256)])
def test_encoder_equals_transformers(name, side, pixels, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", minversion="5")         # the names of version 4 differ
    torch.manual_seed(0)
    kind, config, before = JUDGES[name]
    config = getattr(transformers, f"{kind}Config")(**config)
    monkeypatch.setattr(transformers.PreTrainedModel, "init_weights", lambda self: None)     # saves seconds
    judge = shake(getattr(transformers, f"{kind}Model")(config))
    path = tmp_path / "weights" / f"{ENCODERS[name][0]}.safetensors"
    path.parent.mkdir()
    save_file(timm_state(judge, name), path)
    monkeypatch.setattr(model_module, "HERE", tmp_path)
    create, fewer = timm.create_model, dict(depth=2) if name == "siglip2-so400m" else {}
    monkeypatch.setattr(timm, "create_model",                          # all weights come from the file
                        lambda *args, **how: create(*args, **{"weight_init": "skip", **fewer, **how}))
    encoder = Encoder(name, side)
    path.unlink()                                                      # pytest would keep up to 350 MB
    assert (encoder.grid, encoder.input_size, encoder.channels) == (side // 16, pixels, config.hidden_size)

    norm = judge.post_layernorm if kind == "SiglipVision" else judge.layernorm
    norm.weight.fill_(1), norm.bias.zero_()                            # in the file they are random: not used
    how = {} if kind == "Dinov2WithRegisters" else dict(interpolate_pos_encoding=True)
    if kind == "ViTMAE":
        how["noise"] = torch.arange((side // 16) ** 2)[None].float()   # patches stay in order
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in pixel_statistics(transformers.image_utils, name))
    images = torch.rand(1, 3, *[288 if side == pixels else side] * 2)  # resized for each
    x = (F.interpolate(images, (pixels, pixels), mode="bicubic", antialias=False) - mean) / std
    expected = judge(x, **how).last_hidden_state[:, before:]
    z = encoder.encode(images)
    assert z.shape == (1, config.hidden_size, side // 16, side // 16) and 0.9 < expected.std() < 1.1
    torch.testing.assert_close(z.flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=0)


def test_pixel_statistics_are_those_of_the_judges():
    constants = pytest.importorskip("transformers").image_utils
    for name, (timm_name, _, ours) in ENCODERS.items():
        if name in ("tiny", "random", "webssl-l"):                     # not timm's
            continue
        theirs = timm.get_pretrained_cfg(timm_name)
        assert ours == (theirs.mean, theirs.std) == pixel_statistics(constants, name)


@pytest.mark.parametrize("grid, latent_grid", [(16, 16), (32, 32), (16, 32)])
def test_decoder_equals_diffusers(grid, latent_grid):
    diffusers = pytest.importorskip("diffusers", minversion="0.40")    # the first with AutoencoderRAE
    judge = diffusers.AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=16, encoder_num_hidden_layers=1,
        encoder_input_size=16 * grid, decoder_hidden_size=48, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3, decoder_intermediate_size=80, patch_size=4)
    torch.manual_seed(0)
    theirs = shake(judge).decoder
    state = judge.state_dict()                                         # with an encoder, without the table
    assert "encoder_mean" in state and "decoder.decoder_pos_embed" not in state
    ours = load_release(Decoder(64, grid, 4, 48, 2, 3, 80), state)
    # diffusers leaves base_size at 16, so that its positions are i * 16 / grid where the release has i: right
    # at grid 16 only. Hence its own table for base_size = grid, which changes nothing at grid 16.
    table = diffusers.models.embeddings.get_2d_sincos_pos_embed(
        48, grid, cls_token=True, extra_tokens=1, base_size=grid, output_type="pt")
    assert torch.equal(theirs.decoder_pos_embed, table.float()[None]) or grid != 16
    theirs.decoder_pos_embed.copy_(table)
    z = torch.randn(2, 64, latent_grid, latent_grid)
    expected = theirs.unpatchify(theirs(z.flatten(2).transpose(1, 2)).logits)
    torch.testing.assert_close(ours(z), expected, atol=1e-5, rtol=0)


# 10^9 multiply-adds of one forward, c=768, grid 16, patch 16, as counted in the official models; the paper's
# own numbers leave out attention and the adaLN of the wide head.
GMACS = {"DiT-S": "6.20", "DiT-B": "23.3", "DiT-L": "81.1", "DiT-XL": "119.1",
         "DiTDH-S": "48.5", "DiTDH-B": "65.7", "DiTDH-L": "123.6", "DiTDH-XL": "161.6",
         "decoder-B": "23.3", "decoder-L": "81.3", "decoder-XL": "110.8"}


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_of_one_forward(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: contextlib.nullcontext())    # meta has none
    family, size = name.split("-")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # DiTs narrower than 768 warn, rightly
        inputs = torch.empty(1, 768, 16, 16), torch.empty(1), torch.empty(1, dtype=torch.long)
        if family == "decoder":
            module, inputs = build_decoder({**DECODER_SIZES[size], "decoder_patch": 16}, 768, 16), inputs[:1]
        else:
            module = build_dit({**DIT_SIZES[name], "class_dropout": 0.0}, 768, 16, 1000)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:    # all of it counts
            module(*inputs)
    digits = len(GMACS[name].split(".")[1])
    assert f"{counter.get_total_flops() / 2e9:.{digits}f}" == GMACS[name]
