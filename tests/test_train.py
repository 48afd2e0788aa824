"""The training scripts: exact resume, kills, accumulation, processes, flags and errors.

Run: python -m pytest tests/test_train.py
"""
import argparse
import copy
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import eval_decoder
import release
import run_flags
import runtime
import sample
import storage
import train_decoder
import train_dit
import train_t2i
from conftest import (
    ROOT,
    kill_after,
    largest_difference,
    load_last,
    logged_flops_per_image,
    read_log,
    run_on_one_thread,
    run_script,
    start,
    torchrun,
)
from data import batches, open_data, resize_images
from model import Encoder, build_decoder
from muon import Muon

DECODER_FLAGS = [
    "--decoder_width", "32", "--decoder_depth", "1", "--decoder_heads", "2", "--decoder_mlp", "64",
    "--batch", "8", "--stats_n", "16", "--workers", "0", "--warmup", "2", "--tau", "0.5",
    "--log_every", "2", "--save_every", "2", "--preview_every", "0", "--eval_every", "0",
    "--eval_n", "4"]
DIT_FLAGS = [
    "--width", "32", "--depth", "1", "--heads", "2",
    "--head_width", "192", "--head_depth", "1", "--head_heads", "4",
    "--batch", "8", "--workers", "0", "--warmup", "2", "--decay_start", "2",
    "--log_every", "2", "--save_every", "2", "--preview_every", "0",
    "--sampling_steps", "2", "--eval_n", "36"]
CACHED_DIT_FLAGS = [*DIT_FLAGS, "--cache", "120"]

both_stages = pytest.mark.parametrize("script, flags", [
    pytest.param(train_decoder, DECODER_FLAGS, id="decoder"),
    pytest.param(train_dit, DIT_FLAGS, id="dit")])
both_stages_and_cache = pytest.mark.parametrize("script, flags", [
    pytest.param(train_decoder, DECODER_FLAGS, id="decoder"),
    pytest.param(train_dit, DIT_FLAGS, id="dit"),
    pytest.param(train_dit, CACHED_DIT_FLAGS, id="dit_cached")])


def assert_refused(script, argv, message, capsys):
    """parse_args ends the script, with the message on stderr."""
    with pytest.raises(SystemExit):
        script.parse_args([str(flag) for flag in argv])
    assert message in capsys.readouterr().err


def steps_in_log(folder):
    return [record["step"] for record in read_log(folder) if "step" in record]


# ---------------------------------------------------------------------------- resume and kills
@both_stages_and_cache
def test_resume_is_exact_to_the_bit(script, flags, tmp_path):
    """--resume and --out alone: the other flags are those of the run that was killed."""
    run_script(script, *flags, "--steps", 6, "--out", tmp_path / "straight")
    kill_after(script, flags, tmp_path, stop=4)

    run_script(script, "--resume", "--out", tmp_path / "killed")

    straight, resumed = load_last(tmp_path / "straight"), load_last(tmp_path / "killed")
    assert largest_difference(straight, resumed) == 0
    flags_of_the_run = set(straight["args"]) - {"out", "resume"}
    for name in flags_of_the_run:
        assert resumed["args"][name] == straight["args"][name], name
    assert steps_in_log(tmp_path / "killed") == [2, 4, 6]
    first_record = read_log(tmp_path / "killed")[0]
    assert first_record["args"]["batch"] == 8
    assert first_record["parameters"] > 0 and first_record["commit"]


@both_stages
def test_resume_forgets_what_was_logged_after_the_checkpoint(script, flags, tmp_path, monkeypatch):
    """Resumed from step 4 of a run that has logged 6, with all flags and another loader."""
    original = storage.save_checkpoint

    def save_and_keep(path, **state):
        original(path, **state)
        shutil.copy(path, tmp_path / f"step_{state['step']}.pt")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_checkpoint", save_and_keep)
        run_script(script, *flags, "--steps", 6, "--out", tmp_path)
    straight = load_last(tmp_path)
    shutil.copy(tmp_path / "step_4.pt", tmp_path / "last.pt")

    run_script(script, *flags, "--steps", 6, "--out", tmp_path, "--resume", "--workers", 1)

    assert largest_difference(straight, load_last(tmp_path)) == 0
    assert steps_in_log(tmp_path) == [2, 4, 6]


def test_resume_writes_to_the_folder_that_it_reads(tmp_path, monkeypatch):
    """A run whose folder was moved is not taken back to its old place."""
    args = train_dit.parse_args([*DIT_FLAGS, "--out", str(tmp_path / "old")])
    state = {"args": run_flags.flags_as_dict(args), "num_classes": 36}
    torch.save(state, tmp_path / "last.pt")
    monkeypatch.setitem(train_dit.DEFAULTS, "out", str(tmp_path))
    assert train_dit.parse_args(["--resume"]).out == str(tmp_path)


def test_kill_in_mid_save_leaves_the_last_whole_checkpoint(tmp_path):
    """A child saves ever larger checkpoints without pause and is killed at random moments."""
    code = ("import torch, storage\n"
            "for step in range(10**6):\n"
            "    x = torch.full((300_000,), step)\n"
            "    storage.save_checkpoint('last.pt', step=step, x=x)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for delay in (0.05, 0.11, 0.17):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        while not (tmp_path / "last.pt").exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        state = storage.load_checkpoint(tmp_path / "last.pt")
        assert (state["x"] == state["step"]).all()


def test_real_run_killed_with_9_resumes_to_the_same_weights(tmp_path):
    flags = [*DIT_FLAGS, "--decay_end", "30", "--steps", "30"]
    child = start(train_dit, *flags, "--out", tmp_path / "killed")
    while not (tmp_path / "killed" / "last.pt").exists():
        assert child.is_alive()
        time.sleep(0.02)
    time.sleep(0.1)
    child.kill()
    child.join()
    assert load_last(tmp_path / "killed")["step"] < 30

    run_on_one_thread(train_dit, *flags, "--out", tmp_path / "killed", "--resume")
    run_on_one_thread(train_dit, *flags, "--out", tmp_path / "straight")

    straight, killed = load_last(tmp_path / "straight"), load_last(tmp_path / "killed")
    assert largest_difference(straight, killed) == 0


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)

    assert_refused(train_dit, [*DIT_FLAGS, "--out", tmp_path], "exists; add --resume", capsys)
    deeper = [*DIT_FLAGS, "--depth", 2, "--steps", 4, "--out", tmp_path, "--resume"]
    assert_refused(train_dit, deeper,
                   "--depth 2 differs from the checkpoint's 1; resume with --depth 1", capsys)
    with pytest.raises(ValueError, match="has done 2 steps; raise --steps 2"):
        run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path, "--resume")
    with pytest.raises(ValueError, match="has done 2 steps; raise --steps 2"):
        run_script(train_dit, "--out", tmp_path, "--resume")

    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path, "--overwrite")


def resume_edited(folder, edit):
    """Resume the run in a folder after edit(its checkpoint)."""
    state = load_last(folder)
    edit(state)
    torch.save(state, folder / "last.pt")
    run_script(train_dit, "--resume", "--steps", 4, "--out", folder)


@pytest.mark.parametrize("name, value", [
    ("seed", None), ("seed", -1), ("rae", -1), ("data", None), ("data", [3]), ("interval", None),
    ("interval", "0 1"), ("init", {}), ("wandb", torch.zeros(2)), ("eval_features", 0),
    ("steps", "4"), ("micro_batch", 0), ("batch", True), ("ema", float("nan")), ("lr_end", -1.0),
    ("flip", "maybe"), ("compile", 1)])
def test_flags_of_a_damaged_checkpoint_are_refused(name, value, tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)
    with pytest.raises(SystemExit):
        resume_edited(tmp_path, lambda state: state["args"].update({name: value}))
    assert f"last.pt has --{name} " in capsys.readouterr().err


def spoil_moment(key, value):
    def edit(state):
        state["opt"]["state"][2][key] = value
    return edit


@pytest.mark.parametrize("edit", [
    lambda state: state.update(step="x"), lambda state: state.update(opt=[]),
    spoil_moment("exp_avg", "x"), spoil_moment("exp_avg", torch.zeros(1)),
    spoil_moment("exp_avg_sq", torch.tensor(float("nan"))),
    lambda state: state["opt"]["state"][2].pop("exp_avg"),
    lambda state: state["opt"].pop("state")], ids=range(7))
def test_a_damaged_optimizer_or_step_is_refused(edit, tmp_path):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)
    with pytest.raises(ValueError, match="start another run"):
        resume_edited(tmp_path, edit)


@pytest.mark.parametrize("name", ["model", "ema"])
def test_a_checkpoint_without_weights_to_go_on_with_is_refused(name, tmp_path):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)
    with pytest.raises(ValueError, match=f"last.pt has no {name} to go on with"):
        resume_edited(tmp_path, lambda state: state.pop(name))


def test_a_folder_in_the_place_of_the_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "last.pt").mkdir()
    assert_refused(train_dit, [*DIT_FLAGS, "--out", tmp_path, "--overwrite"],
                   "last.pt is a folder, and the checkpoint is to be written there", capsys)


def test_settings_of_the_optimizer_are_those_of_the_flags(tmp_path):
    run_script(train_dit, *DIT_FLAGS, "--steps", 4, "--out", tmp_path / "straight")
    kill_after(train_dit, DIT_FLAGS, tmp_path, stop=2, steps=4)
    resume_edited(tmp_path / "killed",
                  lambda state: state["opt"]["param_groups"][0].update(maximize=True))
    straight, resumed = load_last(tmp_path / "straight"), load_last(tmp_path / "killed")
    assert largest_difference(straight["model"], resumed["model"]) == 0


@pytest.mark.parametrize("argv", [["--out", ""], ["--init", " "], ["--rae="], ["--data", "x", ""]])
def test_an_empty_text_is_most_likely_an_unset_variable(argv, capsys):
    assert_refused(train_dit, argv, "is given an empty text, perhaps a variable that is not set",
                   capsys)


def test_data_that_changed_are_told_and_refused_if_images_are_held_out(tmp_path, capsys):
    write_grey_images(tmp_path / "images", 16)
    common = [*DIT_FLAGS, "--data", tmp_path / "images", "--steps", 2]
    run_script(train_dit, *common, "--out", tmp_path / "all")
    run_script(train_dit, *common, "--hold_out", 4, "--out", tmp_path / "held")
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "zz.png")

    run_script(train_dit, "--resume", "--steps", 4, "--out", tmp_path / "all")
    told = "the data changed since the checkpoint: --data had 16 images and has 17"
    assert f"warning: {told}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{told}; images that --hold_out 4 kept"):
        run_script(train_dit, "--resume", "--steps", 4, "--out", tmp_path / "held")


def test_more_processes_than_before_split_the_batch_anew(tmp_path, monkeypatch):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = train_dit.parse_args(["--resume", "--steps", "4", "--out", str(tmp_path)])
    assert args.micro_batch == 4                       # of batches of 8


@pytest.mark.parametrize("flags, warning", [
    (["--steps", 10, "--warmup", 20], "--warmup 20 is not below --steps 10: the learning rate"),
    (["--steps", 10, "--llm_start", 10], "--llm_start 10 is not below --steps 10: prompts never")])
def test_what_never_happens_in_a_run_is_told(flags, warning, tmp_path, capsys):
    class Screen:
        def warn(self, line):
            print(line)

    args = train_t2i.parse_args([str(flag) for flag in [*flags, "--out", tmp_path]])
    run_flags.warn_of_flags(Screen(), args, resumed=None)
    assert warning in capsys.readouterr().out


def test_a_short_run_of_stage_3_listens_to_its_prompts(tmp_path):
    out = ["--out", str(tmp_path)]
    assert train_t2i.parse_args([*out, "--steps", "60"]).llm_start == 20
    assert train_t2i.parse_args(out).llm_start == 500


def test_overwriting_removes_the_old_checkpoint_at_once(tmp_path, monkeypatch):
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path)

    def die_before_the_first_save(path, **state):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_checkpoint", die_before_the_first_save)
    with pytest.raises(KeyboardInterrupt):
        run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--out", tmp_path, "--overwrite")

    assert not (tmp_path / "last.pt").exists()


def test_resume_takes_the_autoencoder_of_the_checkpoint(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 2, "--out", tmp_path / "decoder")
    flags = [*DIT_FLAGS, "--rae", tmp_path / "decoder" / "last.pt", "--out", tmp_path / "dit"]
    run_script(train_dit, *flags, "--steps", 2)
    before = load_last(tmp_path / "dit")["rae"]

    run_script(train_decoder, *DECODER_FLAGS, "--steps", 1, "--stats_n", 32,
               "--out", tmp_path / "decoder", "--overwrite")
    run_script(train_dit, *flags, "--steps", 4, "--resume")

    assert largest_difference(before, load_last(tmp_path / "dit")["rae"]) == 0

    (tmp_path / "decoder" / "last.pt").unlink()
    run_script(train_dit, "--out", tmp_path / "dit", "--steps", 5, "--resume")
    assert largest_difference(before, load_last(tmp_path / "dit")["rae"]) == 0


# ---------------------------------------------------------------------------- processes and batches
@both_stages_and_cache
def test_two_processes_equal_one_with_two_micro_batches(script, flags, tmp_path):
    flags = [*flags, "--micro_batch", "4", "--steps", "3", "--dtype", "fp32"]

    run_on_one_thread(script, *flags, "--out", tmp_path / "one")
    torchrun(script, *flags, "--out", tmp_path / "two")

    one, two = load_last(tmp_path / "one"), load_last(tmp_path / "two")
    assert largest_difference(one["model"], two["model"]) < 1e-5
    assert largest_difference(one["ema"], two["ema"]) < 1e-5
    assert largest_difference(one["rae"], two["rae"]) < 1e-5           # the latent statistics, too
    loss_of_one = read_log(tmp_path / "one")[-1]["loss"]
    loss_of_two = read_log(tmp_path / "two")[-1]["loss"]               # the mean over processes
    assert abs(loss_of_one - loss_of_two) < 1e-5
    of_one = logged_flops_per_image(tmp_path / "one")
    of_two = logged_flops_per_image(tmp_path / "two")                  # each has half of the images
    assert [2 * flops for flops in of_two] == pytest.approx(of_one)


@both_stages
def test_accumulation_equals_the_large_batch(script, flags, tmp_path, monkeypatch):
    """With noise that depends on the image alone, 1 x 8 and 4 x 2 images give the same weights."""
    # Adam makes rounding errors as large as the learning rate.
    flags = [*flags, "--steps", "3", "--dtype", "fp32", "--lr", "1e-3"]
    if script is train_dit:
        monkeypatch.setattr(train_dit, "sample_times", lambda n, *_: torch.full((n,), 0.3))
        monkeypatch.setattr(torch, "randn_like", lambda x, **_: x.flip(1))
        flags += ["--class_dropout", "0", "--guidance", "1"]
    else:
        monkeypatch.setattr(train_decoder, "add_noise", lambda z, tau, law: z + 0.1 * z.flip(1))

    run_script(script, *flags, "--out", tmp_path / "big")
    run_script(script, *flags, "--out", tmp_path / "small", "--micro_batch", 2)

    big, small = load_last(tmp_path / "big"), load_last(tmp_path / "small")
    assert largest_difference(big["model"], small["model"]) < 1e-5


def test_loss_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch, capsys):
    original = train_dit.flow_matching_loss
    steps = iter(range(3))

    def poisoned_loss(model, x0, y, t, eps):
        loss = original(model, x0, y, t, eps)
        if next(steps) == 1:
            return loss * float("nan")
        return loss

    monkeypatch.setattr(train_dit, "flow_matching_loss", poisoned_loss)
    run_script(train_dit, *DIT_FLAGS, "--steps", 3, "--out", tmp_path)

    assert all(value.isfinite().all() for value in load_last(tmp_path)["model"].values())
    assert "step 1: not finite, update left out: loss nan" in capsys.readouterr().err


# ---------------------------------------------------------------------------- stage 1
def test_ema_follows_and_is_what_is_saved_in_the_autoencoder(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 4, "--out", tmp_path)
    state = load_last(tmp_path)
    assert largest_difference(state["model"], state["ema"]) > 0
    assert largest_difference(state["ema"], state["rae"]["decoder"]) == 0
    assert state["rae"]["latent_var"].shape == (192, 4, 4)


def test_latent_statistics_are_those_of_all_latents():
    encoder = release.load_encoder("tiny")
    data = open_data("shapes", 64, objects=1)

    mean, var = train_decoder.latent_statistics(encoder, data, 24, 8)

    stream = batches(data, 8, 8, stop=3, workers=0)
    images = torch.cat([images for _, _, images, _, _ in stream])
    latents = encoder.encode(images.float() / 255)
    torch.testing.assert_close(mean, latents.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(var, latents.var(0, unbiased=False), atol=1e-5, rtol=1e-4)


def test_latent_statistics_want_whole_batches():
    data = open_data("shapes", 64, objects=1)
    with pytest.raises(AssertionError):                # else the sums of 16 images, over 20
        train_decoder.latent_statistics(release.load_encoder("tiny"), data, n=20, batch=8)


@pytest.mark.parametrize("law, mean_sigma", [
    ("half_normal", 0.5 * (2 / torch.pi) ** 0.5), ("uniform", 0.5 / 2)])
def test_latent_noise_law(law, mean_sigma):
    noise = train_decoder.add_noise(torch.zeros(4000, 8, 4, 4), 0.5, law)
    sigma = noise.flatten(1).std(1)
    assert abs(sigma.mean() - mean_sigma) < 0.02
    is_unbounded = law == "half_normal"
    assert (sigma.max() > 0.8) == is_unbounded


def test_upsampling_decoder_learns_from_images_of_its_own_side(tmp_path, monkeypatch):
    """With twice the patch, the encoder sees 64 px, and the target is the image at 128 px rather
    than 64 px blown up.
    """
    encoded, targets = [], []
    encode = Encoder.encode
    forward = train_decoder.ReconstructionLoss.forward

    def recording_encode(self, images):
        encoded.append(images)
        return encode(self, images)

    def recording_forward(self, images, target):
        targets.append(target)
        return forward(self, images, target)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", recording_encode)
        patch.setattr(train_decoder.ReconstructionLoss, "forward", recording_forward)
        run_script(train_decoder, *DECODER_FLAGS, "--steps", 1, "--decoder_patch", 32,
                   "--out", tmp_path)

    small, target = encoded[-1], targets[-1]
    assert small.shape[-1] == 64
    assert target.shape[-1] == 128
    assert torch.allclose(resize_images(target, 64), small)
    blown_up = resize_images(small, 128)
    assert (blown_up - target).abs().max() > 0.2           # edges that 64 px cannot hold

    results = run_script(eval_decoder, "--rae", tmp_path / "last.pt", "--n", 4,
                         "--out", tmp_path / "eval.json")
    assert 5 < results["psnr"] < 40


def test_a_checkpoint_from_before_a_flag_resumes(tmp_path, capsys):
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 2, "--out", tmp_path)
    state = load_last(tmp_path)
    del state["args"]["cutout"]
    torch.save(state, tmp_path / "last.pt")

    flags = [*DECODER_FLAGS, "--steps", 3, "--out", tmp_path, "--resume"]
    assert_refused(train_decoder, [*flags, "--cutout", 0.5],
                   "--cutout 0.5 differs from the checkpoint's None", capsys)
    run_script(train_decoder, *flags)
    assert load_last(tmp_path)["step"] == 3


def small_decoder():
    sizes = dict(decoder_patch=4, decoder_width=32, decoder_depth=1, decoder_heads=2,
                 decoder_mlp=64)
    return build_decoder(sizes, channels=16, grid=4)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest():
    model = small_decoder()
    names = {parameter: name for name, parameter in model.named_parameters()}

    adamw, muon = train_decoder.make_optimizers(model, "muon", 1e-3, 0.0)

    names_of_adamw = {names[p] for p in adamw.param_groups[0]["params"]}
    names_of_muon = {names[p] for p in muon.param_groups[0]["params"]}
    matrices = ("query", "key", "value", "proj", "fc1", "fc2")
    assert names_of_muon == {f"decoder_layers.0.{name}.weight" for name in matrices}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names_of_adamw == trained - names_of_muon
    assert len(train_decoder.make_optimizers(model, "adamw", 1e-3, 0.0)) == 1


def test_muon_moves_a_matrix_alike_in_all_directions():
    model = small_decoder()
    optimizers = train_decoder.make_optimizers(model, "muon", 1e-3, 0.0)
    weight = model.decoder_layers[0].fc1.weight
    before = weight.detach().clone()

    model(torch.randn(64, 16, 4, 4)).square().mean().backward()
    gradient = torch.linalg.svdvals(weight.grad)
    runtime.optimizer_step(optimizers, model, 0.0, 1e-2)

    update = torch.linalg.svdvals(before - weight.detach())
    assert gradient.max() > 5 * gradient.median()
    assert update.max() < 2 * update.median()


@pytest.mark.parametrize("is_on_gpu", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_with_a_gradient_that_is_not_finite_changes_nothing(name, is_on_gpu, monkeypatch):
    monkeypatch.setattr(runtime, "has_own_memory", lambda device: is_on_gpu)
    model = small_decoder()
    optimizers = train_decoder.make_optimizers(model, name, 1e-2, 0.1)

    def update(factor):
        (factor * model(torch.randn(4, 16, 4, 4)).square().mean()).backward()
        norm = runtime.optimizer_step(optimizers, model, 1.0, 1e-2)
        moments = [optimizer.state_dict()["state"] for optimizer in optimizers]
        return norm, copy.deepcopy([model.state_dict(), moments])

    _, after_one = update(1.0)
    norm, after_nan = update(float("nan"))
    _, after_two = update(1.0)

    assert norm.isnan()
    assert largest_difference(after_one, after_nan) == 0
    assert largest_difference(after_nan, after_two) > 0


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
def test_muon_is_that_of_torch_but_for_bf16(shape):
    ours, theirs = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape))
    optimizer = Muon([ours], 1e-2, 0.1)
    torch_optimizer = torch.optim.Muon([theirs], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        torch_optimizer.step()
    moved = (theirs - 1).norm()
    assert moved > 0.05
    assert (ours - theirs).norm() < 0.02 * moved           # bf16 has 8 bits


# ---------------------------------------------------------------------------- previews, evaluation
def test_preview_evaluation_and_upsampling(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 2, "--decoder_patch", 32,
               "--preview_every", 2, "--eval_every", 2, "--out", tmp_path / "decoder")
    assert (tmp_path / "decoder" / "preview_0000002.png").exists()
    last_record = read_log(tmp_path / "decoder")[-1]
    assert {"psnr", "ssim", "frechet_distance"} <= last_record.keys()

    run_script(train_dit, *DIT_FLAGS, "--rae", tmp_path / "decoder" / "last.pt", "--steps", 2,
               "--preview_every", 2, "--eval_every", 2, "--out", tmp_path / "dit")
    preview = Image.open(tmp_path / "dit" / "preview_0000002.png")
    assert preview.size[0] == 12 * 130 + 2             # images of 128 px
    last_record = read_log(tmp_path / "dit")[-1]
    assert {"frechet_distance", "right_colour_and_shape", "unsure"} <= last_record.keys()


# ---------------------------------------------------------------------------- stage 2
def record_calls_of_the_loss(monkeypatch):
    """A list to which each call of train_dit's flow_matching_loss appends (x0, t)."""
    calls = []
    original = train_dit.flow_matching_loss

    def recording_loss(model, x0, y, t, eps):
        calls.append((x0, t))
        return original(model, x0, y, t, eps)

    monkeypatch.setattr(train_dit, "flow_matching_loss", recording_loss)
    return calls


@pytest.mark.parametrize("law, quartiles", [
    ("uniform", [0.25, 0.5, 0.75]), ("logit_normal", [0.337, 0.5, 0.663])])
def test_times_follow_their_law(tmp_path, monkeypatch, law, quartiles):
    calls = record_calls_of_the_loss(monkeypatch)
    latent_dimensions = 192 * 4 * 4
    run_script(train_dit, *DIT_FLAGS, "--batch", 200, "--steps", 4, "--time_law", law,
               "--shift_base", latent_dimensions, "--out", tmp_path)           # no shift

    times = torch.cat([t for _, t in calls])
    measured = times.quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert (measured - torch.tensor(quartiles)).abs().max() < 0.06


def test_the_time_shift_of_a_run_is_kept_for_sampling(tmp_path, monkeypatch, capsys):
    tiny_base = train_dit.TINY_LATENTS["shift_base"]
    shifts_in_training = []

    def recording_times(n, law, dim, base, device):
        shifts_in_training.append((dim, base))
        return torch.full((n,), 0.5)

    monkeypatch.setattr(train_dit, "sample_times", recording_times)
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--out", tmp_path / "tiny")
    run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--shift_base", 4096,
               "--out", tmp_path / "paper")
    assert shifts_in_training == [(3072, tiny_base), (3072, tiny_base), (3072, 4096)]

    shifts_in_sampling = []

    def recording_grid(steps, shift, release_grid):
        shifts_in_sampling.append(shift)
        return []

    monkeypatch.setattr(sample, "time_grid", recording_grid)
    monkeypatch.setitem(sample.SOLVERS, "euler", lambda velocity, x, times: x)
    args = train_dit.parse_args(["--out", str(tmp_path / "none"), "--solver", "euler"])
    for name in ("tiny", "paper"):
        model, rae, _ = release.load_dit(tmp_path / name / "last.pt")
        sample.generate(model, rae, [0], args)
    assert shifts_in_sampling == [(3072 / tiny_base) ** 0.5, (3072 / 4096) ** 0.5]

    flags = [*DIT_FLAGS, "--steps", 4, "--out", tmp_path / "tiny", "--resume"]
    assert_refused(train_dit, [*flags, "--shift_base", 99],
                   "--shift_base 99.0 differs from the checkpoint's 340", capsys)
    run_script(train_dit, *flags)
    assert load_last(tmp_path / "tiny")["args"]["shift_base"] == tiny_base


def test_the_prediction_of_a_run_is_kept_and_its_loss_is_that_of_v(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dit, "sample_times", lambda n, *_: torch.full((n,), 0.5))
    calls = record_calls_of_the_loss(monkeypatch)

    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--log_every", 1, "--out", tmp_path / "x0")
    run_script(train_dit, *DIT_FLAGS, "--steps", 2, "--prediction", "v", "--out", tmp_path / "v")

    # The output is 0 at first: the error of x0 is x0 itself, that of v = (x_t - x0) / t is x0 / t,
    # and at t = 0.5 the loss is weighted by (10 * 0.25)^2.
    first_x0, _ = calls[0]
    first_loss = [record["loss"] for record in read_log(tmp_path / "x0") if "loss" in record][0]
    assert abs(first_loss / (2.5 * first_x0 / 0.5).square().mean() - 1) < 1e-3
    for prediction in ("x0", "v"):
        assert load_last(tmp_path / prediction)["args"]["prediction"] == prediction
        model, _, _ = release.load_dit(tmp_path / prediction / "last.pt")
        assert model.prediction == prediction
    assert_refused(train_dit, [*DIT_FLAGS, "--steps", 4, "--prediction", "v",
                               "--out", tmp_path / "x0", "--resume"],
                   "--prediction v differs from the checkpoint's x0", capsys)


def test_the_cache_holds_the_latents_of_the_first_images_each_with_its_label():
    args = train_dit.parse_args([*DIT_FLAGS, "--cache", "120", "--steps", "20"])
    rae = release.load_rae(release.SHIPPED_RAE)
    data = open_data("shapes", 64, objects=1)
    images = torch.stack([data[k]["image"] for k in range(120)]).float() / 255
    with runtime.autocast(torch.device("cpu"), args.dtype):
        # In micro-batches of 8, as the cache does: in bf16 the result depends on them.
        latents = torch.cat([rae.encode(micro_batch) for micro_batch in images.split(8)])
    latents = latents.flatten(1).float()

    drawn = set()
    cache = train_dit.encode_cache(data, rae, args, 0, 1, torch.device("cpu"))
    stream = train_dit.cached_batches(*cache, args, 0, 0, 1)
    for _, _, cached_latents, labels, _ in stream:
        for cached, label in zip(cached_latents.flatten(1).float(), labels.tolist(), strict=True):
            nearest = int((latents - cached).square().mean(1).argmin())
            assert (latents[nearest] - cached).abs().max() < 0.02
            assert label == data[nearest]["label"]
            drawn.add(nearest)

    assert len(drawn) > 80                             # 160 draws of 120 miss a quarter of them


# DINOv2-B's latents at 256 px take 393 kB; a process holds them twice while it collects them.
@pytest.mark.parametrize("processes, fitting", [(1, 122_070), (8, 15_258)])
def test_a_cache_that_memory_has_no_room_for_is_refused(processes, fitting, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(train_dit, "memory_of_machine", lambda: 128 * 10 ** 9)
    train_dit.check_cache(fitting, channels=768, grid=16)
    with pytest.raises(ValueError, match=f"in each of {processes} processes; give at most --cache "
                                         f"{fitting}, or leave it out"):
        train_dit.check_cache(1_281_167, channels=768, grid=16)


def test_a_cache_is_not_refused_where_memory_is_unknown(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr("os.sysconf")
    train_dit.check_cache(10 ** 9, channels=768, grid=16)


@pytest.mark.parametrize("prediction, expected_gradient", [
    ("x0", 0.5 * 2.1 ** 2 * 7 + 0.5 * 1.6 ** 2 * 0.01),                # (10 t (1-t))^2
    ("v", 0.5 * 7 + 0.5 * 0.01),
])
def test_x0_prediction_weighs_the_loss_by_time(tmp_path, monkeypatch, prediction,
                                               expected_gradient):
    """Losses of 7 at t = 0.3 and 0.01 at t = 0.8, times a parameter that is 1."""
    gradients = []

    def two_times(n, *_):
        return torch.tensor([0.3, 0.8]).repeat(n // 2)

    def loss_times_a_parameter(model, x0, y, t, eps):
        parameter = model.final_layer.norm_final.weight.mean()
        return parameter * torch.where(t < 0.5, 7.0, 0.01)

    def record_gradient(optimizers, model, *_):
        gradients.append(model.final_layer.norm_final.weight.grad.sum().item())
        model.zero_grad()
        return 0.0

    monkeypatch.setattr(train_dit, "sample_times", two_times)
    monkeypatch.setattr(train_dit, "flow_matching_loss", loss_times_a_parameter)
    monkeypatch.setattr(runtime, "optimizer_step", record_gradient)
    run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--prediction", prediction, "--out", tmp_path)

    assert abs(gradients[0] - expected_gradient) < 1e-3
    assert abs(read_log(tmp_path)[-1]["loss"] - expected_gradient) < 1e-3


def test_a_run_with_the_former_balance_of_the_loss_is_not_resumed(tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--out", tmp_path)
    state = load_last(tmp_path)
    state["args"]["balance"] = "off"
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(SystemExit):
        train_dit.parse_args(["--resume", "--steps", "2", "--out", str(tmp_path)])
    message = "was trained with another weight of the loss by time (--balance)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script, flags, other", [
    (train_dit, DIT_FLAGS, train_decoder),
    (train_decoder, DECODER_FLAGS, train_dit),
])
def test_only_a_run_of_the_same_script_is_resumed(tmp_path, capsys, script, flags, other):
    run_script(script, *flags, "--steps", 1, "--out", tmp_path)
    assert_refused(other, ["--resume", "--steps", 2, "--out", tmp_path],
                   f"is no checkpoint of {other.__name__}.py", capsys)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "last.pt")
    assert_refused(script, ["--resume", "--steps", 2, "--out", tmp_path],
                   f"is no checkpoint of {script.__name__}.py", capsys)


def test_contradicting_flags_of_a_run_are_refused(tmp_path, capsys):
    run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--out", tmp_path)
    assert_refused(train_dit, ["--resume", "--overwrite", "--out", tmp_path],
                   "--resume goes on with a run and --overwrite starts anew", capsys)
    assert_refused(train_dit, ["--resume", "--recipe", "rae", "--out", tmp_path],
                   "--recipe rae differs from the checkpoint's None; resume without it", capsys)


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_the_class_table_starts_at_label_std(tmp_path, monkeypatch, std):
    monkeypatch.setattr(runtime, "optimizer_step", lambda *_: 0.0)     # the weights stay
    run_script(train_dit, *DIT_FLAGS, "--steps", 1, "--label_std", std, "--out", tmp_path)
    table = load_last(tmp_path)["model"]["y_embedder.embedding_table.weight"]
    assert 0.9 * std < table.std() < 1.1 * std


# ---------------------------------------------------------------------------- flags
def test_named_sizes(tmp_path):
    args = train_dit.parse_args(["--model", "DiTDH-XL", "--depth", "3", "--out", str(tmp_path)])
    assert (args.width, args.depth, args.heads) == (1152, 3, 16)
    assert (args.head_width, args.head_heads) == (2048, 16)

    plain = train_dit.parse_args(["--model", "DiT-S", "--out", str(tmp_path)])
    assert plain.head_width == 0

    args = train_decoder.parse_args(["--decoder", "XL", "--decoder_mlp", "96",
                                     "--out", str(tmp_path)])
    assert (args.decoder_width, args.decoder_depth, args.decoder_mlp) == (1152, 28, 96)


# arXiv 2510.11690: 800 epochs of 1251 steps, the learning rate constant for 40 of them.
RAE_RECIPE = dict(steps=1_000_800, batch=1024, lr=2e-4, lr_end=0.1, decay_start=50_040,
                  decay_end=1_000_800, ema=0.9995, dtype="fp32", time_law="logit_normal",
                  label_std=0.02, solver="euler", sampling_steps=50,
                  save_every=5000, preview_every=5000)


def test_recipe_of_the_paper(tmp_path):
    args = train_dit.parse_args(["--recipe", "rae", "--out", str(tmp_path)])
    for name, value in RAE_RECIPE.items():
        assert getattr(args, name) == value, name


def test_single_flags_override_the_recipe(tmp_path):
    args = train_dit.parse_args(["--recipe", "rae", "--batch", "256", "--ema", "0.9", "--solver",
                                 "heun", "--decay_end", "60000", "--out", str(tmp_path)])
    given = dict(batch=256, ema=0.9, solver="heun", decay_end=60_000)
    for name, value in (RAE_RECIPE | given).items():
        assert getattr(args, name) == value, name
    assert args.micro_batch == 256


@pytest.mark.parametrize("script", [train_decoder, train_dit, train_t2i])
def test_resolving_flags_leaves_the_given_ones_as_they_are(script, tmp_path):
    given = argparse.Namespace(**dict.fromkeys(script.DEFAULTS))
    given.out = str(tmp_path)
    given.steps = 77
    before = dict(vars(given))

    resolved = script.resolve(given)

    assert vars(given) == before
    assert resolved.steps == 77
    assert resolved.batch is not None and resolved.micro_batch is not None


@both_stages
def test_main_leaves_its_flags_as_they_are(script, flags, tmp_path):
    args = script.parse_args([*flags, "--steps", "1", "--out", str(tmp_path)])
    before = dict(vars(args))
    script.main(args)
    assert vars(args) == before


def write_grey_images(folder, n, side=64):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (side, side), "grey").save(folder / f"{i}.png")


@both_stages
def test_data_can_be_passed_to_main(script, flags, tmp_path):
    """Two classes of images that are all the same: what is trained has seen nothing else."""
    write_grey_images(tmp_path / "images" / "cats", 8)
    write_grey_images(tmp_path / "images" / "dogs", 8)
    data = open_data([str(tmp_path / "images")], 64)
    args = script.parse_args([*flags, "--steps", "1", "--out", str(tmp_path / "run")])

    script.main(args, data=data)

    state = load_last(tmp_path / "run")
    if script is train_dit:
        assert state["class_names"] == ["cats", "dogs"] and state["num_classes"] == 2
    else:
        assert state["rae"]["latent_var"].max() < 1e-6


@pytest.mark.parametrize("script, argv, message", [
    (train_dit, ["--width", "1150", "--heads", "16"],
     "--width 1150 must be a multiple of --heads 16"),
    (train_dit, ["--class_dropout", "1"],
     "--class_dropout: 1 must be at least 0.0 and below 1"),
    (train_dit, ["--class_dropout", "0"],
     "--class_dropout 0 trains no null class for --guidance 1.5"),
    (train_dit, ["--eval_n", "1"], "--eval_n: 1 must be at least 2"),
    (train_dit, ["--rae", "nowhere.pt"], "nowhere.pt does not exist"),
    (train_dit, ["--decay_start", "9", "--warmup", "10"], "--warmup 10, --decay_start 9"),
    (train_dit, ["--steps", "0"], "--steps: 0 must be at least 1"),
    (train_dit, ["--batch", "10", "--micro_batch", "4"],
     "--batch 10 must be a multiple of --micro_batch 4 x 1"),
    (train_dit, ["--resume", "--out", "runs/no_such_run"],
     "--resume needs runs/no_such_run/last.pt"),
    (train_dit, ["--lr", "0"], "--lr: 0 must be at least 1e-09"),
    (train_dit, ["--lr_end", "1.005"],
     "--lr_end: 1.005 must be at least 0.0 and below 1.000000001"),
    (train_dit, ["--label_std", "-1"], "--label_std: -1 must be at least 0"),
    (train_dit, ["--cache", "-1"], "--cache: -1 must be at least 0"),
    (train_dit, ["--shift_base", "0"], "--shift_base: 0 must be at least 1e-09"),
    (train_dit, ["--ema", "1"], "--ema: 1 must be at least 0.0 and below 1"),
    (train_dit, ["--widht", "64"], "unrecognized arguments: --widht"),
    (train_decoder, ["--decoder_heads", "5"],
     "--decoder_width 192 must be a multiple of --decoder_heads 5"),
    (train_decoder, ["--tau", "-1"], "--tau: -1 must be at least 0"),
    (train_decoder, ["--encoder", "vgg99"], "--encoder vgg99 is neither"),
])
def test_bad_flags_are_refused_before_anything_is_built(script, argv, message, tmp_path, capsys):
    assert_refused(script, ["--out", tmp_path, *argv], message, capsys)


@pytest.mark.parametrize("script", [train_decoder, train_dit, train_t2i])
def test_data_that_do_not_exist_are_refused_with_the_flags(script, tmp_path, capsys):
    assert_refused(script, ["--data", tmp_path / "nowhere", "--out", tmp_path / "run"],
                   "nowhere does not exist", capsys)


def test_all_that_is_too_large_for_the_data_is_told_at_once(tmp_path, capsys):
    write_grey_images(tmp_path / "images", 10)
    common = ["--data", tmp_path / "images", "--eval_every", 1, "--out", tmp_path / "run"]
    assert_refused(train_decoder, [*common, "--hold_out", 12, "--eval_n", 30],
                   "has 10 images: --hold_out 12 must be below 10; --eval_n 30 must be at most "
                   "the 12 held out", capsys)
    assert_refused(train_dit, [*common, "--hold_out", 4, "--eval_n", 30, "--batch", 8],
                   "has 10 images: --batch 8 must be at most the 6 to train on; --eval_n 30 must "
                   "be at most the 4 held out", capsys)


def test_images_held_out_because_of_eval_n_are_explained(tmp_path, capsys):
    write_grey_images(tmp_path / "images", 10)
    assert_refused(train_decoder, ["--data", tmp_path / "images", "--eval_n", 30,
                                   "--out", tmp_path / "run"],
                   "--hold_out 30 must be below 10 (if it is not given, train_decoder.py takes "
                   "that of --eval_n)", capsys)


def test_evaluations_of_one_image_are_refused_before_training(tmp_path, capsys):
    write_grey_images(tmp_path / "images", 10)
    assert_refused(train_dit, ["--data", tmp_path / "images", "--eval_every", 1, "--hold_out", 1,
                               "--out", tmp_path / "run"],
                   "--eval_n 1 must be at least 2; give --hold_out 2", capsys)


def test_shapeseval_of_other_data_is_refused_before_training(tmp_path, capsys):
    write_grey_images(tmp_path / "images", 10)
    (tmp_path / "images" / "a.txt").write_text("a cat")
    assert_refused(train_t2i, ["--data", tmp_path / "images", "--eval_every", 1,
                               "--out", tmp_path / "run"],
                   "--eval_every runs ShapesEval, which measures nothing without shapes", capsys)


@pytest.mark.parametrize("script, amounts", [
    (train_decoder, dict(batch=8, hold_out=2, eval_n=2)),
    (train_dit, dict(batch=10, hold_out=0, eval_n=10))], ids=["decoder", "dit"])
def test_defaults_fit_few_images(script, amounts, tmp_path):
    write_grey_images(tmp_path / "images", 10)
    args = script.parse_args(["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")])
    assert {name: getattr(args, name) for name in amounts} == amounts


def test_given_amounts_change_the_defaults_of_the_others(tmp_path):
    write_grey_images(tmp_path / "images", 100)
    common = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
    assert train_decoder.parse_args([*common, "--eval_n", "30"]).hold_out == 30
    assert train_decoder.parse_args([*common, "--hold_out", "50"]).eval_n == 50
    assert train_decoder.parse_args([*common, "--hold_out", "50"]).batch == 50


def test_a_file_without_an_autoencoder_is_refused(tmp_path, capsys):
    torch.save({"x": 1}, tmp_path / "x.pt")
    assert_refused(train_dit, [*DIT_FLAGS, "--rae", tmp_path / "x.pt", "--out", tmp_path],
                   "no checkpoint of train_decoder.py", capsys)
