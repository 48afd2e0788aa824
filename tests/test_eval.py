"""Fréchet distance, PSNR, SSIM, verified accuracy, and the scripts that measure models.

Run: python -m pytest tests/test_eval.py
"""
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scipy import ndimage

import eval_decoder
import eval_fid
import eval_t2i
import evaluation
import release
import storage
from conftest import SHIPPED, run_script
from data import load_images, open_data
from eval_decoder import evaluate_reconstruction
from eval_fid import evaluate_generation
from metrics import (
    Moments,
    extrapolate_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    linear_probe,
    precision_recall,
    psnr,
    ssim,
    verify,
)
from release import load_dit
from shapes import Scene

SHIPPED_T2I = str(release.SHIPPED_T2I)


# ---------------------------------------------------------------------------- Fréchet distance
@pytest.mark.parametrize("sizes", [[500], [1, 99, 400], [250, 250], [7] * 71 + [3]])
def test_moments_are_those_of_numpy_for_any_batches(sizes):
    features = torch.randn(500, 7) * 3 + 100
    moments = Moments()
    for batch in features.split(sizes):
        moments.add(batch)
    features = features.double().numpy()
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(features.T), rtol=1e-9, atol=1e-10)


def test_frechet_distance_of_gaussians_in_closed_form():
    a = torch.rand(6, dtype=torch.float64) + 0.5
    b = torch.rand(6, dtype=torch.float64) + 0.5
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    mean = torch.randn(6, dtype=torch.float64)
    cov_a, cov_b = q @ a.diag() @ q.T, q @ b.diag() @ q.T              # they commute
    distance = frechet_distance(torch.zeros(6), cov_a, mean, cov_b)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert abs(distance - expected) < 1e-10


def test_frechet_distance_agrees_with_sqrtm():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 12))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    distance = frechet_distance(np.zeros(12), cov_a, np.zeros(12), cov_b)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    assert abs(distance - np.trace(cov_a + cov_b - 2 * root)) < 1e-9


def test_frechet_distance_survives_rank_deficiency():
    few = np.random.default_rng(1).normal(size=(5, 64))
    mean, cov = few.mean(0), np.cov(few.T)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6


def test_frechet_distance_refuses_features_of_different_dimensions():
    with pytest.raises(ValueError, match="features of 3 and 4 dimensions differ"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


def test_frechet_distance_is_never_negative():
    """Rounding gives -1e-12 or so for equal moments."""
    features = np.random.default_rng(2).normal(size=(200, 16)) * 1e3
    mean, cov = features.mean(0), np.cov(features.T)
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-3


@pytest.mark.parametrize("mean, cov, message", [
    (np.full(2, np.nan), np.eye(2), "are not finite"),
    (np.zeros(2), np.full((2, 2), np.nan), "are not finite"),
    (np.zeros(2), np.diag([1, np.inf]), "are not finite"),
    (np.zeros(2), np.array([[1.0, 2], [2, 1]]), "has a negative eigenvalue, -1"),
    (np.zeros(2), np.diag([-1.0, -1]), "has a negative eigenvalue, -1"),
])
def test_frechet_distance_refuses_what_is_no_covariance(mean, cov, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(2), np.eye(2), mean, cov)
    with pytest.raises(ValueError, match=message):
        frechet_distance(mean, cov, np.zeros(2), np.eye(2))


def test_a_covariance_without_eigenvalues_is_refused(monkeypatch):
    def fail(cov):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(ValueError, match="a covariance of features has no eigenvalues"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_every_number(value):
    good = torch.randn(20, 4)
    bad = good.clone()
    bad[3, 2] = value
    labels = torch.zeros(20, dtype=torch.long)
    with pytest.raises(ValueError, match="features of 1 of 20 images are not finite.*black images"):
        Moments().add(bad)
    for measure in (
        lambda: kernel_distance(good, bad),
        lambda: precision_recall(bad, good),
        lambda: inception_score(bad),
        lambda: linear_probe(bad, labels, good, labels, 2),
    ):
        with pytest.raises(ValueError, match="features of 1 of 20 images are not finite"):
            measure()


def test_too_few_images_are_told():
    one, two = torch.randn(1, 4), torch.randn(2, 4)
    moments = Moments()
    moments.add(one)
    for measure, message in (
        (lambda: moments.cov, "1 image is too few for a covariance"),
        (lambda: kernel_distance(one, two), "1 and 2 images are too few"),
        (lambda: kernel_distance(two, one), "2 and 1 images are too few"),
        (lambda: precision_recall(one, one), "1 and 1 images are too few"),
        (lambda: inception_score(two[:0]), "needs images, and there is none"),
        (lambda: extrapolate_distance(two, torch.zeros(4), torch.eye(4)), "2 samples are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            measure()


def test_numbers_of_two_images_are_finite():
    two = torch.randn(2, 4)
    numbers = (*kernel_distance(two, two + 1), *precision_recall(two, two), *inception_score(two))
    assert np.isfinite(numbers).all()


# ---------------------------------------------------------------------------- pairs of images
def test_psnr_on_known_pairs():
    images = torch.randint(0, 200, (2, 32, 32, 3), dtype=torch.uint8)
    assert psnr(images, images).isinf().all()
    expected = torch.full((2,), 20 * np.log10(255 / 5), dtype=torch.float64)
    torch.testing.assert_close(psnr(images, images + 5), expected)


def test_ssim_on_known_pairs():
    images = torch.randint(0, 200, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.allclose(ssim(images, images), torch.ones(2, dtype=torch.float64))
    grey_100 = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    grey_150 = torch.full((1, 32, 32, 3), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100 ** 2 + 150 ** 2 + c1)
    assert abs(ssim(grey_100, grey_150).item() - expected) < 1e-12
    noise = torch.randint(-40, 40, images.shape)
    noisy = (images.int() + noise).clamp(0, 255).byte()
    assert 0.2 < ssim(images, noisy).mean() < 0.999


def test_ssim_is_that_of_scipys_gaussian_window():
    smooth = torch.linspace(0, 250, 40)[:, None, None].expand(40, 23, 3)
    images = torch.stack([smooth, torch.randint(0, 256, (40, 23, 3))]).byte()
    others = torch.where(torch.rand(images.shape) < 0.2, images + 5, images)

    def blur(x):
        x = ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), radius=(0, 5, 5, 0))
        return x[:, 5:-5, 5:-5]

    a, b = images.double().numpy(), others.double().numpy()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * (blur(a * b) - blur(a) * blur(b)) + c2) / (
        blur(a * a) - blur(a) ** 2 + blur(b * b) - blur(b) ** 2 + c2)
    luminance = (2 * blur(a) * blur(b) + c1) / (blur(a) ** 2 + blur(b) ** 2 + c1)
    expected = (luminance * structure).reshape(2, -1).mean(1)
    np.testing.assert_allclose(ssim(images, others), expected, rtol=1e-9)


def test_ssim_refuses_images_smaller_than_its_window():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(images, images)


# ---------------------------------------------------------------------------- verified accuracy
def test_verify_counts_colours_and_classes():
    scenes = [Scene.random(9, label, objects=1, label=label) for label in range(36)]
    images = torch.from_numpy(np.stack([scene.render(64) for scene in scenes]))
    assert verify(images, range(36)).tolist() == [36, 36, 0]
    # There are six shapes of each of the six colours.
    other_shapes = [label // 6 * 6 + (label + 1) % 6 for label in range(36)]
    assert verify(images, other_shapes).tolist() == [36, 0, 0]


def test_verify_counts_nothing_on_empty_images():
    grey = torch.full((3, 64, 64, 3), 128, dtype=torch.uint8)
    assert verify(grey, [0, 1, 2])[:2].tolist() == [0, 0]


def test_verify_counts_an_unsure_shape_as_wrong():
    y, x = np.mgrid[:64, :64] - 32.0
    crescent = (np.hypot(x, y) < 12) & (np.hypot(x - 8, y) > 9)
    image = torch.full((1, 64, 64, 3), 210, dtype=torch.uint8)
    image[0, torch.from_numpy(crescent)] = torch.tensor((222, 38, 42), dtype=torch.uint8)
    assert verify(image, [0]).tolist() == [1, 0, 1]                    # red, but of which shape?


def test_verify_wants_a_single_object():
    scene = Scene.random(9, 0, objects=2)
    image = torch.from_numpy(scene.render(64))[None]
    assert verify(image, [scene.objects[0].label])[:2].tolist() == [0, 0]


# ---------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def shipped():
    """The shipped DiT and RAE, and held-out images."""
    model, rae, _ = load_dit(SHIPPED, with_encoder=True)
    return model, rae, open_data("shapes", 64, split="val", objects=1)


def test_numbers_of_generation_do_not_depend_on_the_batch(shipped):
    args = eval_fid.parse_args(["--sampling_steps", "3"])
    by_12 = evaluate_generation(*shipped, args, 12, batch=12)
    by_5 = evaluate_generation(*shipped, args, 12, batch=5)
    assert by_12.keys() == by_5.keys()
    assert by_12["right_colour"] == by_5["right_colour"]
    # A pixel may round differently.
    assert abs(by_12["frechet_distance"] / by_5["frechet_distance"] - 1) < 1e-2


def test_numbers_of_reconstruction_do_not_depend_on_the_batch(shipped):
    _, rae, val = shipped
    by_12 = evaluate_reconstruction(rae, val, 12, batch=12)
    by_5 = evaluate_reconstruction(rae, val, 12, batch=5)
    assert abs(by_12["psnr"] - by_5["psnr"]) < 1e-3
    assert abs(by_12["ssim"] - by_5["ssim"]) < 1e-4


def test_script_prints_the_table_and_one_json_line(tmp_path, capsys):
    out = tmp_path / "results.json"
    results = run_script(eval_fid, "--n", 36, "--sampling_steps", 3, "--out", out)
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last_line) == results
    assert json.loads(out.read_text()) == results
    assert results["n"] == 36 and results["commit"] and results["guidance"] == 1.5


def test_reconstruction_by_the_autoencoder_of_each_stage():
    of_dit = run_script(eval_decoder, "--rae", SHIPPED, "--n", 24)
    assert of_dit["psnr"] > 20
    assert 0.5 < of_dit["ssim"] <= 1
    assert of_dit["features"] == "tiny"
    assert run_script(eval_decoder, "--rae", SHIPPED_T2I, "--n", 8)["psnr"] > 20
    assert run_script(eval_decoder, "--n", 8)["psnr"] > 20


def test_other_features_change_the_distance_alone():
    tiny = run_script(eval_decoder, "--rae", SHIPPED, "--n", 24)
    random = run_script(eval_decoder, "--rae", SHIPPED, "--n", 24, "--features", "random")
    assert random["features"] == "random"
    assert random["psnr"] == tiny["psnr"]
    assert abs(random["frechet_distance"] / tiny["frechet_distance"] - 1) > 1e-3


@pytest.mark.parametrize("argv, message", [
    (["--n", "1"], "--n/--num_images: 1 must be at least 2"),
    (["--features", "vae:8:16"], "--features vae:8:16 can't be used here"),
    (["--features", "nope"], "--features nope is neither one of"),
])
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        eval_fid.parse_args(argv)
    assert message in capsys.readouterr().err


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        run_script(eval_fid, "--ckpt", tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="--data nowhere does not exist"):
        run_script(eval_fid, "--data", "nowhere")
    # Before Inception is downloaded.
    with pytest.raises(FileNotFoundError, match="--samples nowhere does not exist"):
        run_script(eval_fid, "--samples", "nowhere", "--data", "shapes")
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist"):
        run_script(eval_decoder, "--rae", tmp_path / "nothing.pt")


@pytest.mark.parametrize("script, flags, name", [
    (eval_fid, ["--out"], "last.pt"),
    (eval_fid, ["--samples", "shapes", "--data", "shapes", "--out"], "samples.npz"),
    (eval_fid, ["--data", "shapes", "--save_stats"], "photo.png"),
    (eval_decoder, ["--out"], "last.pt"),
    (eval_t2i, ["--out"], "last.pt"),
])
def test_results_do_not_overwrite_checkpoints_or_images(script, flags, name, tmp_path):
    (tmp_path / name).write_text("days of work")
    with pytest.raises(ValueError, match=f"{name} can't be written in the format of its suffix"):
        run_script(script, *flags, tmp_path / name)
    assert (tmp_path / name).read_text() == "days of work"


def test_the_images_of_an_npz_are_reconstructed(tmp_path):
    images = load_images(open_data("shapes", 64, split="val"), range(8))
    np.savez(tmp_path / "images.npz", arr_0=images.numpy())
    results = run_script(eval_decoder, "--data", tmp_path / "images.npz", "--n", 8)
    assert results["n"] == 8
    assert results["psnr"] > 25
    assert "readable" not in results


# ---------------------------------------------------------------------------- reports
def test_json_is_strict(tmp_path, capsys):
    """PSNR of equal images is infinite, for which JSON has no word."""
    results = dict(psnr=float("inf"), by_source=dict(a=float("nan")), interval=[0.0, 1.0], n=3)
    evaluation.report(results, 1.0, tmp_path / "line.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    expected = dict(psnr=None, by_source=dict(a=None), interval=[0.0, 1.0], n=3)
    printed = capsys.readouterr().out.splitlines()[-1]
    for line in (printed, (tmp_path / "line.json").read_text()):
        assert json.loads(line, parse_constant=refuse) == expected


# ---------------------------------------------------------------------------- what the model saw
def write_photos(folder, n=12):
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def trained_on_photos(photos, tmp_path):
    """Paths of the shipped models, as if they had been trained on photos with --hold_out 4."""
    paths = {}
    for name, shipped in (("dit", SHIPPED), ("rae", release.SHIPPED_RAE)):
        state = dict(storage.load_checkpoint(shipped))
        state["args"] = dict(state["args"], data=[str(photos)], hold_out=4)
        state["data"] = open_data(str(photos), 64).identity()
        paths[name] = tmp_path / f"{name}.pt"
        torch.save(state, paths[name])
    return paths


def evaluate(stage, paths, *flags):
    if stage == "dit":
        return run_script(eval_fid, "--ckpt", paths["dit"], "--sampling_steps", 1, "--guidance", 1,
                          *flags)
    return run_script(eval_decoder, "--rae", paths["rae"], *flags)


both_stages = pytest.mark.parametrize("stage", ["dit", "rae"])


@pytest.mark.shipped
@both_stages
def test_held_out_images_are_the_default_reference(stage, trained_on_photos, capsys):
    results = evaluate(stage, trained_on_photos)
    assert (results["reference_split"], results["n"]) == ("held out", 4)
    assert "trained on" not in capsys.readouterr().err


@pytest.mark.shipped
@both_stages
def test_images_of_the_training_are_told(stage, trained_on_photos, photos, capsys):
    results = evaluate(stage, trained_on_photos, "--hold_out", 0)
    assert (results["reference_split"], results["n"]) == ("train", 12)
    assert "the model was trained on the reference images" in capsys.readouterr().err

    results = evaluate(stage, trained_on_photos, "--data", photos / ".." / "photos")
    assert results["reference_split"] == "train"
    assert "the model was trained on the reference images" in capsys.readouterr().err


@pytest.mark.shipped
@both_stages
def test_files_that_changed_since_training_may_have_been_seen(stage, trained_on_photos, photos,
                                                             capsys):
    new = photos / "new.png"
    Image.new("RGB", (64, 64)).save(new)
    try:
        results = evaluate(stage, trained_on_photos)
    finally:
        new.unlink()
    assert results["reference_split"] == "may overlap train"
    assert "the training may have seen some of the reference images" in capsys.readouterr().err


@pytest.mark.shipped
@both_stages
def test_more_images_than_training_held_out_are_refused(stage, trained_on_photos, photos):
    message = "--hold_out 5 is more than the 4 images that the training of .* held out"
    with pytest.raises(ValueError, match=message):
        evaluate(stage, trained_on_photos, "--hold_out", 5)
    with pytest.raises(ValueError, match=message):
        evaluate(stage, trained_on_photos, "--hold_out", 5, "--data", photos)


@pytest.mark.shipped
@both_stages
def test_other_images_and_scenes_are_no_training_data(stage, trained_on_photos, tmp_path, capsys):
    others = write_photos(tmp_path / "others", n=6)
    results = evaluate(stage, trained_on_photos, "--data", others)
    assert results["reference_split"] == "other data"
    results = evaluate(stage, trained_on_photos, "--data", "shapes", "--n", 4)
    assert results["reference_split"] == "held out"
    assert "trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("data, message", [
    ("photos", "args has data 'photos', which must be of type list"),
    ([], "data is no list of texts"),
    ([3], "data is no list of texts"),
])
def test_a_checkpoint_that_names_no_data_is_refused(data, message, tmp_path):
    state = dict(storage.load_checkpoint(release.SHIPPED_RAE))
    state["args"] = dict(state["args"], data=data)
    torch.save(state, tmp_path / "rae.pt")
    with pytest.raises(ValueError, match=f"rae.pt.*{message}"):
        run_script(eval_decoder, "--rae", tmp_path / "rae.pt")


def test_one_image_is_refused_before_the_work(photos, tmp_path):
    alone = write_photos(tmp_path / "alone", n=1)
    with pytest.raises(ValueError, match="1 image is too few to measure a distance"):
        run_script(eval_fid, "--data", alone)
    with pytest.raises(ValueError, match="1 image is too few to measure a distance"):
        run_script(eval_decoder, "--data", alone)


@pytest.mark.parametrize("script", [eval_decoder, eval_fid, eval_t2i])
def test_every_flag_shows_its_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    _, _, options = capsys.readouterr().out.partition("options:")
    _, *flags = options.split("\n  --")
    assert len(flags) > 12
    for flag in flags:
        assert "default" in flag.lower(), flag


@pytest.mark.shipped
def test_scripts_say_what_they_read(photos, trained_on_photos, capsys):
    run_script(eval_decoder, "--data", photos, "--n", 4)
    assert "images: 12 of 12" in capsys.readouterr().err
    run_script(eval_decoder, "--probe", "pixel:16", "--n", 40, "--hold_out", 20, "--data", "shapes")
    said = capsys.readouterr().err
    assert "data shapes, train" in said and "data shapes, val" in said
    evaluate("dit", trained_on_photos)
    assert "images: 4 of 12" in capsys.readouterr().err
    run_script(eval_fid, "--samples", photos, "--data", photos, "--features", "tiny")
    assert capsys.readouterr().err.count("images: 12 of 12") == 2
