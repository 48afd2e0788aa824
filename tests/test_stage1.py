"""Stage 1: losses, discriminator, augmentation, the GAN's lambda, and the other autoencoders.

Run: python -m pytest tests/test_stage1.py
"""
import json
import urllib.error
from functools import partial

import lpips
import numpy as np
import pytest
import timm
import torch
from scipy import ndimage

import eval_fid
import metrics
import release
import runtime
import sample
import storage
import train_decoder
import train_dit
from conftest import (
    kill_after,
    largest_difference,
    load_last,
    read_log,
    run_on_one_thread,
    run_script,
    torchrun,
)
from data import open_data
from model import IMAGENET_PIXELS
from release import load_encoder
from shapes import Text
from test_train import DECODER_FLAGS, DIT_FLAGS, assert_refused, write_grey_images
from train_decoder import (
    Discriminator,
    DiscriminatorHead,
    Networks,
    ReconstructionLoss,
    augment,
    gram_distance,
    gram_matrix,
    vgg_maps,
)

# The discriminator trains from step 1 on, the GAN joins in step 2.
GAN_FLAGS = [*DECODER_FLAGS, "--gan", "0.75", "--disc_start", "1", "--gan_start", "2",
             "--disc_lr", "1e-3", "--disc_warmup", "1"]
FROM_THE_START = ["--disc_start", "0", "--gan_start", "0"]


@pytest.fixture
def random_vgg(monkeypatch):
    """LPIPS on a VGG with random weights, without a download; its linear layers are published."""
    torch.manual_seed(0)
    monkeypatch.setattr(metrics.lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True))


def random_images():
    """Images that take a gradient, and a target: 2 3 64 64 each."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    target = torch.rand(2, 3, 64, 64)
    return images, target


def gradient_is_not_zero(loss, images):
    gradient, = torch.autograd.grad(loss, images)
    return gradient.abs().max() > 0


def assert_close_gradients(gradients, others):
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).abs().max() < 1e-7 + 1e-4 * a.abs().max()


# ---------------------------------------------------------------------------- reconstruction loss
def test_lpips_is_that_of_the_package(random_vgg):
    reconstruction_loss = ReconstructionLoss(lpips=1.0)
    images, target = random_images()

    loss, terms = reconstruction_loss(images, target)

    assert terms.keys() == {"l1", "lpips"}
    expected = reconstruction_loss.vgg(images, target, normalize=True).mean()
    assert terms["lpips"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(terms["l1"], (images - target).abs().mean())
    assert torch.allclose(loss, terms["l1"] + terms["lpips"])
    _, terms_of_equal_images = reconstruction_loss(target, target)
    assert terms_of_equal_images["lpips"] == 0
    assert gradient_is_not_zero(terms["lpips"], images)
    assert not any(p.requires_grad for p in reconstruction_loss.parameters())


def test_gram_matrix_is_its_formula():
    x = torch.randn(2, 3, 4, 5)
    expected = torch.zeros(2, 3, 3)
    for image in range(2):
        for i in range(4):
            for j in range(5):
                features = x[image, :, i, j]
                expected[image] += torch.outer(features, features) / (3 * 4 * 5)
    assert torch.allclose(gram_matrix(x), expected, atol=1e-6)


def test_gram_distance_is_its_formula(random_vgg):
    reconstruction_loss = ReconstructionLoss(gram=100.0)
    images, target = random_images()

    loss, terms = reconstruction_loss(images, target)

    expected = 0.0
    maps = vgg_maps(reconstruction_loss.vgg, images)
    target_maps = vgg_maps(reconstruction_loss.vgg, target)
    for x, y in zip(maps, target_maps, strict=True):
        expected += (gram_matrix(x) - gram_matrix(y)).square().mean().item() / 5
    assert terms["gram"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["gram"] > 0
    assert torch.allclose(loss, terms["l1"] + 100 * terms["gram"])


def test_gram_distance_ignores_where_things_are(random_vgg):
    vgg = ReconstructionLoss(gram=100.0).vgg
    images, target = random_images()
    target_maps = vgg_maps(vgg, target)
    moved_maps = vgg_maps(vgg, torch.roll(target, (16, 32), (2, 3)))
    other_maps = vgg_maps(vgg, images)
    assert gram_distance(moved_maps, target_maps) < gram_distance(other_maps, target_maps) / 2


def test_missing_vgg_weights_say_which_file_goes_where(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError,
                       match=r"vgg16-397923af.pth into .*checkpoints/, or do without"):
        ReconstructionLoss(lpips=1.0)
    ReconstructionLoss(feature=1.0)                        # needs no VGG


def test_feature_distance_is_of_the_frozen_encoders_tokens():
    encoder = load_encoder("tiny")
    reconstruction_loss = ReconstructionLoss(feature=1.0)
    images, target = random_images()

    tokens = reconstruction_loss.feature_distance.tokens(target)
    assert len(tokens) == len(encoder.backbone.blocks)
    latents = encoder.encode(target)                       # the last block's tokens, normalised
    assert torch.allclose(tokens[-1], latents.flatten(2).mT, atol=1e-4)

    _, terms = reconstruction_loss(images, target)
    assert terms["feature"] > 0
    assert gradient_is_not_zero(terms["feature"], images)
    _, terms_of_equal_images = reconstruction_loss(target, target)
    assert terms_of_equal_images["feature"] == 0


# ---------------------------------------------------------------------------- discriminator
def test_discriminator_has_five_heads_on_a_frozen_vit():
    discriminator = Discriminator("tiny")
    images = torch.rand(2, 3, 64, 64, requires_grad=True)

    logits = discriminator(images)

    assert logits.shape == (2, 5 * 16)
    assert discriminator.blocks == [4, 0, 1, 2, 4]
    assert not any(p.requires_grad for p in discriminator.vit.parameters())
    assert gradient_is_not_zero(logits.sum(), images)


def test_spectral_norms_of_the_discriminator_become_1():
    discriminator = Discriminator("tiny")
    for _ in range(200):
        discriminator.update_spectral_norms()
    weights = [module.weight.flatten(1) for module in discriminator.modules()
               if isinstance(module, torch.nn.Conv1d)]
    assert len(weights) == 15
    for weight in weights:
        assert abs(torch.linalg.matrix_norm(weight, 2) - 1) < 0.02


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    discriminator = Discriminator("tiny")
    images, others = torch.rand(2, 2, 3, 64, 64)
    together = discriminator(torch.cat([images, others]))
    assert torch.allclose(together[:2], discriminator(images), atol=1e-5)


def test_the_discriminator_reads_no_value_back_from_the_device():
    """On the device meta there are none to read: it would raise."""
    discriminator = Discriminator("tiny").to("meta")
    assert discriminator(torch.rand(2, 3, 64, 64, device="meta")).shape == (2, 5 * 16)


def test_discriminators_of_the_papers(monkeypatch):
    """7.39 M trainable parameters on DINO ViT-S/8, whose 12 blocks are seen at 11, 2, 5, 8, 11."""
    def untrained_vit(timm_name, size):
        return timm.create_model(timm_name, pretrained=False, num_classes=0, img_size=size)

    monkeypatch.setattr(release, "load_vit", untrained_vit)
    discriminator = Discriminator("dino-s8")
    trained = sum(p.numel() for p in discriminator.heads.parameters())
    assert round(trained / 1e6, 2) == 7.39
    assert discriminator.blocks == [11, 2, 5, 8, 11]
    assert Discriminator("dino-s16")(torch.rand(1, 3, 256, 256)).shape == (1, 5 * 196)


# ---------------------------------------------------------------------------- augmentation
def test_augment_shifts_each_image_by_up_to_an_eighth():
    images = torch.full((64, 3, 32, 32), 0.5)
    images[:, :, 16, 16] = 1.0                             # a bright spot in the middle

    augmented = augment(images)

    ground = augmented.flatten(2).median(2).values[..., None, None]
    brightest = (augmented - ground).abs().sum(1).flatten(1).argmax(1)
    rows, columns = brightest // 32 - 16, brightest % 32 - 16
    assert rows.abs().max() == 4
    assert columns.abs().max() == 4
    assert len(set(brightest.tolist())) > 20


def test_augment_changes_brightness_within_bounds():
    grey = torch.full((64, 3, 32, 32), 0.5)
    middle = augment(grey)[:, :, 8:24, 8:24]               # out of reach of shifted borders
    assert middle.amin() >= 0.25 and middle.amax() <= 0.75
    assert middle.mean((1, 2, 3)).std() > 0.1


def test_augment_is_differentiable():
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    assert gradient_is_not_zero(augment(images).square().sum(), images)


def test_cutout_greys_a_square_in_all_colours():
    images = torch.rand(64, 3, 32, 32) + 1
    torch.manual_seed(5)
    whole = augment(images)
    torch.manual_seed(5)
    holes = augment(images, cutout=0.5) != whole

    share = holes[:, 0].float().mean((1, 2))               # less at an edge, which cuts it off
    assert share.max() <= 0.26
    assert 0.1 < share.mean() < 0.2
    assert len(set(share.tolist())) > 20
    assert (holes[:, 0] == holes[:, 2]).all()


# ---------------------------------------------------------------------------- training with the GAN
def record_updates(tmp_path, *flags):
    """Train four steps with the GAN and without noise; what each optimizer step was given.

    Returns: dict (step, "decoder" or "discriminator") -> (list of gradients, learning rate).
    """
    updates = {}
    original = runtime.optimizer_step

    def recording_step(optimizers, model, clip, lr):
        is_discriminator = isinstance(model[0], DiscriminatorHead)
        name = "discriminator" if is_discriminator else "decoder"
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        step = sum(recorded == "decoder" for _, recorded in updates)   # its update comes first
        if is_discriminator:
            step -= 1
        updates[step, name] = gradients, lr
        return original(optimizers, model, clip, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "optimizer_step", recording_step)
        run_script(train_decoder, *GAN_FLAGS, "--tau", 0, "--diffaug", "off",
                   "--optimizer", "adamw", "--dtype", "fp32", "--log_every", 1, "--steps", 4,
                   "--out", tmp_path, "--overwrite", *flags)
    return updates


def test_micro_batches_give_the_gradients_of_the_whole_batch(tmp_path):
    """Lambda is of the whole batch; checkpointed activations change nothing either."""
    flags = [*FROM_THE_START, "--feature", 0]
    whole = record_updates(tmp_path, *flags)
    parts = record_updates(tmp_path, *flags, "--micro_batch", 2, "--checkpoint_activations")
    assert whole.keys() == parts.keys()
    for name in ("decoder", "discriminator"):
        assert_close_gradients(whole[0, name][0], parts[0, name][0])


def test_lambda_balances_both_losses_at_the_last_layer(tmp_path):
    """In the step in which the GAN joins, its gradient at the last layer is gan x as long as that
    of the reconstruction loss.
    """
    with_gan, _ = record_updates(tmp_path)[2, "decoder"]
    without_gan, _ = record_updates(tmp_path, "--gan_start", 3)[2, "decoder"]
    last_weight = -2                                       # the last parameter is its bias
    gan_part = with_gan[last_weight] - without_gan[last_weight]
    ratio = gan_part.norm() / without_gan[last_weight].norm()
    assert abs(ratio - 0.75) < 0.01


@pytest.fixture
def no_flops(monkeypatch):
    """FLOPs are not counted, since counting runs each network once."""
    nothing = train_decoder.ImageFlops(0, 0, 0)
    monkeypatch.setattr(train_decoder, "count_image_flops", lambda *_: nothing)


def test_a_plain_step_decodes_each_micro_batch_once(no_flops, tmp_path, monkeypatch):
    """Only a step with the GAN decodes twice."""
    calls = []
    original = train_decoder.build_decoder

    def counting_decoder(*args):
        decoder = original(*args)
        decoder.decoder_embed.register_forward_hook(lambda *_: calls.append("decoded"))
        return decoder

    monkeypatch.setattr(train_decoder, "build_decoder", counting_decoder)
    run_script(train_decoder, *GAN_FLAGS, "--steps", 2, "--gan_start", 1, "--micro_batch", 4,
               "--stats_n", 8, "--out", tmp_path)
    micro_batches = 2
    assert len(calls) == micro_batches + 2 * micro_batches # step 0 is plain, step 1 has the GAN


def test_the_discriminators_schedule_covers_its_own_life(tmp_path):
    updates = record_updates(tmp_path, "--steps", 12, "--disc_start", 4, "--gan_start", 6,
                             "--disc_warmup", 2, "--lr_end", 0.1)

    steps, rates = [], []
    for (step, name), (_, lr) in updates.items():
        if name == "discriminator":
            steps.append(step)
            rates.append(lr)
    assert steps == list(range(4, 12))
    assert rates[0] == pytest.approx(0.5e-3)
    assert rates[2] == pytest.approx(1e-3)
    assert rates[-1] < 2.5e-4
    records = [record for record in read_log(tmp_path) if "step" in record]
    assert ["disc" in record for record in records] == [False] * 4 + [True] * 8
    assert ["gan_lambda" in record for record in records] == [False] * 6 + [True] * 6


def test_nan_in_the_discriminator_alone_leaves_the_decoder_training(no_flops, tmp_path, monkeypatch,
                                                                    capsys):
    original = Discriminator.forward
    calls = []

    def poisoned_forward(self, images):
        calls.append(images)
        logits = original(self, images)
        if len(calls) == 1:
            return logits * torch.nan
        return logits

    monkeypatch.setattr(Discriminator, "forward", poisoned_forward)
    run_script(train_decoder, *GAN_FLAGS, "--gan_start", 4, "--steps", 5, "--out", tmp_path)

    assert "step 1: not finite, update left out" in capsys.readouterr().err
    state = load_last(tmp_path)
    for name in ("model", "disc"):
        assert all(value.isfinite().all() for value in state[name].values())
    disc_optimizer = state["opt"][-1]
    assert disc_optimizer["state"][0]["step"] == 3         # of the discriminator's four steps


@pytest.mark.parametrize("encoder", ["tiny", "vae:8:16"])
def test_two_processes_have_one_discriminator(encoder, tmp_path):
    """After one step of two micro-batches on each process, with everything on: AdamW's running
    means of the gradients are those of one process.
    """
    flags = [*GAN_FLAGS, *FROM_THE_START, "--batch", "16", "--micro_batch", "4", "--steps", "1",
             "--encoder", encoder, "--optimizer", "adamw", "--dtype", "fp32"]

    run_on_one_thread(train_decoder, *flags, "--out", tmp_path / "one")
    torchrun(train_decoder, *flags, "--out", tmp_path / "two")

    optimizers = load_last(tmp_path / "one")["opt"]        # of the decoder and VAE; of the heads
    others = load_last(tmp_path / "two")["opt"]
    assert len(optimizers) == 2
    assert len(optimizers[1]["state"]) > 40
    for a, b in zip(optimizers, others, strict=True):
        for k in a["state"]:
            mean, other_mean = a["state"][k]["exp_avg"], b["state"][k]["exp_avg"]
            difference = largest_difference(mean, other_mean)
            assert difference < 1e-7 + 1e-3 * mean.abs().max(), k


# ---------------------------------------------------------------------------- compiling
def are_compiled(blocks):
    return [block._compiled_call_impl is not None for block in blocks]


def test_what_training_runs_is_compiled():
    """Nothing runs here, so nothing takes time."""
    args = train_decoder.parse_args(["--gan", "0.1", "--feature", "0.1", "--compile"])
    encoder = load_encoder("tiny")
    networks = Networks(encoder, args, torch.device("cpu"))
    loss = networks.reconstruction_loss
    loss.vgg = torch.nn.Module()                       # in place of VGG-16
    loss.vgg.net = torch.nn.Identity()

    networks.compile()

    blocks = [*networks.encoder.backbone.blocks, *networks.decoder.decoder_layers,
              *loss.feature_distance.encoder.backbone.blocks, loss.vgg.net,
              *networks.discriminator.vit.blocks, *networks.discriminator.heads]
    assert all(are_compiled(blocks))
    assert not any(are_compiled(networks.ema[0].decoder_layers))


# ---------------------------------------------------------------------------- resume, kills, init
def test_more_steps_on_resume_keep_the_start_of_the_gan(tmp_path, capsys):
    flags = [*DECODER_FLAGS, "--gan", 1, "--out", tmp_path]
    run_script(train_decoder, *flags, "--steps", 4)
    run_script(train_decoder, *flags, "--steps", 6, "--resume")
    state = load_last(tmp_path)
    assert state["step"] == 6
    assert state["args"]["gan_start"] == 2
    assert_refused(train_decoder, [*flags, "--steps", 8, "--resume", "--gan_start", 3],
                   "--gan_start 3 differs from the checkpoint's 2", capsys)


def test_resume_with_the_gan_is_exact_to_the_bit(tmp_path):
    run_script(train_decoder, *GAN_FLAGS, "--steps", 6, "--out", tmp_path / "straight")
    kill_after(train_decoder, GAN_FLAGS, tmp_path, stop=4)
    run_script(train_decoder, *GAN_FLAGS, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    straight, killed = load_last(tmp_path / "straight"), load_last(tmp_path / "killed")
    assert largest_difference(straight, killed) == 0
    assert len(killed["disc"]) > 40


def test_killed_while_it_saves_with_the_gan_on(tmp_path):
    """What it had written of step 4 is left aside; from step 2 on it comes to the same bits."""
    run_script(train_decoder, *GAN_FLAGS, "--steps", 6, "--out", tmp_path / "straight")
    original = torch.save
    saved_steps = []

    def die_in_mid_save(state, file):
        saved_steps.append(state["step"])
        if state["step"] == 4:
            file.write(b"half")
            raise KeyboardInterrupt
        original(state, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", die_in_mid_save)
        with pytest.raises(KeyboardInterrupt):
            run_script(train_decoder, *GAN_FLAGS, "--steps", 6, "--out", tmp_path / "killed")
    assert saved_steps == [2, 4]
    assert load_last(tmp_path / "killed")["step"] == 2

    run_script(train_decoder, *GAN_FLAGS, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    straight, killed = load_last(tmp_path / "straight"), load_last(tmp_path / "killed")
    assert largest_difference(straight, killed) == 0


def test_init_takes_a_decoder(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 2, "--out", tmp_path / "a")
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 1, "--lr", 1e-9,
               "--init", tmp_path / "a" / "last.pt", "--out", tmp_path / "b")
    ema, started = load_last(tmp_path / "a")["ema"], load_last(tmp_path / "b")["model"]
    assert largest_difference(ema, started) < 1e-6


def test_init_takes_a_vae_whole(tmp_path):
    flags = [*DECODER_FLAGS, "--encoder", "vae:8:16"]
    run_script(train_decoder, *flags, "--lr", 1e-2, "--steps", 3, "--checkpoint_activations",
               "--out", tmp_path / "a")
    run_script(train_decoder, *flags, "--lr", 1e-9, "--steps", 1,
               "--init", tmp_path / "a" / "last.pt", "--out", tmp_path / "b")
    ema = load_last(tmp_path / "a")["rae"]["encoder_weights"]
    started = load_last(tmp_path / "b")["encoder"]
    assert largest_difference(ema, started) < 1e-6


@pytest.mark.parametrize("flags, module, problem", [
    (["--size", 128], "Decoder", "decoder_pos_embed"),
    (["--encoder", "pixel"], "Decoder", "decoder_embed"),
    (["--encoder", "vae:192:16"], "VAE", "missing vit"),
])
def test_init_refuses_weights_that_do_not_fit(flags, module, problem, tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--steps", 2, "--out", tmp_path / "a")
    with pytest.raises(ValueError, match=rf"last.pt does not fit {module}(.|\n)*{problem}"):
        run_script(train_decoder, *DECODER_FLAGS, *flags, "--init", tmp_path / "a" / "last.pt",
                   "--out", tmp_path / "b")


# ---------------------------------------------------------------------------- other autoencoders
@pytest.mark.parametrize("encoder, channels", [("vae:8:16", 8), ("pixel", 768)])
def test_other_autoencoders_train_resume_and_load(encoder, channels, tmp_path):
    flags = [*GAN_FLAGS, "--encoder", encoder, "--feature", 0]
    run_script(train_decoder, *flags, "--steps", 6, "--out", tmp_path / "straight")
    kill_after(train_decoder, flags, tmp_path, stop=4)
    run_script(train_decoder, *flags, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    state = load_last(tmp_path / "straight")
    assert largest_difference(state, load_last(tmp_path / "killed")) == 0

    rae = release.unpack_rae(state["rae"])
    images = torch.rand(2, 3, 64, 64)
    latents = rae.encode(images)
    assert latents.shape == (2, channels, 4, 4)
    assert rae.decode(latents).shape == images.shape


def test_the_encoder_of_a_vae_learns_and_is_part_of_the_checkpoint(tmp_path):
    """Its latent statistics are those of the weights that stand beside them."""
    flags = [*GAN_FLAGS, "--encoder", "vae:8:16", "--feature", 0]
    first = kill_after(train_decoder, flags, tmp_path, stop=4)
    run_script(train_decoder, *flags, "--steps", 6, "--out", tmp_path / "killed", "--resume")
    last = load_last(tmp_path / "killed")
    assert largest_difference(first["encoder"], last["encoder"]) > 1e-4
    assert largest_difference(first["rae"]["latent_var"], last["rae"]["latent_var"]) > 1e-6
    assert read_log(tmp_path / "killed")[-1]["kl"] > 0


def test_a_frozen_encoder_is_not_part_of_the_checkpoint(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--encoder", "pixel", "--steps", 1, "--out", tmp_path)
    state = load_last(tmp_path)
    assert state["encoder"] == {}
    assert "encoder_weights" not in state["rae"]


def test_a_vae_in_micro_batches_has_the_gradients_of_the_whole(tmp_path, monkeypatch):
    flags = [*FROM_THE_START, "--encoder", "vae:8:16", "--feature", 0, "--kl", 1]
    monkeypatch.setattr(torch, "randn", torch.ones)        # the same noise for any micro-batch
    whole, _ = record_updates(tmp_path, *flags)[0, "decoder"]
    parts, _ = record_updates(tmp_path, *flags, "--micro_batch", 2)[0, "decoder"]
    assert_close_gradients(whole, parts)
    not_zero = [gradient for gradient in whole if gradient.abs().sum() > 0]
    assert len(not_zero) > 30                              # those of the encoder as well


def test_a_token_of_pixels_is_its_patch():
    images = torch.rand(2, 3, 64, 64)
    latents = load_encoder("pixel").encode(images)
    first_pixel = images[0, :, 0, 16]                      # of token (0, 1), rgb
    assert torch.allclose(latents[0, :3, 0, 1], 2 * first_pixel - 1)


def test_the_random_encoder_is_always_the_same():
    images = torch.rand(2, 3, 64, 64)
    latents, again = load_encoder("random").encode(images), load_encoder("random").encode(images)
    assert torch.equal(latents, again)


@pytest.mark.parametrize("name", ["pixel:9999999", "vae:8:65", "vae:99999:8"])
def test_encoders_that_no_memory_has_room_for_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        train_decoder.parse_args(["--encoder", name])
    assert "give at most" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vae:8:14", "pixel:14"])
def test_patch_14_is_the_stride_of_what_has_no_patch_16(name):
    encoder = load_encoder(name, 56)
    assert (encoder.grid, encoder.input_size) == (4, 56)
    assert encoder.encode(torch.rand(1, 3, 56, 56)).shape[2:] == (4, 4)


@pytest.mark.parametrize("encoder, channels", [("vae:8:16", 8), ("pixel:16", 768)])
def test_other_latents_are_drawn_and_measured(encoder, channels, tmp_path):
    """A DiT over a VAE and over pixels, by the same scripts: trained, evaluated, sampled."""
    run_script(train_decoder, *DECODER_FLAGS, "--encoder", encoder, "--steps", 1,
               "--out", tmp_path / "rae")
    run_script(train_dit, *DIT_FLAGS, "--rae", tmp_path / "rae" / "last.pt", "--steps", 1,
               "--eval_every", 1, "--out", tmp_path / "dit")
    state = load_last(tmp_path / "dit")
    assert state["latent_shape"] == [channels, 4]
    assert state["args"]["prediction"] == "v"

    results = run_script(eval_fid, "--ckpt", tmp_path / "dit" / "last.pt", "--n", 36,
                         "--sampling_steps", 2)
    assert results["features"] == encoder
    in_training = read_log(tmp_path / "dit")[-1]["frechet_distance"]
    assert results["frechet_distance"] == pytest.approx(in_training, rel=1e-2)


def test_webssl_equals_transformers(tmp_path, monkeypatch):
    """Its file, in transformers' names, read into timm's layout: the tokens of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=1024, num_hidden_layers=2,
                                       num_attention_heads=16, image_size=224)
    judge = transformers.Dinov2Model(config).eval()
    for parameter in judge.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    judge.layernorm.weight.data.fill_(1)
    judge.layernorm.bias.data.zero_()
    (tmp_path / "weights").mkdir()
    judge.save_pretrained(tmp_path)                        # in the names of the hub's files
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "webssl-l.safetensors")
    create_model = timm.create_model

    def create_two_blocks(*args, **options):
        return create_model(*args, **{**options, "depth": 2})

    monkeypatch.setattr(release, "HERE", tmp_path)
    monkeypatch.setattr(timm, "create_model", create_two_blocks)
    encoder = load_encoder("webssl-l", 256)

    images = torch.rand(1, 3, 224, 224)
    mean, std = IMAGENET_PIXELS
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = judge(normalised).last_hidden_state[:, 1:]
    assert encoder.grid == 16
    latents = encoder.encode(images)
    torch.testing.assert_close(latents.flatten(2).mT, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", [
    {"encoder.layer.0.attention.attention.query.weight": torch.zeros(4, 4)},
    {"embeddings.position_embeddings": torch.zeros(3)}, {"embeddings.position_embeddings": 1},
    {"embeddings.position_embeddings": torch.zeros(1, 0, 1024)}])
def test_a_damaged_file_of_webssl_is_named(weights, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "webssl-l.safetensors").touch()
    monkeypatch.setattr(storage, "load_checkpoint", lambda path: weights)
    monkeypatch.setattr(release, "HERE", tmp_path)
    with pytest.raises(ValueError, match=r"webssl-l.safetensors does not fit WebSSL's ViT \("):
        load_encoder("webssl-l", 256)


def test_diffusers_vae_is_frozen_and_its_means_are_the_latents(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"))
    vae.save_pretrained(tmp_path)

    encoder = load_encoder(f"diffusers:{tmp_path}", 64)

    images = torch.rand(2, 3, 64, 64)
    assert encoder.grid == 16
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        expected = vae.encode(2 * images - 1).latent_dist.mean
        assert torch.allclose(encoder.encode(images), expected, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors"):
        load_encoder(f"diffusers:{tmp_path}/nowhere", 64)


def test_512_pixels_directly(tmp_path):
    """1024 tokens of 512 px: trained, then drawn at that side."""
    run_script(train_decoder, *DECODER_FLAGS, "--encoder", "random", "--size", 512, "--batch", 2,
               "--stats_n", 2, "--steps", 1, "--out", tmp_path / "decoder")
    assert load_last(tmp_path / "decoder")["rae"]["latent_mean"].shape == (192, 32, 32)

    run_script(train_dit, *DIT_FLAGS, "--rae", tmp_path / "decoder" / "last.pt", "--batch", 2,
               "--steps", 1, "--out", tmp_path / "dit")
    run_script(sample, "--ckpt", tmp_path / "dit" / "last.pt", "--labels", 0, "--n", 1,
               "--sampling_steps", 2, "--out", tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 512, 512, 3)


# ---------------------------------------------------------------------------- text and mixtures
def test_text_is_read_back_letter_by_letter():
    texts = [Text.random(0, k) for k in range(15)]
    images = [text.render() for text in texts]
    others = images[1:] + images[:1]
    blurred = [ndimage.gaussian_filter(image, (3, 3, 0)) for image in images]

    def total_read(images):
        return sum(text.read(image) for text, image in zip(texts, images, strict=True))

    assert total_read(images) > 14.8
    assert total_read(others) < 1
    assert total_read(blurred) < 5
    assert texts[3] == Text.random(0, 3) != Text.random(1, 3)
    assert texts[0].read(texts[0].render(128)) == 1


def test_tilted_text_is_read():
    text = Text(("AB", "CD"), 0.25, 8.0)
    one_letter_wrong = Text(("AC", "CD"), 0.25, 8.0)
    assert text.read(text.render()) == 1
    assert text.read(one_letter_wrong.render()) == 0.75


def test_a_mixture_is_logged_and_evaluated_by_source(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--data", "draw=shapes:0.75", "write=text:0.25",
               "--steps", 4, "--eval_every", 4, "--feature", 0, "--out", tmp_path)

    records = read_log(tmp_path)
    for record in records:
        if "l1" in record:
            assert record["l1_draw"] > 0 and record["l1_write"] > 0
            # l1 is a mean of both.
            assert record["l1"] > min(record["l1_draw"], record["l1_write"])
    held_out = {record["domain"]: record for record in records if "domain" in record}
    assert held_out.keys() == {"draw", "write"}
    assert held_out["write"]["n"] == 4
    for record in held_out.values():
        assert 0 <= record["readable"] <= 1
        assert record["psnr"] > 5


def test_what_an_image_of_a_mixture_shows_is_known():
    data = open_data(["draw=shapes:0.75", "write=text:0.25"], 64, split="val")
    texts = [k for k in range(99) if data.source_of(k) == 1]
    image = data[texts[0]]["image"].movedim(0, 2).numpy()
    assert data.scene_or_text(texts[0]).read(image) > 0.9


def test_text_has_no_conversations():
    with pytest.raises(ValueError, match="text has no conversations"):
        open_data("text", 64, chat=lambda scene, rng: [])


def test_a_source_with_too_few_images_is_refused(tmp_path, capsys):
    write_grey_images(tmp_path / "images", 3)
    with pytest.raises(SystemExit):
        run_script(train_decoder, *DECODER_FLAGS, "--hold_out", 4, "--out", tmp_path / "out",
                   "--data", "a=shapes:0.5", f"b={tmp_path / 'images'}:0.5")
    assert "has 3 images: --hold_out 4 must be below 3" in capsys.readouterr().err


# ---------------------------------------------------------------------------- flags and warnings
PAPER = dict(decoder_width=1152, batch=512, size=256, optimizer="adamw", lr_end=0.1, ema=0.9978,
             lpips=1.0, feature=0.0, clip=0.0)
RAE = dict(PAPER, encoder="dinov2-b", steps=40_032, lr=2e-4, warmup=2502, tau=0.8, gram=0.0,
           gan=0.75, gan_start=20_016, disc="dino-s8", disc_start=15_012, disc_lr=2e-4)
SCALE_RAE = dict(PAPER, encoder="siglip2-so400m", steps=200_000, lr=4e-4, warmup=5000, tau=0.0,
                 gram=100.0, gan=10.0, gan_start=20_000, disc="dino-s16", disc_start=17_500,
                 disc_lr=5e-5)


@pytest.mark.parametrize("recipe, expected", [("rae", RAE), ("scale_rae", SCALE_RAE)])
def test_recipes_are_those_of_the_papers(recipe, expected, tmp_path):
    args = train_decoder.parse_args(["--recipe", recipe, "--micro_batch", "8",
                                     "--out", str(tmp_path)])
    for name, value in expected.items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize("recipe", ["rae", "scale_rae"])
def test_a_flag_overrides_the_recipe(recipe, tmp_path):
    flags = ["--recipe", recipe, "--out", str(tmp_path)]
    args = train_decoder.parse_args([*flags, "--gan", "0", "--decoder", "B"])
    assert args.gan == 0
    assert args.decoder_width == 768
    assert train_decoder.parse_args([*flags, "--encoder", "vae:32:16"]).size == 256


@pytest.mark.parametrize("flags, message", [
    (["--lpips", "-1"], "must be at least 0"),
    (["--gan", "-0.5"], "must be at least 0"),
    (["--gan", "1", "--gan_start", "2000"], "lower --gan_start, or give --gan 0"),
    (["--gan", "1", "--disc_start", "9", "--gan_start", "8"], "must come in this order"),
    (["--diffaug", "off", "--cutout", "0.5"], "--cutout 0.5 is a part of --diffaug on"),
    (["--encoder", "resnet18"], "--encoder resnet18 is neither one of"),
])
def test_bad_flags(flags, message, tmp_path, capsys):
    assert_refused(train_decoder, ["--out", tmp_path, *flags], message, capsys)


def test_the_gan_from_the_first_step_on(tmp_path):
    args = train_decoder.parse_args(["--gan", "1", "--gan_start", "0", "--out", str(tmp_path)])
    assert (args.disc_start, args.gan_start) == (0, 0)


def test_images_that_are_too_small_to_evaluate(tmp_path):
    with pytest.raises(ValueError,
                       match="images of 16 pixels are too small to evaluate; make them"):
        run_script(train_decoder, *DECODER_FLAGS, "--decoder_patch", 4, "--eval_every", 1,
                   "--out", tmp_path)


@pytest.mark.parametrize("encoder, is_warned", [("tiny", True), ("random", False)])
def test_the_shipped_encoder_on_photographs_is_warned_of(encoder, is_warned, tmp_path, capsys):
    write_grey_images(tmp_path / "photos", 20)
    run_script(train_decoder, *DECODER_FLAGS, "--encoder", encoder, "--data", tmp_path / "photos",
               "--steps", 1, "--out", tmp_path / "run")
    warning = "the shipped encoder has only seen coloured shapes"
    log = json.dumps(read_log(tmp_path / "run"))
    assert (warning in capsys.readouterr().out) == is_warned
    assert (warning in log) == is_warned


def test_the_shipped_encoder_knows_the_built_in_world(tmp_path):
    run_script(train_decoder, *DECODER_FLAGS, "--data", "a=shapes:0.5", "b=text:0.5", "--steps", 1,
               "--warmup", 0, "--out", tmp_path)
    assert not any("warning" in record for record in read_log(tmp_path))
