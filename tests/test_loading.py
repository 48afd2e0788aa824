"""Loading encoders and weights by release.py. Run: python -m pytest tests/test_loading.py"""
import math

import pytest
import timm
import torch
from safetensors.torch import save_file

import release
import t2i
from model import build_decoder, build_dit
from test_llm import TOKENIZER_FILE
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

    # What it computes is compared in test_judges.py.
    for name in ("patch_embed.proj.weight", "blocks.11.mlp.fc2.weight"):
        assert torch.equal(encoder.backbone.state_dict()[name], reference.state_dict()[name])

    smaller = release.load_encoder("dinov2-s", 64)     # sees 56 px
    assert smaller.encode(torch.rand(1, 3, 64, 64)).shape == (1, 384, 4, 4)


def test_weights_of_another_patch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "HERE", tmp_path)
    other_patch = timm.create_model("vit_small_patch16_224", depth=0, num_classes=0)
    (tmp_path / "weights").mkdir()
    save_file(other_patch.state_dict(), tmp_path / "weights" / f"{DINOV2_S}.safetensors")
    with pytest.raises(ValueError, match=f"{DINOV2_S}: patches of 16 x 16 pixels, not 14 x 14"):
        release.load_encoder("dinov2-s", 64)


def test_an_encoder_is_asked_for_where_the_hub_fails_at_once(tmp_path, monkeypatch):
    """The hub's client retries for 50 seconds to fetch a single file, but not a snapshot."""
    asked = []

    def offline(repository, allow_patterns):
        asked.append(repository)
        raise OSError("no network")

    monkeypatch.setattr(release, "HERE", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for name in ("dinov2-s", "siglip2-b"):
        with pytest.raises(FileNotFoundError, match=r"no download \(OSError\)"):
            release.load_encoder(name)
    assert asked == [f"timm/{DINOV2_S}", "timm/vit_base_patch16_siglip_256.v2_webli"]


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


# ---------------------------------------------------------------------------- what files must hold
DELETED = object()
TINY_DECODER = dict(decoder_width=8, decoder_depth=1, decoder_heads=2, decoder_mlp=8,
                    decoder_patch=16)
TINY_DIT = dict(width=8, depth=1, heads=2, head_width=0, class_dropout=0.1, data=["shapes"])
TINY_QWEN2 = dict(vocab_size=512, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                  num_attention_heads=2, num_key_value_heads=1, rope_theta=1e4, rms_norm_eps=1e-6,
                  tie_word_embeddings=True)


def tiny_rae():
    """An autoencoder of 4 x 2 x 2 latents, as checkpoints hold it."""
    return dict(TINY_DECODER, encoder="vae:4:16", size=32, latent_mean=torch.zeros(4, 2, 2),
                latent_var=torch.ones(4, 2, 2),
                decoder=build_decoder(TINY_DECODER, 4, 2).state_dict())


def tiny_checkpoint(script):
    """A checkpoint of a training script, of the smallest models there are."""
    state = dict(rae=tiny_rae(), args=dict(TINY_DIT), step=1)
    if script == "train_dit.py":
        state["ema"] = build_dit(TINY_DIT, 4, 2, 3).state_dict()
        state |= dict(num_classes=3, class_names=["a", "b", "c"], latent_shape=[4, 2])
    elif script == "train_t2i.py":
        state["args"] |= dict(connector="linear", context=64)
        state |= dict(llm=dict(TINY_QWEN2), tokenizer=TOKENIZER_FILE.read_text(), asked=0,
                      latent_shape=[4, 2, 2])
        state["ema"] = t2i.build_t2i(state["args"], state).state_dict()
    return state


SCRIPTS = ("train_decoder.py", "train_dit.py", "train_t2i.py")
LOADERS = dict(zip(SCRIPTS, (release.load_rae, release.load_dit, t2i.load_t2i), strict=True))


@pytest.fixture(scope="module")
def checkpoints():
    return {script: tiny_checkpoint(script) for script in SCRIPTS}


def changed(state, keys, value):
    """A copy of nested dicts with another value at "outer/inner", or none at all."""
    key, _, inner_keys = keys.partition("/")
    state = dict(state)
    if inner_keys:
        state[key] = changed(state[key], inner_keys, value)
    elif value is DELETED:
        del state[key]
    else:
        state[key] = value
    return state


def load(script, state, folder):
    """Save a dict and load it as a checkpoint of a script, without the encoder."""
    path = folder / "last.pt"
    torch.save(state, path)
    if script == "train_decoder.py":
        return release.load_rae(path, with_encoder=False)
    return LOADERS[script](path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_checkpoints_load(script, checkpoints, tmp_path):
    load(script, checkpoints[script], tmp_path)


BAD_AUTOENCODERS = [
    ("rae", [], "rae of type list, (which must be|not a dict)"),
    ("rae/encoder", 3, "encoder 3, which must be of type str"),
    ("rae/encoder", "vgg99", r"last.pt has an encoder that does not exist \(.*vgg99"),
    ("rae/size", 10 ** 5, "size 100000, which must be from 1 to 4096"),
    ("rae/size", 32.0, "size 32.0, which must be of type int"),
    ("rae/size", True, "size True, which must be of type int"),
    ("rae/decoder_depth", 10 ** 5, "decoder_depth 100000, which must be from 0 to 256"),
    ("rae/decoder_depth", torch.tensor(1), "decoder_depth of type Tensor, which must be of type"),
    ("rae/decoder_width", 10 ** 6, "decoder_width 1000000, which must be from 1 to 16384"),
    ("rae/decoder_width", 16384, r"(?s)last.pt: the decoder does not fit Decoder.*shape \(8, 4\)"),
    ("rae/decoder_heads", 0, "decoder_heads 0, which must be from 1 to"),
    ("rae/decoder_heads", 3, "decoder_width 8, no multiple of decoder_heads 3"),
    ("rae/decoder_patch", "16", "decoder_patch '16', which must be of type int"),
    ("rae/decoder_mlp", DELETED, "last.pt: rae has no decoder_mlp"),
    ("rae/decoder", None, "decoder None, which must be of type dict"),
    ("rae/decoder", {}, "(?s)does not fit Decoder.*missing decoder_embed.weight"),
    ("rae/decoder", {0: 1}, "(?s)does not fit Decoder.*25 keys.*missing decoder_embed.weight"),
    ("rae/latent_mean", DELETED, "rae has no latent_mean"),
    ("rae/latent_mean", None, "latent_mean None, which must be of type Tensor"),
    ("rae/latent_mean", torch.zeros(4), "a latent mean of shape"),
    ("rae/latent_var", [1.0], "latent_var of type list, which must be of type Tensor"),
    ("rae/latent_var", torch.zeros(4, 2, 2), "variances down to 0, which must be all positive"),
    ("rae/latent_var", -torch.ones(4, 2, 2), "variances down to -1, which must be all positive"),
    ("rae/latent_var", torch.full((4, 2, 2), math.nan), "numbers that are not finite"),
    ("rae/latent_var", torch.full((4, 2, 2), math.inf), "numbers that are not finite"),
    ("rae/latent_var", torch.ones(4, 2, 2).int(), "a latent variance torch.int32"),
    ("rae/latent_var", torch.ones(1).expand(4, 9999, 9999), "of which the file holds only a part"),
]
BAD_WEIGHTS = [
    ("ema", DELETED, "has no weights, neither ema nor model"),
    ("ema", torch.zeros(3), "ema of type Tensor, which must be of type dict"),
    ("ema/dit.pos_embed", torch.zeros(1, 9, 8), r"pos_embed: shape \(1, 9, 8\), the model has"),
    ("ema/dit.pos_embed", torch.zeros(1, 4, 8).long(), "pos_embed: torch.int64"),
    ("ema/dit.pos_embed", torch.zeros(1, 4, 8).cfloat(), "pos_embed: torch.complex64"),
    ("ema/dit.pos_embed", "x", "pos_embed: str, not a tensor"),
    ("ema/dit.pos_embed", torch.zeros(1, 4, 8).to_sparse(), "torch.sparse_coo"),
    ("ema/dit.pos_embed", torch.full((1, 4, 8), math.nan), "weights that are not finite, .*pos_"),
    ("ema/dit.pos_embed", torch.full((1, 4, 8), -math.inf), "weights that are not finite, .*pos_"),
]
BAD_DITS = [
    ("args", DELETED, "last.pt has no args"),
    ("args", None, "args None, which must be of type dict"),
    ("args/width", 10 ** 6, "args has width 1000000, which must be from 1 to 16384"),
    ("args/width", 8.5, "width 8.5, which must be of type int"),
    ("args/width", 10, "width 10, no multiple of heads 2 x 4"),
    ("args/depth", 10 ** 5, "depth 100000, which must be from 0 to 256"),
    ("args/heads", 0, "heads 0, which must be from 1"),
    ("args/head_width", 8, "args has no head_depth"),
    ("args/head_width", None, "head_width None, which must be of type int"),
    ("args/class_dropout", "0", "class_dropout '0', which must be of type float"),
    ("args/class_dropout", math.nan, "class_dropout nan, which must be from 0 to 1"),
    ("args/prediction", "eps", "prediction 'eps', which must be one of v x0"),
    ("args/prediction", None, "prediction None, which must be of type str"),
    ("args/shift_base", 0, "shift_base 0, which must be from 1e-09"),
    ("latent_shape", [4, 3], r"model of latents \[4, 3\] and an autoencoder of \[4, 2, 2\]"),
    ("latent_shape", (4, 2), "latent_shape of type tuple, which must be of type list"),
]
BAD_CLASSES = [
    ("num_classes", 10 ** 9, "3 class_names for 1000000000 classes"),
    ("num_classes", 2, "3 class_names for 2 classes"),
    ("num_classes", DELETED, "last.pt has no num_classes"),
    ("class_names", [1, 2, 3], "a text for each is needed"),
    ("class_names", "abc", "class_names 'abc', which must be of type list"),
]
BAD_TEXTS = [
    ("llm", [], "llm of type list, which must be of type dict"),
    ("llm/vocab_size", 10 ** 9, "vocab_size 1000000000, which must be from 1 to"),
    ("llm/vocab_size", 100, "a tokenizer of ids up to 511 and a language model of 100 tokens"),
    ("llm/num_hidden_layers", 10 ** 5, "num_hidden_layers 100000, which must be from 0 to"),
    ("llm/num_attention_heads", 3, "hidden_size 8, no multiple of num_attention_heads 3 x 2"),
    ("llm/num_key_value_heads", 0, "num_key_value_heads 0, which must be from 1"),
    ("llm/rope_theta", DELETED, "llm has no rope_theta"),
    ("llm/rope_theta", -1.0, "rope_theta -1.0, which must be from 1"),
    ("llm/tie_word_embeddings", 1, "tie_word_embeddings 1, which must be of type bool"),
    ("tokenizer", DELETED, "last.pt has no tokenizer"),
    ("tokenizer", "/etc/passwd", "a tokenizer that is no JSON"),
    ("tokenizer", "{}", "last.pt: tokenizer can't be read"),
    ("args/connector", "mlp9", "connector 'mlp9', which must be one of linear mlp2"),
    ("args/context", 10 ** 9, "context 1000000000, which must be from 1"),
    ("args/plan", -1, "plan -1, which must be from 0"),
    ("asked", None, "asked None, which must be of type int"),
]


@pytest.mark.parametrize("keys, value, message", BAD_AUTOENCODERS)
def test_an_autoencoder_that_cannot_be_used_is_refused(keys, value, message, checkpoints,
                                                       tmp_path):
    for script in ("train_decoder.py", "train_t2i.py"):
        state = changed(checkpoints[script], keys, value)
        with pytest.raises(ValueError, match=message) as error:
            load(script, state, tmp_path)
        assert str(tmp_path / "last.pt") in str(error.value)


@pytest.mark.parametrize("keys, value, message", BAD_DITS + BAD_CLASSES + BAD_WEIGHTS)
def test_a_model_of_classes_that_cannot_be_used_is_refused(keys, value, message, checkpoints,
                                                           tmp_path):
    state = changed(checkpoints["train_dit.py"], keys.replace("/dit.", "/"), value)
    with pytest.raises(ValueError, match=message) as error:
        load("train_dit.py", state, tmp_path)
    assert str(tmp_path / "last.pt") in str(error.value)


@pytest.mark.parametrize("keys, value, message", BAD_DITS + BAD_TEXTS + BAD_WEIGHTS)
def test_a_model_of_text_that_cannot_be_used_is_refused(keys, value, message, checkpoints,
                                                        tmp_path):
    state = changed(checkpoints["train_t2i.py"], keys, value)
    with pytest.raises(ValueError, match=message) as error:
        load("train_t2i.py", state, tmp_path)
    assert str(tmp_path / "last.pt") in str(error.value)


@pytest.mark.parametrize("given, loaded_as, message", [
    ("train_decoder.py", "train_dit.py", "is a checkpoint of train_decoder.py, for eval_decoder"),
    ("train_decoder.py", "train_t2i.py", "is a checkpoint of train_decoder.py, for eval_decoder"),
    ("train_dit.py", "train_t2i.py", "is a checkpoint of train_dit.py, for sample.py"),
    ("train_t2i.py", "train_dit.py", "is a checkpoint of train_t2i.py, for sample.py --prompt"),
])
def test_a_checkpoint_of_another_script_says_which_reads_it(given, loaded_as, message,
                                                            checkpoints, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(loaded_as, checkpoints[given], tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("content, message", [
    ([("rae", 1)], "holds a list and no dict"),
    (torch.zeros(3), "holds a Tensor and no dict"),
    (None, "holds a NoneType and no dict"),
    ({}, "is no checkpoint of train_"),
    ({"decoder_embed.weight": torch.zeros(3)}, "is no checkpoint of train_"),
])
def test_files_of_something_else_are_refused(script, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(script, content, tmp_path)


def test_files_that_cannot_be_read_are_refused(checkpoints, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(checkpoints["train_dit.py"], path)
    whole = path.read_bytes()
    for broken in (b"", whole[:1000], whole[:-1000], b"\x00" * 1000, b"# no checkpoint\n"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="last.pt is no checkpoint that can be read safely"):
            release.load_dit(path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is a folder; name the checkpoint in"):
        release.load_dit(tmp_path)


@pytest.mark.parametrize("plain", ["{", "[]", "3", '{"args": 3}', "[" * 10_000])
def test_safetensors_with_foreign_metadata_are_refused(plain, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"args/width": torch.zeros(1)}, path, metadata={"plain": plain})
    with pytest.raises(ValueError, match="x.safetensors is no checkpoint"):
        release.load_dit(path)


# ---------------------------------------------------------------------------- published names
@pytest.mark.parametrize("name, loader, message", [
    ("dinov2-bb", release.load_rae, "did you mean the published dinov2-b"),
    ("imagenet265", release.load_dit, "did you mean the published imagenet256"),
    ("scale-rae-1.5", t2i.load_t2i, "did you mean the published scale-rae-1.5b"),
    ("nothing.pt", release.load_dit, "nothing.pt does not exist; give a checkpoint of train_dit"),
])
def test_misspelt_names_are_corrected(name, loader, message):
    with pytest.raises(FileNotFoundError, match=message):
        loader(name)


@pytest.mark.parametrize("name, loader, message", [
    ("imagenet256", t2i.load_t2i, "imagenet256 is a published model for sample.py"),
    ("scale-rae-7b", release.load_dit, "a published model for sample.py --prompt, eval_t2i.py and"),
    ("dinov2-b", release.load_dit, "a published model for eval_decoder.py --rae"),
    ("imagenet512", release.load_rae, "a published model for sample.py, eval_fid.py and train_"),
])
def test_published_models_of_another_kind_say_what_takes_them(name, loader, message):
    with pytest.raises(ValueError, match=message):
        loader(name)
