"""Memory of a training step of train_decoder.py, counted without running it.

    python tests/memory.py         decoders B and XL at 256 px, micro-batches of 1 to 32, in bf16

Tensors have shapes but no data. What is counted: weights, gradients, AdamW and EMA; the frozen
networks; and what autograd keeps for the backward pass. Without the GAN that is one graph, of the
decoder and of LPIPS. With it there are two passes, of which the larger one counts: the graphs of
LPIPS and of the discriminator at the pixels, then that of the decoder. What comes on top: the work
space of CUDA's kernels, DDP's buckets (as large as the gradients), fragmentation, and the images of
the augmentation.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lpips  # noqa: E402
import timm  # noqa: E402

import release  # noqa: E402
import train_decoder  # noqa: E402
from model import DECODER_SIZES, build_decoder  # noqa: E402

IMAGE_SIZE, CHANNELS, GRID = 256, 768, 16              # of DINOv2-B
BYTES = 4                                              # of an fp32 number
GIB = 2 ** 30


class Memory(NamedTuple):
    """Bytes in a step."""
    state: int                   # weights, gradients, AdamW and EMA
    frozen: int                  # encoder, VGG, the discriminator's ViT
    pixels: int                  # graphs of the losses at the pixels
    decoder: int                 # graph of the decoder
    has_gan: bool

    def peak(self):
        if self.has_gan:                               # two passes
            graphs = max(self.pixels, self.decoder)
        else:
            graphs = self.pixels + self.decoder
        return self.state + self.frozen + graphs


def untrained_vit(timm_name, image_size):
    """In place of release.load_vit: no weights are needed."""
    return timm.create_model(timm_name, img_size=image_size, num_classes=0)


def strip_data(module, mode):
    """Replace parameters and buffers by tensors without data."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = mode.from_tensor(parameter.data)
            part._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(buffer)


def count_elements(parameters):
    return sum(parameter.numel() for parameter in parameters)


class Graph:
    """What autograd keeps for a backward pass, as a hook for saved tensors.

    known: tensors that are counted elsewhere, such as weights.
    """
    def __init__(self, known):
        self.known = {id(tensor.untyped_storage()) for tensor in known}
        self.storages = {}                             # held, so that no id comes twice

    def record(self):
        """Context of a forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.storages[id(storage)] = storage
        return tensor

    def bytes(self):
        """Bytes of all storages, each counted once."""
        return sum(storage.nbytes() for storage in self.storages.values())


def build_networks(size, has_gan, checkpoint_activations):
    """Decoder, reconstruction loss, encoder, and the discriminator or None, all untrained."""
    sizes = dict(DECODER_SIZES[size], decoder_patch=IMAGE_SIZE // GRID)
    decoder = build_decoder(sizes, CHANNELS, GRID).train()
    decoder.checkpoint = checkpoint_activations
    loss = train_decoder.ReconstructionLoss()
    loss.vgg = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    loss.vgg.requires_grad_(False)
    loss.weights["lpips"] = 1.0
    encoder = timm.create_model("vit_base_patch14_reg4_dinov2", img_size=224, num_classes=0)
    discriminator = None
    if has_gan:
        discriminator = train_decoder.Discriminator("dino-s8")
        discriminator.vit.set_grad_checkpointing(checkpoint_activations)
    return decoder, loss, encoder, discriminator


def measure(decoder, loss, encoder, discriminator, micro_batch):
    """The Memory of a step with this micro-batch."""
    trained = [p for p in decoder.parameters() if p.requires_grad]
    frozen = [*loss.vgg.parameters(), *encoder.parameters()]
    heads = []
    known = [*decoder.parameters(), *loss.buffers()]
    if discriminator is not None:
        frozen += discriminator.vit.parameters()
        heads += discriminator.heads.parameters()
        known += discriminator.buffers()
    known += frozen + heads

    graph_of_decoder, graph_at_pixels = Graph(known), Graph(known)
    with torch.autocast("cpu", torch.bfloat16):
        with graph_of_decoder.record():
            pixels = decoder(torch.randn(micro_batch, CHANNELS, GRID, GRID))
        target = torch.rand(micro_batch, 3, IMAGE_SIZE, IMAGE_SIZE)
        images = pixels.detach().float().requires_grad_()
        with graph_at_pixels.record():
            total, _ = loss(images, target)
            if discriminator is not None:
                total = total - discriminator(images).mean()

    # Weight, gradient and AdamW's two means; of the decoder also the EMA.
    state = 5 * count_elements(trained) + 4 * count_elements(heads)
    return Memory(BYTES * state, BYTES * count_elements(frozen), graph_at_pixels.bytes(),
                  graph_of_decoder.bytes(), has_gan=discriminator is not None)


def print_row(name, values):
    print(name.ljust(58), *(f"{value / GIB:7.1f}" for value in values), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[1, 4, 8, 16, 32],
                        help="Micro-batches to count for (default: 1 4 8 16 32).")
    micro_batches = parser.parse_args().micro_batch
    release.load_vit = untrained_vit

    print("GiB, for micro-batches of".ljust(58), *(f"{n:7}" for n in micro_batches))
    for size in ("B", "XL"):
        for has_gan in (False, True):
            for checkpoint_activations in (False, True):
                networks = build_networks(size, has_gan, checkpoint_activations)
                mode = FakeTensorMode()
                for network in networks:
                    if network is not None:
                        strip_data(network, mode)
                with mode:
                    rows = [measure(*networks, n) for n in micro_batches]

                name = f"decoder {size}"
                if has_gan:
                    name += ", GAN"
                if checkpoint_activations:
                    name += ", --checkpoint_activations"
                print_row(name, [row.peak() for row in rows])
                state, frozen = rows[0].state / GIB, rows[0].frozen / GIB
                print_row(f"  weights, AdamW, EMA {state:.1f}, frozen {frozen:.1f}, at the pixels",
                          [row.pixels for row in rows])


if __name__ == "__main__":
    main()
