"""Both training scripts: exact resume, kills, accumulation, processes, errors.

Run: python -m pytest tests/test_train.py
"""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import eval_fid
import runtime
import sample
import train_decoder
import train_dit
from conftest import ROOT, start, torchrun
from data import open_data
from model import build_decoder, unpack_rae

DECODER = ("--decoder_width 32 --decoder_depth 1 --decoder_heads 2 --decoder_mlp 64 --batch 8 --stats_n 16 "
           "--workers 0 --log_every 2 --save_every 2 --preview_every 0 --eval_every 0 --eval_n 4 --warmup 2 "
           "--tau 0.5").split()
DIT = ("--width 32 --depth 1 --heads 2 --head_width 192 --head_depth 1 --head_heads 4 --batch 8 --workers 0 "
       "--log_every 2 --save_every 2 --preview_every 0 --warmup 2 --decay_start 2 --sampling_steps 2 "
       "--eval_n 36").split()
STAGES = [(train_decoder, DECODER), (train_dit, DIT)]
CACHED = (train_dit, [*DIT, "--cache", "120"])


def go(script, *argv):
    script.main(script.parse_args([str(a) for a in argv]))


def go_on_one_thread(script, *argv):               # as each process of torchrun does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    go(script, *argv)
    torch.set_num_threads(threads)


def load(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def difference(a, b):
    """Largest difference between any two tensors of two checkpoints, EMA and optimizer state included."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max([difference(a[k], b[k]) for k in a if k != "args"], default=0.0)
    if isinstance(a, (list, tuple)):
        return max([difference(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
    assert a == b
    return 0.0


@pytest.mark.parametrize("script, flags", [*STAGES, CACHED])
def test_resume_is_exact_to_the_bit(script, flags, tmp_path):
    common = [*flags, "--decay_end", 6] if script is train_dit else flags
    go(script, *common, "--steps", 6, "--out", tmp_path / "straight")
    go(script, *common, "--steps", 6, "--out", tmp_path / "twice", "--save_every", 4)
    torch.save(load_at(script, common, tmp_path, 4), tmp_path / "twice" / "last.pt")
    go(script, *common, "--steps", 6, "--out", tmp_path / "twice", "--resume", "--workers", 1)
    assert difference(load(tmp_path / "straight"), load(tmp_path / "twice")) == 0
    rows = [json.loads(r) for r in (tmp_path / "twice" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "step" in r] == [2, 4, 6]       # the first run's log past 4 is gone
    assert rows[0]["args"]["batch"] == 8 and rows[0]["parameters"] > 0 and rows[0]["commit"]


def load_at(script, flags, tmp_path, stop):
    """The checkpoint of a run that was killed after `stop` steps of 6."""
    saved, original = [], runtime.save_checkpoint

    def save_and_die(path, **state):
        original(path, **state)
        if state["step"] == stop:
            saved.append(torch.load(path, weights_only=True))
            raise KeyboardInterrupt

    runtime.save_checkpoint = save_and_die
    try:
        with pytest.raises(KeyboardInterrupt):
            go(script, *flags, "--steps", 6, "--out", tmp_path / "killed")
    finally:
        runtime.save_checkpoint = original
    return saved[0]


def test_kill_in_mid_save_leaves_the_last_whole_checkpoint(tmp_path):
    """A child saves ever larger checkpoints without pause and is killed at random moments."""
    code = ("import torch, runtime\n"
            "for step in range(10**6):\n"
            "    runtime.save_checkpoint('last.pt', step=step, x=torch.full((300_000,), step))\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for delay in (0.05, 0.11, 0.17):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
        while not (tmp_path / "last.pt").exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        state = runtime.load_checkpoint(tmp_path / "last.pt")
        assert (state["x"] == state["step"]).all()


def test_real_run_killed_with_9_resumes_to_the_same_weights(tmp_path):
    flags = [*DIT, "--decay_end", "30", "--steps", "30"]
    child = start(train_dit, *flags, "--out", tmp_path / "killed")
    while not (tmp_path / "killed" / "last.pt").exists():
        assert child.is_alive()
        time.sleep(0.02)
    time.sleep(0.1)
    child.kill()
    child.join()
    step = load(tmp_path / "killed")["step"]
    assert step < 30
    go_on_one_thread(train_dit, *flags, "--out", tmp_path / "killed", "--resume")
    go_on_one_thread(train_dit, *flags, "--out", tmp_path / "straight")
    assert difference(load(tmp_path / "straight"), load(tmp_path / "killed")) == 0


@pytest.mark.parametrize("script, flags", [*STAGES, CACHED])
def test_two_processes_equal_one_with_two_micro_batches(script, flags, tmp_path):
    common = [*flags, "--micro_batch", "4", "--steps", "3", "--dtype", "fp32"]
    go_on_one_thread(script, *common, "--out", tmp_path / "one")
    torchrun(script, *common, "--out", tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert difference(one["model"], two["model"]) < 1e-5 and difference(one["ema"], two["ema"]) < 1e-5
    assert difference(one["rae"], two["rae"]) < 1e-5                   # statistics merge over processes
    records = [json.loads((tmp_path / x / "log.jsonl").read_text().splitlines()[-1]) for x in ("one", "two")]
    assert abs(records[0]["loss"] - records[1]["loss"]) < 1e-5         # the log is the mean over processes


@pytest.mark.parametrize("script, flags", STAGES)
def test_accumulation_equals_the_large_batch_given_the_same_noise(script, flags, tmp_path, monkeypatch):
    """With noise drawn per image, not per micro-batch, 1 x 8 and 4 x 2 images must give the same weights."""
    if script is train_dit:
        monkeypatch.setattr(train_dit, "time_shift", lambda t, *_: torch.full_like(t, 0.3))
        monkeypatch.setattr(torch, "randn_like", lambda x, **_: x.flip(1))
    else:
        monkeypatch.setattr(train_decoder, "add_noise", lambda z, tau, law: z + 0.1 * z.flip(1))
    flags = [*flags, "--steps", "3", "--dtype", "fp32", "--lr", "1e-3"]     # Adam makes rounding lr-sized
    flags += ["--class_dropout", "0", "--guidance", "1"] * (script is train_dit)
    go(script, *flags, "--out", tmp_path / "big")
    go(script, *flags, "--out", tmp_path / "small", "--micro_batch", 2)
    assert difference(load(tmp_path / "big")["model"], load(tmp_path / "small")["model"]) < 1e-5


def test_loss_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch, capsys):
    original = train_dit.flow_matching_loss

    def poisoned(model, x0, y, t, eps):
        poisoned.calls += 1
        return original(model, x0, y, t, eps) * (float("nan") if poisoned.calls == 2 else 1.0)

    poisoned.calls = 0
    monkeypatch.setattr(train_dit, "flow_matching_loss", poisoned)
    go(train_dit, *DIT, "--steps", 3, "--out", tmp_path)
    assert all(v.isfinite().all() for v in load(tmp_path)["model"].values())
    assert "step 1: not finite, update left out: loss nan" in capsys.readouterr().err


def test_ema_follows_and_is_what_is_saved_in_the_autoencoder(tmp_path):
    go(train_decoder, *DECODER, "--steps", 4, "--out", tmp_path)
    state = load(tmp_path)
    assert difference(state["model"], state["ema"]) > 0
    assert difference(state["ema"], state["rae"]["decoder"]) == 0
    assert state["rae"]["latent_var"].shape == (192, 4, 4)


def test_latent_statistics_are_those_of_all_latents():
    from data import batches, open_data
    encoder, data = train_decoder.Encoder("tiny"), open_data("shapes", 64, objects=1)
    mean, var = train_decoder.latent_statistics(encoder, data, 24, 8)
    images = torch.cat([images for _, _, images, _, _ in batches(data, 8, 8, stop=3, workers=0)])
    z = encoder.encode(images.float() / 255)
    torch.testing.assert_close(mean, z.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(var, z.var(0, unbiased=False), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("law", ["half_normal", "uniform"])
def test_latent_noise_law(law):
    z = train_decoder.add_noise(torch.zeros(4000, 8, 4, 4), 0.5, law)
    sigma = z.flatten(1).std(1)
    mean = 0.5 * (2 / torch.pi) ** 0.5 if law == "half_normal" else 0.25
    assert abs(sigma.mean() - mean) < 0.02
    assert (sigma.max() > 0.8) == (law == "half_normal")


def test_preview_evaluation_and_upsampling(tmp_path):
    go(train_decoder, *DECODER, "--steps", 2, "--decoder_patch", 32, "--preview_every", 2, "--eval_every", 2,
       "--out", tmp_path / "decoder")
    assert (tmp_path / "decoder" / "preview_0000002.png").exists()
    record = [json.loads(r) for r in (tmp_path / "decoder" / "log.jsonl").read_text().splitlines()][-1]
    assert {"psnr", "ssim", "frechet_distance"} <= record.keys()
    go(train_dit, *DIT, "--rae", tmp_path / "decoder" / "last.pt", "--steps", 2, "--preview_every", 2,
       "--eval_every", 2, "--out", tmp_path / "dit")
    assert Image.open(tmp_path / "dit" / "preview_0000002.png").size[0] == 12 * 130 + 2
    record = [json.loads(r) for r in (tmp_path / "dit" / "log.jsonl").read_text().splitlines()][-1]
    assert {"frechet_distance", "right_colour_and_shape", "unsure"} <= record.keys()


def test_upsampling_decoder_learns_from_images_of_its_own_side(tmp_path, monkeypatch):
    """Twice the patch: the encoder sees 64 px, the target is the image at 128 px and not 64 px blown up."""
    seen, encode = [], train_decoder.Encoder.encode
    monkeypatch.setattr(train_decoder.Perceptual, "forward", lambda self, images, target:
                        seen.append(target) or dict(l1=(images - target).abs().mean()))
    monkeypatch.setattr(train_decoder.Encoder, "encode", lambda self, x: seen.append(x) or encode(self, x))
    go(train_decoder, *DECODER, "--steps", 1, "--decoder_patch", 32, "--out", tmp_path)
    small, target = seen[-2], seen[-1]
    assert small.shape[-1] == 64 and target.shape[-1] == 128
    assert torch.allclose(eval_fid.resize(target, 64), small)
    assert (eval_fid.resize(small, 128) - target).abs().max() > 0.2       # edges that 64 px cannot hold
    flags = ["--reconstruct", tmp_path / "last.pt", "--n", "4", "--out", tmp_path / "eval.json"]
    metrics = eval_fid.main(eval_fid.parse_args([str(a) for a in flags]))
    assert 5 < metrics["psnr"] < 40


def test_plain_dit_and_named_sizes(tmp_path):
    out = ["--out", str(tmp_path)]
    args = train_dit.parse_args(["--model", "DiTDH-XL", "--depth", "3", *out])
    assert (args.width, args.depth, args.heads, args.head_width, args.head_heads) == (1152, 3, 16, 2048, 16)
    assert train_dit.parse_args(["--model", "DiT-S", *out]).head_width == 0
    args = train_decoder.parse_args(["--decoder", "XL", "--decoder_mlp", "96", *out])
    assert (args.decoder_width, args.decoder_depth, args.decoder_mlp) == (1152, 28, 96)


@pytest.mark.parametrize("script, argv, message", [
    (train_dit, ["--width", "1150", "--heads", "16"], "--width 1150 must be a multiple of --heads 16"),
    (train_dit, ["--class_dropout", "1"], "--class_dropout: 1 must be at least 0.0 and below 1"),
    (train_dit, ["--class_dropout", "0"], "--class_dropout 0 trains no null class for --guidance 1.5"),
    (train_dit, ["--eval_n", "1"], "--eval_n: 1 must be at least 2"),
    (train_dit, ["--rae", "nowhere.pt"], "--rae nowhere.pt does not exist"),
    (train_dit, ["--decay_start", "9", "--warmup", "10"], "--warmup 10, --decay_start 9"),
    (train_dit, ["--steps", "0"], "--steps: 0 must be at least 1"),
    (train_dit, ["--batch", "10", "--micro_batch", "4"],
     "--batch 10 must be a multiple of --micro_batch 4 x 1"),
    (train_dit, ["--resume", "--out", "runs/no_such_run"], "--resume needs runs/no_such_run/last.pt"),
    (train_dit, ["--lr", "0"], "--lr: 0 must be at least 1e-09"),
    (train_dit, ["--lr_end", "1.005"], "--lr_end: 1.005 must be at least 0.0 and below 1.000000001"),
    (train_dit, ["--label_std", "-1"], "--label_std: -1 must be at least 0"),
    (train_dit, ["--cache", "-1"], "--cache: -1 must be at least 0"),
    (train_dit, ["--shift_base", "0"], "--shift_base: 0 must be at least 1e-09"),
    (train_dit, ["--ema", "1"], "--ema: 1 must be at least 0.0 and below 1"),
    (train_dit, ["--widht", "64"], "unrecognized arguments: --widht"),
    (train_decoder, ["--decoder_heads", "5"], "--decoder_width 192 must be a multiple of --decoder_heads 5"),
    (train_decoder, ["--tau", "-1"], "--tau: -1 must be at least 0"),
    (train_decoder, ["--encoder", "vgg99"], "--encoder vgg99 is neither"),
])
def test_bad_flags_are_refused_before_anything_is_built(script, argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--out", str(tmp_path), *argv])
    assert message in capsys.readouterr().err


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path, capsys):
    go(train_dit, *DIT, "--steps", 2, "--out", tmp_path)
    with pytest.raises(SystemExit):
        train_dit.parse_args([*DIT, "--out", str(tmp_path)])
    assert "exists; add --resume" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--depth 2 differs from the checkpoint's 1; resume with --depth 1"):
        go(train_dit, *DIT, "--depth", 2, "--steps", 4, "--out", tmp_path, "--resume")
    with pytest.raises(ValueError, match="has done 2 steps; raise --steps 2"):
        go(train_dit, *DIT, "--steps", 2, "--out", tmp_path, "--resume")
    go(train_dit, *DIT, "--steps", 2, "--out", tmp_path, "--overwrite")


def test_a_checkpoint_from_before_a_flag_resumes(tmp_path):
    go(train_decoder, *DECODER, "--steps", 2, "--out", tmp_path)
    state = load(tmp_path)
    del state["args"]["cutout"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="--cutout 0.5 differs from the checkpoint's None"):
        go(train_decoder, *DECODER, "--steps", 3, "--out", tmp_path, "--resume", "--cutout", 0.5)
    go(train_decoder, *DECODER, "--steps", 3, "--out", tmp_path, "--resume")
    assert load(tmp_path)["step"] == 3


def test_the_time_shift_of_a_run_is_kept_in_its_checkpoint_for_sampling(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_dit, "time_shift", lambda t, dim, base:
                        seen.append((dim, base)) or torch.full_like(t, 0.5))
    go(train_dit, *DIT, "--steps", 2, "--out", tmp_path / "tiny")     # left open: that of the tiny encoder
    go(train_dit, *DIT, "--steps", 1, "--shift_base", 4096, "--out", tmp_path / "paper")
    assert seen == [(3072, train_dit.TINY["shift_base"])] * 2 + [(3072, 4096)]
    shifts = []
    monkeypatch.setattr(sample, "time_grid", lambda steps, shift, release: shifts.append(shift) or [])
    monkeypatch.setitem(sample.SOLVERS, "euler", lambda velocity, x, times: x)
    for run in ("tiny", "paper"):
        model, rae, _ = sample.load_dit(tmp_path / run / "last.pt")
        args = train_dit.parse_args(["--out", str(tmp_path / "none"), "--solver", "euler"])
        sample.generate(model, rae, [0], args)
    assert shifts == [(3072 / train_dit.TINY["shift_base"]) ** 0.5, (3072 / 4096) ** 0.5]
    with pytest.raises(ValueError, match="--shift_base 99.0 differs from the checkpoint's 340"):
        go(train_dit, *DIT, "--steps", 4, "--shift_base", 99, "--out", tmp_path / "tiny", "--resume")
    go(train_dit, *DIT, "--steps", 4, "--out", tmp_path / "tiny", "--resume")
    assert load(tmp_path / "tiny")["args"]["shift_base"] == train_dit.TINY["shift_base"]


def test_the_prediction_of_a_run_is_kept_and_its_loss_is_that_of_x0(tmp_path, monkeypatch):
    seen, flow_matching_loss = [], train_dit.flow_matching_loss
    monkeypatch.setattr(train_dit, "time_shift", lambda t, *_: torch.full_like(t, 0.5))
    monkeypatch.setattr(train_dit, "flow_matching_loss", lambda model, x0, y, t, eps:
                        seen.append(x0) or flow_matching_loss(model, x0, y, t, eps))
    go(train_dit, *DIT, "--steps", 2, "--log_every", 1, "--out", tmp_path / "x0")
    go(train_dit, *DIT, "--steps", 2, "--prediction", "v", "--out", tmp_path / "v")
    rows = map(json.loads, (tmp_path / "x0/log.jsonl").read_text().splitlines())
    first = next(r["loss"] for r in rows if "loss" in r)               # output 0 at the start: x0 taken for 0
    assert abs(first / seen[0].square().mean() - 1) < 1e-3
    for run, kind in (("x0", "x0"), ("v", "v")):
        assert load(tmp_path / run)["args"]["prediction"] == kind
        assert sample.load_dit(tmp_path / run / "last.pt")[0].prediction == kind
    with pytest.raises(ValueError, match="--prediction v differs from the checkpoint's x0"):
        go(train_dit, *DIT, "--steps", 4, "--prediction", "v", "--out", tmp_path / "x0", "--resume")


def test_the_cache_holds_the_latents_of_the_first_images_each_with_its_label():
    args = train_dit.parse_args([*DIT, "--cache", "120", "--steps", "20"])
    packed = runtime.load_checkpoint(train_dit.SHIPPED_RAE)["rae"]
    rae, data = unpack_rae(packed), open_data("shapes", 64, objects=1)
    images = torch.stack([data[k]["image"] for k in range(120)]).float() / 255
    with runtime.autocast(torch.device("cpu"), args.dtype):
        wanted = torch.cat([rae.encode(x) for x in images.split(50)]).flatten(1).float()
    seen = set()
    for _, _, z, y, _ in train_dit.replay(data, rae, args, 0, 0, 1, torch.device("cpu")):
        for row, label in zip(z.flatten(1).float(), y.tolist()):
            k = int((wanted - row).square().mean(1).argmin())
            assert (wanted[k] - row).abs().max() < 0.02 and label == data[k]["label"]
            seen.add(k)
    assert len(seen) > 80                              # 160 draws of 120 leave a quarter of them out


@pytest.mark.parametrize("balance, gradient", [("on", 1.0), ("off", 0.5 * 7 + 0.5 * 0.01)])
def test_balance_gives_all_times_the_same_say(tmp_path, monkeypatch, balance, gradient):
    """Losses of 7 at t = 0.3, 0.01 at 0.8, times a weight that stays 1: its gradient is their mean, or 1."""
    seen = []
    monkeypatch.setattr(train_dit, "time_shift", lambda t, *_: torch.tensor([0.3, 0.8]).repeat(len(t) // 2))
    monkeypatch.setattr(train_dit, "flow_matching_loss", lambda model, x0, y, t, eps:
                        model.final_layer.norm_final.weight.mean() * torch.where(t < 0.5, 7.0, 0.01) / t ** 2)
    monkeypatch.setattr(runtime, "step_optimizers", lambda opts, model, *rest: seen.append(
        model.final_layer.norm_final.weight.grad.sum().item()) or model.zero_grad() or 0.0)
    go(train_dit, *DIT, "--cache", 8, "--steps", 150, "--save_every", 150, "--balance", balance,
       "--out", tmp_path)
    assert abs(seen[0] - (0.5 * 7 + 0.5 * 0.01)) < 1e-3                # nothing is known of the loss yet
    assert abs(seen[-1] - gradient) < 0.03 * gradient
    level = load(tmp_path)["level"]
    assert abs(level[6] - 7) < 0.1 and abs(level[16] - 0.01) < 0.001 and level[0] == 1       # never seen


def test_a_wild_loss_does_not_silence_its_times(tmp_path, monkeypatch):
    """A loss of 1e7 among losses of 0.01, as a sample gave once: 40 steps later it weighs as before."""
    calls = []
    monkeypatch.setattr(train_dit, "flow_matching_loss", lambda model, x0, y, t, eps: calls.append(t) or (
        1e7 if len(calls) == 60 else 0.01) * model.final_layer.norm_final.weight.mean() / t ** 2)
    monkeypatch.setattr(runtime, "step_optimizers", lambda opts, model, *rest: model.zero_grad() or 0.0)
    go(train_dit, *DIT, "--cache", 8, "--steps", 100, "--save_every", 100, "--balance", "on",
       "--out", tmp_path)
    assert load(tmp_path)["level"][10:].max() < 0.05                   # by arithmetic means: 1e5


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest():
    model = build_decoder(dict(decoder_patch=4, decoder_width=32, decoder_depth=1, decoder_heads=2,
                               decoder_mlp=64), 16, 4)
    name = {p: k for k, p in model.named_parameters()}
    adamw, muon = train_decoder.make_optimizers(model, "muon", 1e-3, 0.0)
    sets = [{name[p] for group in opt.param_groups for p in group["params"]} for opt in (adamw, muon)]
    assert sets[1] == {f"decoder_layers.0.{k}.weight" for k in "query key value proj fc1 fc2".split()}
    assert sets[0] == {k for p, k in name.items() if p.requires_grad} - sets[1]
    weight = model.decoder_layers[0].fc1.weight
    before = weight.detach().clone()
    model(torch.randn(64, 16, 4, 4)).square().mean().backward()
    gradient = torch.linalg.svdvals(weight.grad)
    runtime.step_optimizers([adamw, muon], model, 0.0, torch.tensor(0.0), 0, 1e-2)
    update = torch.linalg.svdvals(before - weight.detach())
    assert gradient.max() > 5 * gradient.median() and update.max() < 2 * update.median()     # all ways alike
    assert len(train_decoder.make_optimizers(model, "adamw", 1e-3, 0.0)) == 1


def test_muon_is_torch_s_but_for_bf16():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((24, 12), (12, 24))] for _ in "ab")
    opts = (train_decoder.Muon(ours, 1e-2, 0.1),
            torch.optim.Muon(theirs, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        [opt.step() for opt in opts]
    for p, q in zip(ours, theirs):
        moved = (q - 1).norm()
        assert (p - q).norm() < 0.02 * moved and moved > 0.05, (p - q).norm() / moved    # bf16 has 8 bits


def test_the_class_table_starts_at_label_std(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dit.runtime, "step_optimizers", lambda *args: 0.0)     # the weights stay
    for std in (1.0, 0.02):
        go(train_dit, *DIT, "--steps", 1, "--label_std", std, "--out", tmp_path / str(std))
        table = load(tmp_path / str(std))["model"]["y_embedder.embedding_table.weight"]
        assert 0.9 * std < table.std() < 1.1 * std


def test_overwriting_removes_the_old_checkpoint_at_once(tmp_path, monkeypatch):
    go(train_dit, *DIT, "--steps", 2, "--out", tmp_path)
    monkeypatch.setattr(runtime, "save_checkpoint", lambda *_, **__: None)      # killed before the first save
    go(train_dit, *DIT, "--steps", 1, "--out", tmp_path, "--overwrite")
    assert not (tmp_path / "last.pt").exists()


def test_resume_takes_the_autoencoder_of_the_checkpoint(tmp_path):
    go(train_decoder, *DECODER, "--steps", 2, "--out", tmp_path / "decoder")
    flags = [*DIT, "--rae", tmp_path / "decoder" / "last.pt", "--out", tmp_path / "dit"]
    go(train_dit, *flags, "--steps", 2)
    before = load(tmp_path / "dit")["rae"]
    go(train_decoder, *DECODER, "--steps", 1, "--stats_n", 32, "--out", tmp_path / "decoder", "--overwrite")
    go(train_dit, *flags, "--steps", 4, "--resume")
    assert difference(before, load(tmp_path / "dit")["rae"]) == 0


def test_bad_data_stops_before_any_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(train_decoder, "Encoder", None)                # calling it would be a TypeError
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        go(train_decoder, *DECODER, "--data", "nowhere", "--out", tmp_path)
    with pytest.raises(ValueError, match="--eval_n 200 is more than the 16 held-out images"):
        folder = tmp_path / "images"
        folder.mkdir()
        for i in range(40):
            Image.new("RGB", (64, 64)).save(folder / f"{i}.png")
        go(train_decoder, *DECODER, "--data", folder, "--hold_out", 16, "--eval_every", 1, "--eval_n", 200,
           "--out", tmp_path)
    monkeypatch.setattr(train_dit, "unpack_rae", None)
    with pytest.raises(ValueError, match="no checkpoint of train_decoder.py"):
        torch.save({"x": 1}, tmp_path / "x.pt")
        go(train_dit, *DIT, "--rae", tmp_path / "x.pt", "--out", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        go(train_dit, *DIT, "--data", "nowhere", "--out", tmp_path)


@pytest.mark.parametrize("law, quartiles", [
    ("uniform", [0.25, 0.5, 0.75]), ("logit_normal", [0.337, 0.5, 0.663])])
def test_times_follow_their_law(tmp_path, monkeypatch, law, quartiles):
    seen, flow_matching_loss = [], train_dit.flow_matching_loss
    monkeypatch.setattr(train_dit, "flow_matching_loss", lambda model, x0, y, t, eps:
                        seen.append(t) or flow_matching_loss(model, x0, y, t, eps))
    go(train_dit, *DIT, "--batch", 200, "--steps", 4, "--time_law", law, "--shift_base", 3072,         # a = 1
       "--out", tmp_path)
    found = torch.cat(seen).quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert (found - torch.tensor(quartiles)).abs().max() < 0.06
