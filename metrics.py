"""How good images are, in numbers: FID and its relatives, PSNR, SSIM, LPIPS, verified accuracy.

    network = feature_network("inception")             # or "fd-dinov2", "tiny", "dinov2-b", ...
    real, fake = FeatureSet(network), FeatureSet(network)
    real.add(real_images, range(1000))                 # uint8 n H W 3, and their numbers
    fake.add(fake_images, range(1000))
    results = compare(real.merge(), fake.merge())      # {"fid": ..., "precision": ..., ...}

This file maps features and images to numbers. The scripts eval_decoder.py, eval_fid.py and
eval_t2i.py draw the images, and the training scripts call these scripts' functions on their EMA
weights. What each number is, and the protocol under which papers report it:

fid                 Fréchet distance of 2048 pooled features of Inception v3 (arXiv 1706.08500).
                    Protocol: 50,000 samples against ADM's VIRTUAL_imagenet256_labeled.npz.
sfid                The same for 17 x 17 x 7 values of Inception's layer mixed_6/conv (arXiv
                    2103.03841); absent if the statistics of the reference lack them.
inception_score     exp of the mean KL(p(y|x) || p(y)) over 10 parts of the samples (arXiv
                    1606.03498). There is no reference.
precision, recall   Fraction of samples inside the manifold of the references, and the reverse,
                    with k = 3 neighbours (arXiv 1904.06991). Protocol: ADM's suite, 50,000
                    samples against 10,000 references.
kid                 Squared maximum mean discrepancy under a cubic kernel, mean over 100 subsets
                    of 1000 images (arXiv 1801.01401). Of the same images as precision.
fd_dinov2           Fréchet distance of the class token of DINOv2-L without registers, at 224
                    pixels (arXiv 2306.04675).
frechet_distance,   What fid and kid are, in the mean token of another encoder. Comparable only
kernel_distance     for the same encoder, references and number of images.
rfid, psnr, ssim,   Of reconstructions against the centre-cropped originals; psnr, ssim and lpips
lpips               are means over images.
right_colour, ...   Fractions of samples in which shapes.read_scene finds what was asked for.
accuracy            Of a linear classifier of an encoder's mean token (RAE, table 1d).

Few images bias a Fréchet distance upwards, by about 1/n: compare numbers of the same n only, and
see extrapolate_distance(). Inception is TensorFlow's graph of 2015, with TensorFlow's resizing,
which other implementations of FID replace: their numbers differ.
Features are computed in fp32, not TF32, and moments summed in fp64: batches and processes change
a number only by fp32's rounding of features. samples_sha1 and reference_sha1 identify the pixels
that were compared.
"""
import hashlib
import math
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torchvision.models import Inception3, inception
from torchvision.models.feature_extraction import create_feature_extractor

import progress
import runtime
import storage
from data import load_images, resize_images
from model import IMAGENET_PIXELS, Normalise
from release import load_encoder, load_vit, pixel_statistics
from shapes import CLASSES, read_scene

# The weights that define FID, converted from TensorFlow's.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 + INCEPTION_FILE)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Images whose features are kept, for precision, recall and KID: as many as ADM's suite compares.
KEEP_REFERENCES = 10_000
KEEP_SAMPLES = 50_000
BLOCK = 1000         # features compared at a time: 1000 x 50,000 distances are 200 MB


# ---------------------------------------------------------------------------- features to numbers
def frechet_distance(mean1, cov1, mean2, cov2):
    """Fréchet distance of two Gaussians, a float, computed in fp64.

        |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))

    mean1, mean2: f. cov1, cov2: f f, possibly rank-deficient. Arrays or tensors.
    Raises ValueError if the shapes differ, or the numbers are not finite or no covariance.
    Source: arXiv 1706.08500
    """
    mean1 = torch.as_tensor(mean1, dtype=torch.float64)
    mean2 = torch.as_tensor(mean2, dtype=torch.float64)
    cov1 = torch.as_tensor(cov1, dtype=torch.float64)
    cov2 = torch.as_tensor(cov2, dtype=torch.float64)
    f = len(mean1)
    if len(mean2) != f or cov1.shape != (f, f) or cov2.shape != (f, f):
        raise ValueError(f"features of {f} and {len(mean2)} dimensions differ; use one encoder")
    for mean, cov in ((mean1, cov1), (mean2, cov2)):
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise ValueError("means or covariances of features are not finite, so there is no "
                             "distance; measure the images anew, with a model that has not "
                             "diverged")
    # tr (A B)^(1/2) is the sum of the singular values of R1^T R2 for any R1 R1^T = A, R2 R2^T = B.
    # Unlike scipy.linalg.sqrtm(A @ B), this takes no square roots of rounding errors.
    root1, root2 = square_root(cov1), square_root(cov2)
    trace = torch.linalg.svdvals(root1.T @ root2).sum()
    squared = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace
    return max(0.0, float(squared))                    # below 0 by rounding, for equal images


def square_root(cov):
    """R, f r, with R R^T = cov, f f of rank r. Raises ValueError if there is none."""
    try:
        values, vectors = torch.linalg.eigh(cov)       # cov = V D V^T, eigenvalues ascending
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"a covariance of features has no eigenvalues ({error}); measure the "
                         f"images anew") from error
    if values[0] < -1e-3 * values[-1].abs():           # more than rounding, even of half precision
        raise ValueError(f"a covariance of features has a negative eigenvalue, {values[0]:.3g}; "
                         f"measure the images anew")
    precision = values[-1] * len(values) * 2e-16       # 2e-16: of fp64
    is_positive = values > precision                   # the others are zeros, rounded
    return vectors[:, is_positive] * values[is_positive].sqrt()


def check_finite(features):
    """Raise ValueError unless all features, n f, or logits are finite numbers."""
    finite = torch.isfinite(features).flatten(1).all(1)                    # n
    if not finite.all():
        raise ValueError(f"features of {int((~finite).sum())} of {len(features)} images are not "
                         f"finite: the model that drew or encodes these images has diverged (one "
                         f"whose weights are not finite draws black images); take an earlier "
                         f"checkpoint")


def inception_score(logits, splits=10):
    """Inception Score exp(mean KL(p(y|x) || p(y))), over `splits` parts of the images.

    logits: n k. Returns mean and standard deviation over the parts.
    Raises ValueError without images, or if logits are not finite.
    Source: arXiv 1606.03498; each part is ten percent, in the order of torch-fidelity
    """
    logits = torch.as_tensor(logits)
    check_finite(logits)
    if len(logits) == 0:
        raise ValueError("the Inception Score needs images, and there is none")
    # Shuffled, as parts of images sorted by class would have few classes each.
    order = np.random.RandomState(2020).permutation(len(logits))
    logits = logits.double()[order]
    ends = [len(logits) * i // splits for i in range(1, splits)]
    scores = []
    for part in logits.tensor_split(ends):
        if len(part) == 0:
            continue
        p = part.softmax(1).clamp(min=1e-300)                              # n k; not 0 * log(0)
        divergence = (p * (p.log() - p.mean(0).log())).sum(1)              # n
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """Fraction of `fake` inside the manifold of `real` (precision), and the reverse (recall).

    real: n c. fake: m c. The manifold of a set is the union of the balls around its points, each
    of which reaches to the k-th nearest other point of the set, or to the farthest of fewer.
    Raises ValueError for sets of less than two, or features that are not finite.
    Source: arXiv 1904.06991, as in ADM's evaluator.py
    """
    check_pair(real, fake)
    return fraction_inside(fake, real, k), fraction_inside(real, fake, k)


def check_pair(real, fake):                                                # n c, m c
    """Raise ValueError unless two sets of features can be compared pair by pair."""
    check_finite(real)
    check_finite(fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"{len(real)} and {len(fake)} images are too few to compare in pairs; "
                         f"give at least 2 of each")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and {fake.shape[1]} dimensions differ; use "
                         f"one encoder")


def fraction_inside(points, manifold, k):
    """Fraction of points, n c, inside the manifold of a set of others, m c."""
    nearest = min(k + 1, len(manifold))                # the nearest point is the point itself
    radii = []
    for block in manifold.split(BLOCK):
        radii.append(torch.cdist(block, manifold).kthvalue(nearest).values)
    radii = torch.cat(radii)                                               # m
    inside = 0
    for block in points.split(BLOCK):
        is_inside = (torch.cdist(block, manifold) <= radii).any(1)         # b
        inside += int(is_inside.sum())
    return inside / len(points)


def kernel_distance(real, fake, subsets=100, size=1000):
    """Squared maximum mean discrepancy (KID): mean and standard deviation over random subsets.

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y),  k(x, y) = (x.y / c + 1)^3

    over all pairs of a subset of `size` images x of real, n c, and y of fake, m c, without pairs
    of an image with itself, so that it is unbiased.
    Raises ValueError for sets of less than two, or features that are not finite.
    Source: arXiv 1801.01401; the subsets are those of torch-fidelity
    """
    check_pair(real, fake)
    rng = np.random.RandomState(2020)
    size = min(size, len(real), len(fake))
    distances = []
    for _ in range(subsets):
        y = fake[rng.choice(len(fake), size, replace=False)]               # s c
        x = real[rng.choice(len(real), size, replace=False)]               # s c
        xx = cubic_kernel(x, x)                                            # s s
        yy = cubic_kernel(y, y)                                            # s s
        xy = cubic_kernel(x, y)                                            # s s
        off_diagonal = (xx.sum() - xx.trace()) + (yy.sum() - yy.trace())
        within = off_diagonal / (size * (size - 1))
        distances.append(float(within - 2 * xy.mean()))
    return float(np.mean(distances)), float(np.std(distances))


def cubic_kernel(x, y):                                                    # s c, s c
    return ((x @ y.T).double() / x.shape[1] + 1) ** 3                      # s s


def extrapolate_distance(features, real_mean, real_cov):
    """Fréchet distance at ten sample sizes, and its limit for infinitely many samples.

    The bias of n samples falls like 1/n: the limit is where a straight line through the points
    (1/n, distance) meets 1/n = 0.
    features: n c, of the samples. real_mean: c. real_cov: c c.
    Returns a list of ten (size, distance), and the limit. Raises ValueError for too few samples.
    Source: arXiv 1911.07023
    """
    features = features.double()
    n, channels = features.shape
    if n < 4:                                          # half of them must have a covariance
        raise ValueError(f"{n} samples are too few to extrapolate a distance; give at least 4")
    rng = np.random.default_rng(0)
    # Far fewer samples than dimensions do not lie on the line yet.
    smallest = max(n / 10, min(2 * channels, n / 2))
    points = []
    for size in np.linspace(smallest, n, 10).astype(int).tolist():
        subset = features[rng.permutation(n)[:size]]
        value = frechet_distance(subset.mean(0), subset.T.cov(), real_mean, real_cov)
        points.append((size, value))
    sizes, distances = np.array(points).T
    slope, limit = np.polyfit(1 / sizes, distances, 1).tolist()
    return points, limit


@runtime.full_precision()
def linear_probe(x, y, x_test, y_test, classes, steps=1500, seed=0):
    """Accuracy in [0,1] on held-out images of a linear classifier of features.

    x: m c and y: m class ids, to train on. x_test: n c and y_test: n, to test on. Features are
    standardised; AdamW in fp32, on batches of 1000.
    Raises ValueError if features are not finite, or a set is too small.
    """
    check_finite(x)
    check_finite(x_test)
    if len(x) < 2 or len(x_test) < 1:
        raise ValueError(f"{len(x)} images to train and {len(x_test)} to test a probe are too few; "
                         f"give at least 2 and 1")
    mean = x.mean(0)                                                       # c
    std = x.std(0) + 1e-6                                                  # c
    x = (x - mean) / std
    x_test = (x_test - mean) / std
    with torch.random.fork_rng([]):                    # leaves the caller's random state as it was
        torch.manual_seed(seed)
        probe = nn.Linear(x.shape[1], classes)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = torch.randint(len(x), (min(1000, len(x)),))
            loss = F.cross_entropy(probe(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    is_right = probe(x_test).argmax(1) == y_test                           # n
    return is_right.float().mean().item()


# ---------------------------------------------------------------------------- images to numbers
def in_fp64(x):
    """A tensor in fp64: on its device or, since Apple's GPUs have no fp64, on the CPU."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.double()


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair, 10 log10(255^2 / mse), in dB.

    images, others: uint8 b H W 3. Returns b, fp64; infinite for equal images.
    """
    difference = in_fp64(images) - in_fp64(others)
    mse = difference.square().flatten(1).mean(1)                           # b
    return 10 * torch.log10(255 ** 2 / mse)


def blur_matrix(n, device):
    """The matrix n-10 n, fp64, whose product with n pixels is their blur by a Gaussian window of 11
    pixels and sigma 1.5, where the whole window is inside the image.
    """
    first = torch.arange(n - 10, device=device)        # pixel of each window
    offset = torch.arange(n, device=device) - first[:, None] - 5           # n-10 n, from its centre
    weights = torch.exp(-offset.double() ** 2 / (2 * 1.5 ** 2))
    weights = torch.where(offset.abs() <= 5, weights, 0.0)
    return weights / weights.sum(1, keepdim=True)


def ssim(images, others):
    """Structural similarity of each pair, a mean over pixels and channels.

        (2 ma mb + c1) (2 cov + c2) / ((ma^2 + mb^2 + c1) (va + vb + c2))

    with means ma, mb, variances va, vb and covariance cov under a Gaussian window.
    images, others: uint8 b H W 3. Returns b, fp64, at most 1.
    Raises ValueError for images of less than 11 pixels a side.
    Source: Wang et al. 2004, equation 13, with its constants
    """
    a = in_fp64(rearrange(images, "b h w c -> b c h w"))
    b = in_fp64(rearrange(others, "b h w c -> b c h w"))
    height, width = a.shape[2:]
    if min(height, width) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels a side, not {height} x {width}")
    # A Gaussian window of 11 x 11 pixels is the product of one over columns and one over rows.
    blur_columns = blur_matrix(height, a.device)                           # h-10 h
    blur_rows = blur_matrix(width, a.device).T                             # w w-10
    moments = torch.stack([a, b, a * a + b * b, a * b])                    # 4 b c h w
    mean_a, mean_b, mean_squares, mean_product = blur_columns @ moments @ blur_rows
    var_sum = mean_squares - mean_a ** 2 - mean_b ** 2
    cov = mean_product - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    denominator = (mean_a ** 2 + mean_b ** 2 + c1) * (var_sum + c2)
    return (numerator / denominator).flatten(1).mean(1)


def load_lpips():
    """LPIPS on VGG-16, frozen: a lpips.LPIPS. Raises FileNotFoundError if it has no weights.

    Source: arXiv 1801.03924
    """
    advice = (f"put download.pytorch.org/models/vgg16-397923af.pth into "
              f"{torch.hub.get_dir()}/checkpoints/, or do without, in train_decoder.py by "
              f"--lpips 0 --gram 0")
    with storage.fetching("no weights of VGG-16", advice):
        return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)


def verify(images, labels):
    """Count images of the built-in world that show one object, of the class of their label.

    images: uint8 b H W 3. labels: b class ids.
    Returns three counts, fp64: right colour; right colour and shape; unsure. read_scene() would
    rather be unsure than guess, and that counts as wrong. The colour is read by itself, since it
    can be plain where the shape is not.
    """
    right_colour, right_class, unsure = 0, 0, 0
    for image, label in zip(images.numpy(), labels, strict=True):
        objects = read_scene(image)
        if objects is None:
            unsure += 1
            colours = read_scene(image, colours=True)
            classes = None
        else:
            colours = [thing.colour for thing in objects]
            classes = [thing.label for thing in objects]
        colour = CLASSES[label].split()[0]             # of "red star"
        if colours == [colour]:
            right_colour += 1
        if classes == [label]:
            right_class += 1
    return torch.tensor([right_colour, right_class, unsure], dtype=torch.float64)


# ---------------------------------------------------------------------------- feature networks
class FeatureNetwork(nn.Module):
    """What all feature networks have in common.

    name: as of --features. channels: c, dimensions of a feature.
    distance_name, kernel_name: keys of the Fréchet and the kernel distance in results.
    has_logits: True if it also has logits(features b c) of classes, for the Inception Score.
    forward: images uint8 b H W 3, on any device -> features b c and spatial features b s, or None
        if it has none; fp32, on the network's device.
    """
    distance_name = "frechet_distance"
    kernel_name = "kernel_distance"
    has_logits = False


class PoolOf2015:
    """A mixin for torchvision's blocks: the pool that TensorFlow's graph has in their last branch,
    an average that does not count the padding.
    """
    def pool(self, x):
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)

    def _forward(self, x):
        branches = super()._forward(x)
        branches[-1] = self.branch_pool(self.pool(x))
        return branches


class InceptionA(PoolOf2015, inception.InceptionA):
    pass


class InceptionC(PoolOf2015, inception.InceptionC):
    pass


class InceptionE(PoolOf2015, inception.InceptionE):
    pass


class LastInceptionE(InceptionE):
    def pool(self, x):
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def build_inception():
    """TensorFlow's Inception v3 of 2015-12-05 in torchvision's module names, without weights."""
    blocks = [inception.BasicConv2d, InceptionA, inception.InceptionB, InceptionC,
              inception.InceptionD, InceptionE, inception.InceptionAux]
    network = Inception3(num_classes=1008, aux_logits=False, inception_blocks=blocks,
                         init_weights=False)              # 1008: 1000 classes and 8 unused logits
    network.Mixed_7c = LastInceptionE(2048)
    return network


def download_inception(folder):
    """Path of Inception's weights in a folder, downloaded if the file is not there."""
    path = folder / INCEPTION_FILE
    if not path.exists():
        advice = f"put {INCEPTION_URL} into {folder}, or name the file by --inception"
        with storage.fetching(f"no {path}", advice):
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
    return path


def load_inception_weights(path=None):
    """State dict of the Inception that defines FID.

    path: its file. None: the one in torch.hub's folder, which is downloaded if it is not there.
    Raises FileNotFoundError; ValueError if the file is another one.
    """
    if path is None:
        path = download_inception(Path(torch.hub.get_dir()) / "checkpoints")
    elif not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}; put {INCEPTION_URL} there, or leave "
                                f"--inception out")
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if sha256 != INCEPTION_SHA256:
        raise ValueError(f"{path} has sha256 {sha256[:8]}, not {INCEPTION_SHA256[:8]}: it is no "
                         f"copy of {INCEPTION_URL}; get that one")
    return torch.load(path, weights_only=True)


def resize_as_tensorflow(images, side):
    """Images b c H W resized to b c side side, bilinearly as in TensorFlow 1.

    Pixel i of the result is at i * H / side of the image: no half-pixel centres, and no
    antialiasing.
    """
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(side, device=images.device) * (length / side)
        lower = position.long()
        weight = position - lower                      # of the upper neighbour
        if dim == 2:
            weight = weight[:, None]                   # one weight for each row
        below = images.index_select(dim, lower.clamp(max=length - 1))
        above = images.index_select(dim, (lower + 1).clamp(max=length - 1))
        images = below + (above - below) * weight
    return images


class InceptionFeatures(FeatureNetwork):
    """The network that defines FID: TensorFlow's Inception v3 of 2015-12-05.

    path: file of its weights, see load_inception_weights().
    forward: features b 2048, after the average pool; spatial features b 2023, for sFID: 17 x 17 x
        the first 7 channels of TensorFlow's mixed_6/conv.
    logits: features b 2048 -> b 1008. Without the bias, as in ADM's evaluator.py.
    Source: arXiv 1512.00567 (network), 1706.08500 (FID), 1606.03498 (IS), 2103.03841 (sFID)
    """
    name = "inception"
    channels = 2048
    distance_name = "fid"
    kernel_name = "kid"
    has_logits = True

    def __init__(self, path=None):
        super().__init__()
        network = build_inception()
        network.load_state_dict(load_inception_weights(path))
        self.register_buffer("fc", network.fc.weight.detach())             # 1008 2048
        layers = {"Mixed_6d.branch1x1": "spatial", "avgpool": "pooled"}
        self.network = create_feature_extractor(network.eval(), layers)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):                                             # b H W 3
        x = rearrange(images.to(self.fc.device), "b h w c -> b c h w").float()
        x = resize_as_tensorflow(x, 299)                                   # b 3 299 299
        x = (x - 128) / 128                            # as in TensorFlow's graph
        maps = self.network(x)
        features = maps["pooled"].flatten(1)                               # b 2048
        spatial = rearrange(maps["spatial"][:, :7], "b c h w -> b (h w c)")    # b 2023
        return features, spatial

    def logits(self, features):                                            # b 2048
        return (features.to(self.fc.device) @ self.fc.T).cpu()             # b 1008


class DINOv2Features(FeatureNetwork):
    """The network of FD-DINOv2: the class token of ViT-L/14 without registers, at 224 pixels.

    As in dgm-eval: bicubic, antialiased resizing, and positions as DINOv2's own code resamples
    them, which scales the table of 37 x 37 to 16.1 and keeps 16 x 16.
    Source: arXiv 2306.04675
    """
    name = "fd-dinov2"
    channels = 1024
    distance_name = "fd_dinov2"
    timm_name = "vit_large_patch14_dinov2.lvd142m"
    image_size, grid = 224, 16                 # here
    trained_size, trained_grid = 518, 37       # in its training

    def __init__(self):
        super().__init__()
        self.vit = load_vit(self.timm_name, self.trained_size)
        self.vit.patch_embed.set_input_size(img_size=self.image_size)
        positions = self.vit.pos_embed.data                                # 1 1+37*37 c
        class_position, table = positions[:, :1], positions[:, 1:]
        table = rearrange(table, "1 (h w) c -> 1 c h w", h=self.trained_grid)
        scale = (self.grid + 0.1) / self.trained_grid
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")   # 1 c 16 16
        table = rearrange(table, "1 c h w -> 1 (h w) c")
        self.vit.pos_embed.data = torch.cat([class_position, table], 1)    # 1 1+16*16 c
        self.normalise = Normalise(*IMAGENET_PIXELS)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):                                             # b H W 3
        device = self.vit.pos_embed.device
        x = rearrange(images, "b h w c -> b c h w").to(device).float() / 255
        x = resize_images(x, self.image_size)                              # b 3 224 224
        features = self.vit(self.normalise(x))                             # b c
        return features, None


class EncoderFeatures(FeatureNetwork):
    """The mean token of an Encoder. encoder: a model.Encoder, on any device."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.name = encoder.name
        self.channels = encoder.channels

    @torch.no_grad()
    def forward(self, images):                                             # b H W 3
        # The encoder "pixel" has no weights; then the images stay on the CPU.
        weight = next(self.encoder.parameters(), torch.empty(0))
        x = rearrange(images, "b h w c -> b c h w").to(weight.device).float() / 255
        x = resize_images(x, self.encoder.image_size)                      # b 3 S S
        features = self.encoder.encode(x).mean((2, 3))                     # b c
        return features, None


def feature_network(name, inception_path=None):
    """The feature network of a name: "inception", "fd-dinov2", or any encoder of load_encoder().

    inception_path: file of Inception's weights; default: see load_inception_weights().
    Raises FileNotFoundError if there are no weights.
    """
    if name == "inception":
        return InceptionFeatures(inception_path)
    if name == "fd-dinov2":
        return DINOv2Features()
    return EncoderFeatures(load_encoder(name))


def check_feature_name(name, flag):
    """Raise ValueError unless feature_network() knows `name`. None: no name was given.

    flag: the flag that gave it, for the message, such as "--features".
    """
    if name not in (None, "inception", "fd-dinov2"):
        check_encoder_name(name, flag)


def check_encoder_name(name, flag):
    """Raise ValueError unless `name` is an encoder that has weights. flag: that gave it."""
    is_vae = name.startswith("vae")                    # trained together with its decoder
    if name in ("inception", "fd-dinov2") or is_vae:
        raise ValueError(f"{flag} {name} can't be used here; give an encoder with weights")
    try:
        pixel_statistics(name)
    except ValueError as error:
        raise ValueError(str(error).replace("--encoder", flag)) from None


def check_feature_flags(args):
    """Raise ValueError if --features is no feature network, or contradicts --inception."""
    check_feature_name(args.features, "--features")
    if args.inception and args.features not in (None, "inception"):
        raise ValueError(f"--inception {args.inception} does nothing with --features "
                         f"{args.features}; leave one out")


# ---------------------------------------------------------------------------- sets of features
class Moments:
    """Mean and covariance of features, streamed in fp64: the same for all batches and processes.

    n: number of features. mean: f. scatter: f f, sum of the outer products of centred features.
    cov: f f, the scatter over n - 1. They are where the features are, after merge() on the CPU.
    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
        computing sample variances"
    """

    def __init__(self):
        self.clear()

    def clear(self):
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.scatter = torch.zeros((), dtype=torch.float64)

    def add(self, features):                                               # b f
        check_finite(features)
        features = in_fp64(features)
        mean = features.mean(0)                                            # f
        centred = features - mean                                          # b f
        self.combine(len(features), mean, centred.T @ centred)

    def combine(self, n, mean, scatter):
        """Take in the moments of n more features: mean f, scatter f f."""
        if n == 0:
            return
        total = self.n + n
        delta = mean - self.mean                                           # f
        # S = S1 + S2 + d d^T n1 n2 / (n1 + n2), with d the difference of the means
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def merge(self):
        """Combine the moments of all processes; afterwards all have the same."""
        parts = runtime.gather((self.n, self.mean.cpu(), self.scatter.cpu()))
        self.clear()
        for n, mean, scatter in parts:
            self.combine(n, mean, scatter)

    @property
    def cov(self):
        if self.n < 2:
            raise ValueError(f"{self.n} image is too few for a covariance; give at least 2")
        return self.scatter / (self.n - 1)


class FeatureSet:
    """What distances need of a set of images: moments of features, some features, a hash.

    network: a FeatureNetwork. keep: the first `keep` features, by the images' numbers, are kept.
    add() images in any batches on any processes, then merge() once. Then it has the attributes
    n: number of images; None for saved statistics that do not say.
    pooled: Moments of the features. spatial: Moments of the spatial features, n 0 without any.
    features: the kept ones, k c. image_size: (H, W); None if unknown.
    sha1: 12 hex digits, which depend on all pixels but not on the order of the images.
    """

    def __init__(self, network, keep=KEEP_REFERENCES):
        self.network = network
        self.keep = keep
        self.pooled = Moments()
        self.spatial = Moments()
        self.kept_features = []
        self.kept_numbers = []
        self.sha1_sum = 0
        self.image_size = None

    def add(self, images, numbers):
        """Add images, uint8 b H W 3, with their numbers: b ints that never repeat."""
        with runtime.full_precision():
            features, spatial = self.network(images)   # a GPU begins, and the CPU goes on
        for image in images.cpu().numpy():
            self.sha1_sum += int.from_bytes(hashlib.sha1(image.tobytes()).digest(), "big")
        self.pooled.add(features)
        if spatial is not None:
            self.spatial.add(spatial)
        numbers = torch.tensor(list(numbers))                              # b
        is_kept = numbers < self.keep                                      # b
        self.kept_numbers.append(numbers[is_kept])
        self.kept_features.append(features.cpu()[is_kept])
        self.image_size = tuple(images.shape[1:3])

    def merge(self):
        """Combine the sets of all processes; afterwards all have the same. Returns itself."""
        self.pooled.merge()
        self.spatial.merge()
        self.n = self.pooled.n
        if self.n < 2:
            raise ValueError(f"{self.n} image is too few to measure a distance; give at least 2")
        own = (self.kept_features, self.kept_numbers, self.sha1_sum, self.image_size)
        features, numbers, sha1_sum = [], [], 0
        for kept_features, kept_numbers, process_sum, image_size in runtime.gather(own):
            features += kept_features
            numbers += kept_numbers
            sha1_sum += process_sum
            if self.image_size is None:                # this process had no image
                self.image_size = image_size
        self.features = torch.cat(features)[torch.cat(numbers).argsort()]  # k c
        self.sha1 = f"{sha1_sum % 16 ** 40:040x}"[:12]                     # SHA-1 has 40 digits
        return self


def measure_images(data, n, network, keep=KEEP_REFERENCES, rank=0, world=1, batch=72):
    """The merged FeatureSet of the first n images of ImageData or Arrays, on all processes."""
    feature_set = FeatureSet(network, keep)
    batches = runtime.split_numbers(n, batch, rank, world)
    for numbers in progress.progress_bar(batches, "measure"):
        feature_set.add(load_images(data, numbers), numbers)
    return feature_set.merge()


def check_image_size(size, other, advice="resize one of them"):
    """Raise ValueError if the (H, W) of two sets of images differ. None: unknown.

    advice: what to do about it, if the caller knows more.
    """
    if size and other and size != other:
        raise ValueError(f"images of {size[0]} x {size[1]} and {other[0]} x {other[1]} pixels "
                         f"can't be compared; {advice}")


@runtime.full_precision()
def compare(real, fake):
    """All distances of one FeatureSet to another, after merge(), as a dict. Of several processes,
    let one compute them, by runtime.on_rank_0().

    Precision, recall and the kernel distance need kept features, sFID spatial ones.
    Raises ValueError if the images differ in size, or a number comes out that is not finite.
    """
    check_image_size(real.image_size, fake.image_size)
    network = fake.network
    results = {network.distance_name: distance(real.pooled, fake.pooled)}
    if real.spatial.n > 0:
        results["sfid"] = distance(real.spatial, fake.spatial)
    if network.has_logits:
        logits = torch.cat([network.logits(block) for block in fake.features.split(BLOCK)])
        mean, std = inception_score(logits)
        results["inception_score"] = mean
        results["inception_score_std"] = std
    if len(real.features) > 0:
        precision, recall = precision_recall(real.features, fake.features)
        results["precision"] = precision
        results["recall"] = recall
        mean, std = kernel_distance(real.features, fake.features)
        results[network.kernel_name] = mean
        results[f"{network.kernel_name}_std"] = std
    for name, value in results.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, since features are too large for its formula; "
                             f"choose other --features")
    results["reference_sha1"] = real.sha1
    results["samples_sha1"] = fake.sha1
    return results


def distance(moments, other):
    """Fréchet distance of two Moments."""
    return frechet_distance(moments.mean, moments.cov, other.mean, other.cov)


def format_results(results):
    """Results as one line for a log, without the hashes."""
    parts = []
    for key, value in results.items():
        if key.endswith("sha1"):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        parts.append(f"{key} {text}")
    return " | ".join(parts)
