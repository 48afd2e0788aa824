"""Write a release with the official files, keys and shapes but random weights: the whole road, no download.

    python tests/dry_run.py DIR imagenet256
    python sample.py --release imagenet256 --release_dir DIR --labels 207 --n 1 --out noise.png
    python tests/dry_run.py DIR scale-rae-1.5b
    python sample.py --release scale-rae-1.5b --release_dir DIR --prompt "a cat" --n 1 --out noise.png
DIR takes 5.8 GB, or 9 GB (of random weights at --depth 1: 1 GB). The keys are written out here from the
published files and code, not taken from model.py.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

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


# width, MLP, layers, heads, key heads of the language model; width, depth, heads of the DiT; decoder, patch
SCALE_RAE = dict(llm=(1536, 8960, 28, 12, 2), dit=(2048, 32, 32), decoder=(1152, 28, 4096), patch=14)
SMALL = dict(llm=(32, 48, 1, 4, 2), dit=(32, 1, 4), decoder=(32, 1, 48), patch=4)
TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.json"          # for Qwen2.5's


def scale_rae_shapes(vocab, d, mlp, layers, heads, groups, width, depth, dit_heads, c=1152, grid=16):
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(layers):
        layer, kv = f"model.layers.{i}.", d // heads * groups
        for name, out in (("q", d), ("k", kv), ("v", kv)):
            shapes |= linear(f"{layer}self_attn.{name}_proj", out, d)
        shapes |= {f"{layer}self_attn.o_proj.weight": (d, d), f"{layer}mlp.down_proj.weight": (d, mlp)}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, d) for name in ("gate", "up")}
        shapes |= {f"{layer}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    shapes |= linear("model.mm_projector.0", d, c) | linear("model.mm_projector.2", d, d)
    shapes |= {"model.latent_queries": (grid * grid, d)} | linear("diff_head_projector", width, d)
    dit = {"pos_embed": (1, grid * grid, width), "y_embedder.dropout_embedding": (width,)}
    dit |= linear("x_embedder.proj", width, c, 1, 1) | linear("t_embedder.mlp.0", width, 512)
    dit |= {f"feat_rope.freqs_{x}": (grid * grid, width // dit_heads) for x in ("cos", "sin")}
    for i in range(depth):
        dit |= {f"dit_{key}": shape for key, shape in block_shapes(i, width).items()}
    dit |= {"final_layer.norm_final.weight": (width,)} | linear("final_layer.linear", c, width)
    dit |= linear("t_embedder.mlp.2", width, width)
    dit |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes | {f"diff_head.model.{key}": shape for key, shape in dit.items()}


def make_scale_rae(folder, depth=None, small=True, vocab=600):
    """The two folders of scale-rae-1.5b under `folder`; returns their paths: model, decoder.

    depth: of all three networks, instead of the release's. small: narrow ones, but for what the code fixes.
    """
    llm, dit, decoder, patch = (SMALL if small else SCALE_RAE).values()
    if depth:
        llm, dit = (*llm[:2], depth, *llm[3:]), (dit[0], depth, dit[2])
        decoder = decoder[0], depth, decoder[2]
    here, there = (Path(folder) / name for name in ("Scale-RAE-Qwen1.5B_DiT2.4B", "siglip2_decoder"))
    here.mkdir(parents=True), there.mkdir()
    torch.manual_seed(0)
    def draw(shapes):
        return {k: torch.randn(shape) * (0.02 if len(shape) > 1 else 0.2) + ("norm" in k and "weight" in k)
                for k, shape in shapes.items()}
    weights, index = {k: v.bfloat16() for k, v in draw(scale_rae_shapes(vocab, *llm, *dit)).items()}, {}
    for i in range(2):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({k: weights[k] for k in sorted(weights)[i::2]}, here / name)
        index |= {k: name for k in sorted(weights)[i::2]}
    (here / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    (here / "config.json").write_text(json.dumps(dict(
        zip(names, llm), model_type="cambrian_qwen", vocab_size=vocab, tie_word_embeddings=True,
        hidden_act="silu", rope_theta=1e6, rms_norm_eps=1e-6, use_sliding_window=False,
        diffusion_model_hidden_size=dit[0],
        diffusion_model_depth=dit[1], diffusion_model_heads=dit[2], diffusion_model_z_channels=dit[0],
        diffusion_model_channels=1152, diffusion_class_dropout_prob=0.1, mm_projector_type="mlp2x_gelu")))
    shutil.copy(TOKENIZER, here)
    d, layers, mlp = decoder
    (there / "config.json").write_text(json.dumps(dict(
        decoder_hidden_size=d, decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=4 if small else 16, decoder_intermediate_size=mlp,
        patch_size=patch, image_size=16 * patch)))
    torch.save(draw(decoder_shapes(1152, 16, *decoder, patch)), there / "model.pt")
    return here, there


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("release", choices=[*LAYOUT, "scale-rae-1.5b"])
    parser.add_argument("--depth", type=int, help="of scale-rae-1.5b, instead of the release's")
    given = parser.parse_args()
    paths = write(given.folder, given.release, **XL) if given.release in LAYOUT else [
        path for folder in make_scale_rae(given.folder, given.depth, small=False, vocab=151_667)
        for path in sorted(folder.iterdir())]
    for path in paths:
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")
