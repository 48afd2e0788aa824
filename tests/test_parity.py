"""Our modules against the official ones: weights, inputs, outputs and gradients at tiny sizes.

tests/fixtures/official.safetensors was recorded from github.com/bytetriper/RAE at odd sizes: grid
5, head dimensions 12, 20 and 24, MLP 5/3; ../shared/oracle, where there is one, has more.
Run: python -m pytest tests/test_parity.py
"""
import json

import pytest
import torch
from einops import rearrange
from safetensors import safe_open

from conftest import ROOT
from model import Decoder, DiT, DiTDH, flow_matching_loss
from release import load_release
from sample import autoguidance, cfg

FIXTURE = ROOT / "tests" / "fixtures" / "official.safetensors"
ORACLE = ROOT.parent / "shared" / "oracle"
without_oracle = pytest.mark.skipif(not ORACLE.exists(), reason="no ../shared/oracle")
both_sources = pytest.mark.parametrize("source", [
    "fixture", pytest.param("oracle", marks=without_oracle)])


class Recording:
    """What was recorded of one official module.

    config: arguments of its constructor. tensors: name -> tensor; names of weights begin with
    "state.", of gradients with "grad.".
    """
    def __init__(self, source, name):
        path = FIXTURE if source == "fixture" else ORACLE / f"{name}.safetensors"
        with safe_open(path, "pt") as f:
            config = json.loads(f.metadata()["config"])
            self.tensors = {key.removeprefix(f"{name}/"): f.get_tensor(key)
                            for key in f.keys()}       # noqa: SIM118, safe_open is no dict
        self.config = config.get(name, config)         # the fixture holds several modules

    def group(self, prefix):
        """The tensors whose names begin with a prefix, as a dict without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items()
                if key.startswith(prefix)}


def build_dit_of(config):
    """A DiT or DiTDH from the official configuration, whose sizes are pairs for a DiTDH."""
    width, depth, heads = config["hidden_size"], config["depth"], config["num_heads"]
    channels, grid, classes = config["in_channels"], config["input_size"], config["num_classes"]
    if isinstance(width, int):
        return DiT(channels, grid, width, depth, heads, classes).eval()
    return DiTDH(channels, grid, width[0], depth[0], heads[0], width[1], depth[1], heads[1],
                 classes).eval()


def build_decoder_of(config):
    grid = config["image_size"] // config["patch_size"]
    return Decoder(config["hidden_size"], grid, config["patch_size"],
                   config["decoder_hidden_size"], config["decoder_num_hidden_layers"],
                   config["decoder_num_attention_heads"], config["decoder_intermediate_size"])


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@both_sources
@pytest.mark.parametrize("name", ["dit", "ditdh"])
def test_dit_equals_official(source, name):
    official = Recording(source, name)
    model = load_release(build_dit_of(official.config), official.group("state."))
    model.requires_grad_(True)                         # the fixed tables and W, too
    x, t, y = (official.tensors[f"input.{i}"] for i in range(3))

    output = model(x, t, y)
    loss = (output - official.tensors["target"]).square().mean()
    loss.backward()

    assert_close(output, official.tensors["out"])
    assert_close(loss, official.tensors["loss"])
    parameters = dict(model.named_parameters())
    gradients = official.group("grad.")
    assert gradients and gradients.keys() >= parameters.keys() - {"pos_embed", "t_embedder.W"}
    for key, gradient in gradients.items():
        assert_close(parameters[key].grad, gradient)


def read_weak_weights(source, official):
    """Weights of the weak model for AutoGuidance, which has the same head."""
    if source == "fixture":
        return Recording(source, "weak").group("state.")
    weights = official.group("weak.")
    return {key.removeprefix("state."): value for key, value in weights.items()}


def weak_config(config, weights):
    """The configuration of the weak model: width and depth of its backbone from its weights."""
    head_width, head_depth = config["hidden_size"][1], config["depth"][1]
    width = weights["s_embedder.proj.weight"].shape[0]
    blocks = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    depth = blocks - head_depth
    return {**config, "hidden_size": [width, head_width], "depth": [depth, head_depth]}


@both_sources
def test_guidance_equals_official(source):
    official = Recording(source, "ditdh")
    config, tensors = official.config, official.tensors
    model = load_release(build_dit_of(config), official.group("state."))
    weak_weights = read_weak_weights(source, official)
    weak = load_release(build_dit_of(weak_config(config, weak_weights)), weak_weights)
    x, t, y = (tensors[f"input.{i}"] for i in range(3))
    y = tensors.get("guided.y", y)

    with torch.no_grad():
        by_classes = cfg(model, y[:2], config["num_classes"], 3.0)(x[:2], t[:2])
        by_weak_model = autoguidance(model, weak, y, 1.42)(x, t)

    assert_close(by_classes, tensors["cfg.scale3"])
    assert_close(by_weak_model, tensors["autoguidance.scale1.42"])


@both_sources
def test_decoder_equals_official(source):
    official = Recording(source, "decoder")
    weights, gradients = official.group("state."), official.group("grad.")
    decoder = load_release(build_decoder_of(official.config), weights)
    decoder.requires_grad_(True)
    latents = rearrange(official.tensors["input.0"], "b (h w) c -> b c h w", h=decoder.grid)

    image = decoder(latents)
    p = decoder.patch
    tokens = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    loss = (tokens - official.tensors["target"]).square().mean()
    loss.backward()

    assert_close(image, official.tensors["image_before_denorm"])
    assert_close(tokens, official.tensors["out"])
    assert_close(loss, official.tensors["loss"])
    # A second decoder, loaded with the gradients in place of weights, has them under our names.
    renamed = load_release(build_decoder_of(official.config), {**weights, **gradients})
    expected = dict(renamed.named_parameters())
    for key, parameter in decoder.named_parameters():
        if key != "decoder_pos_embed" or key in gradients:
            assert_close(parameter.grad, expected[key])


def under_ema(weights):
    return {"ema": weights}


def under_model_of_ddp(weights):
    return {"model": {f"module.{key}": value for key, value in weights.items()}}


def under_state_dict(weights):
    return {"state_dict": weights}


def of_an_autoencoder_in_ddp(weights):
    return {f"module.decoder.{key}": value for key, value in weights.items()}


def of_an_autoencoder_with_encoder(weights):
    wrapped = {f"decoder.{key}": value for key, value in weights.items()}
    wrapped["encoder.layernorm.bias"] = torch.ones(3)
    return wrapped


@pytest.mark.parametrize("wrap", [
    under_ema, under_model_of_ddp, under_state_dict, of_an_autoencoder_in_ddp,
    of_an_autoencoder_with_encoder])
def test_wrapped_decoders_load(wrap, tmp_path):
    official = Recording("fixture", "decoder")
    weights = official.group("state.")
    plain = load_release(build_decoder_of(official.config), weights)
    torch.save(wrap(weights), tmp_path / "model.pt")

    wrapped = load_release(build_decoder_of(official.config), tmp_path / "model.pt")

    latents = torch.randn(1, official.config["hidden_size"], plain.grid, plain.grid)
    assert_close(wrapped(latents), plain(latents))


def test_loss_is_the_plain_formula():
    x0 = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.2, 0.9])
    loss = flow_matching_loss(lambda x, t, y: torch.zeros_like(x), x0, None, t, eps)
    torch.testing.assert_close(loss, (eps - x0).square().mean((1, 2, 3)))
