"""How the time and memory of a DiT^DH's training step grow, beside its counted FLOPs.

    OMP_NUM_THREADS=1 python tests/growth.py            writes assets/growth.png, prints the fit

Forward and backward passes in fp32 of a DiT^DH around one that is varied in width, depth, tokens
and batch, in CPU seconds. The memory is what autograd keeps for the backward pass.
"""
import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import run_flags  # noqa: E402
import runtime  # noqa: E402
import speed  # noqa: E402
from memory import Graph  # noqa: E402
from model import build_dit, flow_matching_loss  # noqa: E402

CHANNELS = 64
BASE = dict(width=384, depth=6, grid=12, batch=4)
VALUES = {
    "width": (128, 192, 256, 384, 512, 768),
    "depth": (2, 4, 6, 8, 12),
    "grid": (6, 8, 12, 16, 20, 24),            # tokens are its square
    "batch": (1, 2, 4, 6, 8),
}


def measure(width, depth, grid, batch, repeats):
    """A dict of FLOPs, bytes that autograd keeps, parameters, and CPU seconds of a step."""
    head = dict(head_width=2 * width, head_depth=2, head_heads=8)
    flags = dict(width=width, depth=depth, heads=4, class_dropout=0.0, **head)
    model = build_dit(flags, CHANNELS, grid, 10).eval()
    x0 = torch.randn(batch, CHANNELS, grid, grid)
    t, labels = torch.rand(batch), torch.zeros(batch, dtype=torch.long)
    graph = Graph(model.parameters())
    seconds = []
    for repeat in range(1 + repeats):
        start = time.process_time()
        flow_matching_loss(model, x0, labels, t, torch.randn_like(x0)).mean().backward()
        if repeat > 0:                                 # the first one warms up
            seconds.append(time.process_time() - start)
        model.zero_grad(set_to_none=True)
    with graph.record():
        flow_matching_loss(model, x0, labels, t, x0)
    flops = batch * speed.count_flops(model, x0[:1], t[:1], labels[:1]).training
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dict(flops=flops, bytes=graph.bytes(), parameters=parameters,
                seconds=statistics.median(seconds))


def fit(points):
    """Seconds = FLOPs / rate + bytes / bandwidth + a step's own: the three of them, and the largest
    relative error. By least squares of relative errors, none of them below 0.
    """
    from scipy.optimize import nnls
    terms = np.array([[p["flops"], p["bytes"], 1.0] for p in points])
    seconds = np.array([p["seconds"] for p in points])
    scale = terms.max(0)
    coefficients, _ = nnls(terms / scale / seconds[:, None], np.ones(len(points)))
    predicted = terms / scale @ coefficients
    return coefficients / scale, predicted / seconds - 1


def draw(points, coefficients, path):
    """Time above, memory below, against each size."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 4.8), sharey="row", dpi=80)
    for column, (name, values) in enumerate(VALUES.items()):
        chosen = points[name]
        x = [value ** 2 for value in values] if name == "grid" else list(values)
        flops = np.array([p["flops"] for p in chosen])
        kept = np.array([p["bytes"] for p in chosen])
        top, bottom = axes[:, column]
        top.plot(x, [p["seconds"] for p in chosen], "o", color="black", label="measured")
        top.plot(x, flops * coefficients[0], "--", color="grey", label="FLOPs alone")
        top.plot(x, flops * coefficients[0] + kept * coefficients[1] + coefficients[2], "-",
                 color="#2255cc", label="fit")
        bottom.plot(x, kept / 2 ** 20, "o-", color="black")
        bottom.set_xlabel("tokens" if name == "grid" else name)
        for axis in (top, bottom):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("CPU seconds of a step")
    axes[1, 0].set_ylabel("kept for backward, MiB")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="assets/growth.png", help="The plot.")
    p.add_argument("--repeats", type=run_flags.at_least(1), default=3,
                   help="Steps of each size, after one to warm up (default: 3).")
    return p.parse_args(argv)


def main(args):
    runtime.setup()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="--.*width .* is below")
    points = {}
    print("| varied | value | parameters, M | TFLOP | kept, MiB | seconds |")
    print("|---|---|---|---|---|---|")
    for name, values in VALUES.items():
        points[name] = []
        for value in values:
            point = measure(**{**BASE, name: value}, repeats=args.repeats)
            points[name].append(point)
            print(f"| {name} | {value} | {point['parameters'] / 1e6:.1f} | "
                  f"{point['flops'] / 1e12:.3f} | {point['bytes'] / 2 ** 20:.0f} | "
                  f"{point['seconds']:.3f} |", flush=True)
    every_point = [point for name in VALUES for point in points[name]]
    coefficients, errors = fit(every_point)
    print(f"\nseconds = FLOPs / {1e-9 / max(coefficients[0], 1e-30):.0f} GFLOP/s + bytes / "
          f"{1e-9 / max(coefficients[1], 1e-30):.2f} GB/s + {1e3 * coefficients[2]:.1f} ms; errors "
          f"{100 * errors.min():.0f}% to {100 * errors.max():.0f}%, median "
          f"{100 * np.median(abs(errors)):.0f}%")
    draw(points, coefficients, args.out)


if __name__ == "__main__":
    main(parse_args())
