"""Time one forward of a named DiT beside the matmul peak of the same machine, in fp32 and bf16.

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

def seconds(run, device, repeats=6):
    """Median time of run(), seconds, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=DIT_SIZES)
    parser.add_argument("--batch", type=runtime.at_least(1), default=4, help="of 768 x 16 x 16 latents")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = runtime.setup()[2]
    model = build_dit({**DIT_SIZES[args.model], "class_dropout": 0.1}, 768, 16, 1000)
    model = model.to(device).eval().requires_grad_(False)
    if args.compile:
        model.compile()
    inputs = (torch.randn(args.batch, 768, 16, 16, device=device), torch.rand(args.batch, device=device),
              torch.zeros(args.batch, dtype=torch.long, device=device))
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(4096 if device.type == "cuda" else 2048, 2048, device=device, dtype=kind)
                for _ in range(2))
        peak = 2 * a.numel() * len(b) / seconds(lambda: a @ b.T, device) / 1e9
        with runtime.autocast(device, dtype), torch.no_grad():
            took = seconds(lambda: model(*inputs), device)
        rate = 2 * float(GMACS[args.model]) * args.batch / took
        print(f"{args.model} batch {args.batch} {dtype}: {took:.3f} s, {rate:.0f} GFLOP/s = "
              f"{100 * rate / peak:.0f}% of the matmul peak {peak:.0f}")
