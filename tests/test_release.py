"""Published weights: loading, sampling from them, many images, and what can go wrong on the way.

The files are small, with the published names and keys, see tests/dry_run.py.
Run: python -m pytest tests/test_release.py
"""
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import time
import warnings

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dry_run
import eval_fid
import model as model_module
import release
import runtime
import sample
import storage
import train_dit
from conftest import ROOT, SHIPPED, run_script, start, torchrun
from model import RAE, Decoder, DiT, build_decoder, build_dit
from release import (
    PUBLISHED_DITS,
    PUBLISHED_RAES,
    SHIPPED_RAE,
    load_dit,
    load_dit_alone,
    load_packed_rae,
    load_rae,
    load_release,
    pixel_statistics,
    published_dit,
)

SMALL_DITDH = dict(decoder=dry_run.SMALL_DECODER, dit=dry_run.SMALL_DIT,
                   guide=dry_run.SMALL_GUIDE, head=dry_run.SMALL_HEAD)
STATISTICS_256 = "stats/dinov2/wReg_base/imagenet1k/stat.pt"
STATISTICS_512 = "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"


@pytest.fixture
def small_sizes(monkeypatch):
    """The named sizes of published models, shrunk to those of the files that these tests write."""
    head = dict(head_width=48, head_depth=1, head_heads=3)
    monkeypatch.setitem(model_module.DECODER_SIZES, "XL", dict(
        decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_mlp=48))
    monkeypatch.setitem(model_module.DIT_SIZES, "DiTDH-XL",
                        dict(width=32, depth=2, heads=2, **head))
    monkeypatch.setitem(model_module.DIT_SIZES, "DiTDH-S",
                        dict(width=16, depth=1, heads=1, **head))
    warnings.filterwarnings("ignore", message="--head_width 48 is below")


def refuse_to_load(*args):
    raise AssertionError("no encoder may be loaded here")


@pytest.fixture
def hub(tmp_path, small_sizes, monkeypatch):
    """A folder with both published DiTs. Drawing from them must not load an encoder."""
    monkeypatch.setattr(release, "load_encoder", refuse_to_load)
    for name in PUBLISHED_DITS:
        dry_run.write_dit(tmp_path / "hub", name, **SMALL_DITDH)
    return tmp_path / "hub"


def read(path):
    return torch.load(path, weights_only=True)


def write_rae(folder, name):
    """Small files of a published autoencoder; returns the paths of its weights and statistics."""
    if name == "siglip2-so400m":
        weights, _ = dry_run.write_siglip2_decoder(folder, dry_run.SMALL_DECODER)
        return weights, None
    return dry_run.write_rae(folder, name, dry_run.SMALL_DECODER)


# ---------------------------------------------------------------------------- autoencoders by name
def test_the_dry_run_knows_every_published_name():
    assert PUBLISHED_RAES.keys() == dry_run.AUTOENCODERS.keys() | {"siglip2-so400m"}
    assert PUBLISHED_DITS.keys() == dry_run.DITS.keys()


@pytest.mark.parametrize("name", PUBLISHED_RAES)
def test_every_published_autoencoder_loads_and_decodes(name, tmp_path, small_sizes):
    weights_path, statistics_path = write_rae(tmp_path, name)
    published = PUBLISHED_RAES[name]
    weights = read(weights_path)
    latent_shape = (published.channels, published.image_size // 16, published.image_size // 16)

    rae = load_rae(name, with_encoder=False, folder=tmp_path)

    assert not rae.training
    assert not any(parameter.requires_grad for parameter in rae.parameters())
    decoder = rae.decoder
    query = weights["decoder_layers.0.attention.attention.query.weight"]
    assert torch.equal(decoder.decoder_pos_embed, weights["decoder_pos_embed"])
    assert torch.equal(decoder.decoder_pred.weight, weights["decoder_pred.weight"])
    assert torch.equal(decoder.decoder_layers[0].query.weight, query)

    assert rae.latent_std.shape == latent_shape
    if statistics_path is None:                        # of Scale-RAE: mean 0, variance 1
        assert rae.latent_mean.abs().max() == 0
        assert (rae.latent_std - 1).abs().max() < 1e-6
    else:
        statistics = read(statistics_path)
        assert torch.equal(rae.latent_std, (statistics["var"] + 1e-5).sqrt())
        expected_mean = 0 if statistics["mean"] is None else statistics["mean"]
        assert (rae.latent_mean - expected_mean).abs().max() == 0

    mean, _ = pixel_statistics(published.encoder)
    side = 224 if name == "siglip2-so400m" else published.image_size
    assert (rae.pixel_mean.flatten() - torch.tensor(mean)).abs().max() < 1e-6
    assert decoder.image_size == side
    image = rae.decode(torch.randn(1, *latent_shape))
    assert image.shape == (1, 3, side, side) and image.isfinite().all()


def test_a_noise_level_is_another_decoder_with_the_same_statistics(tmp_path, small_sizes):
    weights_path, _ = write_rae(tmp_path, "dinov2-b")
    other_path, _ = write_rae(tmp_path, "dinov2-b:n05")
    other = read(other_path)
    other["decoder_pred.bias"] += 1
    torch.save(other, other_path)

    usual = load_packed_rae("dinov2-b", tmp_path)
    noisier = load_packed_rae("dinov2-b:n05", tmp_path)

    assert torch.equal(usual["decoder"]["decoder_pred.bias"],
                       read(weights_path)["decoder_pred.bias"])
    assert torch.equal(noisier["decoder"]["decoder_pred.bias"], other["decoder_pred.bias"])
    assert torch.equal(usual["latent_var"], noisier["latent_var"])
    assert usual["encoder"] == noisier["encoder"] == "dinov2-b"


@pytest.mark.parametrize("name", ["dinov2-b", "siglip2-so400m"])
def test_a_published_autoencoder_encodes(name, tmp_path, small_sizes, monkeypatch):
    """With an encoder of the right width and layout, but a single layer and random weights."""
    channels = PUBLISHED_RAES[name].channels

    def small_vit(timm_name, size):
        assert size == 224                             # patch 14 sees 14/16 of 256 px
        return timm.models.VisionTransformer(img_size=size, patch_size=14, embed_dim=channels,
                                             depth=1, num_heads=16, num_classes=0)

    monkeypatch.setattr(release, "load_vit", small_vit)
    write_rae(tmp_path, name)
    rae = load_rae(name, folder=tmp_path)
    images = torch.rand(1, 3, 256, 256)

    latents = rae.encode(images)

    assert latents.shape == (1, channels, 16, 16)
    expected = (rae.encoder.encode(images) - rae.latent_mean) / rae.latent_std
    assert torch.equal(latents, expected)
    assert rae.encoder.encode(images).mean(1).abs().max() < 1e-5


def test_encoder_names_are_known_without_loading_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse_to_load)
    assert release.encoder_name() == release.encoder_name(SHIPPED_RAE) == "tiny"
    assert release.encoder_name("dinov2-b:n10") == "dinov2-b"


def test_checkpoints_of_both_stages_hold_an_autoencoder(tmp_path):
    for path in (SHIPPED_RAE, SHIPPED):
        packed = load_packed_rae(path)
        assert packed["encoder"] == "tiny" and packed["latent_var"].shape == (192, 4, 4)
    storage.save_checkpoint(tmp_path / "other.pt", step=3)
    with pytest.raises(ValueError, match="other.pt is no checkpoint of train_decoder.py, .*mae-b"):
        load_packed_rae(tmp_path / "other.pt")


def test_unknown_names_and_missing_files_of_autoencoders(tmp_path, small_sizes):
    with pytest.raises(ValueError, match="no autoencoder dinov2-b:n07 is published; give one of "
                                         "dinov2-b dinov2-b:n00 dinov2-b:n05 dinov2-b:n10$"):
        load_packed_rae("dinov2-b:n07")
    with pytest.raises(ValueError, match="mae-b:n05 is published; give one of mae-b$"):
        load_packed_rae("mae-b:n05")
    with pytest.raises(FileNotFoundError, match="dinov2-xl does not exist; did you mean .*dinov2-"):
        load_packed_rae("dinov2-xl")

    _, statistics = write_rae(tmp_path, "mae-b")
    statistics.unlink()
    with pytest.raises(FileNotFoundError, match="mae/base_p16/ImageNet1k/stat.pt does not exist; "
                                                "copy it there from huggingface.co/nyu-visionx"):
        load_packed_rae("mae-b", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ViTXL_n10/\*.pt does not exist"):
        load_packed_rae("dinov2-b:n10", tmp_path)
    with pytest.raises(FileNotFoundError, match="siglip2_decoder/config.json does not exist"):
        load_packed_rae("siglip2-so400m", tmp_path)


# ---------------------------------------------------------------------------- loading and drawing
@pytest.mark.shipped
def test_release_is_loaded_as_it_is(hub):
    decoder_path, statistics_path, dit_path, guide_path = dry_run.write_dit(
        hub, "imagenet256", **SMALL_DITDH)

    model, rae, state = load_dit("imagenet256", folder=hub)

    for key, value in read(dit_path).items():          # tables, frequencies and all
        assert torch.equal(model.state_dict()[key], value), key
    assert rae.encoder is None and not rae.training and not model.training
    var = read(statistics_path)["var"]
    assert torch.equal(rae.latent_std, (var + 1e-5).sqrt())
    assert rae.latent_mean.abs().max() == 0
    table = read(decoder_path)["decoder_pos_embed"]
    assert torch.equal(rae.decoder.decoder_pos_embed, table)
    imagenet_mean = torch.tensor([0.485, 0.456, 0.406])
    assert (rae.pixel_mean.flatten() - imagenet_mean).abs().max() < 1e-6
    assert state["class_names"][207] == "golden retriever"
    assert len(state["class_names"]) == 1000

    assert load_dit("imagenet512", folder=hub)[0].grid == 32
    guide, _ = load_dit_alone("imagenet256/guide", folder=hub)
    assert torch.equal(guide.t_embedder.W, read(guide_path)["t_embedder.W"])


@pytest.mark.shipped
@pytest.mark.parametrize("name, side, guidance, shift", [
    ("imagenet256", 256, 1.42, 6.928), ("imagenet512", 512, 1.5, 13.856)])
def test_one_command_draws_with_the_papers_sampler(hub, tmp_path, monkeypatch, name, side,
                                                   guidance, shift):
    args = sample.parse_args(["--release", name])
    assert (args.solver, args.sampling_steps, args.release_grid) == ("euler", 50, False)
    assert args.guidance == guidance
    assert sample.parse_args(["--release", name, "--guidance", "1.3"]).guidance == 1.3

    shifts = []
    original = sample.time_grid

    def recording_time_grid(steps, shift, *rest):
        shifts.append(shift)
        return original(steps, shift, *rest)

    monkeypatch.setattr(sample, "time_grid", recording_time_grid)
    flags = ["--release", name, "--release_dir", hub, "--sampling_steps", 2]
    run_script(sample, *flags, "--n", 2, "--out", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (2 * (side + 2) + 2, 16 + side + 4)
    assert abs(shifts[0] - shift) < 1e-3

    run_script(sample, *flags, "--n", 1, "--guidance", 1, "--labels", "golden_retriever",
               "--out", tmp_path / "plain.npz")
    assert np.load(tmp_path / "plain.npz")["labels"].tolist() == [207]


@pytest.mark.shipped
def test_what_is_not_needed_is_not_asked_for(hub, monkeypatch):
    """Without guidance no guide; of the repository on the hub only the four files."""
    repositories, files = set(), []

    def download(repository, allow_patterns):
        repositories.add(repository)
        files.extend(allow_patterns)
        return hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    args = sample.parse_args(["--release", "imagenet256", "--guidance", "1"])
    assert sample.load_models(args, "cpu")[3] is None
    assert len(files) == 3

    files.clear()
    args = sample.parse_args(["--release", "imagenet256"])
    weak = sample.load_models(args, "cpu")[3]
    assert len(weak.blocks) == dry_run.SMALL_GUIDE.depth + dry_run.SMALL_HEAD.depth
    written = {path.relative_to(hub).as_posix() for path in hub.rglob("*.pt")
               if "512" not in str(path)}
    assert set(files) == written and len(written) == 4
    assert repositories == {"nyu-visionx/RAE-collections"}


@pytest.mark.shipped
def test_guidance_costs_what_it_must(hub):
    """AutoGuidance: a main and a weak forward of b images; CFG: one of 2b.

    Outside the interval, and without labels: one forward of b.
    """
    args = sample.parse_args(["--release", "imagenet256", "--release_dir", str(hub),
                              "--sampling_steps", "10"])
    model, rae, _, weak = sample.load_models(args, "cpu")
    calls = []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(("main", len(inputs[0]))))
    weak.register_forward_pre_hook(lambda _, inputs: calls.append(("weak", len(inputs[0]))))

    def count(labels, weak, interval=(0, 1)):
        """Number of forward passes by (model, images in each)."""
        calls.clear()
        args.interval = interval
        sample.generate(model, rae, labels, args, weak=weak)
        return {call: calls.count(call) for call in calls}

    assert count([1, 2, 3], weak) == {("main", 3): 10, ("weak", 3): 10}
    assert count([1, 2, 3], None) == {("main", 6): 10}

    times = sample.time_grid(10, 48 ** 0.5)[:-1]
    inside = int(((times >= 0.7) & (times <= 0.9)).sum())
    assert 0 < inside < 10
    assert count([1, 2, 3], weak, (0.7, 0.9)) == {("main", 3): 10, ("weak", 3): inside}
    assert count([1, 2, 3], None, (0.7, 0.9)) == {("main", 6): inside, ("main", 3): 10 - inside}

    null_class = 1000
    assert count([null_class, null_class], None) == {("main", 2): 10}      # nothing to guide by
    assert count([null_class, null_class], weak) == {("main", 2): 10, ("weak", 2): 10}


@pytest.mark.shipped
def test_upsampling_decoder_gives_twice_the_side(tmp_path):
    """256 tokens, patch 32: the other way to 512 px. Images have the size of the decoder."""
    state = storage.load_checkpoint(SHIPPED)
    state["rae"]["decoder_patch"] = 32
    state["rae"]["decoder"] = build_decoder(state["rae"], 192, 4).state_dict()
    storage.save_checkpoint(tmp_path / "up.pt", **state)

    run_script(sample, "--ckpt", tmp_path / "up.pt", "--n", 1, "--sampling_steps", 2,
               "--out", tmp_path / "up.npz")

    assert np.load(tmp_path / "up.npz")["arr_0"].shape == (1, 128, 128, 3)
    with torch.device("meta"):
        decoder = Decoder(768, 16, 32, 1152, 28, 16, 4096)
        assert decoder(torch.zeros(1, 768, 16, 16)).shape == (1, 3, 512, 512)


def test_statistics_of_a_release_go_into_an_rae(hub):
    var = read(hub / STATISTICS_256)["var"]
    rae = RAE(None, Decoder(768, 16, 16, 32, 1, 2, 48),
              pixel_statistics=pixel_statistics("dinov2-b"))

    load_release(rae, hub / STATISTICS_256)
    assert torch.equal(rae.latent_std, (var + 1e-5).sqrt())
    assert rae.latent_mean.abs().max() == 0
    load_release(rae, {"mean": var * 2, "var": var})
    assert torch.equal(rae.latent_mean, var * 2)

    wrong_shape = r"shape \(768, 32, 32\) are not of this decoder's latents"
    with pytest.raises(ValueError, match=wrong_shape):
        load_release(rae, hub / STATISTICS_512)
    for wrong in ({"variance": var}, {"mean": None, "var": None}):
        with pytest.raises(ValueError, match="the given state has no latent statistics"):
            load_release(rae, wrong)


def test_statistics_of_a_checkpoint_go_into_an_rae():
    decoder = build_decoder(load_packed_rae(SHIPPED), 192, 4)
    rae = RAE(None, decoder, pixel_statistics=pixel_statistics("tiny"))
    load_release(rae, SHIPPED)
    assert torch.equal(rae.latent_std, load_dit(SHIPPED)[1].latent_std)


def test_our_checkpoints_go_through_the_same_function():
    state = storage.load_checkpoint(SHIPPED)
    model = build_dit(state["args"], 192, 4, 36)
    load_release(model, SHIPPED)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][key]), key
    for path in (SHIPPED, SHIPPED_RAE):                # of stage 2 and of stage 1
        decoder = load_release(build_decoder(state["rae"], 192, 4), path)
        for key, value in decoder.state_dict().items():
            assert torch.equal(value, state["rae"]["decoder"][key]), key


# ---------------------------------------------------------------------------- training on
TABLE = "y_embedder.embedding_table.weight"
QUICK_TRAINING = ["--steps", 1, "--preview_every", 0, "--log_every", 1, "--workers", 0,
                  "--dtype", "fp32"]


@pytest.fixture
def no_updates(monkeypatch):
    """Training runs, but the weights stay."""
    monkeypatch.setattr(runtime, "optimizer_step", lambda *args: 0.0)


class FlatEncoder(torch.nn.Module):
    """Stands for DINOv2-B: as many channels, made from the mean colours of the patches."""
    def __init__(self, name, image_size):
        super().__init__()
        self.name, self.image_size, self.grid = name, image_size, image_size // 16
        self.channels, self.mean, self.std = 768, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images):
        colours = torch.nn.functional.avg_pool2d(images, 16)
        return colours.repeat(1, 256, 1, 1) - 0.5


def write_photos(folder, n, side):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (side, side), (40 * i, 99, 30)).save(folder / f"{i}.png")


def test_train_dit_starts_from_a_checkpoint(tmp_path, no_updates):
    """--init takes weights, size, RAE and prediction of the checkpoint."""
    shipped = storage.load_checkpoint(SHIPPED)
    flags = ["--init", SHIPPED, "--batch", 4, *QUICK_TRAINING]

    run_script(train_dit, *flags, "--out", tmp_path / "same")

    trained = storage.load_checkpoint(tmp_path / "same" / "last.pt")
    for key, value in trained["model"].items():
        assert torch.equal(shipped["ema"][key], value), key
    assert trained["args"]["prediction"] == "x0"
    assert torch.equal(trained["rae"]["latent_var"], shipped["rae"]["latent_var"])


def test_train_dit_starts_other_classes_with_a_new_table(tmp_path, no_updates):
    shipped = storage.load_checkpoint(SHIPPED)
    write_photos(tmp_path / "two" / "cats", 4, 64)
    write_photos(tmp_path / "two" / "dogs", 4, 64)
    flags = ["--init", SHIPPED, "--batch", 4, *QUICK_TRAINING]

    run_script(train_dit, *flags, "--data", tmp_path / "two", "--out", tmp_path / "fresh")

    weights = storage.load_checkpoint(tmp_path / "fresh" / "last.pt")["model"]
    assert weights.pop(TABLE).shape == (3, 192)
    for key, value in weights.items():
        assert torch.equal(shipped["ema"][key], value), key


def test_train_dit_refuses_a_checkpoint_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="(?s)--init .*tiny_dit.* does not fit DiTDH; build it"):
        run_script(train_dit, "--init", SHIPPED, "--width", 64, "--batch", 4, *QUICK_TRAINING,
                   "--out", tmp_path / "n")


def test_train_dit_knows_the_sizes_of_a_release(tmp_path):
    args = train_dit.parse_args(["--init", "imagenet256", "--out", str(tmp_path / "official")])
    assert (args.width, args.depth, args.head_width) == (1152, 28, 2048)


@pytest.mark.shipped
def test_train_dit_goes_on_from_a_release(tmp_path, hub, no_updates, monkeypatch, capsys):
    monkeypatch.setattr(release, "load_encoder", FlatEncoder)
    write_photos(tmp_path / "photos", 6, 256)
    flags = ["--release_dir", hub, "--data", tmp_path / "photos"]
    official = published_dit("imagenet256", hub)["ema"]

    run_script(train_dit, "--init", "imagenet256", *flags, "--batch", 2, *QUICK_TRAINING,
               "--out", tmp_path / "run")

    trained = storage.load_checkpoint(tmp_path / "run" / "last.pt")
    args = trained["args"]
    assert args["shift_base"] == 4096 and args["prediction"] == "v"
    assert args["ema"] == 0.9995 and args["label_std"] == 0.02
    assert args["time_law"] == "logit_normal"
    assert trained["num_classes"] == 1
    for key, value in official.items():
        if "y_embedder" not in key:
            assert torch.equal(trained["model"][key], value), key
    assert torch.equal(trained["model"][TABLE][-1], official[TABLE][-1])   # the null class

    run_script(sample, "--ckpt", tmp_path / "run" / "last.pt", "--n", 1, "--sampling_steps", 1,
               "--out", tmp_path / "one.png")
    results = run_script(eval_fid, "--release", "imagenet256", *flags, "--n", 4,
                         "--sampling_steps", 1, "--features", "tiny")
    assert results["n"] == 4 and results["guidance"] == 1.42
    assert np.isfinite(results["frechet_distance"])


def test_train_dit_takes_a_published_autoencoder(tmp_path, small_sizes, monkeypatch):
    monkeypatch.setattr(release, "load_encoder", FlatEncoder)
    weights_path, _ = write_rae(tmp_path / "hub", "dinov2-b:n05")
    write_photos(tmp_path / "photos", 4, 256)

    warnings.filterwarnings("ignore", message="--width 16 is below")
    run_script(train_dit, "--rae", "dinov2-b:n05", "--release_dir", tmp_path / "hub",
               "--data", tmp_path / "photos", "--width", 16, "--heads", 1, "--depth", 1,
               "--head_width", 0, "--batch", 2, *QUICK_TRAINING, "--out", tmp_path / "run")

    packed = storage.load_checkpoint(tmp_path / "run" / "last.pt")["rae"]
    assert packed["encoder"] == "dinov2-b" and packed["size"] == 256
    for key, value in read(weights_path).items():
        assert torch.equal(packed["decoder"][key], value), key


def test_a_folder_of_files_needs_a_published_name(capsys):
    with pytest.raises(SystemExit):
        train_dit.parse_args(["--release_dir", "hub"])
    message = capsys.readouterr().err
    assert "--release_dir needs" in message and "--init" in message and "imagenet256" in message


def test_evaluating_a_release_needs_data(capsys):
    with pytest.raises(SystemExit):
        eval_fid.parse_args(["--release", "imagenet256"])
    assert "needs --data: a folder or tars of ImageNet" in capsys.readouterr().err


# ---------------------------------------------------------------------------- many images
QUICK = ["--sampling_steps", 1, "--guidance", 1, "--solver", "euler"]


def images_of(path):
    return np.load(path)["arr_0"].astype(int)


def test_balanced_labels(tmp_path):
    run_script(sample, *QUICK, "--labels", "balanced", "--n", 108, "--out", tmp_path / "b.npz")
    assert np.bincount(np.load(tmp_path / "b.npz")["labels"]).tolist() == [3] * 36


def test_random_labels(tmp_path):
    flags = [*QUICK, "--labels", "random"]
    run_script(sample, *flags, "--n", 108, "--out", tmp_path / "many.npz")
    run_script(sample, *flags, "--n", 40, "--batch", 7, "--out", tmp_path / "few.npz")
    run_script(sample, *flags, "--n", 40, "--seed", 1, "--out", tmp_path / "other.npz")

    many, few, other = (np.load(tmp_path / f"{name}.npz")["labels"].tolist()
                        for name in ("many", "few", "other"))
    assert len(set(many)) > 20 and many != sorted(many)
    assert many[:40] == few                            # label i depends on i alone
    difference = images_of(tmp_path / "many.npz")[:40] - images_of(tmp_path / "few.npz")
    assert np.abs(difference).max() <= 1
    assert other != few


def killed_after(n, monkeypatch):
    """The list of the numbers of the images drawn from now on; beyond n the run is interrupted."""
    drawn = []
    original = sample.generate

    def generate_or_die(model, rae, labels, args, numbers, *rest):
        drawn.extend(numbers)
        if len(drawn) > n:
            raise KeyboardInterrupt
        return original(model, rae, labels, args, numbers, *rest)

    monkeypatch.setattr(sample, "generate", generate_or_die)
    return drawn


@pytest.mark.parametrize("suffix", [".npz", ""])
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    flags = [*QUICK, "--n", 20, "--labels", "balanced"]
    run_script(sample, *flags, "--batch", 4, "--out", whole)

    drawn = killed_after(12, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_script(sample, *flags, "--batch", 4, "--out", cut)
    assert not cut.exists()
    drawn.clear()
    run_script(sample, *flags, "--batch", 3, "--out", cut)     # another batch, the same images

    assert drawn == list(range(12, 20))
    assert not list(tmp_path.glob("*.parts"))
    if suffix == ".npz":
        assert np.abs(images_of(whole) - images_of(cut)).max() <= 1        # a rounding at most
    else:
        names = sorted(path.name for path in cut.iterdir())
        assert names == [f"{i:06d}.png" for i in range(20)]
        with pytest.raises(SystemExit):
            run_script(sample, *flags, "--out", cut)
        assert "cut exists; delete it, or name another folder" in capsys.readouterr().err


def wait_for(condition):
    """Wait up to a minute until condition() is true."""
    deadline = time.time() + 60
    while not condition() and time.time() < deadline:
        time.sleep(0.05)


@pytest.mark.shipped
def test_a_killed_process_leaves_only_whole_images(tmp_path):
    """And another run with other settings does not mix with what it left."""
    process = start(sample, "--n", 3000, "--sampling_steps", 2, "--batch", 4,
                    "--out", tmp_path / "x.npz")
    wait_for(lambda: len(list(tmp_path.glob("*.parts/*.png"))) >= 20)
    process.kill()
    process.join()

    parts = list(tmp_path.glob("x.npz.*.parts"))
    files = list(parts[0].glob("*.png"))
    assert len(parts) == 1 and len(files) >= 20 and not (tmp_path / "x.npz").exists()
    for file in files:
        assert np.asarray(Image.open(file)).shape == (64, 64, 3)           # each can be read

    run_script(sample, "--n", 4, "--sampling_steps", 1, "--out", tmp_path / "x.npz")
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 4
    assert not list(tmp_path.glob("*.parts"))          # what nobody will go on with is deleted


@pytest.mark.shipped
def test_images_of_other_weights_are_not_taken_for_its_own(tmp_path, monkeypatch):
    """Killed, retrained under the same name and to the same step: nothing is reused."""
    state = storage.load_checkpoint(SHIPPED)
    drawn = killed_after(4, monkeypatch)
    for bias, first_drawn in ((0.0, 0), (0.0, 4), (0.1, 0)):
        state["ema"]["final_layer.linear.bias"] += bias
        storage.save_checkpoint(tmp_path / "last.pt", **state)
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            run_script(sample, "--ckpt", tmp_path / "last.pt", *QUICK, "--n", 12, "--batch", 4,
                       "--out", tmp_path / "x.npz")
        assert drawn[0] == first_drawn


@pytest.mark.shipped
def test_two_processes_draw_what_one_does(tmp_path):
    flags = [*QUICK, "--labels", "random", "--n", 21, "--seed", 5]
    run_script(sample, *flags, "--out", tmp_path / "one.npz")
    torchrun(sample, *flags, "--batch", 4, "--out", tmp_path / "two.npz")

    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["labels"], two["labels"])
    assert one["arr_0"].shape == two["arr_0"].shape
    difference = images_of(tmp_path / "one.npz") - images_of(tmp_path / "two.npz")
    assert np.abs(difference).max() <= 1


# ---------------------------------------------------------------------------- bad input
def test_no_network_is_told(hub, monkeypatch):
    def offline(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find a cached snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="imagenet256: no download .*--release_dir"):
        run_script(sample, "--release", "imagenet256")
    with pytest.raises(FileNotFoundError, match="mae-b: no download .*RAE-collections to FOLDER"):
        load_packed_rae("mae-b")
    with pytest.raises(FileNotFoundError, match="no download .* to FOLDER/siglip2_decoder and add"):
        load_packed_rae("siglip2-so400m")


@pytest.mark.shipped
def test_missing_files_are_told(hub):
    (hub / PUBLISHED_DITS["imagenet256"].guide_file).unlink()
    with pytest.raises(FileNotFoundError, match="DiTDH-S_ep14/stage2_model.pt does not exist"):
        run_script(sample, "--release", "imagenet256", "--release_dir", hub)
    (hub / STATISTICS_256).unlink()
    with pytest.raises(FileNotFoundError, match="imagenet1k/stat.pt does not exist"):
        run_script(sample, "--release", "imagenet256", "--release_dir", hub, "--guidance", 1)
    with pytest.raises(FileNotFoundError, match="nowhere/DiTs.*does not exist"):
        run_script(sample, "--release", "imagenet512", "--release_dir", "nowhere")


class Code:
    """An object that runs code when it is unpickled."""
    def __reduce__(self):
        return print, ("code ran",)


def test_damaged_files_are_told(hub):
    dit = hub / PUBLISHED_DITS["imagenet256"].file
    flags = ["--release", "imagenet256", "--release_dir", hub, "--n", 1]

    dit.write_bytes(dit.read_bytes()[:200_000])
    with pytest.raises(ValueError, match="DiTDH-XL/stage2_model.pt is no checkpoint that can be"):
        run_script(sample, *flags)
    dit.write_bytes(pickle.dumps({"ema": Code()}))
    with pytest.raises(ValueError, match="stage2_model.pt is no .*with code in it"):
        run_script(sample, *flags)
    torch.save(torch.zeros(3), dit)
    with pytest.raises(ValueError, match="stage2_model.pt is no checkpoint"):
        run_script(sample, *flags)


@pytest.mark.shipped
def test_weights_that_do_not_fit_are_told(hub):
    flags = ["--release", "imagenet256", "--release_dir", hub, "--n", 1]
    deeper = dry_run.SMALL_DIT._replace(depth=3)
    dry_run.write_dit(hub, "imagenet256", **{**SMALL_DITDH, "dit": deeper})
    with pytest.raises(ValueError,
                       match=r"(?s)imagenet256 does not fit DiTDH.*unexpected blocks.3.norm1"):
        run_script(sample, *flags)
    wider = dry_run.SMALL_DECODER._replace(width=36)
    dry_run.write_dit(hub, "imagenet256", **{**SMALL_DITDH, "decoder": wider})
    with pytest.raises(ValueError,
                       match=r"(?s)does not fit Decoder.*embed.weight: shape \(36, 768\)"):
        run_script(sample, *flags)


def test_wrong_statistics_are_told(hub):
    flags = ["--release", "imagenet256", "--release_dir", hub, "--n", 1]
    not_finite = torch.full((768, 16, 16), float("nan"))
    torch.save({"mean": None, "var": not_finite}, hub / STATISTICS_256)
    with pytest.raises(ValueError, match="stat.pt has a latent variance with numbers that"):
        run_script(sample, *flags)
    torch.save({"mean": not_finite}, hub / STATISTICS_256)
    with pytest.raises(ValueError, match="stat.pt has a latent variance NoneType, not a tensor"):
        run_script(sample, *flags)
    shutil.copy(hub / STATISTICS_512, hub / STATISTICS_256)
    with pytest.raises(ValueError,
                       match=r"imagenet1k/stat.pt has statistics of shape \(768, 32, 32\)"):
        run_script(sample, *flags)


@pytest.mark.shipped
@pytest.mark.parametrize("label, message", [
    (1000, "--labels 1000: not among the model's 1000 classes, 0 to 999 or "),
    ("crane", "--labels crane: not among .* crane is the name of several classes")])
def test_unknown_labels_are_told(hub, label, message):
    with pytest.raises(ValueError, match=message):
        run_script(sample, "--release", "imagenet256", "--release_dir", hub, "--labels", label)


@pytest.mark.parametrize("out", ["assets", "LICENSE", "assets/../assets"])
def test_an_output_that_exists_is_told(out, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--out", out])
    assert f"--out {out} exists; delete it, or name another" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--release", "imagenet1k"], "invalid choice: 'imagenet1k'"),
    (["--release_dir", "x"], "--release_dir needs --release with one of imagenet256"),
    (["--release", "imagenet256", "--ckpt", "a.pt"], "not allowed with argument"),
    (["--sampling_steps", "-5"], "--sampling_steps: -5 must be at least 1"),
    (["--release_grid", "--sampling_steps", "1"], "needs --sampling_steps 2")])
def test_bad_flags_are_told(flags, message, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("state", [
    {}, {"epoch": 3, "pos_embed": 4}, {"mean": None, "var": torch.ones(3)}, {0: torch.ones(1)}])
def test_states_that_are_no_weights_are_told(state):
    message = "(?s)the given state does not fit DiT;.*missing t_embedder.W"
    with pytest.raises(ValueError, match=message):
        load_release(DiT(4, 2, 16, 1, 2, 3), state)


@pytest.mark.parametrize("out", ["README.md/x.png", "/proc/nothing/x.npz"])
def test_an_impossible_out_ends_in_one_line(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--n", "1", "--out", out])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    line = f"{ending.value.code}{capsys.readouterr().err}"
    assert "error: " in line and out.split("/x")[0] in line
    assert line.strip().count("\n") == 0


@pytest.mark.shipped
def test_ctrl_c_ends_in_one_line_and_neighbours_are_left_alone(tmp_path):
    (tmp_path / "x.tmp").write_text("precious")
    process = start(sample, "--n", 5000, "--sampling_steps", 2, "--batch", 4,
                    "--out", tmp_path / "x.npz", errors=tmp_path / "errors")
    wait_for(lambda: list(tmp_path.glob("*.parts/*.png")))
    os.kill(process.pid, signal.SIGINT)
    process.join(60)

    last_line = (tmp_path / "errors").read_text().splitlines()[-1]
    kept = re.search(r"stopped; (\d+) of 5000 images are kept, and it goes on when", last_line)
    assert int(kept[1]) >= 1
    run_script(sample, "--n", 2, "--sampling_steps", 1, "--out", tmp_path / "x.npz")
    assert (tmp_path / "x.tmp").read_text() == "precious"
