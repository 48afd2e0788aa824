"""Memory of a step of train_decoder.py, counted and not run: tensors without data, and what autograd keeps.

    python tests/memory.py                       decoders B and XL at 256 px, micro batches 1 to 32, in bf16
Weights, gradients, AdamW and EMA, frozen networks, and the larger of two phases: the graphs of LPIPS (and
discriminator) at the pixels, or that of the decoder. Work space of CUDA's kernels, DDP's buckets (as large
as the gradients), fragmentation, and the small images of the augmentation come on top.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpips  # noqa: E402
import timm  # noqa: E402

import train_decoder  # noqa: E402
from model import DECODER_SIZES, build_decoder  # noqa: E402


def kept(run, known):
    """Bytes that autograd keeps of run() for a backward pass, each storage once, without those of `known`."""
    seen = {id(x.untyped_storage()) for x in known}
    sizes = {}

    def pack(x):
        storage = x.untyped_storage()
        if id(storage) not in seen:
            sizes[id(storage)] = storage, storage.nbytes()              # held, so that no id comes twice
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(n for _, n in sizes.values()), out


def count(size, micros, gan, checkpoint, side=256, channels=768, grid=16):
    """GiB of a step for each micro batch: dicts of state, frozen, pixels and decoder (phases), peak."""
    decoder = build_decoder({**DECODER_SIZES[size], "decoder_patch": side // grid}, channels, grid).train()
    decoder.checkpoint = checkpoint
    vgg = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)
    terms = train_decoder.Perceptual(dict(l1=1.0, lpips=0.0, gram=0.0, feature=0.0))
    terms.vgg, terms.weights["lpips"] = vgg, 1.0
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", img_size=224, num_classes=0)
    disc = train_decoder.Discriminator("dino-s8") if gan else None
    disc and disc.vit.set_grad_checkpointing(checkpoint)
    mode = FakeTensorMode()
    for part in [x for module in (decoder, terms, encoder, *[disc] * gan) for x in module.modules()]:
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(mode.from_tensor(p.data), p.requires_grad)
        for name, x in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(x)
    with mode:
        return [tally(decoder, terms, encoder, disc, m, (channels, grid, grid), side) for m in micros]


def tally(decoder, terms, encoder, disc, micro, shape, side):
    vgg, gan = terms.vgg, disc is not None
    frozen = [*vgg.parameters(), *encoder.parameters(), *(disc.vit.parameters() if gan else ())]
    learnt = [p for p in decoder.parameters() if p.requires_grad], [*disc.heads.parameters()] if gan else []
    state = 4 * (5 * sum(p.numel() for p in learnt[0]) + 4 * sum(p.numel() for p in learnt[1]))
    known = [*decoder.parameters(), *frozen, *learnt[1], *terms.buffers(), *(disc.buffers() if gan else ())]
    with torch.autocast("cpu", torch.bfloat16):
        phase_two, pixels = kept(lambda: decoder(torch.randn(micro, *shape)), known)
        real = torch.rand(micro, 3, side, side)
        fake = pixels.detach().float().requires_grad_()

        def judged():
            found = terms(fake, real)
            return (*found.values(), -disc(fake).mean()) if gan else found
        phase_one, _ = kept(judged, known)
    both = max(phase_one, phase_two) if gan else phase_one + phase_two  # without: one graph, as in the script
    sizes = dict(state=state, frozen=4 * sum(p.numel() for p in frozen), pixels=phase_one, decoder=phase_two)
    return {k: v / 2 ** 30 for k, v in {**sizes, "peak": state + sizes["frozen"] + both}.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    micro = parser.parse_args().micro
    train_decoder.load_vit = lambda name, side: timm.create_model(name, img_size=side, num_classes=0)
    train_decoder.normalize = lambda x, mean, std: (x - mean[0]) / std[0]     # torchvision's looks at values
    print("GiB".ljust(44), *(f"{m:>7}" for m in micro))
    for size in ("B", "XL"):
        for gan in (False, True):
            for checkpoint in (False, True):
                rows = count(size, micro, gan, checkpoint)
                name = f"{size}{', GAN' * gan}{', --checkpoint_activations' * checkpoint}"
                print(name.ljust(44), *(f"{row['peak']:7.1f}" for row in rows), flush=True)
                print(f"  weights, AdamW, EMA {rows[0]['state']:.1f}, frozen {rows[0]['frozen']:.1f}, at the "
                      "pixels".ljust(44), *(f"{row['pixels']:7.1f}" for row in rows))
