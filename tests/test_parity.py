"""Our modules against the official ones: inputs, weights, outputs and gradients recorded at tiny sizes.

Runs where ../shared/oracle lies beside the checkout; run: python -m pytest tests/test_parity.py
"""
import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors import safe_open

from model import Decoder, DiT, DiTDH, flow_matching_loss, load_release
from sample import autoguidance, cfg

ORACLE = Path(__file__).resolve().parents[2] / "shared" / "oracle"
pytestmark = pytest.mark.skipif(not ORACLE.exists(), reason="no recorded outputs of the official modules")


def read(name):
    with safe_open(ORACLE / f"{name}.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        config = json.loads(f.metadata()["config"])

    def group(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return config, tensors, group


def build(config):
    width, depth, heads = config["hidden_size"], config["depth"], config["num_heads"]
    if isinstance(width, int):
        module = DiT(config["in_channels"], config["input_size"], width, depth, heads, config["num_classes"])
    else:
        module = DiTDH(config["in_channels"], config["input_size"], width[0], depth[0], heads[0],
                       width[1], depth[1], heads[1], config["num_classes"])
    return module.eval()


def assert_gradients(module, gradients):
    ours = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    fixed = {"pos_embed", "t_embedder.W", "decoder_pos_embed"}         # frozen here; the oracle may list them
    assert set(gradients) - fixed <= set(ours)
    for name, gradient in gradients.items():
        if name not in fixed:
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dit", "ditdh"])
def test_dit_equals_official(name):
    config, oracle, group = read(name)
    model = load_release(build(config), group("state."))
    x, t, y = (oracle[f"input.{i}"] for i in range(3))
    out = model(x, t, y)
    torch.testing.assert_close(out, oracle["out"], atol=1e-5, rtol=0)
    loss = (out - oracle["target"]).square().mean()
    torch.testing.assert_close(loss, oracle["loss"], atol=1e-5, rtol=0)
    loss.backward()
    assert_gradients(model, group("grad."))


def test_guidance_equals_official():
    config, oracle, group = read("ditdh")
    model, x, t, y = load_release(build(config), group("state.")), *(oracle[f"input.{i}"] for i in range(3))
    with torch.no_grad():
        guided = cfg(model, y[:2], config["num_classes"], 3.0)(x[:2], t[:2])
        torch.testing.assert_close(guided, oracle["cfg.scale3"], atol=1e-5, rtol=0)
        weak_state = {k.removeprefix("state."): v for k, v in group("weak.").items()}
        weak_width = weak_state["s_embedder.proj.weight"].shape[0]
        weak_depth = 1 + max(int(k.split(".")[1]) for k in weak_state if k.startswith("blocks."))
        weak = {**config, "hidden_size": [weak_width, config["hidden_size"][1]],
                "depth": [weak_depth - config["depth"][1], config["depth"][1]]}
        weak = load_release(build(weak), weak_state)
        guided = autoguidance(model, weak, y, 1.42)(x, t)
        torch.testing.assert_close(guided, oracle["autoguidance.scale1.42"], atol=1e-5, rtol=0)


def test_decoder_equals_official():
    config, oracle, group = read("decoder")
    grid = config["image_size"] // config["patch_size"]
    decoder = Decoder(config["hidden_size"], grid, config["patch_size"], config["decoder_hidden_size"],
                      config["decoder_num_hidden_layers"], config["decoder_num_attention_heads"],
                      config["decoder_intermediate_size"])
    load_release(decoder, group("state."))
    z = oracle["input.0"].transpose(1, 2).unflatten(2, (grid, grid))
    image = decoder(z)
    torch.testing.assert_close(image, oracle["image_before_denorm"], atol=1e-5, rtol=0)
    p = config["patch_size"]
    tokens = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    torch.testing.assert_close(tokens, oracle["out"], atol=1e-5, rtol=0)
    loss = (tokens - oracle["target"]).square().mean()
    torch.testing.assert_close(loss, oracle["loss"], atol=1e-5, rtol=0)
    loss.backward()
    names = {"query": "attention.attention.query", "key": "attention.attention.key",
             "value": "attention.attention.value", "proj": "attention.output.dense",
             "fc1": "intermediate.dense", "fc2": "output.dense"}
    ours = {}
    for name, p in decoder.named_parameters():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        ours[name] = p.grad
    for name, gradient in group("grad.").items():
        if name != "decoder_pos_embed":
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0)


def test_loss_is_the_plain_formula():
    x0, eps, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9])
    loss = flow_matching_loss(lambda x, t, y: torch.zeros_like(x), x0, None, t, eps)
    torch.testing.assert_close(loss, (eps - x0).square().mean((1, 2, 3)))
