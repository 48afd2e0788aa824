"""The plan on paper of large trainings: time, memory, network, data and checkpoints, per GPU.

    python tests/plan.py               the paper's DiT^DH-XL on 8 GPUs; 1.5B + 2.4B on 64 to 512
    python tests/plan.py --check       what is counted here, against a small run on this CPU

Nothing is run on a GPU. *Counted*, from tensors without data: parameters, FLOPs, bytes that
autograd keeps. *Derived* from these: bytes that the network carries. *Assumed*, and flags: the
speed of the GPU, what share of it is used, of links and of disks, and how much of the network's
time is hidden behind computation. Multiplying by a share of the peak that was seen elsewhere is
an estimate, not a measurement.
"""
import argparse
import ctypes
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timm  # noqa: E402

from llm import Qwen2  # noqa: E402
from memory import Graph  # noqa: E402
from model import DIT_SIZES, T2I_SIZES, build_dit, flow_matching_loss  # noqa: E402
from train_dit import RECIPES  # noqa: E402
from train_t2i import RECIPES as T2I_RECIPES  # noqa: E402

FP32, BF16 = 4, 2                                      # bytes of a number
GIB, TERA = 2 ** 30, 1e12
SECONDS_A_DAY = 86_400
PROMPT_TOKENS = 74                                     # before the 256 of an image: 330 in all
QWEN_1_5B = dict(vocab_size=151_670, hidden_size=1536, intermediate_size=8960,
                 num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)


# ---------------------------------------------------------------------------- flags
def make_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--check", action="store_true", help="Compare counts with a run on this CPU.")
    # Large bf16 matmuls on an H200 reach about 790 of the 989 TFLOP/s of its data sheet.
    p.add_argument("--peak", type=float, default=790, help="TFLOP/s of large bf16 matmuls.")
    p.add_argument("--peak_tf32", type=float, default=400, help="TFLOP/s of large TF32 matmuls.")
    # From a count of kernels and bytes of a step of DiTDH-XL at micro-batch 32, not from a run.
    p.add_argument("--compiled", type=float, default=0.60, help="Share of the peak, compiled.")
    p.add_argument("--eager", type=float, default=0.39, help="Share of the peak, not compiled.")
    # NVLink 4: 900 GB/s in both directions together. ConnectX-7: 400 Gb/s.
    p.add_argument("--nvlink", type=float, default=450, help="GB/s of a GPU within its node.")
    p.add_argument("--link", type=float, default=50, help="GB/s of a link between nodes.")
    p.add_argument("--links", type=int, nargs="+", default=[8, 1],
                   help="Links of a node that are in use: one for each GPU, or fewer.")
    p.add_argument("--link_share", type=float, default=0.8, help="Share of links that is reached.")
    p.add_argument("--overlap", type=float, default=0.6,
                   help="Share of the computation during which the network works unnoticed: about "
                        "that of the backward pass, which is 2/3 or, if recomputed, 3/4.")
    p.add_argument("--gather_bytes", type=int, default=BF16, choices=(BF16, FP32),
                   help="Bytes of a weight that is gathered; 4: without mixed precision in FSDP.")
    p.add_argument("--micro_batch", type=int,
                   help="Images of a GPU and pass, text to image; None: 32 if activations are "
                        "recomputed, else 8.")
    p.add_argument("--gpus_a_node", type=int, default=8, help="GPUs of a node.")
    p.add_argument("--image_kb", type=float, default=110, help="Mean kB of an image file.")
    p.add_argument("--decode_ms", type=float, default=5.3,
                   help="CPU milliseconds to decode and crop an image.")
    p.add_argument("--disk", type=float, default=1.0, help="GB/s of a node's disk.")
    return p


# ---------------------------------------------------------------------------- models
class TextToImage(torch.nn.Module):
    """What t2i.T2I computes for prompts that are to be drawn, without looking at tokens."""
    def __init__(self, dit_size, channels, grid):
        super().__init__()
        width = QWEN_1_5B["hidden_size"]
        self.llm = Qwen2(**QWEN_1_5B)
        flags = dict(T2I_SIZES[dit_size], head_width=0, class_dropout=0.1)
        self.dit = build_dit(flags, channels, grid, num_classes=None)
        self.latent_queries = torch.nn.Parameter(torch.empty(grid ** 2, width))
        self.diff_head_projector = torch.nn.Linear(width, self.dit.pos_embed.shape[2])

    def states(self, batch):
        """Final states b n d of the queries, which follow a prompt."""
        queries = self.latent_queries.expand(batch, -1, -1)             # b n d
        prompt = torch.empty(batch, PROMPT_TOKENS, queries.shape[2])    # b l d
        hidden = self.llm(torch.cat([prompt, queries], dim=1))          # b l+n d
        return hidden[:, PROMPT_TOKENS:]                                # b n d


class Model(NamedTuple):
    """A model to plan for, in a latent space."""
    name: str
    encoder: str             # its name in timm
    channels: int            # of the latents
    grid: int
    is_text: bool
    flags: dict              # of train_dit.py; of text to image: {"model": its size}

    def build(self):
        if self.is_text:
            return TextToImage(self.flags["model"], self.channels, self.grid)
        return build_dit(self.flags, self.channels, self.grid, num_classes=1000)

    def loss(self, module, batch):
        """Flow matching loss of latents and conditions without meaning."""
        dit = module
        condition = torch.zeros(batch, dtype=torch.long)                # b
        if self.is_text:
            dit = module.dit
            condition = module.diff_head_projector(module.states(batch))            # b n e
        latents = torch.empty(batch, self.channels, self.grid, self.grid)           # b c h w
        return flow_matching_loss(dit, latents, condition, torch.rand(batch), latents).sum()

    def blocks(self, module):
        if self.is_text:
            return [*module.llm.layers, *module.dit.blocks]
        return list(module.blocks)

    def recompute(self, module):
        """Recompute the activations within blocks in the backward pass."""
        parts = [module.llm, module.dit] if self.is_text else [module]
        for part in parts:
            part.checkpoint = True


DITDH_XL = Model("DiTDH-XL over DINOv2-B", "vit_base_patch14_reg4_dinov2", 768, 16, False,
                 dict(DIT_SIZES["DiTDH-XL"], class_dropout=0.1))
T2I_4B = Model("1.5B language model + 2.4B DiT over SigLIP2-So400M",
               "vit_so400m_patch14_siglip_224", 1152, 16, True, dict(model="2.4B"))


# ---------------------------------------------------------------------------- counts
class Counts(NamedTuple):
    """What is counted of a model. FLOPs and activations: of an image."""
    parameters: int          # trained
    frozen: int              # parameters of the encoder
    gathered: int            # parameters that are whole at a time if they are sharded
    encoding: int            # FLOPs of the encoder
    flops: int               # of forward and backward pass
    saved: int               # bytes that autograd keeps for the backward pass, with bf16 matmuls


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(run):
    """FLOPs of the matmuls in run(), attention as two of them.

    What the backward pass recomputes counts, too; speed.count_flops leaves it out, for the MFU.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):        # what is counted of attention on CPUs
        run()
    return counter.get_total_flops()


def count_saved(model, module, batch, dtype=torch.bfloat16):
    """Bytes that autograd keeps for the loss of a batch. module: on the CPU, with data or not."""
    graph = Graph(known=[*module.parameters(), *module.buffers()])
    with graph.record(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        model.loss(module, batch)
    return graph.bytes()


def count_gathered(model, module):
    """Parameters that a process holds whole at a time if blocks are sharded one by one: the block
    that computes, the next one, and all that lies outside of blocks.
    """
    sizes = [count_parameters(block) for block in model.blocks(module)]
    return count_parameters(module) - sum(sizes) + 2 * max(sizes)


def count(model, recompute=False):
    """The Counts of a Model. recompute: whether activations within blocks are recomputed."""
    with torch.device("meta"), torch.no_grad():
        encoder = timm.create_model(model.encoder, img_size=224, num_classes=0)
        images = torch.empty(1, 3, 224, 224)
        encoding = count_flops(lambda: encoder.forward_features(images))
    with FakeTensorMode():                             # tensors without data, too
        module = model.build().train()
        if recompute:
            model.recompute(module)
        flops = count_flops(lambda: model.loss(module, 1).backward())
        # Their difference leaves out what does not grow with the batch.
        saved = count_saved(model, module, 4) - count_saved(model, module, 2)
    return Counts(
        parameters=count_parameters(module), frozen=count_parameters(encoder),
        gathered=count_gathered(model, module),
        encoding=encoding, flops=flops, saved=saved // 2)


# ---------------------------------------------------------------------------- network
class Network(NamedTuple):
    """Bytes a second that a GPU sends, and receives at the same time."""
    nodes: int
    gpus: int                # of a node
    inside: float            # of a GPU within its node
    between: float           # of all links of a node together

    def gather_seconds(self, size, nodes):
        """An all-gather of `size` bytes in the end, or a reduce-scatter of as many, in a ring over
        the GPUs of so many nodes.

        Each GPU sends and receives all but its own part, through NVLink; each node all but its
        own part, through its links. Both happen at once.
        """
        ranks = nodes * self.gpus
        seconds = size * (ranks - 1) / ranks / self.inside
        if nodes > 1:
            seconds = max(seconds, size * (nodes - 1) / nodes / self.between)
        return seconds

    def reduce_seconds(self, size, nodes):
        """An all-reduce in a ring: a reduce-scatter, then an all-gather."""
        return 2 * self.gather_seconds(size, nodes)


def network_seconds(mode, counts, network, micro_batches, gather_bytes=BF16):
    """Seconds for which the network works in a step of so many micro-batches.

    mode: "DDP": fp32 gradients, once a step. "sharded": over all GPUs (FSDP); in every micro-batch,
    the weights are gathered for the forward pass and for the backward pass, and fp32 gradients
    reduced and scattered once a step. "hybrid": the same within each node, then the shards'
    gradients are averaged over the nodes (HSDP). gather_bytes: of a weight that is gathered.
    """
    gradients = FP32 * counts.parameters
    weights = gather_bytes * counts.parameters
    if mode == "DDP":
        return network.reduce_seconds(gradients, network.nodes)
    nodes = 1 if mode == "hybrid" else network.nodes
    seconds = 2 * micro_batches * network.gather_seconds(weights, nodes)
    seconds += network.gather_seconds(gradients, nodes)
    if mode == "hybrid" and network.nodes > 1:         # all shards of a node share its links
        share = (network.nodes - 1) / network.nodes
        seconds += 2 * gradients * share / network.between
    return seconds


# ---------------------------------------------------------------------------- plan
class Plan(NamedTuple):
    """What a training takes."""
    compute: float           # seconds of a step
    network: float           # seconds of a step, hidden or not
    step: float              # seconds
    memory: float            # bytes of a GPU
    images_a_second: float   # of all GPUs
    days: float
    gpu_days: float
    checkpoint: float        # bytes


def plan(counts, mode, network, batch, micro_batch, steps, flops_a_second, has_ema, overlap,
         gather_bytes=BF16):
    """The Plan of a training. flops_a_second: of a GPU, as used. overlap, gather_bytes: see the
    flags.
    """
    gpus = network.nodes * network.gpus
    micro_batches = batch // (gpus * micro_batch)
    compute = batch / gpus * (counts.flops + counts.encoding) / flops_a_second
    communication = network_seconds(mode, counts, network, micro_batches, gather_bytes)
    step = compute + max(0.0, communication - overlap * compute)

    # Weights, gradients, AdamW's two means, perhaps the EMA.
    state = FP32 * counts.parameters * (5 if has_ema else 4)
    if mode == "sharded":
        state = state / gpus
    elif mode == "hybrid":
        state = state / network.gpus
    if mode != "DDP":                                  # these are whole, with fp32 gradients
        state += counts.gathered * (BF16 + FP32)
    memory = state + FP32 * counts.frozen + micro_batch * counts.saved
    seconds = steps * step
    return Plan(
        compute=compute, network=communication, step=step, memory=memory,
        images_a_second=batch / step, days=seconds / SECONDS_A_DAY,
        gpu_days=gpus * seconds / SECONDS_A_DAY,
        checkpoint=FP32 * counts.parameters * (4 if has_ema else 3))


def print_counts(model, counts, kind):
    print(f"\n{model.name}, {kind}: {counts.parameters / 1e6:,.0f} M parameters; an image takes "
          f"{counts.flops / TERA:.2f} TFLOP, its encoder ({counts.frozen / 1e6:.0f} M) "
          f"{counts.encoding / TERA:.3f}, and keeps {counts.saved / GIB:.2f} GiB")


HEADER = ("GPUs  mode     links  micro  speed     compute  network     step    GiB  images/s  "
          "days  GPU-days  files MB/s  cores")


def print_plan(args, mode, network, links, micro_batch, speed, result):
    """A row of the table. files, cores: of a node, to read and to decode its images."""
    images_of_node = result.images_a_second / network.nodes
    files = images_of_node * args.image_kb / 1e3
    cores = images_of_node * args.decode_ms / 1e3
    print(f"{network.nodes * network.gpus:4}  {mode:8} {links:5}  {micro_batch:5}  {speed:8} "
          f"{1e3 * result.compute:6.0f} ms {1e3 * result.network:5.0f} ms "
          f"{1e3 * result.step:5.0f} ms {result.memory / GIB:6.1f} {result.images_a_second:9,.0f} "
          f"{result.days:5.2f} {result.gpu_days:9.1f} {files:11,.0f} {cores:6.0f}")


def make_network(args, gpus, links):
    nodes = max(1, gpus // args.gpus_a_node)
    return Network(nodes, min(gpus, args.gpus_a_node), args.nvlink * 1e9 * args.link_share,
                   args.link * 1e9 * links * args.link_share)


def print_checkpoint(args, result, nodes):
    seconds = result.checkpoint / (args.disk * 1e9)
    print(f"a checkpoint has {result.checkpoint / 1e9:.1f} GB: {seconds:.0f} s through one process "
          f"at {args.disk} GB/s")
    if nodes > 1:
        print(f"{seconds / nodes:.1f} s if each of {nodes} nodes writes its part to its own disk")


def print_classes(args):
    """The paper's DiTDH-XL on 8 GPUs."""
    counts = count(DITDH_XL)
    recipe = RECIPES["rae"]
    print_counts(DITDH_XL, counts, "activations kept")
    print(HEADER)
    network = make_network(args, 8, args.links[0])
    speeds = {"compiled": args.compiled * args.peak, "eager": args.eager * args.peak,
              "TF32": args.eager * args.peak_tf32}
    for speed, flops_a_second in speeds.items():
        for micro_batch in (32, 128):
            # Activations of TF32 are as large again.
            own = counts._replace(saved=counts.saved * (2 if speed == "TF32" else 1))
            result = plan(own, "DDP", network, recipe["batch"], micro_batch, recipe["steps"],
                          flops_a_second * TERA, True, args.overlap)
            print_plan(args, "DDP", network, "-", micro_batch, speed, result)
    print_checkpoint(args, result, network.nodes)


def print_text(args, sizes=(64, 128, 256, 512)):
    """Scale-RAE's 1.5B + 2.4B on several nodes."""
    recipe = T2I_RECIPES["pretrain"]
    for recompute in (True, False):
        counts = count(T2I_4B, recompute)
        print_counts(T2I_4B, counts, "recomputed" if recompute else "activations kept")
        print(HEADER)
        for gpus in sizes:
            largest = recipe["batch"] // gpus
            micro_batch = min(largest, args.micro_batch or (32 if recompute else 8))
            for links in args.links:
                network = make_network(args, gpus, links)
                for mode in ("sharded", "hybrid"):
                    result = plan(counts, mode, network, recipe["batch"], micro_batch,
                                  recipe["steps"], args.compiled * args.peak * TERA, False,
                                  args.overlap, args.gather_bytes)
                    print_plan(args, mode, network, links, micro_batch, "compiled", result)
    print_checkpoint(args, result, network.nodes)


# ---------------------------------------------------------------------------- check
SMALL = Model("a small DiT", "vit_tiny_patch16_224", 64, 16, False,
              dict(width=256, depth=8, heads=4, head_width=0, class_dropout=0.1))


def resident_bytes():
    """Memory of this process that is in use now. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def check(batch=16):
    """Counted and measured bytes that a batch of SMALL keeps in fp32, and FLOPs of an image: a dict
    of pairs. Linux only.
    """
    counted = count(SMALL)
    with FakeTensorMode():
        counted_bytes = count_saved(SMALL, SMALL.build().train(), batch, torch.float32)

    M_MMAP_THRESHOLD = -3                              # number of malloc.h
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 16)        # freed memory is given back
    module = SMALL.build().train()
    SMALL.loss(module, 1).backward()                   # what is made once, such as pools
    before = resident_bytes()
    loss = SMALL.loss(module, batch)                   # holds what autograd keeps
    measured_bytes = resident_bytes() - before
    del loss
    measured_flops = count_flops(lambda: SMALL.loss(module, 1).backward())
    return dict(bytes=(counted_bytes, measured_bytes), flops=(counted.flops, measured_flops))


def main():
    args = make_parser().parse_args()
    if args.check:
        for name, (counted, measured) in check().items():
            print(f"{name}: counted {counted:,}, measured {measured:,}: "
                  f"{counted / measured:.3f}")
        return
    print("Estimated, not run.")
    print_classes(args)
    print_text(args)


if __name__ == "__main__":
    main()
