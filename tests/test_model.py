"""Encoder, decoder, RAE, DiT, DiTDH and flow matching. Run: python -m pytest tests/test_model.py"""
import argparse
import contextlib
import copy
import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.functional import normalize as torchvision_normalize

import release
from conftest import ROOT
from model import (
    DECODER_SIZES,
    DIT_SIZES,
    RAE,
    Decoder,
    DiT,
    DiTDH,
    LabelEmbedding,
    Normalise,
    RoPE,
    build_decoder,
    build_dit,
    flow_matching_loss,
    sample_times,
    time_shift,
    time_weight,
)
from runtime import LossByTime
from sample import SOLVERS, cfg, sampling_times

SMALL = dict(in_channels=8, grid=4, width=32, depth=2, heads=2, num_classes=5)
SMALL_HEAD = dict(head_width=48, head_depth=2, head_heads=3)


def small_model(head, **changes):
    """A small DiTDH if head, else a small DiT, with some of its arguments changed."""
    if head:
        return DiTDH(**{**SMALL, **SMALL_HEAD, **changes})
    return DiT(**{**SMALL, **changes})


def randomise(module):
    """Random weights everywhere: zero-initialised outputs would hide what comes before them."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def millions_of_parameters(module):
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


def dit_of_the_paper(name):
    """A DiT of the paper's size for DINOv2-B at 256 px, without memory for its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                # DiTs narrower than 768 warn, rightly
        return build_dit({**DIT_SIZES[name], "class_dropout": 0.1}, 768, 16, 1000)


# ---------------------------------------------------------------------------- sizes of the paper
# Millions of parameters at c=768, grid 16, counted in the official models.
DIT_PARAMETERS = {"DiT-S": 33.65, "DiT-B": 131.88, "DiT-L": 459.92, "DiT-XL": 677.25,
                  "DiTDH-S": 196.46, "DiTDH-B": 294.30, "DiTDH-L": 621.74, "DiTDH-XL": 838.68}


@pytest.mark.parametrize("name", DIT_PARAMETERS)
def test_parameter_counts_of_the_paper(name):
    model = dit_of_the_paper(name)
    assert millions_of_parameters(model) == DIT_PARAMETERS[name]


@pytest.mark.parametrize("size, count", [("B", 86.44), ("L", 304.15), ("XL", 415.35)])
def test_decoder_counts_of_the_paper(size, count):
    with torch.device("meta"):
        decoder = build_decoder({**DECODER_SIZES[size], "decoder_patch": 16}, 768, 16)
    assert millions_of_parameters(decoder) == count


def test_decoder_xl_as_released():
    with torch.device("meta"):
        decoder = build_decoder({**DECODER_SIZES["XL"], "decoder_patch": 16}, 768, 16)
        upsampling = build_decoder({**DECODER_SIZES["XL"], "decoder_patch": 32}, 768, 16)
    assert millions_of_parameters(upsampling) == 418.01
    assert len(decoder.state_dict()) == 456


def test_released_ditdh_xl_has_382_tensors():
    state = dit_of_the_paper("DiTDH-XL").state_dict()
    assert len(state) == 382
    assert state["blocks.29.mlp.w12.weight"].shape == (10922, 2048)
    assert state["dec_feat_rope.freqs_cos"].shape == (256, 128)


# ---------------------------------------------------------------------------- DiT and DiTDH
@pytest.mark.parametrize("head", [False, True])
def test_output_is_zero_at_initialisation(head):
    model = small_model(head)
    output = model(torch.randn(3, 8, 4, 4), torch.rand(3), torch.tensor([0, 4, 5]))
    assert output.abs().max() == 0


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("changes", [
    {}, dict(grid=5), dict(width=144, heads=2), dict(in_channels=3, grid=1)])
def test_every_parameter_gets_a_gradient_and_the_shape_is_kept(head, changes):
    model = randomise(small_model(head, **changes))
    x = torch.randn(2, model.in_channels, model.grid, model.grid)

    output = model(x, torch.rand(2), torch.tensor([1, 2]))
    output.square().mean().backward()

    assert output.shape == x.shape and output.dtype == torch.float32
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not model.pos_embed.requires_grad and not model.t_embedder.W.requires_grad


@pytest.mark.parametrize("head", [False, True])
def test_images_of_a_batch_do_not_mix(head):
    model = randomise(small_model(head)).eval()
    x = torch.randn(4, 8, 4, 4)
    t = torch.rand(4)
    y = torch.tensor([0, 1, 2, 5])

    together = model(x, t, y)
    alone = torch.cat([model(x[[i]], t[[i]], y[[i]]) for i in range(4)])

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_rope_depends_on_relative_position_only():
    rope = RoPE(16, 6)
    q = torch.randn(16).expand(1, 1, 36, 16)           # the same query and key at every position
    k = torch.randn(16).expand(1, 1, 36, 16)

    scores = rope(q) @ rope(k).transpose(-1, -2)
    scores = scores[0, 0].view(6, 6, 6, 6)             # row and column of q, row and column of k

    two_down_one_right = scores[1, 1, 3, 2]
    torch.testing.assert_close(two_down_one_right, scores[2, 3, 4, 4], atol=1e-4, rtol=1e-4)
    one_down_two_right = scores[1, 1, 2, 3]
    assert (two_down_one_right - one_down_two_right).abs() > 1e-4


def test_label_dropout_only_in_training():
    embedding = LabelEmbedding(5, 8, dropout=0.5)
    null = embedding.embedding_table.weight[5]
    y = torch.ones(4000, dtype=torch.long)

    in_training = (embedding.train()(y)[:, 0] == null).all(1)
    in_evaluation = (embedding.eval()(y)[:, 0] == null).all(1)

    assert 0.45 < in_training.float().mean() < 0.55
    assert not in_evaluation.any()


@pytest.mark.parametrize("head", [False, True])
def test_prediction_of_x0_gives_the_velocity_towards_it(head):
    small = dict(in_channels=12, width=16, depth=1)
    if head:
        small |= dict(head_width=24, head_depth=1, head_heads=2)
    model = small_model(head, **small).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x_t = torch.randn(3, 12, 4, 4)
    t = torch.tensor([1.0, 0.3, 0.01])
    y = torch.tensor([0, 3, 5])

    x0 = model(x_t, t, y)                              # what the layers give, since this is "v"
    model.prediction = "x0"
    v = model(x_t, t, y)

    at_least_005 = torch.tensor([1.0, 0.3, 0.05]).view(3, 1, 1, 1)
    torch.testing.assert_close(v, (x_t - x0) / at_least_005)
    one_euler_step_to_0 = x_t - t.view(3, 1, 1, 1) * v
    torch.testing.assert_close(one_euler_step_to_0[:2], x0[:2])
    assert x0.std() > 0.1


def test_width_below_the_latent_channels_warns_of_theorem_1():
    with pytest.warns(UserWarning, match="Theorem 1.*2510.11690"):
        DiT(64, 2, 32, 1, 2, 3)
    with pytest.warns(UserWarning, match="--head_width 32 is below the 64"):
        DiTDH(64, 2, 32, 1, 2, 32, 1, 2, 3)


def test_narrow_backbone_of_a_wide_head_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiTDH(64, 2, 32, 1, 2, 64, 1, 2, 3)


def test_bad_widths_are_named():
    message = r"--width 1150 must be a multiple of --heads 16.*try --width 1152"
    with pytest.raises(ValueError, match=message):
        DiT(4, 2, 1150, 1, 16, 3)
    with pytest.raises(ValueError, match="--head_width 50 must be a multiple of --head_heads 4"):
        DiTDH(4, 2, 32, 1, 2, 50, 1, 4, 3)
    message = "--decoder_width 30 must be a multiple of --decoder_heads 4"
    with pytest.raises(ValueError, match=message):
        Decoder(4, 2, 4, 30, 1, 4, 8)


# ---------------------------------------------------------------------------- flow matching
@pytest.mark.parametrize("dim", [1000, 4096, 5120, 196_608])
def test_shift_is_monotone_and_fixes_0_and_1(dim):
    shifted = time_shift(torch.linspace(0, 1, 101, dtype=torch.float64), dim)
    assert shifted[0] == 0
    assert abs(shifted[-1] - 1) < 1e-12
    assert (shifted.diff() > 0).all()


def test_shift_matches_the_release():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(time_shift(t, 4096), t)
    a = math.sqrt(196_608 / 4096)                      # 6.93, DINOv2-B at 256 px
    at_one_half = time_shift(t, 196_608)[50].item()
    torch.testing.assert_close(at_one_half, a * 0.5 / (1 + (a - 1) * 0.5))
    torch.testing.assert_close(time_shift(t, 5120, base=128), time_shift(t, 40 * 4096))


def test_quantiles_of_the_papers_times():
    logit_normal = torch.randn(100_000).sigmoid()
    times = time_shift(logit_normal, 196_608)
    assert abs(times.median() - 0.875) < 0.01
    assert abs(times.quantile(0.1) - 0.66) < 0.01


def test_path_ends_and_velocity_by_finite_differences():
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    eps = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def x_at(t):
        """The input that the loss gives to the model at time t."""
        inputs = []

        def model(x_t, t, y):
            inputs.append(x_t)
            return torch.zeros_like(x_t)

        flow_matching_loss(model, x0, None, torch.full((2,), t, dtype=torch.float64), eps)
        return inputs[0]

    torch.testing.assert_close(x_at(0.0), x0)
    torch.testing.assert_close(x_at(1.0), eps)

    slope = (x_at(0.3 + 1e-4) - x_at(0.3 - 1e-4)) / 2e-4
    loss = flow_matching_loss(lambda x, t, y: slope, x0, None, torch.full((2,), 0.3), eps)
    assert loss.max() < 1e-12


def test_overfits_one_batch():
    model = small_model(head=True).train()
    x0 = torch.randn(4, 8, 4, 4)
    eps = torch.randn(4, 8, 4, 4)
    t = torch.rand(4)
    y = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    losses = []
    for _ in range(150):
        loss = flow_matching_loss(model, x0, y, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.05 * losses[0]


# ---------------------------------------------------------------------------- encoder, decoder, RAE
@pytest.fixture(scope="module")
def tiny_encoder():
    return release.load_encoder("tiny")


def test_tiny_encoder_is_frozen(tiny_encoder):
    tiny_encoder.train()
    assert not tiny_encoder.training
    assert not tiny_encoder.backbone.blocks[0].training
    assert not any(p.requires_grad for p in tiny_encoder.parameters())


def test_tiny_encoder_is_normalised(tiny_encoder):
    z = tiny_encoder.encode(torch.rand(2, 3, 64, 64))
    assert (tiny_encoder.channels, tiny_encoder.grid) == (192, 4)
    assert z.shape == (2, 192, 4, 4) and not z.requires_grad
    assert z.mean(1).abs().max() < 1e-5
    assert (z.var(1, unbiased=False) - 1).abs().max() < 1e-2


def test_tiny_encoder_is_a_small_file():
    assert (ROOT / "assets/tiny_encoder.safetensors").stat().st_size <= 8e6


def test_decoder_patch_is_free_and_other_grids_are_resized():
    decoder = Decoder(8, 4, 6, 32, 1, 2, 64)
    assert decoder.image_size == 24
    assert decoder(torch.randn(2, 8, 4, 4)).shape == (2, 3, 24, 24)
    assert decoder(torch.randn(2, 8, 2, 2)).shape == (2, 3, 24, 24)


def test_rae_normalises_and_inverts(tiny_encoder):
    decoder = Decoder(192, 4, 16, 32, 1, 2, 64)
    mean = torch.randn(192, 4, 4)
    var = torch.rand(192, 4, 4) + 0.1
    rae = RAE(tiny_encoder, decoder, mean, var)
    plain = RAE(tiny_encoder, decoder)
    images = torch.rand(2, 3, 64, 64)

    z = tiny_encoder.encode(images)
    latents = rae.encode(images)

    torch.testing.assert_close(plain.encode(images), z)
    torch.testing.assert_close(latents, (z - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(rae.decode(latents), plain.decode(z), atol=1e-4, rtol=1e-4)


def test_rae_without_a_mean_as_released_for_dinov2_b(tiny_encoder):
    decoder = Decoder(192, 4, 16, 32, 1, 2, 64)
    var = torch.rand(192, 4, 4) + 0.1
    rae = RAE(tiny_encoder, decoder, None, var)
    images = torch.rand(2, 3, 64, 64)
    z = tiny_encoder.encode(images)
    torch.testing.assert_close(rae.encode(images), z / (var + 1e-5).sqrt())


def test_decoded_images_lie_between_0_and_1(tiny_encoder):
    rae = RAE(tiny_encoder, Decoder(192, 4, 16, 32, 1, 2, 64))
    images = rae.decode(100 * torch.randn(2, 192, 4, 4))
    assert images.min() >= 0 and images.max() <= 1


def test_rae_without_an_encoder_decodes_only(tiny_encoder):
    decoder = Decoder(192, 4, 16, 32, 1, 2, 64)
    mean = torch.randn(192, 4, 4)
    var = torch.rand(192, 4, 4) + 0.1
    rae = RAE(tiny_encoder, decoder, mean, var)
    statistics = release.pixel_statistics("tiny")
    decoding_only = RAE(None, decoder, mean, var, pixel_statistics=statistics)
    latents = torch.randn(2, 192, 4, 4)

    torch.testing.assert_close(decoding_only.decode(latents), rae.decode(latents))
    with pytest.raises(ValueError, match="only decodes, as it has no encoder"):
        decoding_only.encode(torch.rand(2, 3, 64, 64))


def test_rae_leaves_networks_that_others_share_where_they_are(tiny_encoder):
    """The device meta stands for a GPU. Statistics come from a checkpoint, on the CPU."""
    encoder = copy.deepcopy(tiny_encoder).to("meta")
    decoder = Decoder(192, 4, 16, 32, 1, 2, 64).to("meta")
    rae = RAE(encoder, decoder, torch.zeros(192, 4, 4), torch.ones(192, 4, 4))
    tensors = [*rae.parameters(), *rae.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# ---------------------------------------------------------------------------- for GPUs
def test_pixels_are_normalised_as_by_torchvision():
    images = torch.rand(2, 3, 8, 8)
    statistics = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    ours = Normalise(*statistics)
    assert torch.equal(ours(images), torchvision_normalize(images, *statistics))
    assert ours.state_dict() == {}                     # no checkpoint changes


def test_encoding_reads_no_value_back_from_the_device(tiny_encoder):
    """On the device meta there are none to read: it would raise."""
    encoder = copy.deepcopy(tiny_encoder).to("meta")
    assert encoder.encode(torch.rand(2, 3, 64, 64, device="meta")).shape == (2, 192, 4, 4)


@pytest.mark.parametrize("head", [False, True], ids=["DiT", "DiTDH"])
def test_tokens_lie_together_in_memory(head):
    model = small_model(head)
    are_together = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: are_together.append(
            inputs[0].is_contiguous()))
    model(torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    assert are_together == [True for _ in model.blocks]


class NoDoubles(TorchDispatchMode):
    """Refuses fp64 on the device meta, as Apple's GPUs do, which it stands for."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, f"{function} has no fp64 on this device"
        return output


def test_training_and_sampling_have_no_fp64_on_the_device(tiny_encoder, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: contextlib.nullcontext())
    device = torch.device("meta")
    rae = RAE(copy.deepcopy(tiny_encoder), Decoder(192, 4, 16, 32, 1, 2, 64)).to(device)
    dit = small_model(head=True, in_channels=192, width=192, head_width=192).to(device)
    optimizer = torch.optim.AdamW(dit.parameters(), fused=False)       # fused ones know no meta
    y = torch.tensor([0, 1], device=device)
    args = argparse.Namespace(sampling_steps=2, release_grid=False)
    with NoDoubles():
        x0 = rae.encode(torch.rand(2, 3, 64, 64, device=device))
        t = sample_times(2, "logit_normal", x0[0].numel(), 4096, device)
        loss = time_weight(t) * flow_matching_loss(dit, x0, y, t, torch.randn_like(x0))
        loss.mean().backward()
        LossByTime(device).add(t, loss)
        optimizer.step()
        velocity = cfg(dit, y, dit.null_condition(y), 1.0)
        for solver in SOLVERS.values():
            x = solver(velocity, torch.randn_like(x0), sampling_times(dit, args))
        assert rae.decode(x).shape == (2, 3, 64, 64)


def test_fp64_on_the_device_is_noticed():
    with NoDoubles(), pytest.raises(AssertionError, match="no fp64"):
        torch.ones(2, device="meta").double()
