"""Write a release with the official files, keys and shapes but random weights: the whole road, no download.

    python tests/dry_run.py DIR imagenet256
    python sample.py --release imagenet256 --release_dir DIR --labels 207 --n 1 --out noise.png
DIR takes 5.8 GB. The keys are written out here from the published files, not taken from model.py.
"""
import argparse
from pathlib import Path

import torch

# release: latent grid; folders of decoder, statistics, DiT and guide
LAYOUT = {"imagenet256": (16, "ViTXL_n08", "imagenet1k", "ImageNet256/DiTDH-XL", "ImageNet256/DiTDH-S_ep14"),
          "imagenet512": (32, "ViTXL_n08_i512", "imagenet1k_512", "ImageNet512/DiTDH-XL_ep400",
                          "ImageNet512/DiTDH-S_ep20")}
# width, depth, MLP of the decoder; width, depth, heads of the DiTs and of the head that both share
XL = dict(decoder=(1152, 28, 4096), dit=(1152, 28, 16), guide=(384, 12, 6), head=(2048, 2, 16))


def linear(key, out, inner, *more):
    return {f"{key}.weight": (out, inner, *more), f"{key}.bias": (out,)}


def decoder_shapes(c, grid, d, depth, mlp, patch=16):
    shapes = linear("decoder_embed", d, c) | linear("decoder_pred", 3 * patch * patch, d)
    shapes |= {"decoder_pos_embed": (1, grid * grid + 1, d), "trainable_cls_token": (1, 1, d),
               "decoder_norm.weight": (d,), "decoder_norm.bias": (d,)}
    for i in range(depth):
        layer = f"decoder_layers.{i}."
        for name in ("query", "key", "value"):
            shapes |= linear(f"{layer}attention.attention.{name}", d, d)
        shapes |= linear(f"{layer}attention.output.dense", d, d)
        shapes |= linear(f"{layer}intermediate.dense", mlp, d) | linear(f"{layer}output.dense", d, mlp)
        for name in ("before", "after"):
            shapes |= {f"{layer}layernorm_{name}.weight": (d,), f"{layer}layernorm_{name}.bias": (d,)}
    return shapes


def block_shapes(i, d):
    hidden, block = int(2 / 3 * 4 * d), f"blocks.{i}."
    shapes = {f"{block}norm1.weight": (d,), f"{block}norm2.weight": (d,)}
    shapes |= linear(f"{block}attn.qkv", 3 * d, d) | linear(f"{block}attn.proj", d, d)
    shapes |= linear(f"{block}mlp.w12", 2 * hidden, d) | linear(f"{block}mlp.w3", d, hidden)
    return shapes | linear(f"{block}adaLN_modulation.1", 6 * d, d)


def ditdh_shapes(c, grid, d, depth, heads, e, head_depth, head_heads, classes=1000):
    n = grid * grid
    shapes = {"pos_embed": (1, n, d), "t_embedder.W": (256,)}
    shapes |= {"y_embedder.embedding_table.weight": (classes + 1, d)}
    shapes |= linear("x_embedder.proj", e, c, 1, 1) | linear("s_embedder.proj", d, c, 1, 1)
    shapes |= linear("t_embedder.mlp.0", d, 512) | linear("t_embedder.mlp.2", d, d)
    shapes |= linear("s_projector", e, d)
    for rope, dh in (("enc_feat_rope", d // heads), ("dec_feat_rope", e // head_heads)):
        shapes |= {f"{rope}.freqs_cos": (n, dh), f"{rope}.freqs_sin": (n, dh)}
    for i in range(depth + head_depth):
        shapes |= block_shapes(i, d if i < depth else e)
    shapes |= {"final_layer.norm_final.weight": (e,)} | linear("final_layer.linear", c, e)
    return shapes | linear("final_layer.adaLN_modulation.1", 2 * e, e)


def write(folder, release, decoder, dit, guide, head, c=768, save=torch.save):
    """The four files of a release under `folder`; returns their paths: decoder, statistics, DiT, guide."""
    grid, *names = LAYOUT[release]
    paths = [f"decoders/dinov2/wReg_base/{names[0]}/model.pt", f"stats/dinov2/wReg_base/{names[1]}/stat.pt",
             *(f"DiTs/Dinov2/wReg_base/{name}/stage2_model.pt" for name in names[2:])]
    paths = [Path(folder) / path for path in paths]
    shapes = [decoder_shapes(c, grid, *decoder), None, ditdh_shapes(c, grid, *dit, *head),
              ditdh_shapes(c, grid, *guide, *head)]
    torch.manual_seed(0)
    for path, keys in zip(paths, shapes):
        path.parent.mkdir(parents=True, exist_ok=True)
        if keys is None:
            save({"mean": None, "var": torch.rand(c, grid, grid) + 0.5}, path)
        else:
            save({k: torch.randn(shape) * (0.02 if len(shape) > 1 else 0.2) + ("norm" in k and "weight" in k)
                  for k, shape in keys.items()}, path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("release", choices=LAYOUT)
    for path in write(**vars(parser.parse_args()), **XL):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")
