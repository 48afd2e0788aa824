"""Measure: FID and its kin, verified accuracy on the shapes, reconstructions, an encoder's linear probe.

    python eval_fid.py                                          the shipped model against held-out images
    python eval_fid.py --ckpt runs/dit/last.pt --n 720 --guidance 1
    python eval_fid.py --samples guided.npz --data VIRTUAL_imagenet256_labeled.npz
    python eval_fid.py --reconstruct runs/decoder/last.pt --data photos/ --n 1000 --features inception
    python eval_fid.py --save_stats photos.npz --data photos/ --size 256
    python eval_fid.py --probe dinov2-b --data imagenet/ --hold_out 50000
The training scripts call the same functions on their EMA weights: one road to each number.
"""
import argparse
import hashlib
import json
import struct
import sys
import time
import zipfile
from functools import partial
from importlib.util import find_spec
from itertools import count, islice, permutations
from pathlib import Path

import lpips
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from scipy import ndimage
from torchvision.models import Inception3
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize
from tqdm import tqdm

import runtime
import sample
from data import SHAPES_VAL, open_data
from model import IMAGENET, Encoder, fetching, load_vit, pixel_statistics, unpack_rae
from runtime import at_least
from shapes import CLASSES, SHAPES, Object, Scene, Text, listing, read_scene

INCEPTION = "weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"   # the same
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION[0]}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FRECHET = {"inception": "fid", "fd-dinov2": "fd_dinov2"}    # name by features; of encoders frechet_distance
KEPT = 10_000, 50_000          # feature rows that are kept of references and of samples: as ADM's suite has
USED = {"samples": "data size n batch features inception curve out",        # flags of what draws nothing
        "save_stats": "data size n batch features inception out", "probe": "data size hold_out n batch out",
        "reconstruct": "data hold_out n batch features inception lpips dtype out"}
NOT_USED = {"shapes_eval": "data size hold_out features inception curve lpips", "ckpt": "size lpips"}


# ---------------------------------------------------------------------------------- features
def resize_tf(x, side):        # b c h w; bilinear as in TensorFlow 1: no half-pixel centres, no antialias
    for dim in (3, 2):
        at = torch.arange(side, device=x.device) * (x.shape[dim] / side)
        low, w = at.long(), (at - at.long()).view((-1, 1)[:4 - dim])
        a, b = (x.index_select(dim, i.clamp(max=x.shape[dim] - 1)) for i in (low, low + 1))
        x = a + (b - a) * w
    return x


class Inception(nn.Module):
    """The network that defines FID: TensorFlow's Inception v3 of 2015-12-05, in torchvision's blocks.

    path: its weights, either file of INCEPTION; None: of torch.hub's folder, or downloaded there.
    forward: images b H W 3 uint8 -> pooled features b 2048; spatial ones b 2023, of sFID: 17 x 17 x the first
        7 channels of TensorFlow's mixed_6/conv. logits: rows b 2048 -> b 1008, no bias, as in ADM's suite.
    Source: arXiv 1512.00567, 1706.08500 (FID), 1606.03498 (IS), 2103.03841 (sFID); ADM's evaluator.py
    Raises FileNotFoundError, and ValueError if the file is another (by sha256).
    """
    name, channels = "inception", 2048

    def __init__(self, path=None):
        super().__init__()
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        path = Path(path or next((hub / x for x in INCEPTION if (hub / x).exists()), hub / INCEPTION[0]))
        if not path.exists():
            with fetching(f"no {path}", f"put {INCEPTION_URL} into {hub}, or name it by --inception"):
                if path.parent != hub:
                    raise FileNotFoundError
                hub.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != INCEPTION_SHA256:
            raise ValueError(f"{path} has sha256 {found[:8]}, not {INCEPTION_SHA256[:8]}: it is no copy of "
                             f"{INCEPTION_URL}; get that one")
        net = Inception3(1008, aux_logits=False, init_weights=False)
        net.load_state_dict(torch.load(path, weights_only=True))
        for name, block in net.named_children():           # the pools that torchvision has differently
            if hasattr(block, "branch_pool"):
                how = dict(kernel_size=3, stride=1, padding=1)
                pool = partial(F.max_pool2d, **how) if name == "Mixed_7c" else \
                    partial(F.avg_pool2d, **how, count_include_pad=False)
                block._forward = partial(self.patched, block, block._forward, pool)
        self.register_buffer("fc", net.fc.weight.detach())
        self.net = create_feature_extractor(net.eval(), {"Mixed_6d.branch1x1": "spatial", "avgpool": "pool"})
        self.requires_grad_(False).eval()

    @staticmethod
    def patched(block, forward, pool, x):        # its branches, the last of which is pooled otherwise
        return [*forward(x)[:-1], block.branch_pool(pool(x))]

    def forward(self, images):
        x = rearrange(images.to(self.fc.device), "b h w c -> b c h w").float()
        maps = self.net((resize_tf(x, 299) - 128) / 128)
        return maps["pool"].flatten(1), rearrange(maps["spatial"][:, :7], "b c h w -> b (h w c)")

    def logits(self, rows):
        return rows.to(self.fc.device) @ self.fc.T


class DINOv2(nn.Module):
    """The network of FD-DINOv2, ViT-L/14 without registers. forward: b 3 224 224 in [0,1] -> its CLS b 1024.

    As dgm-eval: 224 px, bicubic and antialiased; positions by DINOv2's own code, which adds 0.1 to the grid.
    Source: arXiv 2306.04675
    """
    name, channels, image_size, release = "fd-dinov2", 1024, 224, "vit_large_patch14_dinov2.lvd142m"

    def __init__(self):
        super().__init__()
        self.vit = load_vit(self.release, 518)             # as it was trained: 37 x 37 patches; 16 x 16 here
        self.vit.patch_embed.set_input_size(img_size=self.image_size)
        first, table = self.vit.pos_embed.data.split([1, 37 * 37], 1)
        table = rearrange(table, "1 (h w) c -> 1 c h w", h=37)
        table = F.interpolate(table, scale_factor=16.1 / 37, mode="bicubic")
        self.vit.pos_embed.data = torch.cat([first, rearrange(table, "1 c h w -> 1 (h w) c")], 1)
        self.requires_grad_(False).eval()

    def forward(self, x):
        return self.vit(normalize(x, *IMAGENET))


@torch.no_grad()
def features(judge, images):
    """Rows b c of uint8 images b H W 3, and spatial ones of Inception, else None; of Encoders mean tokens."""
    if isinstance(judge, Inception):
        return [x.cpu() for x in judge(images)]
    device = next(judge.parameters(), torch.empty(0)).device           # pixels have none
    x = rearrange(images, "b h w c -> b c h w").to(device).float() / 255
    x = resize(x, judge.image_size)
    return (judge(x) if isinstance(judge, DINOv2) else judge.encode(x).mean((2, 3))).cpu(), None


def find_judge(name, path=None):                           # path: of Inception's weights
    return Inception(path) if name == "inception" else DINOv2() if name == "fd-dinov2" else Encoder(name)


# ---------------------------------------------------------------------------------- Fréchet distance
class Moments:
    """Mean and covariance of feature rows, streamed in fp64: the same for any batches and processes.

    add(rows: b f); merge() combines processes; mean: f; cov: f f, over n - 1.       Source: Chan et al. 1979
    """

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, rows):
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        self.join(len(rows), mean, centred.T @ centred)

    def join(self, n, mean, scatter):
        total = self.n + n
        if n:
            delta = mean - self.mean
            self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
            self.mean = self.mean + delta * (n / total)
            self.n = total

    def merge(self):
        parts = gather((self.n, self.mean, self.scatter))
        self.__init__()
        for part in parts:
            self.join(*part)

    @property
    def cov(self):
        return self.scatter / (self.n - 1)


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) in fp64; finite for rank-deficient ones too.

    mu: f. cov: f f. Arrays or tensors.   Source: arXiv 1706.08500; tr (A B)^(1/2) is the sum of the singular
    values of A^(1/2) B^(1/2), roots by symmetric eigendecomposition: no root of a rounding error is summed.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, cov1, mu2, cov2))
    if cov1.shape != cov2.shape or mu1.shape != mu2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"features of {len(mu1)} and {len(mu2)} dimensions differ; use one encoder")
    roots = []
    for values, vectors in (torch.linalg.eigh(cov) for cov in (cov1, cov2)):
        at = values > values[-1] * len(values) * 2e-16     # the others are zeros, rounded
        roots.append(vectors[:, at] * values[at].sqrt())
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()           # rotations drop out
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


class ImageSet:
    """What images leave behind: moments of their features, rows of the first `most`, a fingerprint of pixels.

    judge: of find_judge. add(images: uint8 b H W 3, numbers: b), in any batches on any processes; then
    merge(). pool, spatial: Moments; rows: n c and labels: n, by number; sha1: of all images, in any order;
    side: (H, W); n: how many, None if statistics do not say.
    """
    def __init__(self, judge, most):
        self.judge, self.most, self.sha1, self.side = judge, most, 0, None
        self.pool, self.spatial = Moments(), Moments()
        self.rows, self.numbers = [torch.empty(0)], [torch.empty(0, 2, dtype=torch.long)]

    def add(self, images, numbers, labels=None):
        numbers = torch.tensor([[*numbers], [*(labels or numbers)]]).T
        rows, spatial = features(self.judge, images)
        self.pool.add(rows)
        spatial is None or self.spatial.add(spatial)
        for kept, x in ((self.numbers, numbers), (self.rows, rows)):
            kept.append(x[numbers[:, 0] < self.most])
        self.side = tuple(images.shape[1:3])
        self.sha1 += sum(int.from_bytes(hashlib.sha1(x.tobytes()).digest(), "big") for x in images.numpy())

    def merge(self):
        self.pool.merge(), self.spatial.merge()
        if self.pool.n < 2:
            raise ValueError(f"{self.pool.n} image is too few to measure a distance; give at least 2")
        parts = gather((torch.cat(self.numbers), torch.cat(self.rows), self.sha1, self.side))
        numbers, rows, sha1, sides = zip(*parts)
        order = (numbers := torch.cat(numbers))[:, 0].argsort()
        self.rows, self.labels, self.n = torch.cat(rows)[order], numbers[order, 1], self.pool.n
        self.side, self.sha1 = next(filter(None, sides)), f"{sum(sha1) % 16 ** 40:040x}"[:12]
        return self

    def save(self, path):                        # mu, sigma, mu_s, sigma_s: ADM's names
        spatial = dict(mu_s=self.spatial.mean, sigma_s=self.spatial.cov) if self.spatial.n else {}
        kept = dict(mu=self.pool.mean, sigma=self.pool.cov, rows=self.rows, n=self.pool.n, side=self.side,
                    features=self.judge.name, **spatial)
        runtime.whole_file(path, lambda f: np.savez(f, **kept))


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of logits n k: mean and standard deviation over `splits` parts of them.

    Source: arXiv 1606.03498. The order is torch-fidelity's, so that images sorted by class do no harm.
    """
    logits = torch.as_tensor(logits).double()[np.random.RandomState(2020).permutation(len(logits))]
    ends = [len(logits) * i // splits for i in range(1, splits)]
    scores = [(p * (p.log() - p.mean(0).log())).sum(1).mean().exp() for p in
              (x.softmax(1).clamp(min=1e-300) for x in logits.tensor_split(ends) if len(x))]
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """Shares of fake in the manifold of real, and of real in that of fake: rows n c and m c.

    Manifold: the balls around all rows that reach to the k-th nearest other one. In blocks, of 1000 rows.
    Source: arXiv 1904.06991, as in ADM's suite.
    """
    def covered(rows, by):
        radii = torch.cat([torch.cdist(x, by).kthvalue(min(k + 1, len(by))).values for x in by.split(1000)])
        return sum(int((torch.cdist(x, by) <= radii).any(1).sum()) for x in rows.split(1000)) / len(rows)
    return covered(fake, real), covered(real, fake)


def kernel_distance(real, fake, subsets=100, size=1000):
    """Unbiased squared MMD of rows n c and m c under (x.y / c + 1)^3: mean and deviation over subsets (KID).

    Source: arXiv 1801.01401; the subsets are torch-fidelity's. size: at most that of the smaller set.
    """
    rng, found, m = np.random.RandomState(2020), [], min(size, len(real), len(fake))
    for _ in range(subsets):
        y, x = (rows[rng.choice(len(rows), m, replace=False)] for rows in (fake, real))
        xx, yy, xy = (((a @ b.T).double() / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum(z.sum() - z.trace() for z in (xx, yy)) / (m * (m - 1))
        found.append(float(within - 2 * xy.mean()))
    return float(np.mean(found)), float(np.std(found))


def extrapolate(real, fake, path):
    """Fréchet distance at ten sample sizes and, by the line through them in 1/n, for n without end; a plot.

    Source: arXiv 1911.07023. Sizes reach from a tenth of n, or twice the dimension if there are so many.
    """
    rows, rng, points = fake.rows.double(), np.random.default_rng(0), []
    low = max(len(rows) / 10, min(2 * rows.shape[1], len(rows) / 2))
    for n in np.linspace(low, len(rows), 10).astype(int).tolist():
        part = rows[rng.permutation(len(rows))[:n]]
        points.append((n, frechet_distance(part.mean(0), part.T.cov(), real.pool.mean, real.pool.cov)))
    x, y = 1 / np.array(points)[:, 0], np.array(points)[:, 1]
    slope, end = np.polyfit(x, y, 1).tolist()
    import matplotlib.pyplot as plt                        # of requirements-dev.txt
    figure, panel = plt.subplots(figsize=(5, 3.5), layout="constrained")
    panel.plot(x, y, "o", [0, x.max()], [end, end + slope * x.max()], "-")
    panel.set(xlabel="1 / n", ylabel=f"Fréchet distance ({fake.judge.name})",
              title=f"{y[-1]:.3f} of n = {points[-1][0]}, {end:.3f} without end")
    runtime.whole_file(path, lambda f: figure.savefig(f, dpi=100, format="png"))
    plt.close(figure)
    return dict(curve=points, extrapolated=end)


def compare(real, fake, curve=None):
    """All distances of ImageSet fake to ImageSet real, by name: a dict, the same on all processes."""
    same_side(real.side, fake.side)
    inception, found = isinstance(fake.judge, Inception), {}
    kernel = "kid" if inception else "kernel_distance"
    found[FRECHET.get(fake.judge.name, "frechet_distance")] = distance(real.pool, fake.pool)
    if real.spatial.n:
        found["sfid"] = distance(real.spatial, fake.spatial)
    if inception:
        logits = torch.cat([fake.judge.logits(x).cpu() for x in fake.rows.split(1000)])
        found["inception_score"], found["inception_score_std"] = inception_score(logits)
    if len(real.rows):
        found["precision"], found["recall"] = precision_recall(real.rows, fake.rows)
        found[kernel], found[f"{kernel}_std"] = kernel_distance(real.rows, fake.rows)
    found |= extrapolate(real, fake, curve) if curve else {}
    return found | dict(reference_sha1=real.sha1, samples_sha1=fake.sha1)


def distance(a, b):                                        # of Moments
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def same_side(a, b):                                       # (H, W) or None, unknown
    if a and b and a != b:
        raise ValueError(f"images of {a[0]} x {a[1]} and {b[0]} x {b[1]} pixels can't be compared; crop the "
                         f"reference by --size, or resize one of them")


def gather(x):
    """The objects x of all processes, in a list."""
    parts = [x] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(parts) > 1:
        dist.all_gather_object(parts, x)
    return parts


def total(x):
    """Sum of a tensor over processes."""
    return runtime.all_mean(x) * (dist.get_world_size() if dist.is_initialized() else 1)


# ---------------------------------------------------------------------------------- pairs of images
def psnr(a, b):
    """Peak signal-to-noise ratio of each pair, dB: a, b: b H W 3 uint8 -> b fp64; infinite if identical."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255 ** 2 / mse)


def ssim(a, b):
    """Structural similarity of each pair, mean over pixels and channels: a, b: b H W 3 uint8 -> b fp64.

    Gaussian window of sigma 1.5 and 11 pixels.                        Source: Wang et al. 2004, equation 13
    """
    def blur(x):
        x = ndimage.gaussian_filter1d(x, 1.5, axis=1, radius=5)
        return ndimage.gaussian_filter1d(x, 1.5, axis=2, radius=5)[:, 5:-5, 5:-5]
    a, b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    if min(a.shape[1:3]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 pixels a side, not {a.shape[1]} x {a.shape[2]}")
    mean_a, mean_b, c1, c2 = blur(a), blur(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    value = torch.from_numpy(top / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return value.flatten(1).mean(1)


# ---------------------------------------------------------------------------------- verified accuracy
def verify(images, labels):
    """How many uint8 images b H W 3 of the built-in world show exactly one object of class labels: b.

    Returns a tensor of three counts: right colour, right colour and shape, unsure of the shape or of all.
    Unsure counts as wrong. The colour is read by itself: it can be plain where the shape is not.
    """
    counts = torch.zeros(3, dtype=torch.float64)
    for image, label in zip(images.numpy(), labels):
        objects = read_scene(image)
        colours = read_scene(image, colours=True) if objects is None else [o.colour for o in objects]
        counts[0] += colours == [CLASSES[label].split()[0]]
        counts[1] += objects is not None and [o.label for o in objects] == [label]
        counts[2] += objects is None
    return counts


# ---------------------------------------------------------------------------------- ShapesEval
def shapes_eval():
    """GenEval's six categories on the built-in world, in turn: 300 (category, prompt, names, relation).

    Classes together, and numbers of one, are those never shown in training (Scene.held_out). arXiv 2310.11513
    """
    kinds = {name: Object(*name.split()[::-1]) for name in CLASSES}
    pairs = [(a, b) for a, b in permutations(CLASSES, 2) if Scene([kinds[a], kinds[b]]).held_out()]
    apart = [(a, b) for a, b in pairs if not {*a.split()} & {*b.split()}]
    many = [[name] * n for name in CLASSES for n in (2, 3, 4) if Scene([kinds[name]] * n).held_out()]
    bases = {"single object": [(f"a {shape}", [shape], None) for shape in SHAPES],
             "two objects": [(f"a {a} and a {b}", [a, b], None) for a, b in permutations(SHAPES, 2)],
             "counting": [(listing(names), names, None) for names in many],
             "colours": [(f"a {name}", [name], None) for name in CLASSES],
             "position": [(f"a {a} {word} a {b}", [a, b], (a, word, b)) for a, b in pairs
                          for word in ("left of", "right of", "above", "below")],
             "colour attribution": [(f"a {a} and a {b}", [a, b], None) for a, b in apart]}
    asks = ("{}", "a picture of {}", "draw {}", "an image of {}", "there is {}", "please show me {}",
            "generate an image of {}", "i would like {}", "can you generate a photo of {}?")
    fifty = [[(category, ask.format(base[i][0]), *base[i][1:]) for ask in asks for i in
              np.random.default_rng(0).permutation(len(base))][:50] for category, base in bases.items()]
    return [test for tests in zip(*fifty) for test in tests]


def fulfilled(objects, names, relation):
    """Whether objects of read_scene (None: unsure) are those named, by class or by shape, and stand so."""
    found = [o.name if " " in names[0] else o.shape for o in objects or ()]
    stands = [(found[i], word, found[j]) for i, word, j in Scene(objects or ()).relations()]
    return sorted(found) == sorted(names) and (relation is None or relation in stands)


def answered(t2i, latents, scenes):
    """How many of all questions about b scenes are answered rightly from latents b c h w, and how many."""
    asked = [(k, *pair) for k, scene in enumerate(scenes) for pair in scene.questions()]
    told = [answer for some in (asked[k:k + 256] for k in range(0, len(asked), 256))
            for answer in t2i.ask(latents[[k for k, *_ in some]], [question for _, question, _ in some])]
    return torch.tensor([sum(a == answer for a, (*_, answer) in zip(told, asked)), len(asked)]).double()


def evaluate_prompts(t2i, rae, args, n, rank=0, world=1):
    """ShapesEval of n images, and answers to questions on 200 held-out scenes and on what it drew: a dict."""
    tests, every = shapes_eval(), [category for category, *_ in shapes_eval()[:6]]
    counts, answers = torch.zeros(len(every), 2).double(), torch.zeros(2, 2).double()
    chunks = sample.share(n, rank, world, max(1, args.batch // args.best_of))
    for chunk in tqdm(chunks, desc="evaluate", leave=False, disable=rank > 0 or None):
        some = [tests[i % len(tests)] for i in chunk]
        with runtime.autocast(rae.pixel_mean.device, args.dtype):
            latents = sample.best_of(t2i, [prompt for _, prompt, *_ in some], args, chunk)
            read = [read_scene(image) for image in sample.to_images(rae, latents).numpy()]
            sure = [k for k, objects in enumerate(read) if objects]
            answers[1] += answered(t2i, latents[sure], [Scene(read[k]) for k in sure])
        for (category, _, *wanted), objects in zip(some, read):
            counts[every.index(category)] += torch.tensor([fulfilled(objects, *wanted), 1])
    for chunk in sample.share(200, rank, world, 50):
        scenes = [Scene.random(0, SHAPES_VAL + k) for k in chunk]
        x = torch.from_numpy(np.stack([scene.render() for scene in scenes])).movedim(3, 1).float() / 255
        answers[0] += answered(t2i, rae.encode(x.to(rae.pixel_mean.device)), scenes)
    counts, answers = total(counts), total(answers)
    share, (seen, drawn) = ((x[:, 0] / x[:, 1].clamp(min=1)).tolist() for x in (counts, answers))
    return dict(n=n, guidance=args.guidance, sampling_steps=args.sampling_steps, best_of=args.best_of,
                verifier=args.verifier, overall=sum(share) / len(share), **dict(zip(every, share)),
                answers_on_images=seen, answers_on_own_latents=drawn)


# ---------------------------------------------------------------------------------- images
def real_images(data, numbers):
    """Images of open_data or Arrays by number: uint8 b H W 3. ValueError if one is broken or sizes differ."""
    return stack([data[k] for k in numbers])


def stack(items):
    if broken := {name for item in items for name in item.get("broken", ())}:
        raise ValueError(f"broken images can't be measured: {' '.join(sorted(broken))}; remove or mend them")
    if len(sizes := {tuple(item["image"].shape[1:]) for item in items}) > 1:
        raise ValueError(f"images of different sizes, {sizes}; --size centre-crops those of --data")
    return rearrange(torch.stack([item["image"] for item in items]), "b c h w -> b h w c")


class Arrays:
    """The images of an .npz, arr_0: n H W 3, uint8 or floats in [0,1], as sample.py and ADM's suite write it.

    Mapped into memory rather than read, unless it is compressed. Raises ValueError for anything else.
    """
    class_names, rows = [], [None]

    def __init__(self, path):
        if not self.inside(path):
            raise ValueError(f"{path} is no whole .npz of arr_0, or mu and sigma; write images by np.savez")
        with zipfile.ZipFile(path) as z, open(path, "rb") as f:
            info = z.getinfo("arr_0.npy")
            with z.open(info) as head:
                np.lib.format.read_magic(head)
                shape, _, dtype = np.lib.format.read_array_header_1_0(head)
                skip = head.tell()
            f.seek(info.header_offset + 26)                            # the lengths of name and extra field
            skip += info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
        stored = info.compress_type == zipfile.ZIP_STORED
        self.images = np.memmap(path, dtype, "r", skip, shape) if stored else np.load(path)["arr_0"]
        self.path = path
        if len(shape) != 4 or shape[3] != 3 or not (dtype == np.uint8 or dtype.kind == "f"):
            raise ValueError(f"{path} has arr_0 of {shape}, {dtype}; images are n H W 3, uint8 or floats")

    @staticmethod
    def inside(path):
        return zipfile.is_zipfile(path) and "arr_0.npy" in zipfile.ZipFile(path).namelist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        image = np.array(self.images[k])
        if image.dtype != np.uint8 and not 0 <= image.min() <= image.max() <= 1:      # nan, too
            raise ValueError(f"{self.path} has floats of {image.min():.3g} to {image.max():.3g}; scale them "
                             f"to [0,1], or store uint8")
        image = image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)
        return dict(image=torch.from_numpy(image).permute(2, 0, 1))


def image_set(data, n, judge, most, rank=0, world=1, batch=72):
    """The merged ImageSet of the first n images of open_data or Arrays."""
    found = ImageSet(judge, most)
    for chunk in tqdm(sample.share(n, rank, world, batch), "images", leave=False, disable=rank > 0 or None):
        items = [data[k] for k in chunk]
        found.add(stack(items), chunk, [item.get("label", 0) for item in items])
    return found.merge()


def is_npz(specs):
    return len(specs) == 1 and (specs[0].endswith(".npz") or zipfile.is_zipfile(specs[0]))


def open_images(specs, size=None, hold_out=0, **how):
    """What --data and --samples name: an .npz as it is, else open_data, cropped to `size` unless None."""
    if not is_npz(specs):
        return open_data(specs, size, split="val", hold_out=hold_out, **how)
    if not Path(specs[0]).exists():
        raise FileNotFoundError(f"{specs[0]} does not exist; give an .npz, a folder or tars")
    return Arrays(specs[0])


def load_statistics(path, judge):
    """ImageSet of an .npz with mu and sigma: of ImageSet.save, ADM's suite, pytorch-fid. None without them.

    Raises ValueError if they are another network's."""
    with np.load(path) as f:
        if not {"mu", "sigma"} <= {*f}:
            return None
        name, c = str(f["features"]) if "features" in f else "inception", len(f["mu"])
        if (name, c) != (judge.name, judge.channels):
            raise ValueError(f"{path} has statistics of {c} features of {name}, not the {judge.channels} of "
                             f"{judge.name}; give --features {name}, or other statistics")
        found = ImageSet(judge, 0)
        n = found.n = int(f["n"]) if "n" in f else None    # ADM's do not say
        for moments, mu, sigma in ((found.pool, "mu", "sigma"), (found.spatial, "mu_s", "sigma_s")):
            if {mu, sigma} <= {*f}:
                mean, cov = (torch.from_numpy(f[x]).double() for x in (mu, sigma))
                moments.join(n or 2, mean, cov * ((n or 2) - 1))
        found.rows = torch.from_numpy(f["rows"]) if "rows" in f else torch.empty(0)
        found.side = tuple(f["side"].tolist()) if "side" in f else None
        found.sha1 = hashlib.sha1(f["mu"].tobytes() + f["sigma"].tobytes()).hexdigest()[:12]
    return found


def reference(specs, size, judge, n=None, **share):
    """ImageSet of --data: statistics, or all (or the first n) of its images. ADM's file has both."""
    real = load_statistics(specs[0], judge) if is_npz(specs) and zipfile.is_zipfile(specs[0]) else None
    if real is None or Arrays.inside(specs[0]) and not len(real.rows):
        data = open_images(specs, size)
        own = image_set(data, min(n or len(data), len(data)), judge, KEPT[0], **share)
        if real is None:
            return own
        real.rows, real.side = own.rows, own.side          # for precision and recall
    return real


def check_features(p, args, flag):                         # of --features and the like
    name = getattr(args, flag) or "inception"
    try:
        name in FRECHET or pixel_statistics(name)
    except ValueError as error:
        p.error(str(error).replace("--encoder", f"--{flag}"))
    if name.startswith("vae") or getattr(args, flag) in FRECHET and flag == "probe":
        p.error(f"--{flag} {name} can't be used here; give an encoder with weights")


def check_n(args, val):
    """Refuse a training script's --eval_n beyond its held-out images, before anything is built."""
    least = min(map(len, val.order))                       # of a mixture, each source is evaluated
    if args.eval_every and args.eval_n > least:
        raise ValueError(f"--eval_n {args.eval_n} is more than the {least} held-out images; lower it, or "
                         f"raise --hold_out")


def check_side(args, val, side):                           # of the decoder's images, pixels
    least = 32 if any(rows in (Scene, Text) for rows in val.rows) else 11       # read_scene's, SSIM's
    if args.eval_every and side < least:
        raise ValueError(f"images of {side} pixels are too small to evaluate; make them at least {least}, by "
                         f"--size or --decoder_patch, or give --eval_every 0")


# ---------------------------------------------------------------------------------- evaluations
def evaluate_generation(model, rae, val, args, n, rank=0, world=1, batch=72, weak=None, dtype="fp32",
                        judge=None, real=None, curve=None):
    """Distances of n generated images to n held-out ones, and verified accuracy on the shapes.

    model: a DiT in eval mode. rae: with its encoder. val: Data of the held-out split. args: sampling flags.
    judge: of find_judge, whose features are taken, by default the RAE's own. real: an ImageSet in
    place of val. Labels are balanced: image i has class i % num_classes. Returns a dict, on all processes.
    """
    judge, counts = judge or rae.encoder, torch.zeros(3, dtype=torch.float64)
    verified = val is not None and val.class_names == CLASSES
    fake, own = ImageSet(judge, KEPT[1]), None if real else ImageSet(judge, KEPT[0])
    for chunk in tqdm(sample.share(n, rank, world, batch), "evaluate", leave=False, disable=rank > 0 or None):
        labels = [i % model.num_classes for i in chunk]
        images = sample.generate(model, rae, labels, args, chunk, weak, dtype)
        fake.add(images, chunk)
        own and own.add(real_images(val, chunk), chunk)
        if verified:
            counts += verify(images, labels)
    fake.merge(), own and own.merge()
    metrics = dict(n=n, labels="balanced", guidance=args.guidance, sampling_steps=args.sampling_steps,
                   solver=args.solver, **compare(real or own, fake, curve))
    found = zip(("right_colour", "right_colour_and_shape", "unsure"), (total(counts) / n).tolist())
    return metrics | dict(found if verified else {})


@torch.no_grad()
def reconstruct(rae, images, dtype="fp32"):
    """Uint8 images b H W 3 and their reconstructions, both of the decoder's side: two b 3 S S in [0,1]."""
    x = rearrange(images, "b h w c -> b c h w").to(device := rae.pixel_mean.device).float() / 255
    with runtime.autocast(device, dtype):
        back = rae.decode(rae.encode(resize(x, rae.encoder.image_size))).float()
    return resize(x, back.shape[-1]), back


def evaluate_reconstruction(rae, val, n, rank=0, world=1, batch=72, dtype="fp32", domain=0, vgg=None,
                            judge=None):
    """PSNR (dB), SSIM and Fréchet distance of the reconstructions of n held-out images. Returns a dict.

    domain: the source of a mixture that they are of. readable: of scenes, the share that read_scene reads as
    before; of text, of its letters. vgg: lpips.LPIPS, for the distance of that name. judge: as above.
    """
    judge = judge or rae.encoder
    real, fake, sums = ImageSet(judge, 0), ImageSet(judge, 0), torch.zeros(4, dtype=torch.float64)
    built_in = val.rows[domain] in (Scene, Text)
    mine = (k for k in count() if isinstance(val, Arrays) or val.place(k)[0] == domain)
    numbers = [*islice(mine, n)]
    for chunk in tqdm(sample.share(n, rank, world, batch), "evaluate", leave=False, disable=rank > 0 or None):
        chunk = [numbers[k] for k in chunk]
        x, back = reconstruct(rae, real_images(val, chunk), dtype)
        if vgg:
            with torch.no_grad():
                sums[2] += vgg(x, back, normalize=True).sum().cpu()
        images, back = (rearrange((y * 255).round().byte(), "b c h w -> b h w c").cpu() for y in (x, back))
        sums[:2] += torch.stack([psnr(images, back).sum(), ssim(images, back).sum()])
        for k, a, b in zip(chunk, images.numpy(), back.numpy()) if built_in else ():
            sums[3] += readable(val.drawn(k), a, b)
        real.add(images, chunk), fake.add(back, chunk)
    name = "rfid" if isinstance(judge, Inception) else FRECHET.get(judge.name, "frechet_distance")
    values, apart = (total(sums) / n).tolist(), distance(real.merge().pool, fake.merge().pool)
    metrics = {"n": n, "psnr": values[0], "ssim": values[1], name: apart}
    return metrics | dict([("lpips", values[2])] * bool(vgg) + [("readable", values[3])] * built_in,
                          reference_sha1=real.sha1, samples_sha1=fake.sha1)


def load_lpips():
    """LPIPS on VGG-16 (arXiv 1801.03924), frozen. Raises FileNotFoundError without its weights."""
    with fetching("no weights of VGG-16", f"put download.pytorch.org/models/vgg16-397923af.pth into "
                  f"{torch.hub.get_dir()}/checkpoints/, or do without --lpips and --gram"):
        return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)


def linear_probe(x, y, x_test, y_test, classes, steps=1500):
    """Accuracy on x_test n c, y_test n of a linear classifier of rows x m c, labels y m (AdamW, fp32)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        probe = nn.Linear(x.shape[1], classes)
        opt = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(1000, len(x)),))
            opt.zero_grad()
            F.cross_entropy(probe(x[rows]), y[rows]).backward()
            opt.step()
            schedule.step()
    return (probe(x_test).argmax(1) == y_test).float().mean().item()


def evaluate_probe(args, device, share):
    """Accuracy of a linear probe of an encoder's mean-pooled tokens, on held-out images. [RAE] table 1d"""
    encoder, built_in = Encoder(args.probe, args.size).to(device), not args.data
    specs = args.data or ["shapes"]
    how = dict(hold_out=0 if built_in else args.hold_out, objects=1)
    parts = [open_data(specs, encoder.image_size, split=split, **how) for split in ("train", "val")]
    if not parts[0].labelled:
        raise ValueError(f"--data {' '.join(specs)} has no classes to probe; give class folders")
    n = (args.n or 6000, args.hold_out or 3000) if built_in else (args.n or len(parts[0]), args.hold_out)
    a, b = (image_set(data, count, encoder, count, **share) for data, count in zip(parts, n))
    accuracy = linear_probe(a.rows, a.labels, b.rows, b.labels, parts[0].num_classes)
    return dict(probe=args.probe, n=n[0], held_out=n[1], accuracy=accuracy)


def readable(seen, image, back):
    """Share of the Scene or Text of an image that its reconstruction still shows: both uint8 H W 3."""
    if isinstance(seen, Text):
        return seen.read(back)
    found = read_scene(image), read_scene(back)
    return float(None not in found and sorted(o.name for o in found[0]) == sorted(o.name for o in found[1]))


def resize(images, side):                                  # b 3 H W in [0,1], antialiased
    same = images.shape[-1] == side
    return images if same else F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def one_line(metrics):
    parts = {k: v for k, v in metrics.items() if not k.endswith("sha1")}.items()
    return " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in parts)


# ---------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--samples", nargs="+", help="measure these images: a folder, tars, or .npz with arr_0")
    what.add_argument("--reconstruct", metavar="CKPT", help="measure this autoencoder (of stage 1 or 2)")
    what.add_argument("--shapes_eval", action="store_true", help="300 prompts for train_t2i.py's model")
    what.add_argument("--probe", metavar="ENCODER", help="accuracy of a linear classifier of its tokens")
    what.add_argument("--save_stats", metavar="X.npz", help="write the statistics of --data: later --data")
    p.add_argument("--data", nargs="+", help="reference images, or .npz of statistics; default: as trained")
    p.add_argument("--size", type=at_least(1), help="side to centre-crop --data to, px; default: as it is")
    p.add_argument("--hold_out", type=at_least(0), help="held-out; default: as trained; 0 with --data: all")
    p.add_argument("--n", type=at_least(2), help="images; default: all samples, of a model up to 720")
    p.add_argument("--features", help="inception, fd-dinov2 or an encoder; default: the model's, of files "
                   "inception")
    p.add_argument("--inception", metavar="PATH", help=f"{INCEPTION[0]}; default: download, once")
    p.add_argument("--lpips", action="store_true", help="with --reconstruct: that distance, too (VGG-16)")
    p.add_argument("--curve", metavar="X.png", help="distances at growing n, and for n without end; a plot")
    p.add_argument("--out", type=Path, help="also write the JSON result to this file")
    args = sample.parse_model_args(p, argv, "shapes_eval")
    mode = next((x for x in ("shapes_eval", *USED) if getattr(args, x)), "ckpt")
    given = {x[2:].split("=")[0] for x in (sys.argv[1:] if argv is None else argv) if x[:2] == "--"} - {mode}
    if idle := given - {*USED[mode].split()} if mode in USED else given & {*NOT_USED[mode].split()}:
        what = "new images" if mode == "ckpt" else f"--{mode}"
        p.error(f"--{min(idle)} does nothing with {what}; leave it out")
    if args.shapes_eval and (args.n or 6) < 6:
        p.error("--shapes_eval needs --n of at least 6")
    if mode in ("samples", "save_stats") and not args.data:
        p.error("--samples and --save_stats need --data, the reference")
    if args.curve and not (args.curve.endswith(".png") and find_spec("matplotlib")):
        p.error(f"--curve {args.curve} must be a .png, and needs matplotlib: pip install matplotlib")
    if args.inception and (args.features or "inception") != "inception":
        p.error(f"--inception {args.inception} does nothing with --features {args.features}; leave one out")
    if args.probe and args.data and not args.hold_out:
        p.error("--probe with --data needs --hold_out, the number of images to test on")
    check_features(p, args, "features"), check_features(p, args, "probe")
    if args.release and not args.data and not args.shapes_eval:
        p.error(f"--release {args.release} needs --data: a folder or tars of ImageNet, its reference images")
    if mode in ("samples", "save_stats") or args.release or args.inception:
        args.features = args.features or "inception"
    return args


def caution(n, channels, wanted):                          # what a reader of the number should know
    for wrong, text in ((n < 10_000, f"distances of {n} images come out too large"),
                        (n <= channels, f"{n} images give no full covariance of {channels} features"),
                        (n != wanted, f"the reference's protocol has {wanted} images, not {n}")):
        if wrong:
            print(f"warning: {text}; compare with the same n alone (--curve: by how much)", file=sys.stderr)


def evaluate_files(args, judge, share):
    """Distances of --samples to --data; or the statistics of --data, to a file."""
    endless, samples = {*args.data} & {"shapes", "text"}, args.samples and open_images(args.samples)
    n = args.n or (len(samples) if samples else None)
    if samples and n > len(samples):
        raise ValueError(f"--n {n} is more than the {len(samples)} of --samples; try --n {len(samples)}")
    if samples and not args.size and Arrays.inside(args.data[0]):       # told before anything is computed
        same_side(Arrays(args.data[0]).images.shape[1:3], tuple(samples[0]["image"].shape[1:]))
    count = n or 10_000 if endless else None if samples else n
    real = reference(args.data, args.size or (64 if endless else None), judge, count, **share)
    if args.save_stats:
        share["rank"] == 0 and real.save(args.save_stats)
        return dict(n=real.pool.n, save_stats=args.save_stats, reference_sha1=real.sha1), real
    fake = image_set(samples, n, judge, KEPT[1], **share)
    return dict(n=n, samples=" ".join(args.samples), **compare(real, fake, args.curve)), real


def evaluate_model(args, judge, device, share):
    """Distances of what a checkpoint draws or reconstructs to held-out images or --data; or ShapesEval."""
    path, state = args.reconstruct or args.ckpt, {}
    if args.reconstruct:
        state = runtime.load_checkpoint(path)
        if "rae" not in state:
            raise ValueError(f"{path} is no checkpoint of train_decoder.py or train_dit.py; give one")
    stage1 = args.reconstruct and "num_classes" not in state           # it sees scenes of 1 to 4 objects
    how = dict(objects=(1, 2, 3, 4) if stage1 else 1)
    whole = bool(args.data) and is_npz(args.data) and not args.reconstruct
    given = args.data and not whole                                    # told before any model is loaded
    val = open_images(args.data, 64, args.hold_out or 0, **how) if given else None
    if args.reconstruct:
        rae = unpack_rae(state["rae"]).to(device)
    else:
        model, rae, state, weak = sample.load_models(args, device, encoder=True)
    if args.shapes_eval:
        return evaluate_prompts(model, rae, args, args.n or 4 * len(shapes_eval()), share["rank"],
                                share["world"]), None, None
    judge, side = judge or rae.encoder, max(rae.decoder.grid * rae.decoder.patch, state["rae"]["size"])
    real = reference(args.data, None, judge, **share) if whole else None
    if val is None and not whole:
        hold_out = state["args"].get("hold_out", 0) if args.hold_out is None else args.hold_out
        val = open_data(state["args"]["data"], side, split="val", hold_out=hold_out, **how)
    n = args.n or (720 if whole else min(720, len(val)))
    if val is not None:
        val.size = side
        if n > len(val):
            raise ValueError(f"--n {n} is more than the {len(val)} reference images; try --n {len(val)}")
    if args.reconstruct:
        vgg = load_lpips().to(device) if args.lpips else None
        orders = getattr(val, "order", [val])
        parts = [evaluate_reconstruction(rae, val, min(n, len(order)), domain=i, vgg=vgg, judge=judge,
                                         dtype=args.dtype, **share) for i, order in enumerate(orders)]
        metrics = parts[0] if len(parts) == 1 else dict(zip(val.domains, parts))
    else:
        real and same_side(real.side, (side, side))
        metrics = evaluate_generation(model, rae, val, args, n, weak=weak, judge=judge, real=real,
                                      dtype=args.dtype, curve=args.curve, **share)
        metrics |= dict(interval=[*args.interval], release_grid=args.release_grid, weights=args.weights)
    metrics |= dict(checkpoint=str(path), seed=args.seed, dtype=args.dtype,
                    reference=" ".join(args.data or state["args"]["data"]))
    return metrics, real, judge


def main(args):
    rank, world, device = runtime.setup()
    for path in filter(None, (args.out, args.curve, args.save_stats)):  # told before anything is computed
        (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
    start, share = time.time(), dict(rank=rank, world=world, batch=args.batch)
    judge, real = find_judge(args.features, args.inception).to(device) if args.features else None, None
    if args.probe:
        metrics = evaluate_probe(args, device, share)
    elif args.samples or args.save_stats:
        metrics, real = evaluate_files(args, judge, share)
    else:
        metrics, real, judge = evaluate_model(args, judge, device, share)
    if judge and rank == 0 and not args.save_stats and "n" in metrics:
        caution(n := metrics["n"], judge.channels, min(real.n or 50_000, 50_000) if real else n)
    if judge:
        metrics |= dict(features=judge.name, reference_n=real.n if real else metrics.get("n"))
    metrics |= dict(commit=runtime.git_commit(), torch=torch.__version__, device=device.type)
    if rank == 0:
        for key, value in metrics.items():
            print(f"{key:>24}  {value:.4f}" if isinstance(value, float) else f"{key:>24}  {value}")
        print(f"{'seconds':>24}  {time.time() - start:.1f}")
        print(json.dumps(metrics))
        if args.out:
            runtime.whole_file(args.out, lambda f: f.write(json.dumps(metrics).encode() + b"\n"))
    return metrics


if __name__ == "__main__":
    runtime.run(main, parse_args)
