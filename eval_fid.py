"""Measure: Fréchet distance in an encoder's features, verified accuracy on the shapes, PSNR and SSIM.

    python eval_fid.py                                          the shipped model against held-out images
    python eval_fid.py --ckpt runs/dit/last.pt --n 720 --guidance 1
    python eval_fid.py --reconstruct runs/decoder/last.pt --data photos/ --n 1000
The training scripts call the same functions on their EMA weights: one road to each number.
"""
import argparse
import json
import time
from itertools import count, islice, permutations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from scipy import ndimage
from tqdm import tqdm

import runtime
import sample
from data import SHAPES_VAL, open_data
from model import Encoder, pixel_statistics, unpack_rae
from runtime import at_least
from shapes import CLASSES, SHAPES, Object, Scene, Text, listing, read_scene


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
    (values1, vectors1), (values2, vectors2) = (torch.linalg.eigh(cov) for cov in (cov1, cov2))
    roots = vectors1 * values1.clamp(min=0).sqrt(), vectors2 * values2.clamp(min=0).sqrt()
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()           # rotations drop out
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def distance(a, b):                                        # of the Moments of all processes
    a.merge(), b.merge()
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def features(encoder, images):
    """Mean-pooled tokens of uint8 images b H W 3, at the side that the encoder takes: b c."""
    device = next(encoder.parameters(), torch.empty(0)).device         # pixels have none
    x = rearrange(images, "b h w c -> b c h w").to(device).float() / 255
    return encoder.encode(resize(x, encoder.image_size)).mean((2, 3)).cpu()


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


# ---------------------------------------------------------------------------------- evaluations
def gather(x):
    """The objects x of all processes, in a list."""
    parts = [x] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(parts) > 1:
        dist.all_gather_object(parts, x)
    return parts


def total(x):
    """Sum of a tensor over processes."""
    return runtime.all_mean(x) * (dist.get_world_size() if dist.is_initialized() else 1)


def real_images(data, numbers):
    """Images of open_data by number: uint8 b H W 3."""
    return rearrange(torch.stack([data[k]["image"] for k in numbers]), "b c h w -> b h w c")


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


def evaluate_generation(model, rae, val, args, n, rank=0, world=1, batch=72, weak=None, dtype="fp32",
                        judge=None):
    """Fréchet distance of n generated to n held-out images, and verified accuracy on the shapes.

    model: a DiT in eval mode. rae: with its encoder. val: Data of the held-out split. args: sampling flags.
    judge: the Encoder of whose features the distance is, by default the RAE's own.
    Labels are balanced: image i has class i % num_classes. Returns a dict, the same on all processes.
    """
    real, fake, counts = Moments(), Moments(), torch.zeros(3, dtype=torch.float64)
    judge = judge or rae.encoder
    for chunk in tqdm(sample.share(n, rank, world, batch), "evaluate", leave=False, disable=rank > 0 or None):
        labels = [i % model.num_classes for i in chunk]
        images = sample.generate(model, rae, labels, args, chunk, weak, dtype)
        fake.add(features(judge, images))
        real.add(features(judge, real_images(val, chunk)))
        if val.class_names == CLASSES:
            counts += verify(images, labels)
    metrics = dict(n=n, guidance=args.guidance, sampling_steps=args.sampling_steps, solver=args.solver,
                   frechet_distance=distance(real, fake))
    found = zip(("right_colour", "right_colour_and_shape", "unsure"), (total(counts) / n).tolist())
    return metrics | dict(found if val.class_names == CLASSES else {})


@torch.no_grad()
def evaluate_reconstruction(rae, val, n, rank=0, world=1, batch=72, dtype="fp32", domain=0, vgg=None,
                            judge=None):
    """PSNR (dB), SSIM and Fréchet distance of the reconstructions of n held-out images. Returns a dict.

    domain: the source of a mixture that they are of. readable: of scenes, the share that read_scene reads as
    before; of text, of its letters. vgg: lpips.LPIPS, for the distance of that name. judge: as above.
    """
    device, real, fake, judge = rae.pixel_mean.device, Moments(), Moments(), judge or rae.encoder
    built_in = val.rows[domain] in (Scene, Text)
    numbers = [*islice((k for k in count() if val.place(k)[0] == domain), n)]
    sums = torch.zeros(4, dtype=torch.float64)
    for chunk in tqdm(sample.share(n, rank, world, batch), "evaluate", leave=False, disable=rank > 0 or None):
        chunk = [numbers[k] for k in chunk]
        x = rearrange(real_images(val, chunk), "b h w c -> b c h w").to(device).float() / 255
        with runtime.autocast(device, dtype):
            back = rae.decode(rae.encode(resize(x, rae.encoder.image_size))).float()
        x = resize(x, back.shape[-1])                                  # judged at the decoder's size
        sums[2] += vgg(x, back, normalize=True).sum().cpu() if vgg else 0
        images, back = (rearrange((y * 255).round().byte(), "b c h w -> b h w c").cpu() for y in (x, back))
        sums[:2] += torch.stack([psnr(images, back).sum(), ssim(images, back).sum()])
        for k, a, b in zip(chunk, images.numpy(), back.numpy()) if built_in else ():
            sums[3] += readable(val.drawn(k), a, b)
        real.add(features(judge, images))
        fake.add(features(judge, back))
    values = (total(sums) / n).tolist()
    metrics = dict(n=n, psnr=values[0], ssim=values[1], frechet_distance=distance(real, fake))
    return metrics | dict([("lpips", values[2])] * bool(vgg) + [("readable", values[3])] * built_in)


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
    return " | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())


# ---------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--reconstruct", metavar="CKPT", help="measure this autoencoder (of stage 1 or 2) instead")
    p.add_argument("--shapes_eval", action="store_true", help="300 prompts for train_t2i.py's model")
    p.add_argument("--data", nargs="+", help="reference images; default: those that it was trained on")
    p.add_argument("--hold_out", type=at_least(0), help="held-out; default: as trained; 0 with --data: all")
    p.add_argument("--n", type=at_least(2), help="images; few bias the distance; default: up to 720")
    p.add_argument("--features", help="encoder whose features the distance is of; default: the model's own")
    p.add_argument("--out", type=Path, help="also write the JSON result to this file")
    args = sample.parse_model_args(p, argv, "shapes_eval")
    if args.shapes_eval and (args.reconstruct or args.data or (args.n or 6) < 6):
        p.error("--shapes_eval needs neither --reconstruct nor --data, and --n of at least 6")
    if args.features and args.shapes_eval:
        p.error("--shapes_eval reads what is drawn; --features is of the Fréchet distance, leave one out")
    try:
        args.features and pixel_statistics(args.features)
    except ValueError as error:
        p.error(str(error).replace("--encoder", "--features"))
    if (args.features or "").startswith("vae"):
        p.error(f"--features {args.features} is untrained; give an encoder with weights")
    if args.release and args.reconstruct:
        p.error("--release and --reconstruct exclude each other; leave one out")
    if args.release and not args.data and not args.shapes_eval:
        p.error(f"--release {args.release} needs --data: a folder or tars of ImageNet, its reference images")
    return args


def main(args):
    rank, world, device = runtime.setup()
    start, path = time.time(), args.reconstruct or args.ckpt
    state, val = runtime.load_checkpoint(path) if args.reconstruct else {}, None
    if args.reconstruct and "rae" not in state:
        raise ValueError(f"{path} is no checkpoint of train_decoder.py or train_dit.py; give one")
    stage1 = args.reconstruct and "num_classes" not in state           # it sees scenes of 1 to 4 objects
    split = dict(split="val", objects=(1, 2, 3, 4) if stage1 else 1)
    if args.data:                                                      # told before any model is loaded
        val = open_data(args.data, 64, hold_out=args.hold_out or 0, **split)
    if args.reconstruct:
        rae = unpack_rae(state["rae"]).to(device)
    else:
        model, rae, state, weak = sample.load_models(args, device, encoder=True)
    if args.shapes_eval:
        metrics = evaluate_prompts(model, rae, args, args.n or 4 * len(shapes_eval()), rank, world)
    else:
        if val is None:
            hold_out = state["args"].get("hold_out", 0) if args.hold_out is None else args.hold_out
            val = open_data(state["args"]["data"], 64, hold_out=hold_out, **split)
        val.size = max(rae.decoder.grid * rae.decoder.patch, state["rae"]["size"])
        n = args.n or min(720, len(val))
        if n > len(val):
            raise ValueError(f"--n {n} is more than the {len(val)} reference images; try --n {len(val)}")
        more = dict(rank=rank, world=world, batch=args.batch, dtype=args.dtype,
                    judge=args.features and Encoder(args.features).to(device))
        if args.reconstruct:
            parts = [evaluate_reconstruction(rae, val, min(n, len(order)), domain=i, **more)
                     for i, order in enumerate(val.order)]
            metrics = parts[0] if len(parts) == 1 else dict(zip(val.domains, parts))
        else:
            metrics = evaluate_generation(model, rae, val, args, n, weak=weak, **more)
        metrics |= dict(features=args.features or state["rae"]["encoder"])
    metrics |= dict(checkpoint=str(path), seed=args.seed, commit=runtime.git_commit())
    if rank == 0:
        for key, value in metrics.items():
            print(f"{key:>24}  {value:.4f}" if isinstance(value, float) else f"{key:>24}  {value}")
        print(f"{'seconds':>24}  {time.time() - start:.1f}")
        print(json.dumps(metrics))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(metrics) + "\n")
    return metrics


if __name__ == "__main__":
    runtime.run(main, parse_args)
