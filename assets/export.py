"""Write what sampling needs of a checkpoint as half-precision safetensors.

    python assets/export.py runs/dit/last.pt assets/tiny_dit.safetensors

That is the EMA weights, the autoencoder and the flags; the state of training is left out.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

import runtime


def flatten(node, prefix=""):
    """Split nested dicts into their tensors and their plain values.

    Returns: tensors, a flat dict {"outer/inner": tensor} in half precision; plain, the same nested
        dicts with the plain values alone
    """
    tensors, plain = {}, {}
    for key, value in node.items():
        if isinstance(value, dict):
            inner_tensors, plain[key] = flatten(value, f"{prefix}{key}/")
            tensors.update(inner_tensors)
        elif isinstance(value, torch.Tensor):
            tensors[prefix + key] = value.half().contiguous()
        else:
            plain[key] = value
    return tensors, plain


def needed_to_sample(checkpoint):
    """Return a checkpoint without the state of training."""
    left_out = ["model", "opt"]
    # In stage 1, which has no latent_shape, the EMA is the decoder that is already under "rae".
    if "latent_shape" not in checkpoint:
        left_out.append("ema")
    return {key: value for key, value in checkpoint.items() if key not in left_out}


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: python assets/export.py CHECKPOINT.pt OUTPUT.safetensors")
    source, target = sys.argv[1:]
    tensors, plain = flatten(needed_to_sample(runtime.load_checkpoint(source)))
    save_file(tensors, target, metadata={"plain": json.dumps(plain)})
    print(f"{target}: {Path(target).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
