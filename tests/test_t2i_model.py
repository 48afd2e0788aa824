"""The DiT conditioned on text, and weights of Scale-RAE.

Run: python -m pytest tests/test_t2i_model.py
"""
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as model_module
from conftest import ROOT
from model import (
    T2I_HEAD,
    T2I_SIZES,
    ConditionEmbedding,
    DiT,
    DiTDH,
    RoPE,
    build_dit,
)
from release import load_dit, load_release
from storage import save_checkpoint
from t2i import LONGEST_PROMPT, check_prompt
from test_model import randomise, small_model

ORACLE = ROOT.parent / "shared" / "oracle" / "t2i_dit.safetensors"
with_and_without_head = pytest.mark.parametrize("head", [False, True])


def text_dit(head, **changes):
    """A small DiT or DiTDH conditioned on text, of 8 channels, grid 4 and width 32."""
    return small_model(head, num_classes=None, **changes)


def random_inputs(b=3):
    """Noisy latents, times and text conditions of text_dit()."""
    return torch.randn(b, 8, 4, 4), torch.rand(b), torch.randn(b, 16, 32)


# ---------------------------------------------------------------------------- the official DiT
def pad(tensor, columns=0, rows=0):
    """Append zeros to the last dimension (columns) and to the first one (rows)."""
    if tensor.ndim == 1:
        return F.pad(tensor, (0, rows))
    return F.pad(tensor, (0, columns, 0, rows))


@pytest.mark.skipif(not ORACLE.exists(), reason="no ../shared/oracle")
def test_text_dit_equals_official():
    oracle = load_file(ORACLE)
    # The oracle's condition has 40 channels and its blocks have 48, while ours always agree. Eight
    # zeros more change nothing.
    state = {}
    for name, value in oracle.items():
        if not name.startswith("state."):
            continue
        key = name.removeprefix("state.")
        if key.startswith("t_embedder") or key == "y_embedder.dropout_embedding":
            value = pad(value, rows=8)
        if "adaLN_modulation.1.weight" in key or key == "t_embedder.mlp.2.weight":
            value = pad(value, columns=8)
        state[f"diff_head.model.{key}"] = value        # the oracle's names have no prefix
    x = oracle["input.x"]
    t = oracle["input.t"]
    y = F.pad(oracle["input.y"], (0, 8))

    model = load_release(DiT(24, 8, 48, 2, 4, None).eval(), state)
    rope = RoPE(12, 8)

    # The frequencies are drawn, as they are not in the state.
    assert torch.equal(model.t_embedder.W, oracle["fourier_frequencies"])
    assert torch.equal(rope.freqs_cos, oracle["state.feat_rope.freqs_cos"])
    assert torch.equal(rope.freqs_sin, oracle["state.feat_rope.freqs_sin"])
    with torch.no_grad():
        conditional = model(x, t, y)
        unconditional = model(x, t, model.null_condition(y))
    torch.testing.assert_close(conditional, oracle["out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(unconditional, oracle["out_null"], atol=1e-5, rtol=0)
    assert (oracle["out"] - oracle["out_null"]).abs().max() > 0.01


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Billions of parameters at c=1152, grid 16, with the fixed table.  Source: the official layers
@pytest.mark.parametrize("size, billions", [("0.5B", 0.481), ("2.4B", 2.436), ("3.1B", 3.082),
                                            ("5.5B", 5.475), ("9.8B", 9.729)])
@pytest.mark.filterwarnings("error")
def test_parameter_counts(size, billions):
    start = time.time()
    with torch.device("meta"):
        model = DiT(1152, 16, **T2I_SIZES[size], num_classes=None)
    seconds = time.time() - start

    assert all(value.is_meta for value in model.state_dict().values())
    assert seconds < 5
    assert round(count_parameters(model) / 1e9, 3) == billions


def test_parameters_of_the_wide_head():
    """"+0.28B" in the paper; the number is that of the official class."""
    with torch.device("meta"):
        plain = DiT(1152, 16, **T2I_SIZES["2.4B"], num_classes=None)
        wide = DiTDH(1152, 16, **T2I_SIZES["2.4B"], **T2I_HEAD, num_classes=None)

    assert count_parameters(wide) - count_parameters(plain) == 275_619_200


# ---------------------------------------------------------------------------- the condition
@with_and_without_head
def test_initialisation(head):
    model = text_dit(head)

    assert model(*random_inputs()).abs().max() == 0
    assert model.y_embedder.dropout_embedding.abs().max() == 0
    xavier_bound = (6 / (32 + 96)) ** 0.5
    largest = model.get_parameter("blocks.0.attn.qkv.weight").abs().max()
    assert 0.95 * xavier_bound < largest <= xavier_bound
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert value.abs().max() == 0


@with_and_without_head
def test_every_token_has_its_own_condition(head):
    model = randomise(text_dit(head)).eval()
    x, t, y = random_inputs()
    changed_y = y.clone()
    changed_y[:, 5] = torch.randn(3, 32)               # of the token in row 1, column 1
    shuffled_y = y[:, torch.randperm(16)]

    with torch.no_grad():
        out = model(x, t, y)
        change = out - model(x, t, changed_y)
        swapped = model(x, t, shuffled_y)

    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert change[:, :, 1, 1].abs().max() > 1e-3
    assert change[:, :, 1, 1].abs().mean() > 2 * change.abs().mean()    # most at that token
    assert (out - swapped).abs().max() > 1e-3


@with_and_without_head
@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_every_parameter_has_a_gradient(head, dropout):
    model = randomise(text_dit(head, class_dropout=dropout)).train()

    model(*random_inputs()).square().mean().backward()

    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_head_of_text_is_not_given_the_time_again():
    """With time and condition cut off from the backbone, nothing else of the model depends on t."""
    text = randomise(text_dit(head=True)).eval()
    classes = randomise(small_model(head=True, num_classes=5)).eval()
    for model in (text, classes):
        for block in model.blocks[:2]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
    x, t, y = random_inputs()
    labels = torch.arange(3)

    with torch.no_grad():
        assert torch.equal(text(x, t, y), text(x, 1 - t, y))
        assert not torch.equal(classes(x, t, labels), classes(x, 1 - t, labels))


def test_dropout_replaces_whole_samples_and_only_in_training():
    embedder = ConditionEmbedding(8, 0.1)
    nn.init.normal_(embedder.dropout_embedding)
    y = torch.randn(20_000, 3, 8)

    out = embedder.train()(y)

    is_null = (out == embedder.dropout_embedding).all(2)                # b n
    assert torch.equal(is_null.any(1), is_null.all(1))
    assert 0.09 < is_null[:, 0].float().mean() < 0.11
    assert torch.equal(out[~is_null], y[~is_null])
    assert embedder.eval()(y) is y


def test_no_dropout_keeps_all_conditions():
    y = torch.randn(100, 3, 8)
    assert torch.equal(ConditionEmbedding(8, 0.0).train()(y), y)


def test_null_condition_stays_exact_under_autocast():
    embedder = ConditionEmbedding(8, 0.1).train()
    y = torch.randn(100, 3, 8).bfloat16()
    assert embedder(y).dtype == torch.float32


def test_null_condition_of_text():
    model = randomise(text_dit(head=False))
    always_null = text_dit(head=False, class_dropout=1.0)
    always_null.load_state_dict(model.state_dict())
    x, t, y = random_inputs(2)

    null = model.null_condition(y)

    assert null.shape == y.shape
    assert (null == model.y_embedder.dropout_embedding).all()
    torch.testing.assert_close(always_null.train()(x, t, y), model.eval()(x, t, null))


def test_null_condition_of_classes():
    model = small_model(head=False, num_classes=5)
    null = model.null_condition(torch.tensor([0, 3]))
    assert null.tolist() == [5, 5]
    assert null.dtype == torch.int64


# ---------------------------------------------------------------------------- checkpointing
@with_and_without_head
@pytest.mark.parametrize("num_classes", [None, 5])
def test_activation_checkpointing_changes_no_gradient(head, num_classes, monkeypatch):
    calls = []
    original = model_module.checkpoint

    def counted_checkpoint(block, *inputs, **options):
        calls.append(options)
        return original(block, *inputs, **options)

    monkeypatch.setattr(model_module, "checkpoint", counted_checkpoint)
    x, t, y = random_inputs()
    if num_classes is not None:
        y = torch.arange(3)
    plain = randomise(small_model(head, num_classes=num_classes))
    recomputing = small_model(head, num_classes=num_classes)
    recomputing.load_state_dict(plain.state_dict())
    recomputing.checkpoint = True

    for model in (plain, recomputing):
        torch.manual_seed(1)                           # the same conditions are dropped
        model.train()(x, t, y).square().mean().backward()

    assert calls == [dict(use_reentrant=False) for _ in recomputing.blocks]
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in recomputing.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name]), name

    calls.clear()
    recomputing.eval()(x, t, y)
    assert calls == []


# ---------------------------------------------------------------------------- weights of Scale-RAE
def stand_in(tied=True):
    """The parts of a T2I, but of its language model only some layers."""
    layer = nn.ModuleDict(dict(self_attn=nn.ModuleDict(dict(q_proj=nn.Linear(24, 24)))))
    llm = nn.Module()
    llm.embed_tokens = nn.Embedding(11, 24)
    llm.norm = nn.RMSNorm(24)
    llm.layers = nn.ModuleList([layer])
    if not tied:
        llm.lm_head = nn.Linear(24, 11, bias=False)
    t2i = nn.Module()
    t2i.llm = llm
    t2i.dit = text_dit(head=False)
    t2i.diff_head_projector = nn.Linear(24, 32)
    t2i.mm_projector = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 24))
    t2i.latent_queries = nn.Parameter(torch.randn(16, 24))
    return randomise(t2i)


def published_name(key):
    """The name of a weight of stand_in() in the published file."""
    if key == "llm.lm_head.weight":
        return "lm_head.weight"
    if key.startswith("llm."):
        return key.replace("llm.", "model.", 1)
    if key.startswith("dit."):
        return key.replace("dit.", "diff_head.model.", 1).replace(".blocks.", ".dit_blocks.")
    if key.startswith("diff_head_projector."):
        return key
    return f"model.{key}"                              # mm_projector, latent_queries


def published_state(t2i):
    """The state dict as it is published, without the frequencies of the time embedding."""
    state = {published_name(key): value for key, value in t2i.state_dict().items()}
    del state["diff_head.model.t_embedder.W"]
    return state


def official_frequencies():
    generator = torch.Generator("cpu").manual_seed(114514)
    return torch.normal(0.0, 1.0, (256,), generator=generator)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["dict", "file", "nested"])
def test_weights_of_scale_rae_load_whole(tied, form, tmp_path):
    source = stand_in(tied)
    target = stand_in(tied)
    state = published_state(source)
    assert {"model.layers.0.self_attn.q_proj.weight", "model.mm_projector.2.bias",
            "model.latent_queries", "diff_head.model.dit_blocks.1.mlp.w12.bias",
            "diff_head_projector.weight"} <= state.keys()
    if tied:                                           # some files hold a copy although it is tied
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    given = state
    if form == "file":
        given = tmp_path / "model.safetensors"
        save_file(state, given)
    elif form == "nested":
        given = {"model": state}

    assert load_release(target, given) is target

    for key, value in source.state_dict().items():
        if key == "dit.t_embedder.W":
            value = official_frequencies()
        assert torch.equal(target.state_dict()[key], value), key


def test_dit_of_scale_rae_loads_alone():
    source = stand_in()
    dit = load_release(text_dit(head=False), published_state(source))
    assert torch.equal(dit.t_embedder.W, official_frequencies())
    assert torch.equal(dit.blocks[1].norm2.weight, source.dit.blocks[1].norm2.weight)


@pytest.mark.parametrize("published, ours", [
    ("model.norm.weight", "llm.norm.weight"),
    ("model.latent_queries", "latent_queries"),
    ("diff_head.model.dit_blocks.0.norm1.weight", "dit.blocks.0.norm1.weight")])
def test_missing_weights_are_listed(published, ours):
    state = published_state(stand_in())
    del state[published]
    message = f"(?s)does not fit Module.* 1 keys:.*missing {ours}$"
    with pytest.raises(ValueError, match=message):
        load_release(stand_in(), state)


@pytest.mark.parametrize("only_dit", [False, True])
def test_unexpected_weights_are_listed(only_dit):
    """Statistics of latents are never left out in silence."""
    module = text_dit(head=False) if only_dit else stand_in()
    state = published_state(stand_in())
    state["diff_head.data_mean"] = torch.zeros(8)
    state["diff_head.data_std"] = torch.ones(8)
    with pytest.raises(ValueError, match="(?s)unexpected diff_head.data_mean.*diff_head.data_std"):
        load_release(module, state)


def test_untied_model_needs_its_output_layer():
    state = published_state(stand_in(tied=True))
    with pytest.raises(ValueError, match="(?s)does not fit Module.*missing llm.lm_head.weight"):
        load_release(stand_in(tied=False), state)


def test_dit_of_classes_does_not_load_text():
    message = "(?s)does not fit DiT;.*missing y_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match=message):
        load_release(small_model(head=False, num_classes=5), published_state(stand_in()))


# ---------------------------------------------------------------------------- building
FLAGS = dict(width=32, depth=2, heads=2, head_width=0, class_dropout=0.25)


def test_build_dit_without_classes():
    model = build_dit(FLAGS, 8, 4, None)
    wide_flags = {**FLAGS, "head_width": 48, "head_depth": 1, "head_heads": 3}
    wide = build_dit(wide_flags, 8, 4, None)

    assert type(model) is DiT
    assert model.reads_text
    assert model.y_embedder.dropout == 0.25
    assert not model.checkpoint
    assert type(wide) is DiTDH
    assert wide.reads_text
    load_release(build_dit(FLAGS, 8, 4, None), {"ema": model.state_dict()})     # our own layout


def test_checkpoint_of_text_is_not_loaded_as_one_of_classes(tmp_path):
    model = build_dit(FLAGS, 8, 4, None)
    save_checkpoint(tmp_path / "t2i.pt", llm={}, ema=model.state_dict(), args=FLAGS)
    with pytest.raises(ValueError, match="t2i.pt is a checkpoint of train_t2i.py, for .*--prompt"):
        load_dit(tmp_path / "t2i.pt")


# ---------------------------------------------------------------------------- prompts
@pytest.mark.parametrize("text, message", [
    ("", "must say what to draw"),
    (" \n", "must say what to draw"),
    ("a <image> of a star", "without <image>"),
    ("a red star " * 40_000, "a prompt has 440000 characters"),
    ("a st\udce4r", "is no valid UTF-8"),
    (["a star"], "must be a text, not list"),
    (None, "must be a text, not NoneType"),
])
def test_prompts_that_cannot_be_drawn_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_prompt(text)


def test_a_long_prompt_in_any_language_is_taken():
    check_prompt("a red star and " * 1000)
    check_prompt("\N{GRINNING FACE}" * LONGEST_PROMPT)
