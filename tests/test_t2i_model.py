"""The text-conditioned DiT, and Scale-RAE's released layout. Run: python -m pytest tests/test_t2i_model.py"""
import time

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import model as model_module
from conftest import ROOT
from model import T2I_HEAD, T2I_SIZES, ConditionEmbedding, DiT, DiTDH, build_dit, load_dit, load_release
from runtime import save_checkpoint
from test_model import shake

ORACLE = ROOT.parent / "shared" / "oracle" / "t2i_dit.safetensors"
HEADS = pytest.mark.parametrize("head", [[], [48, 2, 3]])


def small(head, num_classes=None, **more):
    return (DiTDH if head else DiT)(8, 4, 32, 2, 2, *head, num_classes, **more)


def batch(b=3):
    return torch.randn(b, 8, 4, 4), torch.rand(b), torch.randn(b, 16, 32)


# ---------------------------------------------------------------------------------- against the official one
@pytest.mark.skipif(not ORACLE.exists(), reason="no ../shared/oracle")
def test_text_dit_equals_official():
    """The oracle's condition has 40 channels, its blocks 48, ours the same: 8 zeros more change nothing."""
    official = load_file(ORACLE)
    state = {k.removeprefix("state."): v for k, v in official.items() if k.startswith("state.")}
    for key in state:
        rows = 8 * (key.startswith("t_embedder") or key == "y_embedder.dropout_embedding")
        columns = 8 * ("adaLN_modulation.1.weight" in key or key == "t_embedder.mlp.2.weight")
        pad = (0, columns, 0, rows) if state[key].ndim == 2 else (0, rows)
        state[key] = nn.functional.pad(state[key], pad) if rows or columns else state[key]
    state = {f"diff_head.model.{k}": v for k, v in state.items()}       # the oracle's names have no prefix
    model = load_release(DiT(24, 8, 48, 2, 4, None).eval(), state)
    assert torch.equal(model.t_embedder.W, official["fourier_frequencies"])        # drawn, not in the state
    fresh = model_module.RoPE(12, 8)
    assert torch.equal(fresh.freqs_cos, official["state.feat_rope.freqs_cos"])
    assert torch.equal(fresh.freqs_sin, official["state.feat_rope.freqs_sin"])
    x, t, y = (official[f"input.{k}"] for k in "xty")
    y = nn.functional.pad(y, (0, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), official["out"], atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x, t, model.null(y)), official["out_null"], atol=1e-5, rtol=0)
    assert (official["out"] - official["out_null"]).abs().max() > 0.01


# Billions of parameters, the fixed table with them; c=1152, grid 16     Source: official layers, facts sheet
@pytest.mark.parametrize("size, count", [("0.5B", 0.481), ("2.4B", 2.436), ("3.1B", 3.082), ("5.5B", 5.475),
                                         ("9.8B", 9.729)])
@pytest.mark.filterwarnings("error")
def test_parameter_counts(size, count):
    start = time.time()
    with torch.device("meta"):
        model = DiT(1152, 16, **T2I_SIZES[size], num_classes=None)
        wide = DiTDH(1152, 16, **T2I_SIZES[size], **T2I_HEAD, num_classes=None) if size == "2.4B" else None
    assert all(p.is_meta for p in model.state_dict().values()) and time.time() - start < 5
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, wide) if m]
    assert round(parameters[0] / 1e9, 3) == count
    if wide:
        assert parameters[1] - parameters[0] == 275_619_200             # "+0.28B"; the official class on meta


# ---------------------------------------------------------------------------------- the condition
@HEADS
def test_initialisation(head):
    model = small(head)
    assert model(*batch()).abs().max() == 0 and model.y_embedder.dropout_embedding.abs().max() == 0
    bound = (6 / (32 + 96)) ** 0.5                                      # Xavier, for both classes
    qkv = model.get_parameter("blocks.0.attn.qkv.weight")
    assert 0.95 * bound < qkv.abs().max() <= bound
    assert all(v.abs().max() == 0 for k, v in model.state_dict().items() if k.endswith("bias"))


@HEADS
def test_every_token_has_its_own_condition_and_every_parameter_a_gradient(head):
    model, (x, t, y) = shake(small(head)), batch()
    other = y.clone()
    other[:, 5] = torch.randn(3, 32)
    with torch.no_grad():
        out, changed = model.eval()(x, t, y), model(x, t, other)
        swapped = model(x, t, y[:, torch.randperm(16)])
    assert (out - changed)[:, :, 1, 1].abs().max() > 1e-3 and (out - swapped).abs().max() > 1e-3
    assert (out - changed)[:, :, 1, 1].abs().mean() > 2 * (out - changed).abs().mean()   # most at that token
    assert out.shape == x.shape and out.dtype == torch.float32
    for dropout in (0.0, 0.9):
        model = shake(small(head, class_dropout=dropout)).train()
        model(x, t, y).square().mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_the_head_of_text_is_not_given_the_time_again():
    """With the backbone's time and condition cut off, nothing else of the model may depend on t."""
    text, classes = shake(small([48, 2, 3])).eval(), shake(small([48, 2, 3], 5)).eval()
    for model in (text, classes):
        for block in model.blocks[:2]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
    x, t, y = batch()
    with torch.no_grad():
        assert torch.equal(text(x, t, y), text(x, 1 - t, y))
        assert not torch.equal(classes(x, t, torch.arange(3)), classes(x, 1 - t, torch.arange(3)))


def test_dropout_replaces_whole_samples_and_only_in_training():
    embedder, y = ConditionEmbedding(8, 0.1), torch.randn(20_000, 3, 8)
    nn.init.normal_(embedder.dropout_embedding)
    out = embedder.train()(y)
    null = (out == embedder.dropout_embedding).all(2)                   # b n
    assert torch.equal(null.any(1), null.all(1)) and 0.09 < null[:, 0].float().mean() < 0.11
    assert torch.equal(out[~null], y[~null])
    assert embedder.eval()(y) is y
    assert torch.equal(ConditionEmbedding(8, 0.0).train()(y), y)
    assert embedder.train()(y.bfloat16()).dtype == torch.float32        # under autocast the null stays exact


def test_null():
    model, y = shake(small([])), torch.randn(2, 16, 32)
    null = model.null(y)
    assert null.shape == y.shape and (null == model.y_embedder.dropout_embedding).all()
    x, t, _ = batch(2)
    always = small([], class_dropout=1.0)
    always.load_state_dict(model.state_dict())
    torch.testing.assert_close(always.train()(x, t, y), model.eval()(x, t, null))
    labels = small([], 5).null(torch.tensor([0, 3]))
    assert labels.tolist() == [5, 5] and labels.dtype == torch.int64


# ---------------------------------------------------------------------------------- checkpointing
@HEADS
@pytest.mark.parametrize("num_classes", [None, 5])
def test_gradient_checkpointing_changes_no_gradient(head, num_classes, monkeypatch):
    calls, recompute = [], model_module.checkpoint
    monkeypatch.setattr(model_module, "checkpoint", lambda *a, **k: calls.append(k) or recompute(*a, **k))
    x, t, y = batch()
    y = y if num_classes is None else torch.arange(3)
    plain, cheap = shake(small(head, num_classes)), small(head, num_classes)
    cheap.load_state_dict(plain.state_dict())
    cheap.checkpoint = True
    for model in (plain, cheap):
        torch.manual_seed(1)                                            # the same conditions are dropped
        model.train()(x, t, y).square().mean().backward()
    assert calls == [dict(use_reentrant=False)] * len(cheap.blocks)
    for (name, p), q in zip(plain.named_parameters(), cheap.parameters()):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    calls.clear()
    cheap.eval()(x, t, y)
    assert not calls


# ---------------------------------------------------------------------------------- loading
def stand_in(tied=True):
    """The parts of a text-to-image model, the language model with only some of its layers."""
    llm = nn.Module()
    llm.embed_tokens, llm.norm = nn.Embedding(11, 24), nn.RMSNorm(24)
    llm.layers = nn.ModuleList([nn.ModuleDict(dict(self_attn=nn.ModuleDict(dict(q_proj=nn.Linear(24, 24)))))])
    if not tied:
        llm.lm_head = nn.Linear(24, 11, bias=False)
    whole = nn.Module()
    whole.llm, whole.dit, whole.diff_head_projector = llm, small([]), nn.Linear(24, 32)
    whole.mm_projector = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 24))
    whole.latent_queries = nn.Parameter(torch.randn(16, 24))
    return shake(whole)


def released(whole):
    """Its state dict under the names of the release, written out by hand, without the time frequencies."""
    state = {}
    for key, value in whole.state_dict().items():
        part, _, rest = key.partition(".")
        name = {"llm": f"model.{rest}", "dit": f"diff_head.model.{rest}".replace(".blocks.", ".dit_blocks."),
                "mm_projector": f"model.{key}", "latent_queries": "model.latent_queries",
                "diff_head_projector": key}[part]
        state["lm_head.weight" if rest == "lm_head.weight" else name] = value
    del state["diff_head.model.t_embedder.W"]
    return state


FREQUENCIES = torch.normal(0.0, 1.0, (256,), generator=torch.Generator("cpu").manual_seed(114514))  # official


@pytest.mark.parametrize("tied", [True, False])
def test_a_release_of_scale_rae_loads_whole(tied, tmp_path):
    source, target = stand_in(tied), stand_in(tied)
    state = released(source)
    assert {"model.layers.0.self_attn.q_proj.weight", "model.mm_projector.2.bias", "model.latent_queries",
            "diff_head.model.dit_blocks.1.mlp.w12.bias", "diff_head_projector.weight"} <= state.keys()
    if tied:                                            # some files hold it although the config ties it
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    for given in (state, tmp_path / "model.safetensors", {"model": state}):
        assert load_release(target, given) is target
        for key, value in source.state_dict().items():
            expected = FREQUENCIES if key == "dit.t_embedder.W" else value
            assert torch.equal(target.state_dict()[key], expected), key
        shake(target)
    dit = load_release(small([]), state)                                # only its DiT
    assert torch.equal(dit.t_embedder.W, FREQUENCIES)
    assert torch.equal(dit.blocks[1].norm2.weight, source.dit.blocks[1].norm2.weight)


def test_what_does_not_fit_is_listed():
    whole, state = stand_in(), released(stand_in())
    for drop, ours in (("model.norm.weight", "llm.norm.weight"), ("model.latent_queries", "latent_queries"),
                       ("diff_head.model.dit_blocks.0.norm1.weight", "dit.blocks.0.norm1.weight")):
        with pytest.raises(ValueError, match=f"(?s)does not fit Module.* 1 keys:.*missing {ours}$"):
            load_release(whole, {k: v for k, v in state.items() if k != drop})
    statistics = dict(state, **{"diff_head.data_mean": torch.zeros(8), "diff_head.data_std": torch.ones(8)})
    for module in (whole, whole.dit):                                   # never left out in silence
        with pytest.raises(ValueError, match="(?s)unexpected diff_head.data_mean.*diff_head.data_std"):
            load_release(module, statistics)
    with pytest.raises(ValueError, match="(?s)does not fit Module.*missing llm.lm_head.weight"):
        load_release(stand_in(tied=False), state)
    with pytest.raises(ValueError, match="(?s)does not fit DiT;.*missing y_embedder.embedding_table.weight"):
        load_release(small([], 5), state)


def test_build_dit_without_classes(tmp_path):
    args = dict(width=32, depth=2, heads=2, head_width=0, class_dropout=0.25)
    model = build_dit(args, 8, 4, None)
    assert type(model) is DiT and model.text and model.y_embedder.dropout == 0.25 and not model.checkpoint
    wide = build_dit({**args, "head_width": 48, "head_depth": 1, "head_heads": 3}, 8, 4, None)
    assert type(wide) is DiTDH and wide.text
    load_release(build_dit(args, 8, 4, None), {"ema": model.state_dict()})         # our own layout
    save_checkpoint(tmp_path / "t2i.pt", llm={}, ema=model.state_dict(), args=args)
    with pytest.raises(ValueError, match="t2i.pt is of text to image: for .*--prompt"):
        load_dit(tmp_path / "t2i.pt")
