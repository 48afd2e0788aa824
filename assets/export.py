"""Write what sampling needs of a checkpoint (EMA weights, autoencoder, flags) as half-precision safetensors.

    python assets/export.py runs/dit/last.pt assets/tiny_dit.safetensors
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

import runtime


def flatten(node, prefix=""):
    """Split nested dicts into {"a/b": tensor} and the same dicts with the plain values alone."""
    tensors, plain = {}, {}
    for key, value in node.items():
        if isinstance(value, dict):
            inner, plain[key] = flatten(value, f"{prefix}{key}/")
            tensors |= inner
        elif isinstance(value, torch.Tensor):
            tensors[prefix + key] = value.half().contiguous()
        else:
            plain[key] = value
    return tensors, plain


if __name__ == "__main__":
    source, target = sys.argv[1:]
    state = runtime.load_checkpoint(source)
    duplicate = "ema" if "latent_shape" not in state else None         # stage 1: rae has the decoder already
    leave_out = ("model", "opt", "level", duplicate)
    tensors, plain = flatten({k: v for k, v in state.items() if k not in leave_out})
    save_file(tensors, target, metadata={"plain": json.dumps(plain)})
    print(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB")
