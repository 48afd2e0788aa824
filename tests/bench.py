"""Time one forward pass of a named DiT beside the fastest matmul of the same machine.

    python tests/bench.py DiTDH-S --batch 4
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime  # noqa: E402
from model import DIT_SIZES, build_dit  # noqa: E402
from test_judges import GMACS  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def time_calls(call, device, repeats=6):
    """Seconds of the first call(), which may compile, and the median of the others."""
    times = []
    for _ in range(1 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[0], sorted(times[1:])[repeats // 2]


def matmul_gflops(dtype, device):
    """10^9 floating-point operations per second of a large matrix product."""
    m, n = 2048, 2048
    if device.type == "cuda":
        m = 4096
    a = torch.randn(m, n, device=device, dtype=dtype)
    b = torch.randn(m, n, device=device, dtype=dtype)
    _, seconds = time_calls(lambda: a @ b.T, device)
    return 2 * m * m * n / seconds / 1e9


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("model", choices=DIT_SIZES)
    p.add_argument("--batch", type=runtime.at_least(1), default=4,
                   help="Number of latents 768 x 16 x 16 in a forward pass (default: 4).")
    p.add_argument("--compile", action="store_true", help="Compile its blocks by torch.compile.")
    return p.parse_args()


@torch.no_grad()
def main(args):
    _, _, device = runtime.setup()
    model = build_dit({**DIT_SIZES[args.model], "class_dropout": 0.1}, 768, 16, 1000)
    model = model.to(device).eval()
    if args.compile:
        runtime.compile_blocks(model)
    x = torch.randn(args.batch, 768, 16, 16, device=device)
    t = torch.rand(args.batch, device=device)
    y = torch.zeros(args.batch, dtype=torch.long, device=device)

    for name, dtype in DTYPES.items():
        peak = matmul_gflops(dtype, device)
        with runtime.autocast(device, name):
            first, seconds = time_calls(lambda: model(x, t, y), device)
        gflops = 2 * float(GMACS[args.model]) * args.batch / seconds
        print(f"{args.model} batch {args.batch} {name}: {seconds:.3f} s, the first time "
              f"{first:.1f} s; {gflops:.0f} GFLOP/s = {100 * gflops / peak:.0f}% of the matmul "
              f"peak {peak:.0f}")


if __name__ == "__main__":
    main(parse_args())
