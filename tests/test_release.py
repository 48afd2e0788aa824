"""The official weights: loading, sampling from them, many images, and what can go wrong on the way.

Small files with the official names and keys (tests/dry_run.py).  Run: python -m pytest tests/test_release.py
"""
import os
import pickle
import runpy
import shutil
import signal
import sys
import time
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import dry_run
import eval_fid
import model as model_module
import runtime
import sample
import train_dit
from conftest import ROOT, SHIPPED, start, torchrun
from model import RAE, Decoder, DiT, build_decoder, build_dit, load_dit, load_official, load_release

SMALL = dict(decoder=(32, 1, 48), dit=(32, 2, 2), guide=(16, 1, 1), head=(48, 1, 3))


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A folder with both releases at a small size, and the named sizes shrunk to fit."""
    head = dict(head_width=48, head_depth=1, head_heads=3)
    monkeypatch.setitem(model_module.DECODER_SIZES, "XL", dict(
        decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_mlp=48))
    monkeypatch.setitem(model_module.DIT_SIZES, "DiTDH-XL", dict(width=32, depth=2, heads=2, **head))
    monkeypatch.setitem(model_module.DIT_SIZES, "DiTDH-S", dict(width=16, depth=1, heads=1, **head))
    monkeypatch.setattr(model_module, "Encoder", None)                 # sampling must not touch it
    warnings.filterwarnings("ignore", message="--head_width 48 is below")
    for name in model_module.RELEASES:
        dry_run.write(tmp_path / "hub", name, **SMALL)
    return tmp_path / "hub"


def run(*argv):
    sample.main(sample.parse_args([str(a) for a in argv]))


# ---------------------------------------------------------------------------------- loading and drawing
def test_release_is_loaded_as_it_is(release):
    paths = dry_run.write(release, "imagenet256", **SMALL)
    model, rae, state = load_dit("imagenet256", folder=release)
    for key, value in torch.load(paths[2], weights_only=True).items():     # tables, frequencies and all
        assert torch.equal(model.state_dict()[key], value), key
    assert rae.encoder is None and not rae.training and not model.training
    var = torch.load(paths[1], weights_only=True)["var"]
    assert torch.equal(rae.latent_std, (var + 1e-5).sqrt()) and rae.latent_mean.abs().max() == 0
    table = torch.load(paths[0], weights_only=True)["decoder_pos_embed"]
    assert torch.equal(rae.decoder.decoder_pos_embed, table)
    assert (rae.pixel_mean.flatten() - torch.tensor([0.485, 0.456, 0.406])).abs().max() < 1e-6
    assert state["class_names"][207] == "golden retriever" and len(state["class_names"]) == 1000
    assert load_dit("imagenet512", folder=release)[0].grid == 32
    guide, none, _ = load_dit("imagenet256/guide", encoder=None, folder=release)
    assert not none and torch.equal(guide.t_embedder.W,
                                    torch.load(paths[3], weights_only=True)["t_embedder.W"])


@pytest.mark.parametrize("name, side", [("imagenet256", 256), ("imagenet512", 512)])
def test_one_command_draws_with_the_papers_sampler(release, tmp_path, monkeypatch, name, side):
    args = sample.parse_args(["--release", name])
    assert (args.solver, args.sampling_steps, args.release_grid) == ("euler", 50, False)
    assert args.guidance == {256: 1.42, 512: 1.5}[side]
    assert sample.parse_args(["--release", name, "--guidance", "1.3"]).guidance == 1.3
    shifts, grid = [], sample.time_grid
    monkeypatch.setattr(sample, "time_grid", lambda *a: shifts.append(a[1]) or grid(*a))
    out = tmp_path / "out.png"
    run("--release", name, "--release_dir", release, "--sampling_steps", 2, "--n", 2, "--out", out)
    assert Image.open(out).size == (2 * (side + 2) + 2, 16 + side + 4)
    assert abs(shifts[0] - {256: 6.928, 512: 13.856}[side]) < 1e-3
    run("--release", name, "--release_dir", release, "--sampling_steps", 2, "--n", 1, "--guidance", 1,
        "--labels", "golden_retriever", "--out", tmp_path / "plain.npz")
    assert np.load(tmp_path / "plain.npz")["labels"].tolist() == [207]


def test_what_is_not_needed_is_not_asked_for(release, monkeypatch):
    """Without guidance no guide; of the hub repository only the four files."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, allow_patterns: asked.append((repo, allow_patterns)) or release)
    args = sample.parse_args(["--release", "imagenet256", "--guidance", "1"])
    assert sample.load_models(args, "cpu")[3] is None
    assert [len(files) for _, files in asked] == [3]
    args = sample.parse_args(["--release", "imagenet256"])
    assert sample.load_models(args, "cpu")[3].depth == 1
    found = {str(path.relative_to(release)) for path in release.rglob("*.pt") if "512" not in str(path)}
    assert {file for _, files in asked for file in files} == found and len(found) == 4
    assert {repo for repo, _ in asked} == {"nyu-visionx/RAE-collections"}


def test_guidance_costs_what_it_must(release):
    """AutoGuidance: a main and a weak forward of b; CFG: one of 2b; outside the interval or unlabelled: b."""
    args = sample.parse_args(["--release", "imagenet256", "--release_dir", str(release),
                              "--sampling_steps", "10"])
    model, rae, _, weak = sample.load_models(args, "cpu")
    calls = []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(("main", len(inputs[0]))))
    weak.register_forward_pre_hook(lambda _, inputs: calls.append(("weak", len(inputs[0]))))

    def count(labels, weak, interval=(0, 1)):
        calls.clear()
        args.interval = interval
        sample.generate(model, rae, labels, args, weak=weak)
        return {call: calls.count(call) for call in calls}

    assert count([1, 2, 3], weak) == {("main", 3): 10, ("weak", 3): 10}
    assert count([1, 2, 3], None) == {("main", 6): 10}
    times = sample.time_grid(10, 48 ** 0.5)[:-1]
    inside = int(((0.7 <= times) & (times <= 0.9)).sum())
    assert 0 < inside < 10
    assert count([1, 2, 3], weak, (0.7, 0.9)) == {("main", 3): 10, ("weak", 3): inside}
    assert count([1, 2, 3], None, (0.7, 0.9)) == {("main", 6): inside, ("main", 3): 10 - inside}
    assert count([1000, 1000], None) == {("main", 2): 10}               # unconditional: nothing to guide by
    assert count([1000, 1000], weak) == {("main", 2): 10, ("weak", 2): 10}


def test_upsampling_decoder_gives_twice_the_side(tmp_path):
    """256 tokens, patch 32: the other way to 512 px. A checkpoint of stage 2 draws at its decoder's size."""
    state = runtime.load_checkpoint(SHIPPED)
    state["rae"]["decoder_patch"] = 32
    decoder = build_decoder(state["rae"], 192, 4)
    state["rae"]["decoder"] = decoder.state_dict()
    runtime.save_checkpoint(tmp_path / "up.pt", **state)
    run("--ckpt", tmp_path / "up.pt", "--n", 1, "--sampling_steps", 2, "--out", tmp_path / "up.npz")
    assert np.load(tmp_path / "up.npz")["arr_0"].shape == (1, 128, 128, 3)
    with torch.device("meta"):
        wide = Decoder(768, 16, 32, 1152, 28, 16, 4096)
        assert wide(torch.zeros(1, 768, 16, 16)).shape == (1, 3, 512, 512)


def test_statistics_of_a_release_go_into_an_rae(release):
    stat = next(release.glob("stats/*/*/imagenet1k/stat.pt"))
    rae = RAE("dinov2-b", Decoder(768, 16, 16, 32, 1, 2, 48))
    load_release(rae, stat)
    var = torch.load(stat, weights_only=True)["var"]
    assert torch.equal(rae.latent_std, (var + 1e-5).sqrt()) and rae.latent_mean.abs().max() == 0
    load_release(rae, {"mean": var * 2, "var": var})
    assert torch.equal(rae.latent_mean, var * 2)
    with pytest.raises(ValueError, match=r"shape \(768, 32, 32\) are not of this decoder's latents"):
        load_release(rae, next(release.glob("stats/*/*/imagenet1k_512/stat.pt")))
    for wrong in ({"variance": var}, {"mean": None, "var": None}):
        with pytest.raises(ValueError, match="the given state has no latent statistics"):
            load_release(rae, wrong)
    tiny = RAE("tiny", build_decoder(runtime.load_checkpoint(SHIPPED)["rae"], 192, 4))
    load_release(tiny, SHIPPED)                                 # those in a checkpoint of ours
    assert torch.equal(tiny.latent_std, load_dit(SHIPPED)[1].latent_std)


def test_our_checkpoints_go_through_the_same_function():
    state = runtime.load_checkpoint(SHIPPED)
    model = build_dit(state["args"], 192, 4, 36)
    load_release(model, SHIPPED)
    assert all(torch.equal(v, state["ema"][k]) for k, v in model.state_dict().items())
    for path in (SHIPPED, train_dit.SHIPPED_RAE):               # of stage 2 and of stage 1
        decoder = load_release(build_decoder(state["rae"], 192, 4), path)
        assert all(torch.equal(v, state["rae"]["decoder"][k]) for k, v in decoder.state_dict().items())


# ---------------------------------------------------------------------------------- training on
def test_train_dit_starts_from_a_checkpoint_or_a_release(tmp_path, release, monkeypatch):
    """--init takes weights, RAE and prediction of the checkpoint; other classes get a new table."""
    quick = ["--steps", "1", "--batch", "4", "--preview_every", "0", "--log_every", "1",
             "--workers", "0", "--dtype", "fp32"]
    shipped = ["--init", SHIPPED, "--width", "192", "--head_width", "256", *quick]
    monkeypatch.undo()                                                 # the tiny encoder is needed here
    monkeypatch.setattr(runtime, "step_optimizers", lambda *args: 0.0)  # the weights stay
    train_dit.main(train_dit.parse_args([*shipped, "--out", str(tmp_path / "same")]))
    was, now = runtime.load_checkpoint(SHIPPED), runtime.load_checkpoint(tmp_path / "same/last.pt")
    assert all(torch.equal(was["ema"][k], v) for k, v in now["model"].items())
    assert now["args"]["prediction"] == "x0"
    assert torch.equal(now["rae"]["latent_var"], was["rae"]["latent_var"])
    folder = tmp_path / "two"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), (i * 60, 20, 90)).save(folder / name / f"{i}.png")
    train_dit.main(train_dit.parse_args([*shipped, "--data", str(folder), "--out", str(tmp_path / "fresh")]))
    fresh = runtime.load_checkpoint(tmp_path / "fresh/last.pt")["model"]
    table = "y_embedder.embedding_table.weight"
    assert fresh.pop(table).shape == (3, 192)
    assert all(torch.equal(was["ema"][k], v) for k, v in fresh.items())
    with pytest.raises(ValueError, match="(?s)--init .*tiny_dit.* does not fit DiTDH; build it with"):
        train_dit.main(train_dit.parse_args(["--init", SHIPPED, *quick, "--out", str(tmp_path / "n")]))
    args = train_dit.parse_args(["--init", "imagenet256", "--out", str(tmp_path / "official")])
    assert (args.width, args.depth, args.head_width) == (1152, 28, 2048)      # the sizes come with the name


def test_train_dit_goes_on_from_a_release(tmp_path, release, monkeypatch, capsys):
    class Flat(torch.nn.Module):                                       # for DINOv2-B: as many channels
        def __init__(self, name, size):
            super().__init__()
            self.grid, self.channels, self.mean, self.std = size // 16, 768, (0.5,) * 3, (0.5,) * 3
            self.image_size = size
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, x):
            return torch.nn.functional.avg_pool2d(x, 16).repeat(1, 256, 1, 1) - 0.5

    monkeypatch.setattr(model_module, "Encoder", Flat)
    monkeypatch.setattr(runtime, "step_optimizers", lambda *args: 0.0)  # the weights stay
    data = tmp_path / "photos"
    data.mkdir()
    for i in range(6):
        Image.new("RGB", (256, 256), (40 * i, 99, 30)).save(data / f"{i}.png")
    flags = ["--release_dir", str(release), "--data", str(data)]
    train_dit.main(train_dit.parse_args([
        "--init", "imagenet256", *flags, "--steps", "1", "--batch", "2", "--preview_every", "0",
        "--workers", "0", "--out", str(tmp_path / "run")]))
    now = runtime.load_checkpoint(tmp_path / "run/last.pt")
    assert now["args"]["shift_base"] == 4096 and now["args"]["prediction"] == "v" and now["num_classes"] == 1
    official = load_official("imagenet256", release)["ema"]
    assert all(torch.equal(now["model"][k], v) for k, v in official.items() if "y_embedder" not in k)
    table = "y_embedder.embedding_table.weight"
    assert torch.equal(now["model"][table][-1], official[table][-1])   # the null class is one for all
    assert [now["args"][k] for k in ("ema", "label_std", "time_law")] == [0.9995, 0.02, "logit_normal"]
    with pytest.raises(SystemExit):
        train_dit.parse_args(["--release_dir", str(release)])
    assert "--release_dir needs --init with one of imagenet256" in capsys.readouterr().err
    run("--ckpt", tmp_path / "run/last.pt", "--n", 1, "--sampling_steps", 1, "--out", tmp_path / "one.png")
    for argv, message in (([], "needs --data: a folder or tars of ImageNet"),
                          (["--reconstruct", "a.pt"], "--release does nothing with --reconstruct")):
        with pytest.raises(SystemExit):
            eval_fid.parse_args(["--release", "imagenet256", *argv])
        assert message in capsys.readouterr().err
    metrics = eval_fid.main(eval_fid.parse_args(["--release", "imagenet256", *flags, "--n", "4",
                                                 "--sampling_steps", "1", "--features", "tiny"]))
    assert metrics["n"] == 4 and metrics["guidance"] == 1.42 and np.isfinite(metrics["frechet_distance"])


# ---------------------------------------------------------------------------------- many images
QUICK = ["--sampling_steps", "1", "--guidance", "1", "--solver", "euler"]


def test_labels_balanced_and_random(tmp_path):
    run(*QUICK, "--labels", "balanced", "--n", 108, "--out", tmp_path / "b.npz")
    assert np.bincount(np.load(tmp_path / "b.npz")["labels"]).tolist() == [3] * 36
    run(*QUICK, "--labels", "random", "--n", 108, "--out", tmp_path / "r.npz")
    run(*QUICK, "--labels", "random", "--n", 40, "--batch", 7, "--out", tmp_path / "s.npz")
    many, few = np.load(tmp_path / "r.npz"), np.load(tmp_path / "s.npz")
    assert len(set(many["labels"])) > 20 and many["labels"].tolist() != sorted(many["labels"])
    assert np.array_equal(many["labels"][:40], few["labels"])          # label i depends on i alone
    assert np.abs(many["arr_0"][:40].astype(int) - few["arr_0"]).max() <= 1
    again = sample.parse_args([*QUICK, "--labels", "random", "--n", "40", "--seed", "1", "--out",
                               str(tmp_path / "t.npz")])
    sample.main(again)
    assert np.load(tmp_path / "t.npz")["labels"].tolist() != few["labels"].tolist()


def killed_after(n, monkeypatch):
    """The list of image numbers that are drawn from now on; beyond n of them the run is interrupted."""
    drawn, generate = [], sample.generate

    def dies(model, rae, labels, args, chunk, *rest):
        drawn.extend(chunk)
        if len(drawn) > n:
            raise KeyboardInterrupt
        return generate(model, rae, labels, args, chunk, *rest)
    monkeypatch.setattr(sample, "generate", dies)
    return drawn


@pytest.mark.parametrize("suffix", [".npz", ""])
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, suffix):
    flags = [*QUICK, "--n", 20, "--batch", 4, "--labels", "balanced"]
    run(*flags, "--out", tmp_path / f"whole{suffix}")
    drawn = killed_after(12, monkeypatch)
    out = tmp_path / f"cut{suffix}"
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", out)
    assert not out.exists()
    drawn.clear()
    run(*flags[:-4], "--batch", 3, *flags[-2:], "--out", out)          # another batch is no other image
    assert drawn == list(range(12, 20)) and not list(tmp_path.glob("*.parts"))
    if suffix:
        whole, cut = (np.load(file)["arr_0"].astype(int) for file in (tmp_path / "whole.npz", out))
        assert np.abs(whole - cut).max() <= 1                          # a rounding at most
    else:
        with pytest.raises(ValueError, match="cut exists; delete it, or name another folder"):
            run(*flags, "--out", out)
        assert sorted(path.name for path in out.iterdir()) == [f"{i:06d}.png" for i in range(20)]


def test_a_killed_process_leaves_only_whole_images_and_others_settings_are_not_mixed(tmp_path):
    process = start(sample, "--n", 3000, "--sampling_steps", 2, "--batch", 4, "--out", tmp_path / "x.npz")
    deadline = time.time() + 60
    while len(list(tmp_path.glob("*.parts/*.png"))) < 20 and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    parts = list(tmp_path.glob("x.npz.*.parts"))
    files = list(parts[0].glob("*.png"))
    assert len(parts) == 1 and len(files) >= 20 and not (tmp_path / "x.npz").exists()
    for file in files:
        assert np.asarray(Image.open(file)).shape == (64, 64, 3)       # each can be read
    run("--n", 4, "--sampling_steps", 1, "--out", tmp_path / "x.npz")  # other settings: their own folder
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 4 and len(list(parts[0].glob("*.png"))) == len(files)


def test_images_of_other_weights_are_not_taken_for_its_own(tmp_path, monkeypatch):
    """Killed, retrained under the same name and to the same step: the images drawn before are not reused."""
    state, drawn = runtime.load_checkpoint(SHIPPED), killed_after(4, monkeypatch)
    for bias, first in ((0.0, 0), (0.0, 4), (0.1, 0)):
        state["ema"]["final_layer.linear.bias"] += bias
        runtime.save_checkpoint(tmp_path / "last.pt", **state)
        drawn.clear()
        with pytest.raises(KeyboardInterrupt):
            run("--ckpt", tmp_path / "last.pt", *QUICK, "--n", 12, "--batch", 4, "--out", tmp_path / "x.npz")
        assert drawn[0] == first


def test_two_processes_draw_what_one_does(tmp_path):
    flags = [*QUICK, "--labels", "random", "--n", "21", "--seed", "5"]
    run(*flags, "--out", tmp_path / "one.npz")
    torchrun(sample, *flags, "--batch", 4, "--out", tmp_path / "two.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["labels"], two["labels"]) and one["arr_0"].shape == two["arr_0"].shape
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


# ---------------------------------------------------------------------------------- bad input
def test_no_network_and_missing_files_are_told(release, monkeypatch):
    def offline(*args, **more):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="imagenet256: no download .*--release_dir"):
        run("--release", "imagenet256")
    next(release.glob("DiTs/*/*/ImageNet256/DiTDH-S_ep14/stage2_model.pt")).unlink()
    with pytest.raises(FileNotFoundError, match="DiTDH-S_ep14/stage2_model.pt does not exist"):
        run("--release", "imagenet256", "--release_dir", release)
    with pytest.raises(FileNotFoundError, match="nowhere/decoders.*does not exist"):
        run("--release", "imagenet512", "--release_dir", "nowhere")


def test_damaged_files_are_told(release):
    class Code:
        def __reduce__(self):
            return print, ("code ran",)

    decoder, stat, dit, _ = dry_run.write(release, "imagenet256", **SMALL)
    argv = ["--release", "imagenet256", "--release_dir", release, "--n", 1]
    dit.write_bytes(dit.read_bytes()[:200_000])
    with pytest.raises(ValueError, match="DiTDH-XL/stage2_model.pt is no checkpoint that can be read safely"):
        run(*argv)
    dit.write_bytes(pickle.dumps({"ema": Code()}))
    with pytest.raises(ValueError, match="stage2_model.pt is no .*with code in it"):
        run(*argv)
    torch.save(torch.zeros(3), dit)
    with pytest.raises(ValueError, match="stage2_model.pt is no checkpoint"):
        run(*argv)
    dry_run.write(release, "imagenet256", **{**SMALL, "dit": (32, 3, 2)})
    with pytest.raises(ValueError, match=r"(?s)imagenet256 does not fit DiTDH.*unexpected blocks.3.norm1"):
        run(*argv)
    dry_run.write(release, "imagenet256", **{**SMALL, "decoder": (36, 1, 48)})
    with pytest.raises(ValueError, match=r"(?s)does not fit Decoder.*embed.weight: shape \(36, 768\)"):
        run(*argv)
    dry_run.write(release, "imagenet256", **SMALL)
    torch.save({"mean": None, "var": torch.full((768, 16, 16), float("nan"))}, stat)
    with pytest.raises(ValueError, match="imagenet256 needs .* all positive"):
        run(*argv)
    shutil.copy(next(release.glob("stats/*/*/imagenet1k_512/stat.pt")), stat)
    with pytest.raises(ValueError, match=r"imagenet1k/stat.pt has statistics of shape \(768, 32, 32\)"):
        run(*argv)


def test_bad_flags_and_labels_are_told(release, capsys):
    with pytest.raises(ValueError, match="--labels 1000: not among the model's 1000 classes, .*`none`"):
        run("--release", "imagenet256", "--release_dir", release, "--labels", 1000)
    for out in ("assets", "README.md", "assets/../assets"):
        with pytest.raises(ValueError, match=f"--out {out} exists; delete it, or name another"):
            run("--out", out)
    with pytest.raises(ValueError, match="--labels crane: not among"):    # two classes have that name
        run("--release", "imagenet256", "--release_dir", release, "--labels", "crane")
    for argv, message in ((["--release", "imagenet1k"], "invalid choice: 'imagenet1k'"),
                          (["--release_dir", "x"], "--release_dir needs --release with one of imagenet256"),
                          (["--release", "imagenet256", "--ckpt", "a.pt"], "not allowed with argument"),
                          (["--sampling_steps", "-5"], "--sampling_steps: -5 must be at least 1"),
                          (["--release_grid", "--sampling_steps", "1"], "needs --sampling_steps 2")):
        with pytest.raises(SystemExit):
            sample.parse_args(argv)
        assert message in capsys.readouterr().err
    for wrong in ({}, {"epoch": 3, "pos_embed": 4}, {"mean": None, "var": torch.ones(3)}, {0: torch.ones(1)}):
        with pytest.raises(ValueError, match="(?s)the given state does not fit DiT;.*missing t_embedder.W"):
            load_release(DiT(4, 2, 16, 1, 2, 3), wrong)


@pytest.mark.parametrize("out", ["README.md/x.png", "/proc/nothing/x.npz"])
def test_an_impossible_out_ends_in_one_line(out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--n", "1", "--out", out])
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{out.split('/x')[0]}[^\n]*$"):
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


def test_ctrl_c_ends_in_one_line_and_neighbours_are_left_alone(tmp_path):
    (tmp_path / "x.tmp").write_text("precious")
    process = start(sample, "--n", 5000, "--sampling_steps", 2, "--batch", 4, "--out", tmp_path / "x.npz",
                    errors=tmp_path / "errors")
    deadline = time.time() + 60
    while not list(tmp_path.glob("*.parts/*.png")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert (tmp_path / "errors").read_text().splitlines()[-1].startswith("stopped; it goes on when")
    run("--n", 2, "--sampling_steps", 1, "--out", tmp_path / "x.npz")
    assert (tmp_path / "x.tmp").read_text() == "precious"
