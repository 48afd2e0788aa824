"""Loading encoders and weights by release.py. Run: python -m pytest tests/test_loading.py"""
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import release
from test_model import randomise, small_model


# ---------------------------------------------------------------------------- encoders
def test_tiny_encoder_takes_other_sizes():
    encoder = release.load_encoder("tiny", 96)
    assert encoder.encode(torch.rand(1, 3, 96, 96)).shape == (1, 192, 6, 6)
    with pytest.raises(ValueError, match="--size 70 must be a multiple of 16.*try --size 64"):
        release.load_encoder("tiny", 70)


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="--encoder vgg99 is neither one of tiny"):
        release.load_encoder("vgg99")


DINOV2_S = "vit_small_patch14_reg4_dinov2.lvd142m"


def test_missing_weights_of_timm_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "HERE", tmp_path)
    message = f"hf.co/timm/{DINOV2_S} at weights/{DINOV2_S}.safetensors"
    with pytest.raises(FileNotFoundError, match=message):
        release.load_encoder("dinov2-s", 64)


def test_timm_encoder_from_a_file_placed_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "HERE", tmp_path)
    reference = timm.create_model(DINOV2_S, pretrained=False, num_classes=0).eval()
    (tmp_path / "weights").mkdir()
    save_file(reference.state_dict(), tmp_path / "weights" / f"{DINOV2_S}.safetensors")

    encoder = release.load_encoder("dinov2-s", 592)    # sees 518 px: the model's own grid of 37
    assert (encoder.grid, encoder.channels, encoder.input_size) == (37, 384, 518)

    images = torch.rand(1, 3, 518, 518)
    mean = torch.tensor(encoder.mean).view(3, 1, 1)
    std = torch.tensor(encoder.std).view(3, 1, 1)
    # Tokens before the last norm, without those in front of the patches.
    tokens = reference.get_intermediate_layers((images - mean) / std, n=1)[0]
    expected = F.layer_norm(tokens, (384,), eps=1e-6)
    latents = encoder.encode(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)

    smaller = release.load_encoder("dinov2-s", 64)     # sees 56 px
    assert smaller.encode(torch.rand(1, 3, 64, 64)).shape == (1, 384, 4, 4)


# ---------------------------------------------------------------------------- strict loading
def test_load_release_reads_a_file_or_a_dict(tmp_path):
    source = randomise(small_model(head=True))
    from_file = small_model(head=True)
    from_dict = small_model(head=True)
    torch.save({"ema": source.state_dict(), "step": 3}, tmp_path / "a.pt")
    prefixed = {f"module.{key}": value for key, value in source.state_dict().items()}

    release.load_release(from_file, tmp_path / "a.pt")
    release.load_release(from_dict, prefixed)

    for key, value in source.state_dict().items():
        assert torch.equal(from_file.state_dict()[key], value), key
        assert torch.equal(from_dict.state_dict()[key], value), key


def test_load_release_takes_all_or_nothing():
    model = randomise(small_model(head=True))
    before = model.state_dict()["blocks.0.attn.qkv.weight"].clone()
    bad = {key: value + 1 for key, value in model.state_dict().items()}
    bad["extra"] = torch.zeros(1)
    bad["pos_embed"] = torch.zeros(1, 9, 32)
    del bad["t_embedder.W"]

    keys = r"(?s)missing t_embedder.W.*unexpected extra.*pos_embed: shape \(1, 9, 32\)"
    with pytest.raises(ValueError, match=keys):
        release.load_release(model, bad)
    assert torch.equal(before, model.state_dict()["blocks.0.attn.qkv.weight"])
