"""Encoder, decoder, RAE, DiT, DiTDH and flow matching. Run: python -m pytest tests/test_model.py"""
import importlib
import math
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import model as model_module
from model import (DECODER_SIZES, DIT_SIZES, RAE, Decoder, DiT, DiTDH, Encoder, build_dit, flow_matching_loss,
                   load_release, time_shift)
from shapes import Object, Scene

SMALL = dict(in_channels=8, grid=4, width=32, depth=2, heads=2, num_classes=5)
HEAD = dict(head_width=48, head_depth=2, head_heads=3)


def small(head, **changes):
    return DiTDH(**{**SMALL, **HEAD, **changes}) if head else DiT(**{**SMALL, **changes})


def shake(module):
    """Random weights everywhere: zero-initialised outputs would hide what goes on before them."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return module


# Millions of parameters at c=768, grid 16.              Source: reference table of the official models, [RUN]
COUNTS = {"DiT-S": 33.65, "DiT-B": 131.88, "DiT-L": 459.92, "DiT-XL": 677.25,
          "DiTDH-S": 196.46, "DiTDH-B": 294.30, "DiTDH-L": 621.74, "DiTDH-XL": 838.68}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_paper(name):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # DiTs narrower than 768 warn, rightly
        model = build_dit({**DIT_SIZES[name], "class_dropout": 0.1}, 768, 16, 1000)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == COUNTS[name]


@pytest.mark.parametrize("name, count", [("B", 86.44), ("L", 304.15), ("XL", 415.35)])
def test_decoder_counts_of_the_paper(name, count):
    size = {k.removeprefix("decoder_"): v for k, v in DECODER_SIZES[name].items()}
    with torch.device("meta"):
        decoder = Decoder(768, 16, 16, **size)
        wide = Decoder(768, 16, 32, **size)
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 2) == count
    if name == "XL":
        assert round(sum(p.numel() for p in wide.parameters()) / 1e6, 2) == 418.01
        assert len(decoder.state_dict()) == 456


def test_released_ditdh_xl_has_382_tensors():
    with torch.device("meta"):
        state = build_dit({**DIT_SIZES["DiTDH-XL"], "class_dropout": 0.1}, 768, 16, 1000).state_dict()
    assert len(state) == 382
    assert state["blocks.29.mlp.w12.weight"].shape == (10922, 2048)
    assert state["dec_feat_rope.freqs_cos"].shape == (256, 128)


@pytest.mark.parametrize("head", [False, True])
def test_output_is_zero_at_initialisation(head):
    x, t, y = torch.randn(3, 8, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])
    assert small(head)(x, t, y).abs().max() == 0


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("changes", [{}, dict(grid=5), dict(width=144, heads=2), dict(in_channels=3, grid=1)])
def test_every_parameter_gets_a_gradient_and_the_shape_is_kept(head, changes):
    model = shake(small(head, **changes))
    x = torch.randn(2, model.in_channels, model.grid, model.grid)
    out = model(x, torch.rand(2), torch.tensor([1, 2]))
    assert out.shape == x.shape and out.dtype == torch.float32
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert not model.pos_embed.requires_grad and not model.t_embedder.W.requires_grad


@pytest.mark.parametrize("head", [False, True])
def test_images_of_a_batch_do_not_mix(head):
    model = shake(small(head)).eval()
    x, t, y = torch.randn(4, 8, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 5])
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t, y), alone, atol=1e-5, rtol=1e-5)


def test_rope_depends_on_relative_position_only():
    rope = model_module.RoPE(16, 6)
    q, k = (torch.randn(16).expand(1, 1, 36, 16) for _ in range(2))
    scores = (rope(q) @ rope(k).transpose(-1, -2))[0, 0].view(6, 6, 6, 6)          # row, column of q; of k
    torch.testing.assert_close(scores[1, 1, 3, 2], scores[2, 3, 4, 4], atol=1e-4, rtol=1e-4)
    assert (scores[1, 1, 3, 2] - scores[1, 1, 2, 3]).abs() > 1e-4                  # row and column differ


def test_label_dropout_only_in_training():
    table = model_module.LabelEmbedding(5, 8, 0.5)
    y = torch.ones(4000, dtype=torch.long)
    null = table.embedding_table.weight[5]
    dropped = (table.train()(y) == null).all(1).float().mean()
    assert 0.45 < dropped < 0.55
    assert not (table.eval()(y) == null).all(1).any()


def test_width_below_the_latent_channels_warns_of_theorem_1():
    with pytest.warns(UserWarning, match="Theorem 1.*2510.11690"):
        DiT(64, 2, 32, 1, 2, 3)
    with pytest.warns(UserWarning, match="--head_width 32 is below the 64"):
        DiTDH(64, 2, 32, 1, 2, 32, 1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiTDH(64, 2, 32, 1, 2, 64, 1, 2, 3)            # a narrow backbone is fine: the head has the width


def test_bad_widths_are_named():
    with pytest.raises(ValueError, match=r"--width 1150 must be a multiple of --heads 16.*try --width 1152"):
        DiT(4, 2, 1150, 1, 16, 3)
    with pytest.raises(ValueError, match=r"--head_width 50 must be a multiple of --head_heads 4"):
        DiTDH(4, 2, 32, 1, 2, 50, 1, 4, 3)
    with pytest.raises(ValueError, match=r"--decoder_width 30 must be a multiple of --decoder_heads 4"):
        Decoder(4, 2, 4, 30, 1, 4, 8)


# ---------------------------------------------------------------------------------- flow matching
def test_shift_is_monotone_fixes_0_and_1_and_matches_the_release():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for dim in (1000, 4096, 5120, 196_608):
        shifted = time_shift(t, dim)
        assert shifted[0] == 0 and abs(shifted[-1] - 1) < 1e-12 and (shifted.diff() > 0).all()
    assert torch.equal(time_shift(t, 4096), t)
    a = math.sqrt(196_608 / 4096)                                      # 6.93, DINOv2-B at 256 px
    torch.testing.assert_close(time_shift(t, 196_608)[50].item(), a * 0.5 / (1 + (a - 1) * 0.5))
    torch.testing.assert_close(time_shift(t, 5120, base=128), time_shift(t, 40 * 4096))
    times = time_shift(torch.randn(100_000).sigmoid(), 196_608)        # logit-normal, as in the papers
    assert abs(times.median() - 0.875) < 0.01 and abs(times.quantile(0.1) - 0.66) < 0.01     # facts sheet


def test_path_ends_and_velocity_by_finite_differences():
    x0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    seen = {}

    def spy(x, t, y):
        seen[t[0].item()] = x
        return torch.zeros_like(x)

    for t in (0.0, 1.0, 0.3 - 1e-4, 0.3 + 1e-4):
        flow_matching_loss(spy, x0, None, torch.full((2,), t, dtype=torch.float64), eps)
    torch.testing.assert_close(seen[0.0], x0)
    torch.testing.assert_close(seen[1.0], eps)
    slope = (seen[0.3 + 1e-4] - seen[0.3 - 1e-4]) / 2e-4
    assert flow_matching_loss(lambda x, t, y: slope, x0, None, torch.full((2,), 0.3), eps).max() < 1e-12


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = small(True).train()
    x0, y, eps, t = torch.randn(4, 8, 4, 4), torch.arange(4), torch.randn(4, 8, 4, 4), torch.rand(4)
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = flow_matching_loss(model, x0, y, t, eps).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# ---------------------------------------------------------------------------------- encoder, decoder, RAE
@pytest.fixture(scope="module")
def tiny():
    return Encoder("tiny")


def test_tiny_encoder_is_frozen_and_normalised(tiny):
    assert (tiny.channels, tiny.grid) == (192, 4)
    tiny.train()
    assert not tiny.training and not tiny.backbone.blocks[0].training
    assert not any(p.requires_grad for p in tiny.parameters())
    z = tiny.encode(torch.rand(2, 3, 64, 64))
    assert z.shape == (2, 192, 4, 4) and not z.requires_grad
    assert z.mean(1).abs().max() < 1e-5 and (z.var(1, unbiased=False) - 1).abs().max() < 1e-2
    assert (model_module.HERE / "assets/tiny_encoder.safetensors").stat().st_size <= 8e6


def test_descriptor_that_the_tiny_encoder_learned_from():
    """Two objects on grey: a square at (24, 40), nearest to patch (2, 1), and a circle at (56, 8)."""
    make = importlib.import_module("assets.make_tiny_encoder")
    grey = ((128, 128, 128),) * 2
    square, turned = (Scene([Object("square", "red", "large", (0.375, 0.625), rotation=turn),
                             Object("circle", "blue", "small", (0.875, 0.125))], (grey, grey)).render(64)
                      for turn in (0.2, 0.5))
    widths = [width for width, _ in make.PARTS.values()]
    found = dict(zip(make.PARTS, np.split(make.descriptor(square), np.cumsum(widths)[:-1], axis=1)))
    assert [v.shape for v in found.values()] == [(16, width) for width in widths]
    near, far = 9, 3                                                   # patches (2, 1) and (0, 3)
    for patch, x, y in ((near, 24, 40), (far, 56, 8)):
        angle = 2 * np.pi * np.outer((x, y), 1 / np.array(make.WAVES)).ravel()
        np.testing.assert_allclose(found["centre"][patch], [*np.cos(angle), *np.sin(angle)], atol=0.08)
    points = np.arange(17, 32, 2) - 24, np.arange(33, 48, 2) - 40      # of patch (2, 1), from the centre
    c, s, half = np.cos(0.2), np.sin(0.2), np.sqrt(np.pi) / 2 * 0.175 * 64
    x, y = np.meshgrid(*points)
    outside = np.maximum(abs(c * x + s * y), abs(c * y - s * x)) - half         # exact beside the edges
    distance = found["distance"][near].reshape(8, 8)
    np.testing.assert_allclose(distance, np.tanh(outside / make.RANGE), atol=0.12)
    folds, rotation = found["folds"], found["rotation"].reshape(16, 2, 3)
    assert folds[near, 1] > 0.4 and max(*folds[near, [0, 2]], *folds[far]) < 0.1     # a square; a circle
    after = make.descriptor(turned)[:, 76:82].reshape(16, 2, 3)
    turn = np.angle(complex(*after[near, :, 1]) / complex(*rotation[near, :, 1]))
    assert abs(turn - 4 * 0.3) < 0.1
    for patch, colour, radius in ((near, (222, 38, 42), 0.175), (far, (38, 78, 218), 0.13)):
        wanted = np.tile(np.array(colour) / 127.5 - 1, 4)
        np.testing.assert_allclose(found["colour"][patch], wanted, atol=0.05)
        assert abs(found["radius"][patch, 0] - np.log(64 * radius)) < 0.05
    np.testing.assert_allclose(found["ground"], 128 / 127.5 - 1, atol=0.02)
    assert np.isfinite(make.descriptor(np.full((64, 64, 3), 128, np.uint8))).all()      # nothing there


def test_tiny_encoder_takes_other_sizes():
    z = Encoder("tiny", 96).encode(torch.rand(1, 3, 96, 96))
    assert z.shape == (1, 192, 6, 6)
    with pytest.raises(ValueError, match="--size 70 must be a multiple of 16.*try --size 64"):
        Encoder("tiny", 70)


def test_timm_encoder_from_a_file_placed_by_hand(tmp_path, monkeypatch):
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    monkeypatch.setattr(model_module, "HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"hf.co/timm/{name} at weights/{name}.safetensors"):
        Encoder("dinov2-s", 64)
    reference = timm.create_model(name, pretrained=False, num_classes=0).eval()
    (tmp_path / "weights").mkdir()
    save_file(reference.state_dict(), tmp_path / "weights" / f"{name}.safetensors")
    encoder = Encoder("dinov2-s", 592)                                 # 518 px in: the model's own grid of 37
    assert (encoder.grid, encoder.channels, encoder.input_size) == (37, 384, 518)
    x = torch.rand(1, 3, 518, 518)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (encoder.mean, encoder.std))
    tokens = reference.get_intermediate_layers((x - mean) / std, n=1)[0]       # before the norm, patches only
    expected = torch.nn.functional.layer_norm(tokens, (384,), eps=1e-6)
    torch.testing.assert_close(encoder.encode(x).flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=1e-4)
    assert Encoder("dinov2-s", 64).encode(torch.rand(1, 3, 64, 64)).shape == (1, 384, 4, 4)      # sees 56 px


@pytest.mark.parametrize("head", [[], [24, 1, 2]])
def test_prediction_of_x0_gives_the_velocity_towards_it(head):
    model = (DiTDH if head else DiT)(12, 4, 16, 1, 2, *head, 5).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, y = torch.randn(3, 12, 4, 4), torch.tensor([0, 3, 5])
    t = torch.tensor([1.0, 0.3, 0.01])
    x0, model.prediction = model(x, t, y), "x0"                        # what a "v" model's layers give
    v = model(x, t, y)
    torch.testing.assert_close(v, (x - x0) / torch.tensor([1.0, 0.3, 0.05]).view(3, 1, 1, 1))
    torch.testing.assert_close((x - t.view(3, 1, 1, 1) * v)[:2], x0[:2])     # an Euler step to t=0 ends there
    assert x0.std() > 0.1


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="--encoder vgg99 is neither one of tiny"):
        Encoder("vgg99")


def test_decoder_patch_is_free_and_other_grids_are_resized():
    decoder = Decoder(8, 4, 6, 32, 1, 2, 64)
    assert decoder(torch.randn(2, 8, 4, 4)).shape == (2, 3, 24, 24)
    assert decoder(torch.randn(2, 8, 2, 2)).shape == (2, 3, 24, 24)


def test_rae_normalises_and_inverts(tiny):
    decoder = Decoder(192, 4, 16, 32, 1, 2, 64)
    mean, var = torch.randn(192, 4, 4), torch.rand(192, 4, 4) + 0.1
    rae, plain, x = RAE(tiny, decoder, mean, var), RAE(tiny, decoder), torch.rand(2, 3, 64, 64)
    z = tiny.encode(x)
    torch.testing.assert_close(plain.encode(x), z)
    torch.testing.assert_close(rae.encode(x), (z - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(rae.decode(rae.encode(x)), plain.decode(z), atol=1e-4, rtol=1e-4)
    assert plain.decode(100 * z).min() >= 0 and plain.decode(100 * z).max() <= 1
    only_var = RAE(tiny, decoder, None, var)                           # the released DINOv2-B statistics
    torch.testing.assert_close(only_var.encode(x), z / (var + 1e-5).sqrt())
    by_name = RAE("tiny", decoder, mean, var)
    torch.testing.assert_close(by_name.decode(z), rae.decode(z))
    with pytest.raises(ValueError, match="pass Encoder"):
        by_name.encode(x)


# ---------------------------------------------------------------------------------- loading
def test_load_release_takes_all_or_nothing(tmp_path):
    source, target = shake(small(True)), small(True)
    torch.save({"ema": source.state_dict(), "step": 3}, tmp_path / "a.pt")
    load_release(target, tmp_path / "a.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    load_release(target, {f"module.{k}": v for k, v in source.state_dict().items()})
    bad = dict(source.state_dict(), extra=torch.zeros(1), pos_embed=torch.zeros(1, 9, 32))
    bad.pop("t_embedder.W")
    before = target.state_dict()["blocks.0.attn.qkv.weight"].clone()
    rows = r"(?s)missing t_embedder.W.*unexpected extra.*pos_embed: shape \(1, 9, 32\)"
    with pytest.raises(ValueError, match=rows):
        load_release(target, {k: v + 1 for k, v in bad.items()})
    assert torch.equal(before, target.state_dict()["blocks.0.attn.qkv.weight"])
