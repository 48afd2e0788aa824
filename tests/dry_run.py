"""Write published weights with their files, keys and shapes, but random: the whole road, offline.

    python tests/dry_run.py DIR imagenet256         # 5.8 GB
    python sample.py --release imagenet256 --release_dir DIR --labels 207 --n 1

    python tests/dry_run.py DIR siglip2-b           # 1.7 GB; or any other name of PUBLISHED_RAES
    python eval_decoder.py --rae siglip2-b --release_dir DIR --data photos/

    python tests/dry_run.py DIR scale-rae-1.5b      # 9 GB; with --depth 1: 1 GB
    python sample.py --release scale-rae-1.5b --release_dir DIR --prompt "a cat" --n 1

Files and keys are written out here from the published code, not taken from release.py or model.py.
"""
import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.json"  # for that of Qwen2.5

# Published autoencoders: latents c h w, files of the decoder and the statistics.
AUTOENCODERS = {
    "dinov2-b": ((768, 16, 16), "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
                 "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b:n00": ((768, 16, 16), "decoders/dinov2/wReg_base/ViTXL/dinov2_decoder.pt",
                     "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b:n05": ((768, 16, 16), "decoders/dinov2/wReg_base/ViTXL_n05/dinov2_decoder.pt",
                     "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b:n10": ((768, 16, 16), "decoders/dinov2/wReg_base/ViTXL_n10/model.pt",
                     "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2-b-512": ((768, 32, 32), "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
                     "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
    "dinov2-s": ((384, 16, 16), "decoders/dinov2/wReg_small/ViTXL_n08/model.pt",
                 "stats/dinov2/wReg_small/imagenet1k/stat.pt"),
    "dinov2-l": ((1024, 16, 16), "decoders/dinov2/wReg_large/ViTXL_n08/model.pt",
                 "stats/dinov2/wReg_large/imagenet1k/stat.pt"),
    "mae-b": ((768, 16, 16), "decoders/mae/base_p16/ViTXL_n08/model.pt",
              "stats/mae/base_p16/ImageNet1k/stat.pt"),
    "siglip2-b": ((768, 16, 16), "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
                  "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
}

# Published DiTs: their autoencoder, files of the DiT and of its guide.
DITS = {
    "imagenet256": ("dinov2-b", "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
                    "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"),
    "imagenet512": ("dinov2-b-512",
                    "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
                    "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt"),
}


class DecoderSize(NamedTuple):
    width: int
    depth: int
    heads: int
    mlp: int


class DiTSize(NamedTuple):
    width: int
    depth: int
    heads: int


class QwenSize(NamedTuple):
    width: int
    mlp: int
    depth: int
    heads: int
    key_heads: int


DECODER_XL = DecoderSize(1152, 28, 16, 4096)
DITDH_XL, DITDH_S, WIDE_HEAD = DiTSize(1152, 28, 16), DiTSize(384, 12, 6), DiTSize(2048, 2, 16)
QWEN_1_5B = QwenSize(1536, 8960, 28, 12, 2)
DIT_2_4B = DiTSize(2048, 32, 32)

# The same at a size that tests can load in no time.
SMALL_DECODER = DecoderSize(32, 1, 2, 48)
SMALL_DIT, SMALL_GUIDE, SMALL_HEAD = DiTSize(32, 2, 2), DiTSize(16, 1, 1), DiTSize(48, 1, 3)
SMALL_QWEN = QwenSize(32, 48, 1, 4, 2)
SMALL_T2I_DIT = DiTSize(32, 1, 4)


# ---------------------------------------------------------------------------- shapes of weights
def linear(key, out, inner, *kernel):
    return {f"{key}.weight": (out, inner, *kernel), f"{key}.bias": (out,)}


def decoder_shapes(channels, grid, size, patch=16):
    """Shapes of an official decoder, model.pt."""
    width = size.width
    shapes = {
        "decoder_pos_embed": (1, grid * grid + 1, width),
        "trainable_cls_token": (1, 1, width),
        "decoder_norm.weight": (width,),
        "decoder_norm.bias": (width,),
    }
    shapes.update(linear("decoder_embed", width, channels))
    shapes.update(linear("decoder_pred", 3 * patch * patch, width))
    for i in range(size.depth):
        layer = f"decoder_layers.{i}"
        for name in ("query", "key", "value"):
            shapes.update(linear(f"{layer}.attention.attention.{name}", width, width))
        shapes.update(linear(f"{layer}.attention.output.dense", width, width))
        shapes.update(linear(f"{layer}.intermediate.dense", size.mlp, width))
        shapes.update(linear(f"{layer}.output.dense", width, size.mlp))
        for name in ("layernorm_before", "layernorm_after"):
            shapes[f"{layer}.{name}.weight"] = (width,)
            shapes[f"{layer}.{name}.bias"] = (width,)
    return shapes


def block_shapes(block, width):
    """Shapes of a block of a DiT; block: the name that its keys begin with."""
    hidden = int(2 / 3 * 4 * width)
    shapes = {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
    shapes.update(linear(f"{block}.attn.qkv", 3 * width, width))
    shapes.update(linear(f"{block}.attn.proj", width, width))
    shapes.update(linear(f"{block}.mlp.w12", 2 * hidden, width))
    shapes.update(linear(f"{block}.mlp.w3", width, hidden))
    shapes.update(linear(f"{block}.adaLN_modulation.1", 6 * width, width))
    return shapes


def rope_shapes(rope, tokens, size):
    """Shapes of the tables of rotary positions."""
    head_dim = size.width // size.heads
    return {f"{rope}.freqs_cos": (tokens, head_dim), f"{rope}.freqs_sin": (tokens, head_dim)}


def final_layer_shapes(channels, width):
    shapes = {"final_layer.norm_final.weight": (width,)}
    shapes.update(linear("final_layer.linear", channels, width))
    shapes.update(linear("final_layer.adaLN_modulation.1", 2 * width, width))
    return shapes


def ditdh_shapes(channels, grid, backbone, head, classes=1000):
    """Shapes of an official DiT^DH, stage2_model.pt."""
    tokens = grid * grid
    shapes = {
        "pos_embed": (1, tokens, backbone.width),
        "t_embedder.W": (256,),
        "y_embedder.embedding_table.weight": (classes + 1, backbone.width),
    }
    shapes.update(linear("x_embedder.proj", head.width, channels, 1, 1))
    shapes.update(linear("s_embedder.proj", backbone.width, channels, 1, 1))
    shapes.update(linear("t_embedder.mlp.0", backbone.width, 512))
    shapes.update(linear("t_embedder.mlp.2", backbone.width, backbone.width))
    shapes.update(linear("s_projector", head.width, backbone.width))
    shapes.update(rope_shapes("enc_feat_rope", tokens, backbone))
    shapes.update(rope_shapes("dec_feat_rope", tokens, head))
    for i in range(backbone.depth):
        shapes.update(block_shapes(f"blocks.{i}", backbone.width))
    for i in range(backbone.depth, backbone.depth + head.depth):
        shapes.update(block_shapes(f"blocks.{i}", head.width))
    shapes.update(final_layer_shapes(channels, head.width))
    return shapes


def t2i_dit_shapes(channels, grid, size):
    """Shapes of the DiT of Scale-RAE, without the prefix that they have in its files."""
    width, tokens = size.width, grid * grid
    shapes = {"pos_embed": (1, tokens, width), "y_embedder.dropout_embedding": (width,)}
    shapes.update(linear("x_embedder.proj", width, channels, 1, 1))
    shapes.update(linear("t_embedder.mlp.0", width, 512))
    shapes.update(linear("t_embedder.mlp.2", width, width))
    shapes.update(rope_shapes("feat_rope", tokens, size))
    for i in range(size.depth):
        shapes.update(block_shapes(f"dit_blocks.{i}", width))
    shapes.update(final_layer_shapes(channels, width))
    return shapes


def qwen_shapes(vocab, size):
    """Shapes of a Qwen2 with tied embeddings."""
    width = size.width
    key_width = width // size.heads * size.key_heads
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(size.depth):
        layer = f"model.layers.{i}"
        shapes.update(linear(f"{layer}.self_attn.q_proj", width, width))
        shapes.update(linear(f"{layer}.self_attn.k_proj", key_width, width))
        shapes.update(linear(f"{layer}.self_attn.v_proj", key_width, width))
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (size.mlp, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (size.mlp, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, size.mlp)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    return shapes


def scale_rae_shapes(vocab, llm, dit, channels=1152, grid=16):
    """Shapes of a whole release of Scale-RAE."""
    shapes = qwen_shapes(vocab, llm)
    shapes["model.latent_queries"] = (grid * grid, llm.width)
    shapes.update(linear("model.mm_projector.0", llm.width, channels))
    shapes.update(linear("model.mm_projector.2", llm.width, llm.width))
    shapes.update(linear("diff_head_projector", dit.width, llm.width))
    for key, shape in t2i_dit_shapes(channels, grid, dit).items():
        shapes[f"diff_head.model.{key}"] = shape
    return shapes


# ---------------------------------------------------------------------------- files
def draw_weights(shapes):
    """Random weights of these shapes: N(0, 0.02) matrices, norms around 1."""
    weights = {}
    for key, shape in shapes.items():
        weights[key] = torch.randn(shape) * (0.02 if len(shape) > 1 else 0.2)
        if "norm" in key and key.endswith("weight"):
            weights[key] += 1
    return weights


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def write_rae(folder, name, size=DECODER_XL):
    """Write the files of a name of AUTOENCODERS; returns the paths of decoder and statistics."""
    torch.manual_seed(0)
    latent_shape, decoder_file, statistics_file = AUTOENCODERS[name]
    channels, grid, _ = latent_shape
    decoder, statistics = Path(folder) / decoder_file, Path(folder) / statistics_file
    save(draw_weights(decoder_shapes(channels, grid, size)), decoder)
    # That of DINOv2-B was published without a mean.
    mean = None if name.startswith("dinov2-b") else torch.randn(latent_shape)
    save({"mean": mean, "var": torch.rand(latent_shape) + 0.5}, statistics)
    return decoder, statistics


def write_dit(folder, name, decoder=DECODER_XL, dit=DITDH_XL, guide=DITDH_S, head=WIDE_HEAD):
    """Write the four files of a name of DITS; returns paths of decoder, statistics, DiT, guide."""
    autoencoder, dit_file, guide_file = DITS[name]
    decoder_path, statistics_path = write_rae(folder, autoencoder, decoder)
    channels, grid, _ = AUTOENCODERS[autoencoder][0]
    dit_path, guide_path = Path(folder) / dit_file, Path(folder) / guide_file
    save(draw_weights(ditdh_shapes(channels, grid, dit, head)), dit_path)
    save(draw_weights(ditdh_shapes(channels, grid, guide, head)), guide_path)
    return decoder_path, statistics_path, dit_path, guide_path


def write_siglip2_decoder(folder, size=DECODER_XL, patch=14):
    """Write the files of Scale-RAE's decoder; returns the paths of the weights and the config."""
    torch.manual_seed(0)
    folder = Path(folder) / "siglip2_decoder"
    save(draw_weights(decoder_shapes(1152, 16, size, patch)), folder / "model.pt")
    config = dict(decoder_hidden_size=size.width, decoder_num_hidden_layers=size.depth,
                  decoder_num_attention_heads=size.heads, decoder_intermediate_size=size.mlp,
                  patch_size=patch, image_size=16 * patch)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.pt", folder / "config.json"


def save_shards(weights, folder):
    """Weights in bf16 as two files and their index, as the hub has them."""
    index = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        keys = sorted(weights)[i::2]
        save_file({key: weights[key].bfloat16() for key in keys}, folder / file)
        for key in keys:
            index[key] = file
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def write_scale_rae(folder, llm=QWEN_1_5B, dit=DIT_2_4B, vocab=151_667):
    """Write the folder of scale-rae-1.5b, without the decoder; returns its path."""
    torch.manual_seed(0)
    folder = Path(folder) / "Scale-RAE-Qwen1.5B_DiT2.4B"
    folder.mkdir(parents=True)
    save_shards(draw_weights(scale_rae_shapes(vocab, llm, dit)), folder)
    config = dict(
        model_type="cambrian_qwen", vocab_size=vocab, hidden_size=llm.width,
        intermediate_size=llm.mlp, num_hidden_layers=llm.depth, num_attention_heads=llm.heads,
        num_key_value_heads=llm.key_heads, tie_word_embeddings=True, hidden_act="silu",
        rope_theta=1e6, rms_norm_eps=1e-6, use_sliding_window=False,
        diffusion_model_hidden_size=dit.width, diffusion_model_depth=dit.depth,
        diffusion_model_heads=dit.heads, diffusion_model_z_channels=dit.width,
        diffusion_model_channels=1152, diffusion_class_dropout_prob=0.1,
        mm_projector_type="mlp2x_gelu")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(TOKENIZER, folder)
    return folder


def make_scale_rae(folder):
    """Write a small scale-rae-1.5b; returns the folders of the model and of the decoder."""
    weights, _ = write_siglip2_decoder(folder, DecoderSize(32, 1, 4, 48), patch=4)
    return write_scale_rae(folder, SMALL_QWEN, SMALL_T2I_DIT, vocab=600), weights.parent


# ---------------------------------------------------------------------------- command line
def main(argv=None):
    names = [*DITS, *AUTOENCODERS, "siglip2-so400m", "scale-rae-1.5b"]
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", metavar="DIR", type=Path)
    p.add_argument("release", choices=names)
    p.add_argument("--depth", type=int,
                   help="Depth of all three networks of scale-rae-1.5b (default: as published).")
    args = p.parse_args(argv)

    if args.release in DITS:
        paths = write_dit(args.folder, args.release)
    elif args.release in AUTOENCODERS:
        paths = write_rae(args.folder, args.release)
    elif args.release == "siglip2-so400m":
        paths = write_siglip2_decoder(args.folder)
    else:
        llm, dit, decoder = QWEN_1_5B, DIT_2_4B, DECODER_XL
        if args.depth:
            llm = llm._replace(depth=args.depth)
            dit = dit._replace(depth=args.depth)
            decoder = decoder._replace(depth=args.depth)
        model_folder = write_scale_rae(args.folder, llm, dit)
        paths = [*sorted(model_folder.iterdir()), *write_siglip2_decoder(args.folder, decoder)]
    for path in paths:
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")


if __name__ == "__main__":
    main()
