"""Feature networks, FID and its relatives, files, statistics, the linear probe.

Run: python -m pytest tests/test_metrics.py
"""
import hashlib
import io
import json
import time
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import Inception3

import eval_decoder
import eval_fid
import eval_t2i
import metrics
import release
import t2i
import train_decoder
import train_dit
import train_t2i
from conftest import SHIPPED, read_log, run_script, torchrun
from data import open_data
from eval_fid import load_statistics
from evaluation import open_images
from metrics import (
    InceptionFeatures,
    Moments,
    extrapolate_distance,
    frechet_distance,
    inception_score,
    kernel_distance,
    measure_images,
    precision_recall,
)
from model import IMAGENET_PIXELS


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Path of random weights in the layout of the released ones."""
    torch.manual_seed(0)
    network = Inception3(1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("inception") / metrics.INCEPTION_FILE
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def trusted_weights(inception_weights, monkeypatch):
    """The same, with its hash in place of that of the released file."""
    sha256 = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", sha256)
    return inception_weights


def random_images(n, side=32, seed=0):
    """Images of noise, uint8 n side side 3."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def write_folder(path, images):
    """Write images as PNG files to a new folder, whose path is returned."""
    path.mkdir()
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return path


def no_network(*args, **kwargs):
    raise OSError("no network")


# ---------------------------------------------------------------------------- Inception
@pytest.mark.parametrize("side", [64, 320])
def test_inception_has_the_features_and_logits_of_torch_fidelity(trusted_weights, side):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    judge = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"],
                                                 str(trusted_weights)).eval()
    spatial_maps = []
    judge.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: spatial_maps.append(output))
    images = random_images(2, side)
    with torch.no_grad():
        expected, expected_logits = judge(images.permute(0, 3, 1, 2))
    expected_spatial = spatial_maps[0][:, :7].permute(0, 2, 3, 1).flatten(1)   # h w c, as ADM

    network = InceptionFeatures(trusted_weights)
    features, spatial = network(images)
    logits = network.logits(features)

    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert torch.allclose(logits, expected_logits, rtol=1e-4,
                          atol=1e-4 * expected_logits.abs().max())
    assert spatial.shape == (2, 2023)
    assert torch.allclose(spatial, expected_spatial, rtol=1e-4, atol=1e-4)


def test_inception_finds_its_weights_in_the_folder_of_torch_hub(trusted_weights, tmp_path,
                                                                monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / metrics.INCEPTION_FILE).symlink_to(trusted_weights)
    assert InceptionFeatures().fc.shape == (1008, 2048)


def test_inception_without_weights_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError,
                       match="put https://github.com/.*6726825d.pth into .*--inception"):
        InceptionFeatures()
    with pytest.raises(FileNotFoundError, match="no nowhere.pth"):
        InceptionFeatures("nowhere.pth")


def test_inception_takes_no_other_file(tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match="other.pth has sha256 .* it is no copy of"):
        InceptionFeatures(other)


# ---------------------------------------------------------------------------- DINOv2
@pytest.fixture
def small_dinov2(tmp_path, monkeypatch):
    """A small ViT of 518 px, whose random weights DINOv2Features loads in place of its own."""
    name = "vit_small_patch14_dinov2.lvd142m"
    vit = timm.create_model(name, num_classes=0).eval()
    torch.nn.init.normal_(vit.pos_embed)
    (tmp_path / "weights").mkdir()
    save_file(vit.state_dict(), tmp_path / "weights" / f"{name}.safetensors")
    monkeypatch.setattr(release, "HERE", tmp_path)
    monkeypatch.setattr(metrics.DINOv2Features, "timm_name", name)
    monkeypatch.setattr(metrics.DINOv2Features, "channels", 384)
    return vit


def class_tokens(vit, images):
    """Class tokens b c of images uint8 b H W 3, by Pillow's resize and a table of positions that is
    sampled at (j + 1/2) * 37 / 16.1 - 1/2."""
    small = [Image.fromarray(image).resize((224, 224), Image.BICUBIC) for image in images.numpy()]
    x = torch.from_numpy(np.stack(small)).movedim(3, 1) / 255
    mean, std = (torch.tensor(statistic).view(3, 1, 1) for statistic in IMAGENET_PIXELS)
    x = (x - mean) / std

    places = (torch.arange(16) + 0.5) * 2 / 16.1 - 1                   # -1 to 1 is the whole table
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1)[None]
    table = vit.pos_embed.data[:, 1:].unflatten(1, (37, 37)).movedim(3, 1)
    table = F.grid_sample(table, grid, "bicubic", "border", align_corners=False)

    class_token = vit.cls_token.expand(len(x), -1, -1)
    tokens = torch.cat([class_token, vit.patch_embed.proj(x).flatten(2).mT], 1)
    tokens = tokens + torch.cat([vit.pos_embed.data[:, :1], table.flatten(2).mT], 1)
    with torch.no_grad():
        return vit.norm(vit.blocks(tokens))[:, 0]


def test_fd_dinov2_is_the_class_token_with_positions_as_dinov2_takes_them(small_dinov2):
    images = random_images(2, 256)
    expected = class_tokens(small_dinov2, images)
    features, spatial = metrics.feature_network("fd-dinov2")(images)
    assert spatial is None
    assert (features - expected).abs().max() < 0.02 * expected.std()   # Pillow rounds to 8 bits


def test_fd_dinov2_has_statistics_and_a_name_of_its_own(small_dinov2, tmp_path):
    real = write_folder(tmp_path / "real", random_images(4, 28, seed=0))
    fake = write_folder(tmp_path / "fake", random_images(4, 28, seed=1))
    statistics = tmp_path / "statistics.npz"
    flags = "--features", "fd-dinov2"
    run_script(eval_fid, "--save_stats", statistics, "--data", real, *flags)
    results = run_script(eval_fid, "--samples", fake, "--data", statistics, *flags)
    assert results["fd_dinov2"] > 0
    assert "fid" not in results


# ---------------------------------------------------------------------------- features to numbers
def test_inception_score_is_that_of_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(257, 40)
    expected = list(fidelity.isc_features_to_metric(logits).values())
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)


@pytest.fixture
def features():
    """Features of 311 real and 257 fake images."""
    return torch.randn(311, 16), torch.randn(257, 16) + 0.5


def test_kernel_distance_is_that_of_torch_fidelity(features):
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    real, fake = features
    expected = fidelity.kid_features_to_metric(
        fake, real, kid_subsets=100, kid_subset_size=200, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
        rng_seed=2020, verbose=False)
    assert kernel_distance(real, fake, size=200) == pytest.approx(list(expected.values()), rel=1e-3)


def test_precision_and_recall_are_those_of_torch_fidelity(features):
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = features
    expected = fidelity.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False)
    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(expected["precision"])
    assert recall == pytest.approx(expected["recall"])
    assert 0 < min(precision, recall) < max(precision, recall) < 1


def test_precision_and_recall_on_a_line():
    real = torch.tensor([[0.0], [1], [2], [3], [4]])       # third neighbours at 3, 2, 2, 2, 3
    fake = torch.tensor([[0.5], [3.5], [50], [51], [52]])  # at 49.5, 47.5, 46.5, 47.5, 48.5
    assert precision_recall(real, fake) == (0.4, 1.0)
    assert precision_recall(real, real + 100) == (0, 0)
    assert precision_recall(real, real) == (1, 1)


def test_precision_and_recall_are_computed_in_blocks(monkeypatch):
    sizes = []
    cdist = torch.cdist

    def recorded_cdist(a, b):
        sizes.append(len(a) * len(b))
        return cdist(a, b)

    monkeypatch.setattr(torch, "cdist", recorded_cdist)
    real, fake = torch.randn(2, 2500, 4).unbind()
    precision, _ = precision_recall(real, fake)
    assert max(sizes) == 1000 * 2500
    radii = cdist(real, real).kthvalue(4).values
    expected = (cdist(fake, real) <= radii).any(1).double().mean().item()
    assert precision == pytest.approx(expected, abs=1e-3)


def test_moments_merge_exactly():
    features = torch.randn(301, 9, dtype=torch.float64) * 5 + 1e3
    whole = Moments()
    whole.add(features)
    parts = [Moments(), Moments(), Moments()]
    for i, part in enumerate(parts):
        for batch in features[i::3].split(7):
            part.add(batch)
    merged = parts[0]
    for part in parts[1:]:
        merged.combine(part.n, part.mean, part.scatter)
    assert merged.n == 301
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.cov, whole.cov, rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_2048_dimensions_and_500_images():
    features = torch.randn(500, 2048, dtype=torch.float64)
    mean, cov = features.mean(0), features.T.cov()
    start = time.time()
    distance = frechet_distance(mean, cov, mean + 1, 4 * cov)
    seconds = time.time() - start
    # |1|^2 + tr (cov + 4 cov - 2 * 2 cov)
    assert distance == pytest.approx(2048 + float(cov.trace()), rel=1e-6)
    assert seconds < 60                                                # 6 on two idle cores


def test_extrapolation_leads_from_the_biased_distance_to_the_true_one():
    real = Moments()
    real.add(torch.randn(200_000, 24))
    fake = torch.randn(600, 24) + 0.1
    true_distance = 24 * 0.1 ** 2                                      # |mean|^2
    points, limit = extrapolate_distance(fake, real.mean, real.cov)
    sizes = [size for size, _ in points]
    distances = [distance for _, distance in points]
    assert sizes[-1] == 600 and len(sizes) == 10
    assert abs(limit - true_distance) < distances[-1] - true_distance
    assert distances[-1] < distances[0]


# ---------------------------------------------------------------------------- files of images
def test_the_same_images_give_the_same_numbers_from_any_file_batch_and_process(tmp_path):
    images = random_images(40)
    real = write_folder(tmp_path / "real", random_images(50, seed=1))
    folder = write_folder(tmp_path / "pngs", images)
    stored, packed, floats = (tmp_path / f"{name}.npz" for name in ("stored", "packed", "floats"))
    np.savez(stored, arr_0=images.numpy(), labels=np.zeros(40))
    np.savez_compressed(packed, images.numpy())
    np.savez(floats, images.numpy() / np.float32(255))

    flags = "--data", real, "--features", "tiny"
    all_results = []
    for samples, batch in ((folder, 72), (stored, 7), (packed, 40), (floats, 13)):
        all_results.append(run_script(eval_fid, "--samples", samples, *flags, "--batch", batch))
    torchrun(eval_fid, "--samples", stored, *flags, "--batch", 8, "--out", tmp_path / "two.json")
    all_results.append(json.loads((tmp_path / "two.json").read_text()))

    first = all_results[0]
    for results in all_results:
        assert (results["n"], results["reference_n"]) == (40, 50)
        assert results["samples_sha1"] == first["samples_sha1"]
        assert results["reference_sha1"] == first["reference_sha1"]
        for name in ("frechet_distance", "precision", "recall", "kernel_distance"):
            assert results[name] == pytest.approx(first[name], rel=1e-4), name


def test_an_npz_is_mapped_into_memory(tmp_path):
    images = random_images(40)
    np.savez(tmp_path / "stored.npz", arr_0=images.numpy(), labels=np.zeros(40))
    mapped = open_images([str(tmp_path / "stored.npz")]).images
    assert isinstance(mapped, np.memmap)
    assert (mapped == images.numpy()).all()


# ---------------------------------------------------------------------------- statistics
def test_saved_statistics_stand_for_their_images(tmp_path):
    real = write_folder(tmp_path / "real", random_images(6))
    fake = write_folder(tmp_path / "fake", random_images(7, seed=1))
    statistics = tmp_path / "tiny.npz"
    run_script(eval_fid, "--save_stats", statistics, "--data", real, "--features", "tiny")

    by_images = run_script(eval_fid, "--samples", fake, "--data", real, "--features", "tiny")
    by_statistics = run_script(eval_fid, "--samples", fake, "--data", statistics,
                               "--features", "tiny")

    for name in ("frechet_distance", "precision", "recall", "kernel_distance"):
        assert by_statistics[name] == pytest.approx(by_images[name], rel=1e-9), name
    assert by_statistics["reference_n"] == 6
    with pytest.raises(ValueError, match="tiny.npz"):      # none of several is left out silently
        run_script(eval_fid, "--samples", fake, "--data", statistics, real, "--features", "tiny")


def statistics_of_tiny(**changes):
    """Arrays of statistics of the 192 features of the encoder "tiny", with some of them changed."""
    arrays = dict(mu=np.zeros(192), sigma=np.eye(192), n=9, features="tiny",
                  rows=np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32))
    arrays |= changes
    return {name: value for name, value in arrays.items() if value is not None}


def covariance_with(row, column, value):
    """The unit matrix of 192 rows with another value in one place."""
    cov = np.eye(192)
    cov[row, column] = value
    return cov


def measure_against(arrays, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=random_images(4).numpy())
    np.savez(tmp_path / "stats.npz", **arrays)
    return run_script(eval_fid, "--samples", tmp_path / "samples.npz", "--features", "tiny",
                      "--data", tmp_path / "stats.npz")


@pytest.mark.parametrize("changes", [
    {},
    dict(mu=np.zeros(192, ">f8"), sigma=np.eye(192).astype(">f4")),            # big-endian
    dict(sigma=np.asfortranarray(np.eye(192)), rows=None, n=None),
    dict(rows=np.asfortranarray(statistics_of_tiny()["rows"], ">f8")),
])
def test_statistics_in_any_byte_order_are_read(changes, tmp_path):
    expected = measure_against(statistics_of_tiny(), tmp_path)
    results = measure_against(statistics_of_tiny(**changes), tmp_path)
    for name in results.keys() & {"frechet_distance", "precision", "kernel_distance"}:
        assert results[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("changes, message", [
    (dict(mu=np.full(192, np.nan)), "mu or sigma with numbers that are not finite"),
    (dict(sigma=covariance_with(2, 2, np.inf)), "mu or sigma with numbers that are not finite"),
    (dict(rows=np.full((5, 192), np.nan)), "rows with numbers that are not finite"),
    (dict(sigma=np.eye(191)), r"sigma of \(191, 191\) for 192 features"),
    (dict(sigma=np.ones(192)), r"can't be read \(sigma of \(192,\), float64\)"),
    (dict(mu=np.zeros((192, 1))), r"can't be read \(mu of \(192, 1\), float64\)"),
    (dict(mu=np.float64(0)), r"can't be read \(mu of \(\), float64\)"),
    (dict(sigma=covariance_with(0, 1, 3)), "sigma that is not symmetric"),
    (dict(sigma=covariance_with(0, 0, -1)), "sigma with negative variances"),
    (dict(rows=np.zeros((5, 7), np.float32)), r"rows of \(5, 7\) for 192 features"),
    (dict(mu=np.zeros(192, int)), r"can't be read \(mu of \(192,\), int64\)"),
    (dict(mu=np.full(192, "x")), r"can't be read \(mu of"),
    (dict(mu=np.array([None] * 192)), r"can't be read \(mu of \(192,\), object\)"),
    (dict(sigma=np.eye(192) * 1j), r"can't be read \(sigma of \(192, 192\), complex128\)"),
    (dict(n=1), "n 1, less than 2 images"),
    (dict(n=-5), "n -5, less than 2 images"),
    (dict(n=9.5), r"can't be read \(n of \(\), float64\)"),
    (dict(n=[3, 4]), r"can't be read \(n of \(2,\)"),
    (dict(side=[32, 32, 3]), r"side of \(3,\), not height and width"),
    (dict(features=3), r"can't be read \(features of \(\), int64\)"),
])
def test_statistics_that_are_none_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"stats.npz has .*{message}"):
        measure_against(statistics_of_tiny(**changes), tmp_path)


def test_statistics_of_gigabytes_are_refused_before_they_are_read(tmp_path):
    """A file of 200 bytes that claims a covariance of 80 GB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, dict(descr="<f8", fortran_order=False, shape=(100_000, 100_000)))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "stats.npz", "a") as archive:
        archive.writestr("sigma.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"sigma of \(100000, 100000\), more than 268435456"):
        eval_fid.read_statistics(tmp_path / "stats.npz")


def test_statistics_that_are_cut_short_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    np.savez_compressed(path, **statistics_of_tiny())
    whole = path.read_bytes()
    for start in (100, len(whole) // 2):                   # inside the compressed arrays
        path.write_bytes(whole[:start] + bytes(50) + whole[start + 50:])
        with pytest.raises(ValueError, match="stats.npz has statistics that can't be read"):
            eval_fid.read_statistics(path)


def test_saved_statistics_of_inception_are_loaded_as_they_were(tmp_path, trusted_weights):
    real = write_folder(tmp_path / "real", random_images(6))
    statistics = tmp_path / "inception.npz"
    run_script(eval_fid, "--save_stats", statistics, "--data", real, "--inception", trusted_weights)
    network = InceptionFeatures(trusted_weights)
    loaded = load_statistics(statistics, network)
    measured = measure_images(open_images([str(real)]), 6, network, keep=6)
    assert loaded.pooled.n == measured.pooled.n == 6
    assert loaded.spatial.n == measured.spatial.n == 6
    assert torch.allclose(loaded.pooled.mean, measured.pooled.mean)
    assert torch.allclose(loaded.pooled.cov, measured.pooled.cov)
    assert torch.allclose(loaded.spatial.mean, measured.spatial.mean)
    assert torch.allclose(loaded.spatial.cov, measured.spatial.cov)
    assert torch.equal(loaded.features, measured.features)
    assert loaded.image_size == measured.image_size == (32, 32)


def test_statistics_of_another_network_are_refused(tmp_path, trusted_weights):
    images = write_folder(tmp_path / "images", random_images(6))
    statistics = tmp_path / "tiny.npz"
    run_script(eval_fid, "--save_stats", statistics, "--data", images, "--features", "tiny")
    with pytest.raises(ValueError,
                       match="statistics of 192 features of tiny, not the 2048 of inception"):
        run_script(eval_fid, "--samples", images, "--data", statistics,
                   "--inception", trusted_weights)


def distance_of_few(real, fake):
    """Fréchet distance of features n c and m c with n, m < c, by products of the features.

    cov = a^T a for a the centred features over (n - 1)^(1/2), so the trace of the root of the
    product is the sum of the singular values of a b^T.
    """
    real, fake = real.double(), fake.double()
    a = (real - real.mean(0)) / (len(real) - 1) ** 0.5
    b = (fake - fake.mean(0)) / (len(fake) - 1) ** 0.5
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (real.mean(0) - fake.mean(0)).square().sum()
    return float(distance + a.square().sum() + b.square().sum() - 2 * cross)


def test_adm_reference_has_statistics_for_fid_and_images_for_precision(tmp_path, trusted_weights,
                                                                       capsys):
    network = InceptionFeatures(trusted_weights)
    images = random_images(5)
    np.savez(tmp_path / "all.npz", images.numpy())
    real = measure_images(open_images([str(tmp_path / "all.npz")]), 5, network)
    reference = tmp_path / "VIRTUAL.npz"                   # statistics of all, 4 of the images
    np.savez(reference, images[:4].numpy(), mu=real.pooled.mean, sigma=real.pooled.cov,
             mu_s=real.spatial.mean, sigma_s=real.spatial.cov)
    folder = write_folder(tmp_path / "fake", random_images(4, seed=1))
    fake = measure_images(open_images([str(folder)]), 4, network)

    results = run_script(eval_fid, "--samples", folder, "--data", reference,
                         "--inception", trusted_weights)

    expected_keys = {"fid", "sfid", "inception_score", "inception_score_std", "kid", "precision"}
    assert expected_keys <= results.keys()
    expected = distance_of_few(real.features, fake.features)
    assert results["fid"] == pytest.approx(expected, rel=1e-5)
    precision, recall = precision_recall(real.features[:4], fake.features)
    assert (results["precision"], results["recall"]) == (precision, recall)
    assert results["reference_n"] is None                  # ADM's file does not say
    warnings = capsys.readouterr().err
    assert "the reference's protocol has 50000 images, not 4" in warnings
    assert "4 images give no full covariance of 2048 features" in warnings
    assert "distances of 4 images come out too large" in warnings


# ---------------------------------------------------------------------------- what is refused
def test_references_are_cropped_only_where_size_says_so(tmp_path):
    real = write_folder(tmp_path / "real", random_images(5, 48))
    fake = write_folder(tmp_path / "fake", random_images(5, 32))
    flags = "--features", "tiny", "--samples", fake, "--data", real
    with pytest.raises(ValueError, match="48 x 48 and 32 x 32 pixels can't be compared"):
        run_script(eval_fid, *flags)
    assert run_script(eval_fid, *flags, "--size", 32)["n"] == 5


def test_samples_of_different_sizes_and_broken_ones_are_refused(tmp_path):
    fake = write_folder(tmp_path / "fake", random_images(5, 32))
    flags = "--features", "tiny", "--samples", fake, "--data", fake, "--size", 32
    Image.fromarray(random_images(1, 40)[0].numpy()).save(fake / "odd.png")
    with pytest.raises(ValueError, match="images of different sizes"):
        run_script(eval_fid, *flags)
    (fake / "odd.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken images can't be measured: .*odd.png"):
        run_script(eval_fid, *flags)
    (fake / "odd.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError,
                       match="broken images can't be measured: [^ ]*odd.png; remove or mend"):
        run_script(eval_fid, *flags)


@pytest.mark.parametrize("arrays, message", [
    (dict(arr_0=np.linspace(0, 2, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)),
     r"floats of 1 to 2; scale them to \[0,1\]"),
    (dict(images=np.zeros(3)), "samples.npz is no whole .npz of arr_0, or mu and sigma"),
    (dict(arr_0=np.zeros((2, 3, 32, 32), np.uint8)),
     r"arr_0 of \(2, 3, 32, 32\), uint8; images are n H W 3"),
    (dict(arr_0=np.zeros((1, 32, 32, 3), np.uint8)), "1 image is too few"),
])
def test_arrays_that_cannot_be_measured_are_refused(arrays, message, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        run_script(eval_fid, "--samples", path, "--data", path, "--features", "tiny")


def test_files_that_cannot_be_measured_are_refused(tmp_path):
    path = tmp_path / "two.npz"
    np.savez(path, np.zeros((2, 32, 32, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.npz is no whole .npz"):
        run_script(eval_fid, "--n", 4, "--data", tmp_path / "cut.npz", "--features", "tiny")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        run_script(eval_fid, "--n", 4, "--out", tmp_path, "--features", "tiny")
    with pytest.raises(ValueError, match="--n 3 is more than the 2 of --samples"):
        run_script(eval_fid, "--samples", path, "--data", path, "--n", 3, "--features", "tiny")
    with pytest.raises(FileNotFoundError, match="nothing.npz does not exist"):
        run_script(eval_fid, "--samples", tmp_path / "nothing.npz", "--data", path,
                   "--features", "tiny")


@pytest.mark.parametrize("script, argv, message", [
    (eval_fid, ["--samples", "x"], "need --data"),
    (eval_fid, ["--save_stats", "x.npz"], "need --data"),
    (eval_fid, ["--samples", "x", "--save_stats", "x.npz"], "not allowed with"),
    (eval_fid, ["--samples", "x", "--data", "y", "--guidance=3"], "--guidance does nothing with"),
    (eval_fid, ["--samples", "x", "--data", "y", "--hold_out", "3"],
     "--hold_out does nothing with --samples"),
    (eval_fid, ["--size", "64"], "--size does nothing with new images"),
    (eval_fid, ["--inception", "x", "--features", "tiny"], "--inception x does nothing with"),
    (eval_fid, ["--lpips"], "unrecognized arguments: --lpips"),
    (eval_t2i, ["--features", "tiny"], "unrecognized arguments: --features tiny"),
    (eval_decoder, ["--rae", "x", "--size", "64"], "--size does nothing without --probe"),
    (eval_decoder, ["--inception", "x", "--features", "tiny"], "--inception x does nothing with"),
    (eval_decoder, ["--probe", "tiny", "--rae", "x"], "--rae does nothing with --probe"),
    (eval_decoder, ["--probe", "tiny", "--lpips"], "--lpips does nothing with --probe"),
    (eval_decoder, ["--probe", "tiny", "--data", "x"], "needs --hold_out"),
    (eval_decoder, ["--probe", "inception"], "--probe inception can't be used here"),
    (eval_decoder, ["--rae", "dinov2-b"], "--rae dinov2-b needs --data"),
    (eval_decoder, ["--release_dir", "x"], "--release_dir needs --rae with one of"),
])
def test_flags_that_contradict_each_other_are_refused(script, argv, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(argv)
    assert message in capsys.readouterr().err


def test_lpips_without_weights_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth"):
        run_script(eval_decoder, "--rae", SHIPPED, "--n", 4, "--lpips")


def refuse_to_work(*args, **kwargs):
    raise AssertionError("no features may be computed here")


def test_sizes_that_cannot_be_compared_are_refused_before_the_work(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder", random_images(4, side=48))
    samples = write_folder(tmp_path / "samples", random_images(4, side=32))
    array, statistics = tmp_path / "array.npz", tmp_path / "statistics.npz"
    np.savez(array, random_images(4, side=48).numpy())
    np.savez(statistics, **statistics_of_tiny(side=[48, 48]))
    monkeypatch.setattr(metrics.FeatureSet, "add", refuse_to_work)
    flags = "--features", "tiny", "--samples", samples, "--data"

    with pytest.raises(ValueError, match="48 x 48 and 32 x 32 .*; crop the reference by --size 32"):
        run_script(eval_fid, *flags, folder)
    with pytest.raises(ValueError, match="48 x 48 and 32 x 32 .*; an .npz is not cropped: write"):
        run_script(eval_fid, *flags, array)
    with pytest.raises(ValueError, match="48 x 48 and 32 x 32 .*--size 32 --save_stats X.npz"):
        run_script(eval_fid, *flags, statistics)
    with pytest.raises(ValueError, match="48 x 48 and 64 x 64 .*; an .npz is not cropped: write"):
        run_script(eval_fid, "--data", array, "--n", 4)
    with pytest.raises(ValueError, match="48 x 48 and 64 x 64 .*--size 64 --save_stats X.npz"):
        run_script(eval_fid, "--data", statistics, "--n", 4)


def test_a_model_is_compared_with_an_npz(tmp_path):
    reference = tmp_path / "reference.npz"
    image = open_data("shapes", 64)[0]["image"].permute(1, 2, 0).numpy()
    np.savez(reference, np.stack([image, image, image, image]))
    results = run_script(eval_fid, "--data", reference, "--n", 6, "--sampling_steps", 2)
    assert results["reference_n"] == 4 and results["n"] == 6
    assert "right_colour" not in results


# ---------------------------------------------------------------------------- linear probe
def test_probe_reads_classes_from_good_tokens_on_images_it_did_not_learn():
    results = run_script(eval_decoder, "--probe", "tiny", "--n", 700, "--hold_out", 200)
    assert results["accuracy"] > 0.9


def test_probe_of_ones_own_images(tmp_path):
    write_folder(tmp_path / "dark", random_images(30, seed=0) // 2)
    write_folder(tmp_path / "light", random_images(30, seed=1) // 2 + 127)
    results = run_script(eval_decoder, "--probe", "pixel:16", "--data", tmp_path,
                         "--hold_out", 20)
    assert results["accuracy"] == 1.0
    assert (results["n"], results["held_out"]) == (40, 20)
    with pytest.raises(ValueError, match="--n 41 is more than the 40 images to train on; try --n "):
        run_script(eval_decoder, "--probe", "pixel:16", "--data", tmp_path, "--hold_out", 20,
                   "--n", 41)
    with pytest.raises(ValueError, match="has no classes to probe"):
        run_script(eval_decoder, "--probe", "pixel:16", "--data", tmp_path / "dark",
                   "--hold_out", 2)


# ---------------------------------------------------------------------------- online numbers
TWO_STEPS = ["--steps", 2, "--preview_every", 0, "--eval_every", 2]


def last_evaluation(folder, key):
    """The last record of a run's log that has this key."""
    records = [record for record in read_log(folder) if key in record]
    return records[-1]


def assert_equal_where_both_have_numbers(record, results):
    """Digit by digit, and in more than three numbers or hashes."""
    names = [name for name, value in record.items()
             if name in results and isinstance(value, float | str) and name != "domain"]
    assert len(names) > 3
    for name in names:
        assert record[name] == results[name], name


def test_online_numbers_of_stage_1_are_the_offline_ones(tmp_path):
    run_script(train_decoder, *TWO_STEPS, "--batch", 8, "--eval_n", 20, "--hold_out", 20,
               "--stats_n", 64, "--eval_features", "random", "--out", tmp_path)
    results = run_script(eval_decoder, "--rae", tmp_path / "last.pt", "--n", 20, "--batch", 8,
                         "--features", "random")
    assert_equal_where_both_have_numbers(last_evaluation(tmp_path, "psnr"), results)


def test_online_numbers_of_stage_2_are_the_offline_ones(tmp_path):
    run_script(train_dit, *TWO_STEPS, "--batch", 8, "--eval_n", 20, "--sampling_steps", 3,
               "--width", 64, "--head_width", 0, "--out", tmp_path)
    results = run_script(eval_fid, "--ckpt", tmp_path / "last.pt", "--n", 20,
                         "--sampling_steps", 3)
    assert_equal_where_both_have_numbers(last_evaluation(tmp_path, "frechet_distance"), results)


def test_online_numbers_of_stage_3_are_the_offline_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(t2i.T2I.ask, "__defaults__", (4,))     # tokens: it can't answer yet
    run_script(train_t2i, *TWO_STEPS, "--batch", 6, "--eval_n", 6, "--sampling_steps", 3,
               "--width", 64, "--llm_width", 64, "--llm_depth", 1, "--head_width", 0, "--plan", 4,
               "--out", tmp_path)
    results = run_script(eval_t2i, "--ckpt", tmp_path / "last.pt", "--n", 6,
                         "--sampling_steps", 3)
    assert_equal_where_both_have_numbers(last_evaluation(tmp_path, "overall"), results)
