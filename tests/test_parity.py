"""Our modules against the official ones: inputs, weights, outputs and gradients recorded at tiny sizes.

tests/fixtures/official.safetensors holds those of bytetriper/RAE at odd sizes: grid 5, head dimensions 12, 20
and 24, MLP 5/3; ../shared/oracle, where there is one, has more.  Run: python -m pytest tests/test_parity.py
"""
import json

import pytest
import torch
from einops import rearrange
from safetensors import safe_open

from conftest import ROOT
from model import Decoder, DiT, DiTDH, flow_matching_loss, load_release
from sample import autoguidance, cfg

FIXTURE, ORACLE = ROOT / "tests" / "fixtures" / "official.safetensors", ROOT.parent / "shared" / "oracle"
SOURCES = pytest.mark.parametrize("source", ["fixture", pytest.param("oracle", marks=pytest.mark.skipif(
    not ORACLE.exists(), reason="no ../shared/oracle"))])


def read(source, name):
    """Constructor's arguments, tensors, and a function from a prefix of their names to a state dict."""
    with safe_open(FIXTURE if source == "fixture" else ORACLE / f"{name}.safetensors", "pt") as f:
        tensors = {k.removeprefix(f"{name}/"): f.get_tensor(k) for k in f.keys()}
        config = json.loads(f.metadata()["config"])
    return config.get(name, config), tensors, lambda prefix: {
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build(config):
    width, depth, heads = config["hidden_size"], config["depth"], config["num_heads"]
    if isinstance(width, int):
        module = DiT(config["in_channels"], config["input_size"], width, depth, heads, config["num_classes"])
    else:
        module = DiTDH(config["in_channels"], config["input_size"], width[0], depth[0], heads[0],
                       width[1], depth[1], heads[1], config["num_classes"])
    return module.eval()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def build_decoder(config):
    grid = config["image_size"] // config["patch_size"]
    return grid, Decoder(config["hidden_size"], grid, config["patch_size"], config["decoder_hidden_size"],
                         config["decoder_num_hidden_layers"], config["decoder_num_attention_heads"],
                         config["decoder_intermediate_size"])


@SOURCES
@pytest.mark.parametrize("name", ["dit", "ditdh"])
def test_dit_equals_official(source, name):
    config, official, group = read(source, name)
    model = load_release(build(config), group("state.")).requires_grad_(True)
    out = model(*(official[f"input.{i}"] for i in range(3)))
    close(out, official["out"])
    loss = (out - official["target"]).square().mean()
    close(loss, official["loss"])
    loss.backward()
    ours, gradients = dict(model.named_parameters()), group("grad.")
    assert gradients and gradients.keys() >= ours.keys() - {"pos_embed", "t_embedder.W"}
    for key, gradient in gradients.items():                            # the fixed tables and W with them
        close(ours[key].grad, gradient)


@SOURCES
def test_guidance_equals_official(source):
    config, official, group = read(source, "ditdh")
    weak_state = read(source, "weak")[2]("state.") if source == "fixture" else \
        {k.removeprefix("state."): v for k, v in group("weak.").items()}
    width, depth = weak_state["s_embedder.proj.weight"].shape[0], config["depth"][1]
    depth = 1 + max(int(k.split(".")[1]) for k in weak_state if k.startswith("blocks.")) - depth
    weak = {**config, "hidden_size": [width, config["hidden_size"][1]], "depth": [depth, config["depth"][1]]}
    model, weak = load_release(build(config), group("state.")), load_release(build(weak), weak_state)
    x, t, y = (official[f"input.{i}"] for i in range(3))
    y = official.get("guided.y", y)
    with torch.no_grad():
        close(cfg(model, y[:2], config["num_classes"], 3.0)(x[:2], t[:2]), official["cfg.scale3"])
        close(autoguidance(model, weak, y, 1.42)(x, t), official["autoguidance.scale1.42"])


@SOURCES
def test_decoder_equals_official(source):
    config, official, group = read(source, "decoder")
    grid, decoder = build_decoder(config)
    load_release(decoder, group("state.")).requires_grad_(True)
    image = decoder(official["input.0"].transpose(1, 2).unflatten(2, (grid, grid)))
    close(image, official["image_before_denorm"])
    p = config["patch_size"]
    tokens = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    close(tokens, official["out"])
    loss = (tokens - official["target"]).square().mean()
    close(loss, official["loss"])
    loss.backward()
    gradients = {**group("state."), **group("grad.")}                  # load_release gives them our names
    wanted = dict(load_release(build_decoder(config)[1], gradients).named_parameters())
    for key, p in decoder.named_parameters():
        if key != "decoder_pos_embed" or "decoder_pos_embed" in group("grad."):
            close(p.grad, wanted[key])


@pytest.mark.parametrize("wrap", [
    lambda state: {"ema": state}, lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {"state_dict": state}, lambda state: {f"module.decoder.{k}": v for k, v in state.items()},
    lambda state: {f"decoder.{k}": v for k, v in state.items()} | {"encoder.layernorm.bias": torch.ones(3)}])
def test_wrapped_decoders_load(wrap, tmp_path):
    config, _, group = read("fixture", "decoder")
    grid, plain = build_decoder(config)
    z = torch.randn(1, config["hidden_size"], grid, grid)
    load_release(plain, group("state."))
    torch.save(wrap(group("state.")), tmp_path / "model.pt")
    close(load_release(build_decoder(config)[1], tmp_path / "model.pt")(z), plain(z))


def test_loss_is_the_plain_formula():
    x0, eps, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9])
    loss = flow_matching_loss(lambda x, t, y: torch.zeros_like(x), x0, None, t, eps)
    torch.testing.assert_close(loss, (eps - x0).square().mean((1, 2, 3)))
