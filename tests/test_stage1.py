"""Stage 1's losses: LPIPS, Gram, features, discriminator, augmentation, lambda over parts and processes.

Run: python -m pytest tests/test_stage1.py
"""
import json
import urllib.error
from functools import partial

import lpips
import numpy
import pytest
import timm
import torch
from PIL import Image
from scipy import ndimage

import eval_fid
import model
import runtime
import sample
import train_decoder
import train_dit
from conftest import torchrun
from data import open_data
from shapes import Text
from test_train import DECODER, DIT, difference, go, go_on_one_thread, load, load_at
from train_decoder import Discriminator, Perceptual, augment, gram

GAN = [*DECODER, *"--gan 0.75 --disc_start 1 --gan_start 2 --disc_lr 1e-3 --disc_warmup 1".split()]
NONE = dict(l1=1.0, lpips=0.0, gram=0.0, feature=0.0)


@pytest.fixture
def vgg(monkeypatch):
    """LPIPS with a random VGG: the package's own calibrated layers, no download."""
    torch.manual_seed(0)
    monkeypatch.setattr(eval_fid.lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True))


def pair(side=64, n=2):
    torch.manual_seed(1)
    return torch.rand(n, 3, side, side, requires_grad=True), torch.rand(n, 3, side, side)


# ---------------------------------------------------------------------------------- perceptual terms
def test_lpips_is_the_package_s(vgg):
    loss, (x, y) = Perceptual({**NONE, "lpips": 1.0}), pair()
    terms = loss(x, y)
    assert terms.keys() == {"l1", "lpips"}
    assert terms["lpips"].item() == pytest.approx(loss.vgg(x, y, normalize=True).mean().item(), rel=1e-4)
    assert torch.allclose(terms["l1"], (x - y).abs().mean())
    assert loss(y, y)["lpips"] == 0
    grad, = torch.autograd.grad(terms["lpips"], x)
    assert grad.abs().max() > 0 and not any(p.requires_grad for p in loss.parameters())


def test_gram_is_its_formula(vgg):
    x = torch.randn(2, 3, 4, 5)
    by_hand = torch.stack([sum(torch.outer(one[:, i, j], one[:, i, j]) for i in range(4) for j in range(5))
                           / (3 * 20) for one in x])
    assert torch.allclose(gram(x), by_hand, atol=1e-6)
    loss, (x, y) = Perceptual({**NONE, "gram": 100.0}), pair()
    value = loss(x, y)["gram"]
    by_hand = sum((gram(a) - gram(b)).square().mean() for a, b in zip(loss.maps(x), loss.maps(y))) / 5
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-4) and value > 0
    rolled = torch.roll(y, (16, 32), (2, 3))               # statistics, not places
    assert loss(rolled, y)["gram"] < value / 2


def test_missing_vgg_weights_say_which_file_goes_where(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af.pth into .*checkpoints/, or do without"):
        Perceptual({**NONE, "lpips": 1.0})
    Perceptual({**NONE, "feature": 1.0})        # needs none


def test_feature_distance_is_the_frozen_encoder_s():
    encoder = model.Encoder("tiny")
    loss, (x, y) = Perceptual({**NONE, "feature": 1.0}), pair()
    assert len(loss.tokens(x)) == len(encoder.backbone.blocks)
    last, latents = loss.tokens(y)[-1], encoder.encode(y)  # the last map, normalised, is the latents
    assert torch.allclose(last, latents.flatten(2).mT, atol=1e-4)
    assert loss(y, y)["feature"] == 0 and loss(x, y)["feature"] > 0
    assert torch.autograd.grad(loss(x, y)["feature"], x)[0].abs().max() > 0


# ---------------------------------------------------------------------------------- discriminator
def test_discriminator_has_five_spectral_heads_on_a_frozen_vit():
    disc = Discriminator("tiny")
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    assert disc(x).shape == (2, 5 * 16) and disc.at == [4, 0, 1, 2, 4]
    assert not any(p.requires_grad for p in disc.vit.parameters())
    assert torch.autograd.grad(disc(x).sum(), x)[0].abs().max() > 0
    for _ in range(200):
        disc.renew()
    weights = [m.weight.flatten(1) for m in disc.modules() if isinstance(m, torch.nn.Conv1d)]
    assert len(weights) == 15
    assert all(abs(torch.linalg.matrix_norm(w, 2) - 1) < 0.02 for w in weights)
    a, b = torch.rand(2, 2, 3, 64, 64)
    assert torch.allclose(disc(torch.cat([a, b]))[:2], disc(a), atol=1e-5)      # no statistics of the batch


def test_discriminator_of_the_papers(monkeypatch):
    """7.39 M trainable parameters on DINO ViT-S/8, whose 12 blocks are seen at 11, 2, 5, 8, 11."""
    monkeypatch.setattr(train_decoder, "load_vit", lambda name, size: timm.create_model(
        name, pretrained=False, num_classes=0, img_size=size))
    disc = Discriminator("dino-s8")
    assert round(sum(p.numel() for p in disc.heads.parameters()) / 1e6, 2) == 7.39
    assert disc.at == [11, 2, 5, 8, 11]
    assert Discriminator("dino-s16")(torch.rand(1, 3, 256, 256)).shape == (1, 5 * 196)


def test_augment_changes_each_image_in_its_own_way_within_bounds():
    torch.manual_seed(0)
    spot = torch.full((64, 3, 32, 32), 0.5)
    spot[:, :, 16, 16] = 1.0
    x = augment(spot)
    at = (x - x.flatten(2).median(2).values[..., None, None]).abs().sum(1).flatten(1).argmax(1)
    rows, columns = at // 32 - 16, at % 32 - 16
    assert rows.abs().max() == 4 and columns.abs().max() == 4 and len({*at.tolist()}) > 20
    flat = augment(torch.full((64, 3, 32, 32), 0.5))[:, :, 8:24, 8:24]
    assert flat.amin() >= 0.25 and flat.amax() <= 0.75 and flat.mean((1, 2, 3)).std() > 0.1
    x = torch.rand(4, 3, 32, 32, requires_grad=True)
    assert torch.autograd.grad(augment(x).square().sum(), x)[0].abs().max() > 0
    torch.manual_seed(5)
    plain = augment(torch.rand(64, 3, 32, 32) + 1)
    torch.manual_seed(5)
    holes = augment(torch.rand(64, 3, 32, 32) + 1, cutout=0.5) != plain
    share = holes[:, 0].float().mean((1, 2))               # a square at the edge is cut off itself
    assert share.max() <= 0.26 and 0.1 < share.mean() < 0.2 and len(set(share.tolist())) > 20
    assert (holes[:, 0] == holes[:, 2]).all()


# ---------------------------------------------------------------------------------- training
def gradients(monkeypatch, tmp_path, *flags):
    """Gradients of decoder and discriminator in the third step of a run without noise, and their lambda."""
    seen = {}

    def keep(opts, net, clip, loss, step, lr):
        name = "Discriminator" if isinstance(net[0], train_decoder.Head) else "Decoder"
        seen[name, step] = [p.grad.clone() for p in net.parameters() if p.requires_grad], lr
        return runtime_step(opts, net, clip, loss, step, lr)
    runtime_step = runtime.step_optimizers
    monkeypatch.setattr(runtime, "step_optimizers", keep)
    go(train_decoder, *GAN, "--tau", 0, "--diffaug", "off", "--optimizer", "adamw", "--log_every", 1,
       "--steps", 4, "--out", tmp_path, "--overwrite", *flags)
    monkeypatch.setattr(runtime, "step_optimizers", runtime_step)
    return seen


def test_parts_of_a_batch_give_the_update_of_the_whole(monkeypatch, tmp_path):
    """Lambda is of the whole batch; checkpointed activations change nothing either."""
    at_once = "--disc_start 0 --gan_start 0 --feature 0".split()
    whole = gradients(monkeypatch, tmp_path, *at_once)
    parts = gradients(monkeypatch, tmp_path, *at_once, "--micro_batch", 2, "--checkpoint_activations")
    assert {("Decoder", 0), ("Discriminator", 0)} <= whole.keys() == parts.keys()
    for key in (("Decoder", 0), ("Discriminator", 0)):
        for a, b in zip(whole[key][0], parts[key][0], strict=True):
            assert (a - b).abs().max() < 1e-7 + 1e-4 * a.abs().max(), key


def test_lambda_balances_both_losses_at_the_last_layer(monkeypatch, tmp_path):
    """In the step in which the GAN joins, its part of the gradient at the last layer is gan x as long as the
    reconstruction's."""
    with_gan = gradients(monkeypatch, tmp_path)["Decoder", 2][0]
    without = gradients(monkeypatch, tmp_path, "--gan_start", 3)["Decoder", 2][0]
    ratio = (with_gan[-2] - without[-2]).norm() / without[-2].norm()
    assert abs(ratio - 0.75) < 0.01


def test_the_discriminator_s_schedule_covers_its_own_life(monkeypatch, tmp_path):
    seen = gradients(monkeypatch, tmp_path, "--steps", 12, "--disc_start", 4, "--gan_start", 6,
                     "--disc_warmup", 2, "--lr_end", 0.1)
    rates = [lr for (name, step), (_, lr) in seen.items() if name == "Discriminator"]
    assert [step for name, step in seen if name == "Discriminator"] == [*range(4, 12)]
    assert rates[0] == pytest.approx(0.5e-3) and rates[2] == pytest.approx(1e-3) and rates[-1] < 2.5e-4
    rows = [json.loads(r) for r in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert ["disc" in r for r in rows] == [False] * 4 + [True] * 8
    assert ["gan_lambda" in r for r in rows] == [False] * 6 + [True] * 6


def test_more_steps_on_resume_keep_the_start_of_the_gan(tmp_path):
    go(train_decoder, *DECODER, "--gan", 1, "--steps", 4, "--out", tmp_path)
    go(train_decoder, *DECODER, "--gan", 1, "--steps", 6, "--out", tmp_path, "--resume")
    assert load(tmp_path)["step"] == 6 and load(tmp_path)["args"]["gan_start"] == 2
    with pytest.raises(ValueError, match="--gan_start 3 differs from the checkpoint's 2"):
        go(train_decoder, *DECODER, "--gan", 1, "--steps", 8, "--out", tmp_path, "--resume", "--gan_start", 3)


def test_resume_with_the_gan_is_exact_to_the_bit(tmp_path):
    go(train_decoder, *GAN, "--steps", 6, "--out", tmp_path / "straight")
    load_at(train_decoder, GAN, tmp_path, 4)
    go(train_decoder, *GAN, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    assert difference(load(tmp_path / "straight"), load(tmp_path / "killed")) == 0
    assert len(load(tmp_path / "killed")["disc"]) > 40


@pytest.mark.parametrize("encoder", ["tiny", "vae:8:16"])
def test_two_processes_have_one_discriminator(encoder, tmp_path):
    """After a step with all on, in two parts each: AdamW's means of gradients are those of one process."""
    common = [*GAN, *"--disc_start 0 --gan_start 0 --batch 16 --micro_batch 4 --steps 1".split(),
              "--encoder", encoder, "--optimizer", "adamw"]
    go_on_one_thread(train_decoder, *common, "--out", tmp_path / "one")
    torchrun(train_decoder, *common, "--out", tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for a, b in zip(one["opt"], two["opt"], strict=True):  # of decoder (and VAE), of the discriminator
        for k in a["state"]:
            mean = a["state"][k]["exp_avg"]
            assert difference(mean, b["state"][k]["exp_avg"]) < 1e-7 + 1e-3 * mean.abs().max(), k
    assert len(one["opt"]) == 2 and len(one["opt"][1]["state"]) > 40


def test_nan_in_the_discriminator_alone_leaves_the_decoder_training(monkeypatch, tmp_path, capsys):
    forward, calls = Discriminator.forward, []
    monkeypatch.setattr(Discriminator, "forward", lambda self, x: calls.append(1) or forward(self, x) * (
        torch.nan if len(calls) == 1 else 1))
    go(train_decoder, *GAN, "--gan_start", 4, "--steps", 5, "--out", tmp_path)
    assert "step 1: not finite, update left out" in capsys.readouterr().err
    state = load(tmp_path)
    assert all(x.isfinite().all() for part in ("model", "disc") for x in state[part].values())
    assert state["opt"][-1]["state"][0]["step"] == 3       # of the four steps of the discriminator


@pytest.mark.parametrize("encoder", ["vae:8:16", "pixel"])
def test_other_autoencoders_train_resume_and_load(encoder, tmp_path):
    """A VAE's encoder learns, too, is part of the checkpoint, and its statistics are of the final weights."""
    flags = [*GAN, "--encoder", encoder, "--feature", 0]
    go(train_decoder, *flags, "--steps", 6, "--out", tmp_path / "straight")
    first = load_at(train_decoder, flags, tmp_path, 4)
    go(train_decoder, *flags, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    state = load(tmp_path / "straight")
    assert difference(state, load(tmp_path / "killed")) == 0
    rae, x = model.unpack_rae(state["rae"]), torch.rand(2, 3, 64, 64)
    channels = {"vae:8:16": 8, "pixel": 768}[encoder]
    assert rae.encode(x).shape == (2, channels, 4, 4) and rae.decode(rae.encode(x)).shape == x.shape
    if encoder == "vae:8:16":
        assert difference(first["encoder"], state["encoder"]) > 1e-4
        assert difference(first["rae"]["latent_var"], state["rae"]["latent_var"]) > 1e-6
        rows = [json.loads(r) for r in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["kl"] > 0
    else:
        assert state["encoder"] == {} and "encoder_weights" not in state["rae"]
    if encoder == "pixel":
        z = model.Encoder("pixel").encode(x)
        assert torch.allclose(z[0, :3, 0, 1], 2 * x[0, :, 0, 16] - 1)  # token (0, 1): its first pixel's rgb
    assert torch.equal(model.Encoder("random").encode(x), model.Encoder("random").encode(x))


@pytest.mark.parametrize("encoder", ["vae:8:14", "pixel:14"])
def test_patch_14_is_the_stride_of_what_has_no_patch_16(encoder):
    one = model.Encoder(encoder, 56)
    assert (one.grid, one.input_size) == (4, 56) and one.encode(torch.rand(1, 3, 56, 56)).shape[2:] == (4, 4)


def test_other_latents_are_drawn_and_measured(tmp_path):
    """A DiT over a VAE and over pixels, by the same scripts: trained, evaluated, sampled."""
    for encoder, channels in (("vae:8:16", 8), ("pixel:16", 768)):
        go(train_decoder, *DECODER, "--encoder", encoder, "--steps", 1, "--out", tmp_path / "rae")
        go(train_dit, *DIT, "--rae", tmp_path / "rae/last.pt", "--steps", 1, "--eval_every", 1, "--overwrite",
           "--out", tmp_path / "dit")
        state = load(tmp_path / "dit")
        assert (state["latent_shape"], state["args"]["prediction"]) == ([channels, 4], "v")
        row = json.loads((tmp_path / "dit/log.jsonl").read_text().splitlines()[-1])
        found = eval_fid.main(eval_fid.parse_args(["--ckpt", f"{tmp_path}/dit/last.pt", "--n", "36",
                                                   "--sampling_steps", "2"]))
        assert found["features"] == encoder and found["frechet_distance"] == pytest.approx(
            row["frechet_distance"], rel=1e-2)
        (tmp_path / "rae/last.pt").unlink()


def test_a_vae_in_parts_is_the_whole(monkeypatch, tmp_path):
    flags = "--encoder vae:8:16 --disc_start 0 --gan_start 0 --feature 0 --kl 1".split()
    monkeypatch.setattr(torch, "randn", torch.ones)                    # the same for any parts
    whole = gradients(monkeypatch, tmp_path, *flags)["Decoder", 0][0]
    parts = gradients(monkeypatch, tmp_path, *flags, "--micro_batch", 2)["Decoder", 0][0]
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() < 1e-7 + 1e-4 * a.abs().max()
    assert sum(float(g.abs().sum()) > 0 for g in whole) > 30           # the encoder's, too


def test_webssl_equals_transformers(tmp_path, monkeypatch):
    """Its file, in transformers' names, read into timm's layout: the tokens of transformers' own model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=2, num_attention_heads=16,
                                       image_size=224)
    judge = transformers.Dinov2Model(config).eval()
    for p in judge.parameters():
        p.data += 0.02 * torch.randn_like(p)
    judge.layernorm.weight.data.fill_(1), judge.layernorm.bias.data.zero_()
    (tmp_path / "weights").mkdir()
    judge.save_pretrained(tmp_path)                        # in the names of the hub's files
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "webssl-l.safetensors")
    monkeypatch.setattr(model, "HERE", tmp_path)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **how: create(*names, **{**how, "depth": 2}))
    encoder = model.Encoder("webssl-l", 256)
    images = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in model.IMAGENET)
    with torch.no_grad():
        expected = judge((images - mean) / std).last_hidden_state[:, 1:]
    assert encoder.grid == 16
    torch.testing.assert_close(encoder.encode(images).flatten(2).mT, expected, atol=1e-4, rtol=0)


def test_diffusers_vae_is_frozen_and_its_means_are_the_latents(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                                  up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4)
    vae.save_pretrained(tmp_path)
    encoder, x = model.Encoder(f"diffusers:{tmp_path}", 64), torch.rand(2, 3, 64, 64)
    assert encoder.grid == 16 and not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        assert torch.allclose(encoder.encode(x), vae.encode(2 * x - 1).latent_dist.mean, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors"):
        model.Encoder(f"diffusers:{tmp_path}/nowhere", 64)


# ---------------------------------------------------------------------------------- text
def test_text_is_read_back_letter_by_letter():
    words = [Text.random(0, k) for k in range(15)]
    images = [one.render() for one in words]
    assert sum(one.read(image) for one, image in zip(words, images)) > 14.8
    assert sum(one.read(image) for one, image in zip(words, images[1:] + images[:1])) < 1
    blurred = [ndimage.gaussian_filter(image, (3, 3, 0)) for image in images]
    assert sum(one.read(image) for one, image in zip(words, blurred)) < 5
    assert words[3] == Text.random(0, 3) != Text.random(1, 3)
    assert words[0].read(words[0].render(128)) == 1
    tilted = Text(("AB", "CD"), 0.25, 8.0)
    assert tilted.read(tilted.render()) == 1 and tilted.read(Text(("AC", "CD"), 0.25, 8.0).render()) == 0.75


def test_a_mixture_is_logged_and_evaluated_by_domain(tmp_path):
    go(train_decoder, *DECODER, "--data", "draw=shapes:0.75", "write=text:0.25", "--steps", 4,
       "--eval_every", 4, "--feature", 0, "--out", tmp_path)
    rows = [json.loads(r) for r in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "l1" in r]
    assert all(r["l1_draw"] > 0 and r["l1_write"] > 0 for r in steps)
    assert min(r["l1"] - min(r["l1_draw"], r["l1_write"]) for r in steps) > 0      # a mean of both
    held_out = {r["domain"]: r for r in rows if "domain" in r}
    assert held_out.keys() == {"draw", "write"} and held_out["write"]["n"] == 4
    assert all(0 <= r["readable"] <= 1 and r["psnr"] > 5 for r in held_out.values())
    data = open_data(["draw=shapes:0.75", "write=text:0.25"], 64, split="val")
    k = next(k for k in range(99) if data.place(k)[0] == 1)
    assert data.drawn(k).read(data[k]["image"].movedim(0, 2).numpy()) > 0.9
    with pytest.raises(ValueError, match="text has no conversations"):
        open_data("text", 64, chat=lambda *_: None)


@pytest.mark.parametrize("recipe, wanted", [
    ("rae", dict(encoder="dinov2-b", size=256, decoder_width=1152, batch=512, steps=40032, lr=2e-4,
                 lr_end=0.1, warmup=2502, ema=0.9978, tau=0.8, lpips=1.0, gram=0.0, gan=0.75, gan_start=20016,
                 disc="dino-s8", disc_start=15012, disc_lr=2e-4, feature=0.0, clip=0.0)),
    ("scale_rae", dict(encoder="siglip2-so400m", steps=200_000, lr=4e-4, warmup=5000, tau=0.0, gram=100.0,
                       gan=10.0, gan_start=20_000, disc="dino-s16", disc_start=17_500, disc_lr=5e-5))])
def test_recipes_are_the_papers_and_a_flag_overrides(recipe, wanted):
    args = vars(train_decoder.parse_args(["--recipe", recipe, "--micro_batch", "8"]))
    assert {k: args[k] for k in wanted} == wanted
    assert train_decoder.parse_args(["--recipe", recipe, "--gan", "0", "--decoder", "B"]).gan == 0
    assert train_decoder.parse_args(["--recipe", recipe, "--encoder", "vae:32:16"]).size == 256


@pytest.mark.parametrize("flags, message", [
    ("--lpips -1", "must be at least 0"), ("--gan -0.5", "must be at least 0"),
    ("--gan 1 --gan_start 2000", "lower --gan_start, or give --gan 0"),
    ("--gan 1 --disc_start 9 --gan_start 8", "must come in this order"),
    ("--diffaug off --cutout 0.5", "--cutout 0.5 is a part of --diffaug on"),
    ("--encoder resnet18", "--encoder resnet18 is neither one of")])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_decoder.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_the_gan_from_the_first_step_on_and_too_small_images(tmp_path):
    args = train_decoder.parse_args("--gan 1 --gan_start 0".split())
    assert (args.disc_start, args.gan_start) == (0, 0)
    with pytest.raises(ValueError, match="images of 16 pixels are too small to evaluate; make them"):
        go(train_decoder, *DECODER, "--decoder_patch", 4, "--eval_every", 1, "--out", tmp_path)


def test_512_pixels_directly(tmp_path):
    """1024 tokens of 512 px: trained, then drawn at that side."""
    go(train_decoder, *DECODER, "--encoder", "random", "--size", 512, "--batch", 2, "--stats_n", 2,
       "--steps", 1, "--out", tmp_path / "decoder")
    assert load(tmp_path / "decoder")["rae"]["latent_mean"].shape == (192, 32, 32)
    go(train_dit, *DIT, "--rae", tmp_path / "decoder" / "last.pt", "--batch", 2, "--steps", 1, "--out",
       tmp_path / "dit")
    sample.main(sample.parse_args(["--ckpt", str(tmp_path / "dit" / "last.pt"), "--labels", "0", "--n", "1",
                                   "--sampling_steps", "2", "--out", str(tmp_path / "x.npz")]))
    assert numpy.load(tmp_path / "x.npz")["arr_0"].shape == (1, 512, 512, 3)


def test_killed_while_it_saves_with_the_gan_on(tmp_path, monkeypatch):
    """What it had written of step 4 is left aside; from step 2 on it comes to the same bits, D included."""
    go(train_decoder, *GAN, "--steps", 6, "--out", tmp_path / "straight")
    whole, calls = torch.save, []

    def killed(state, f):
        calls.append(state["step"])
        if state["step"] == 4:
            f.write(b"half")
            raise KeyboardInterrupt
        whole(state, f)
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        go(train_decoder, *GAN, "--steps", 6, "--out", tmp_path / "killed")
    monkeypatch.undo()
    assert calls == [2, 4] and load(tmp_path / "killed")["step"] == 2
    go(train_decoder, *GAN, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    assert difference(load(tmp_path / "straight"), load(tmp_path / "killed")) == 0


def test_init_takes_a_decoder_and_refuses_another_s(tmp_path):
    go(train_decoder, *DECODER, "--steps", 2, "--out", tmp_path / "a")
    go(train_decoder, *DECODER, "--steps", 1, "--lr", 1e-9, "--init", tmp_path / "a" / "last.pt",
       "--out", tmp_path / "b")
    assert difference(load(tmp_path / "a")["ema"], load(tmp_path / "b")["model"]) < 1e-6
    vae = [*DECODER, "--encoder", "vae:8:16", "--lr", 1e-9]
    with pytest.raises(ValueError, match="last.pt does not fit VAE(.|\n)*missing vit"):
        go(train_decoder, *vae, "--encoder", "vae:192:16", "--init", tmp_path / "a/last.pt", "--out",
           tmp_path / "c")
    go(train_decoder, *vae, "--lr", 1e-2, "--steps", 3, "--checkpoint_activations", "--out", tmp_path / "v")
    go(train_decoder, *vae, "--steps", 1, "--init", tmp_path / "v/last.pt", "--out", tmp_path / "w")
    assert difference(load(tmp_path / "v")["rae"]["encoder_weights"], load(tmp_path / "w")["encoder"]) < 1e-6
    for flags, key in ((["--size", 128], "decoder_pos_embed"), (["--encoder", "pixel"], "decoder_embed")):
        with pytest.raises(ValueError, match=rf"last.pt does not fit Decoder(.|\n)*{key}"):
            go(train_decoder, *DECODER, *flags, "--init", tmp_path / "a" / "last.pt", "--out", tmp_path / "c")


def test_a_domain_without_enough_images_is_told(tmp_path):
    for k in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match="--hold_out 4 must be below .*3 images"):
        go(train_decoder, *DECODER, "--data", "a=shapes:0.5", f"b={tmp_path}:0.5", "--out", tmp_path / "out")
