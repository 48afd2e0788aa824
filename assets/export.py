"""Write what sampling needs of a checkpoint as half-precision safetensors.

    python assets/export.py runs/dit/last.pt assets/tiny_dit.safetensors

That is the EMA weights, the autoencoder and the flags; the state of training is left out.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save

import run_flags
import runtime
import storage


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


def check(checkpoint, path):
    """Raise ValueError unless a checkpoint is one of the three training scripts."""
    missing = [key for key in ("args", "rae", "ema") if not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; give the last.pt of "
                         f"train_decoder.py, train_dit.py or train_t2i.py")


def needed_to_sample(checkpoint):
    """Return a checkpoint without the state of training."""
    left_out = ["model", "opt"]
    # In stage 1, which has no latent_shape, the EMA is the decoder that is already under "rae".
    if "latent_shape" not in checkpoint:
        left_out.append("ema")
    return {key: value for key, value in checkpoint.items() if key not in left_out}


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("source", metavar="CHECKPOINT.pt", help="Checkpoint of a training script.")
    p.add_argument("target", metavar="OUTPUT.safetensors", help="File to write.")
    return p.parse_args(argv)


def main(args):
    storage.check_out(args.target, "OUTPUT")
    storage.check_suffix(args.target, [".safetensors"], "OUTPUT")
    checkpoint = storage.load_checkpoint(args.source)
    check(checkpoint, args.source)
    tensors, plain = flatten(needed_to_sample(checkpoint))
    content = save(tensors, metadata={"plain": json.dumps(plain)})
    storage.write_whole(args.target, lambda f: f.write(content))
    print(f"{args.target}: {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    runtime.run(main, parse_args)
