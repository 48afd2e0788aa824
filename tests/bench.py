"""Speed of encoder, trainers and sampling, beside the fastest matmul and the official modules.

    python tests/bench.py                                   DiTDH-S, decoder B, on a CPU
    python tests/bench.py --peer ../RAE                     beside github.com/bytetriper/RAE
    python tests/bench.py --model DiTDH-XL --encoder dinov2-b --batch 32        a GPU

Each row is measured in turns: ours, the official module with the same weights, a matmul. Times are
medians; behind +- stands half of the range of the middle half (of fewer than four: of all). All
weights are random, so nothing is downloaded. FLOPs are counted by speed.count_flops.
"""
import argparse
import functools
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lpips  # noqa: E402

import metrics  # noqa: E402
import release  # noqa: E402
import run_flags  # noqa: E402
import runtime  # noqa: E402
import speed  # noqa: E402
import train_decoder  # noqa: E402
import train_t2i  # noqa: E402
from data import open_data  # noqa: E402
from memory import untrained_vit  # noqa: E402
from model import (  # noqa: E402
    DECODER_SIZES,
    DIT_SIZES,
    RAE,
    build_decoder,
    build_dit,
    flow_matching_loss,
)
from sample import autoguidance, cfg  # noqa: E402

CHANNELS, GRID, CLASSES = 768, 16, 1000        # of DINOv2-B's latents, and ImageNet
SOLVER_STEPS = 50
ROWS = ["encoder", "decoder", "lpips", "gan", "dit", "t2i", "sampling"]         # groups of them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_args(argv=None):
    on_gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--peer", type=Path, help="Checkout of github.com/bytetriper/RAE.")
    p.add_argument("--model", choices=DIT_SIZES, default="DiTDH-XL" if on_gpu else "DiTDH-S",
                   help="Size of the DiT (default: DiTDH-S, on a GPU DiTDH-XL).")
    p.add_argument("--decoder", choices=DECODER_SIZES, default="XL" if on_gpu else "B",
                   help="Size of the decoder (default: B, on a GPU XL).")
    p.add_argument("--encoder", default="dinov2-b" if on_gpu else "dinov2-s",
                   help="Encoder, of 256 px (default: dinov2-s, on a GPU dinov2-b).")
    p.add_argument("--batch", type=run_flags.at_least(1), default=32 if on_gpu else 2,
                   help="Images in each call (default: 2, on a GPU 32).")
    p.add_argument("--repeats", type=run_flags.at_least(1), default=3,
                   help="Calls of each, after one to warm up (default: 3).")
    p.add_argument("--compile", action="store_true",
                   help="Compile the blocks of our DiT in its training rows.")
    p.add_argument("--cpu_seconds", action="store_true",
                   help="Seconds of the CPU in place of the clock, for a busy machine without a "
                        "GPU; with OMP_NUM_THREADS=1, since waiting threads would count.")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS,
                   help="Groups of rows (default: all).")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES),
                   help="Precisions (default: fp32 bf16).")
    return p.parse_args(argv)


# ---------------------------------------------------------------------------- measuring
class Row(NamedTuple):
    """One line of the table.

    ours, theirs: functions without arguments; theirs may be a text: why there is none.
    images: in a call of ours. flops: of such a call. compare: a function -> (our output, theirs),
    or None.
    """
    name: str
    ours: Callable
    theirs: Callable | str
    images: float
    flops: float
    compare: Callable | None = None


def seconds_of(call, device, clock):
    """Seconds of call() by a clock, time.perf_counter or time.process_time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def matmul(dtype, device):
    """A large product as a function, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
    return functools.partial(torch.matmul, a, a.T), 2 * n ** 3


def measure(calls, device, repeats, clock):
    """Seconds of each of some functions, called in turns: a list of `repeats` for each."""
    for call in calls:
        call()
    times = [[seconds_of(call, device, clock) for call in calls] for _ in range(repeats)]
    return list(zip(*times, strict=True))


def spread(times):
    """Half of the range of the middle half."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2


def ratio(numerators, denominators):
    """Median of the ratios of what was measured in the same turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def report(row, dtype, device, repeats, clock):
    """Measure a row and print its line."""
    product, product_flops = matmul(dtype, device)
    has_peer = not isinstance(row.theirs, str)
    calls = [row.ours, product]
    if has_peer:
        calls.append(row.theirs)
    with runtime.autocast(device, dtype):
        times = measure(calls, device, repeats, clock)
        difference = ""
        if row.compare is not None and has_peer:
            with torch.no_grad():
                ours, theirs = row.compare()
            relative = (ours - theirs).abs().max() / theirs.abs().max()
            difference = f"{float(relative):.0e}"

    seconds = statistics.median(times[0])
    peak = product_flops / statistics.median(times[1])
    share = row.flops / product_flops * ratio(times[1], times[0])
    peer = row.theirs
    if has_peer:
        peer = f"{statistics.median(times[2]):.3f} s, {ratio(times[2], times[0]):.2f} x ours"
    print(f"| {row.name} | {dtype} | {seconds:.3f} +- {spread(times[0]):.3f} | "
          f"{row.images / seconds:.3g} | {row.flops / seconds / 1e12:.3g} | {100 * share:.0f}% of "
          f"{peak / 1e12:.3g} | {peer} | {difference} |", flush=True)


def report_rows(build, dtype, device, repeats, clock):
    """Measure the rows that build() yields. Their models are freed at the end."""
    for row in build():
        report(row, dtype, device, repeats, clock)


# ---------------------------------------------------------------------------- official modules
def import_official(folder, module):
    """A module of the official code, without what its packages import besides it.

    folder: of the package, such as DIR/src/stage2/models.
    """
    package = f"official_{folder.name}"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{module}")


def official_dit(peer, model, size):
    """The official module with the weights of `model`, or a text that says why there is none."""
    if peer is None:
        return "no --peer"
    if not size["head_width"]:
        return "only of DiTDH"
    try:
        module = import_official(peer / "src/stage2/models", "DDT")
    except ImportError as error:
        return f"not imported: {error}"
    theirs = module.DiTwDDTHead(
        input_size=GRID, in_channels=CHANNELS, hidden_size=[size["width"], size["head_width"]],
        depth=[size["depth"], size["head_depth"]], num_heads=[size["heads"], size["head_heads"]],
        num_classes=CLASSES)
    theirs.load_state_dict(model.state_dict())
    return theirs.to(model.pos_embed.device).eval()


def official_decoder(peer, decoder, size):
    """The official decoder, and our own with its weights."""
    if peer is None:
        return "no --peer"
    try:
        module = import_official(peer / "src/stage1/decoders", "decoder")
    except ImportError as error:
        return f"not imported: {error}"
    config = module.ViTMAEConfig(
        hidden_size=CHANNELS, patch_size=16, image_size=16 * GRID,
        decoder_hidden_size=size["decoder_width"], decoder_num_hidden_layers=size["decoder_depth"],
        decoder_num_attention_heads=size["decoder_heads"],
        decoder_intermediate_size=size["decoder_mlp"])
    theirs = module.GeneralDecoder(config, num_patches=GRID ** 2)
    release.load_release(decoder, theirs.state_dict())
    return theirs.to(decoder.decoder_pos_embed.device).eval()


def official_encoder(peer, encoder):
    """DINOv2 of transformers, which the official code calls, and our own with its weights."""
    if peer is None:
        return "no --peer"
    try:
        import transformers

        from test_judges import timm_state
    except ImportError as error:
        return f"not imported: {error}"
    widths = {"dinov2-s": 384, "dinov2-b": 768, "dinov2-l": 1024}
    if encoder.name not in widths:
        return "only of DINOv2"
    width = widths[encoder.name]
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=width, num_attention_heads=width // 64, image_size=encoder.input_size,
        num_hidden_layers=len(encoder.backbone.blocks), patch_size=14)
    theirs = transformers.Dinov2WithRegistersModel(config).eval().requires_grad_(False)
    theirs.layernorm = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
    state = timm_state(theirs, encoder.name)
    encoder.backbone.load_state_dict(state)
    return theirs.to(encoder.backbone.pos_embed.device)


# ---------------------------------------------------------------------------- rows
def randomise_zeros(module):
    """Draw the weights that start as zeros, which would hide errors behind them."""
    for parameter in module.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return module


def backward(loss, module):
    """Gradients of a loss, dropped again."""
    loss.backward()
    module.zero_grad(set_to_none=True)


def encoder_row(args, device, encoder):
    images = torch.rand(args.batch, 3, 256, 256, device=device)
    theirs = official_encoder(args.peer, encoder)

    @torch.no_grad()
    def encode():
        return encoder.encode(images)

    @torch.no_grad()
    def encode_theirs():
        tokens = theirs(encoder.pixels(images)).last_hidden_state[:, 5:]    # after CLS and 4 others
        return rearrange(tokens, "b (h w) c -> b c h w", h=encoder.grid)

    flops = args.batch * speed.count_flops(encoder.encode, images[:1]).forward
    return Row(f"encoder {encoder.name}", encode, theirs if isinstance(theirs, str) else
               encode_theirs, args.batch, flops, lambda: (encode(), encode_theirs()))


def decoder_row(args, device):
    """Forward and backward of the decoder alone."""
    size = dict(DECODER_SIZES[args.decoder], decoder_patch=16)
    decoder = build_decoder(size, CHANNELS, GRID).to(device).eval()
    theirs = official_decoder(args.peer, decoder, size)
    latents = torch.randn(args.batch, CHANNELS, GRID, GRID, device=device)
    tokens = rearrange(latents, "b c h w -> b (h w) c")

    def decode_theirs():
        return theirs.unpatchify(theirs(tokens).logits)

    def train():
        backward(decoder(latents).abs().mean(), decoder)

    def train_theirs():
        backward(decode_theirs().abs().mean(), theirs)

    flops = args.batch * speed.count_flops(decoder, latents[:1]).training
    return Row(f"decoder {args.decoder}, forward and backward", train,
               theirs if isinstance(theirs, str) else train_theirs, args.batch, flops,
               lambda: (decoder(latents), decode_theirs()))


def decoder_step_row(args, device, encoder, dtype, gan):
    """A step of train_decoder.py with LPIPS, with or without the GAN."""
    flags = ["--encoder", args.encoder, "--size", "256", "--decoder", args.decoder, "--lpips", "1",
             "--batch", str(args.batch), "--dtype", dtype, "--optimizer", "adamw"]
    if gan:
        flags += ["--gan", "0.75", "--disc", "dino-s16", "--disc_start", "0", "--gan_start", "0"]
    args_of_run = train_decoder.parse_args(flags)
    networks = train_decoder.Networks(encoder, args_of_run, device)
    optimizers = train_decoder.make_optimizers(networks.trained, "adamw", 1e-4, 0.0)
    meter = train_decoder.LossMeter(open_data("shapes", 64), device)
    trainer = train_decoder.Trainer(networks, meter, args_of_run, device, world=1)
    images = torch.randint(256, (args.batch, 3, 256, 256), dtype=torch.uint8)

    def step():
        batches = [(0, 0, images, None, None)]
        if gan:
            trainer.adversarial_step(batches)
            networks.discriminator.heads.zero_grad(set_to_none=True)
        else:
            trainer.plain_step(batches, train_discriminator=False)
        runtime.optimizer_step(optimizers, networks.trained, 1.0, 1e-4)
        runtime.update_ema(networks.ema, networks.trained, 0.999, 0)

    flops = train_decoder.count_image_flops(networks, args_of_run, device).at(0, args_of_run)
    name = "LPIPS and GAN" if gan else "LPIPS"
    return Row(f"decoder {args.decoder}, training step with {name}", step,
               "the official step is not a function", args.batch, args.batch * flops)


def dit_inputs(batch, device):
    """Latents, labels, times and noise."""
    return (torch.randn(batch, CHANNELS, GRID, GRID, device=device),
            torch.randint(CLASSES, (batch,), device=device), torch.rand(batch, device=device),
            torch.randn(batch, CHANNELS, GRID, GRID, device=device))


def dit_rows(args, device):
    """Forward and backward of the DiT, and the whole step."""
    size = DIT_SIZES[args.model]
    model = randomise_zeros(build_dit({**size, "class_dropout": 0.1}, CHANNELS, GRID, CLASSES))
    model = model.to(device).eval()            # no class dropout, so that both do the same
    if args.compile:
        runtime.compile_blocks(model)
    theirs = official_dit(args.peer, model, size)
    x0, y, t, eps = dit_inputs(args.batch, device)

    def train():
        backward(flow_matching_loss(model, x0, y, t, eps).mean(), model)

    def train_theirs():
        backward(flow_matching_loss(theirs, x0, y, t, eps).mean(), theirs)

    flops = args.batch * speed.count_flops(model, x0[:1], t[:1], y[:1]).training
    peer = theirs if isinstance(theirs, str) else train_theirs
    yield Row(f"{args.model}, forward and backward", train, peer, args.batch, flops,
              lambda: (model(x0, t, y), theirs(x0, t, y)))

    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-9, fused=True)
    ema = build_dit({**size, "class_dropout": 0.1}, CHANNELS, GRID, CLASSES).to(device)

    def step():
        flow_matching_loss(model, x0, y, t, eps).mean().backward()
        runtime.optimizer_step([optimizer], model, 1.0, 1e-9)
        runtime.update_ema(ema, model, 0.999, 0)

    yield Row(f"{args.model}, training step", step, "the official step is not a function",
              args.batch, flops)


def sampling_rows(args, device):
    """Euler steps: without guidance, with CFG 3, with AutoGuidance 1.42 by DiTDH-S."""
    size, small = DIT_SIZES[args.model], DIT_SIZES["DiTDH-S"]
    model = randomise_zeros(build_dit({**size, "class_dropout": 0.1}, CHANNELS, GRID, CLASSES))
    weak = randomise_zeros(build_dit({**small, "class_dropout": 0.1}, CHANNELS, GRID, CLASSES))
    model, weak = model.to(device).eval(), weak.to(device).eval()
    theirs, their_weak = official_dit(args.peer, model, size), official_dit(args.peer, weak, small)
    x, y, t, _ = dit_inputs(args.batch, device)
    t = torch.full_like(t, 0.5)
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])
    y2 = torch.cat([y, torch.full_like(y, CLASSES)])
    strong_flops = speed.count_flops(model, x[:1], t[:1], y[:1]).forward
    weak_flops = speed.count_flops(weak, x[:1], t[:1], y[:1]).forward

    def with_cfg():
        return theirs.forward_with_cfg(x2, t2, y2, 3.0)[:len(x)]

    kinds = [
        ("no guidance", lambda: model(x, t, y), lambda: theirs(x, t, y), strong_flops),
        ("CFG", lambda: cfg(model, y, CLASSES, 3.0)(x, t), with_cfg, 2 * strong_flops),
        ("AutoGuidance", lambda: autoguidance(model, weak, y, 1.42)(x, t),
         lambda: theirs.forward_with_autoguidance(x, t, y, 1.42, their_weak),
         strong_flops + weak_flops)]
    for name, ours, peer, flops in kinds:
        yield Row(f"{args.model}, {SOLVER_STEPS} steps, {name}: one step", torch.no_grad()(ours),
                  theirs if isinstance(theirs, str) else torch.no_grad()(peer),
                  args.batch / SOLVER_STEPS, args.batch * flops,
                  lambda ours=ours, peer=peer: (ours(), peer()))


def t2i_row(args, device, encoder):
    """A step of train_t2i.py: laptop sizes, on a GPU those of Qwen2-0.5B and the 0.5B DiT."""
    flags = ["--batch", str(args.batch)]
    if device.type == "cuda":
        flags += ["--llm_width", "896", "--llm_depth", "24", "--llm_heads", "14",
                  "--model", "0.5B"]
    args_of_run = train_t2i.parse_args(flags)
    shape = (encoder.channels, encoder.grid, encoder.grid)
    size = dict(DECODER_SIZES["tiny"], decoder_patch=16)
    rae = RAE(encoder, build_decoder(size, encoder.channels, encoder.grid)).to(device)
    context = encoder.grid ** 2 + 176
    t2i = train_t2i.build_model(args_of_run, context, shape, None).to(device)
    prompt = [("user", "two red circles and a blue star"), ("assistant", "<image>")]
    images = torch.randint(256, (args.batch, 3, 256, 256), dtype=torch.uint8)
    micro = train_t2i.make_micro_batch(0, images, args.batch * [prompt], t2i.tokenizer, t2i.n, 500)
    flops = train_t2i.T2IFlops(t2i, rae, args_of_run).of(micro)
    micro = micro.to(device)
    optimizer = train_t2i.make_optimizer(t2i, args_of_run)
    k = args.batch * args_of_run.draws
    t, eps = torch.rand(k, device=device), torch.randn(k, *shape, device=device)

    def step():
        latents = rae.encode(micro.images.float() / 255).float()
        cross_entropy, error, flow = t2i(micro.asked, micro.drawn, latents, t, eps)
        (cross_entropy / micro.counts.tokens + error.mean() + flow.mean()).backward()
        runtime.optimizer_step([optimizer], t2i, 1.0, 1e-9)

    return Row(f"text to image, training step, {args_of_run.draws} draws", step,
               "not in the official code", args.batch, flops)


def rows(args, device, dtype):
    """Yields functions that build a row, each with its name to choose it by."""
    encoder = release.load_encoder(args.encoder, 256).to(device)
    yield "encoder", lambda: [encoder_row(args, device, encoder)]
    yield "decoder", lambda: [decoder_row(args, device)]
    for name, gan in (("lpips", False), ("gan", True)):
        yield name, lambda gan=gan: [decoder_step_row(args, device, encoder, dtype, gan)]
    yield "dit", lambda: dit_rows(args, device)
    yield "t2i", lambda: [t2i_row(args, device, encoder)]
    yield "sampling", lambda: sampling_rows(args, device)


def main(args):
    _, _, device = runtime.setup()
    # Random weights in place of downloads.
    release.load_vit = untrained_vit
    metrics.lpips.LPIPS = functools.partial(lpips.LPIPS, pnet_rand=True, pretrained=False)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch "
          f"{args.batch}, {args.repeats} repeats\n")
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    if device.type != "cuda":
        print("no GPU: all rows are of the CPU\n")
    print("| what | precision | seconds | images/s | TFLOP/s | of the matmul peak, TFLOP/s | "
          "official | difference |\n|---|---|---|---|---|---|---|---|")
    for dtype in args.dtype:
        for name, build in rows(args, device, dtype):
            if name in args.rows:
                report_rows(build, dtype, device, args.repeats, clock)


if __name__ == "__main__":
    main(parse_args())
