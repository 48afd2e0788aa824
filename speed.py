"""FLOPs that a model needs, counted, and those that a device could compute, for the log's MFU."""
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


# FLOPs of what a forward pass consists of, for FlopCounter: two for each multiply-add.
def linear_flops(output, input, weight, bias=None):
    return 2 * output.numel() * weight.shape[1]        # weight: out in


def convolution_flops(output, input, weight, *settings, **options):
    return 2 * output.numel() * weight[0].numel()      # weight: out in kernel


def attention_flops(output, query, key, *rest, **options):
    """Of QK^T and of its product with V. Causal attention counts as whole, as in other papers."""
    return 4 * query.numel() * key.shape[-2]           # key: ... tokens dh


def matmul_flops(output, a, b):
    return 2 * output.numel() * a.shape[-1]


PRODUCTS_WITH_WEIGHTS = {
    F.linear: linear_flops,
    F.conv1d: convolution_flops,
    F.conv2d: convolution_flops,
}
PRODUCTS_OF_ACTIVATIONS = {
    F.scaled_dot_product_attention: attention_flops,
    torch.matmul: matmul_flops,
    torch.Tensor.matmul: matmul_flops,
    torch.Tensor.__matmul__: matmul_flops,             # a @ b
}


class Flops(NamedTuple):
    """FLOPs of a forward pass, and from them those of training.

    These are the model's: what activation checkpointing computes twice counts once.
    """
    weights: int             # of products with weights
    activations: int         # of products of two activations, in attention

    @property
    def forward(self):
        return self.weights + self.activations

    @property
    def training(self):
        """Forward and backward. One product has two gradients, one for each of its factors."""
        return 3 * self.forward

    @property
    def frozen(self):
        """Forward and backward through frozen weights, which have no gradient themselves."""
        return 2 * self.weights + 3 * self.activations


class FlopCounter(TorchFunctionMode):
    """Context that counts the FLOPs of the matmuls, convolutions and attention inside it.

    What works on single elements, such as norms and GELU, counts nothing.
    """
    def __init__(self):
        super().__init__()
        self.weights = 0
        self.activations = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        if function is F.linear:                       # shapes are all that is needed
            output = args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        else:
            output = function(*args, **options)
        if function in PRODUCTS_WITH_WEIGHTS:
            self.weights += PRODUCTS_WITH_WEIGHTS[function](output, *args, **options)
        elif function in PRODUCTS_OF_ACTIVATIONS:
            self.activations += PRODUCTS_OF_ACTIVATIONS[function](output, *args, **options)
        return output


@torch.no_grad()
def count_flops(function, *inputs):
    """The Flops of the forward pass function(*inputs).

    function: a module, or a method of one, in eval mode, so that it draws no random numbers. Runs
    it, but for the linear layers; so a batch of one is best.
    """
    counter = FlopCounter()
    with torch.compiler.set_stance("force_eager"), counter:            # not what compiling makes
        function(*inputs)
    return Flops(counter.weights, counter.activations)


# Matmuls of GPUs in TFLOP/s, dense, with sums in fp32: in bf16, and in fp32 as runtime.setup() has
# it (TF32). None: they are emulated. Keys: words of torch.cuda.get_device_name(), the more special
# ones first, since the first that fits counts.
# Source: NVIDIA's data sheets and white papers of each; many of them give twice the number, for
# sparse matrices.
GPU_PEAKS = {
    "B200": (2250, 1100),
    "H200 NVL": (835, 418),
    "H200": (989, 495),
    "GH200": (989, 495),
    "H100 NVL": (835, 418),
    "H100 PCIe": (756, 378),
    "H100": (989, 495),
    "A100": (312, 156),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L4": (121, 60),
    "T4": (None, 8.1),                                 # Turing has no TF32
    "V100": (None, 15.7),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
}


def peak_flops(device, dtype):
    """FLOP/s at which a device could multiply matrices in dtype "bf16" or "fp32"; None: unknown.

    Of a GPU the maker's number, of a CPU the best of a few products, with the threads of this
    process.
    """
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)
    if device.type != "cpu":
        return None
    n = 512
    ones = torch.ones(n, n, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ones @ ones
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


def gpu_peak_flops(name, dtype):
    """FLOP/s of the GPU called `name` by GPU_PEAKS; None: it is not there, or is a part of one."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words or " Laptop " in words or " D " in words:      # slower ones
        return None
    for model, (bf16, fp32) in GPU_PEAKS.items():
        if f" {model} " in words:
            teraflops = bf16 if dtype == "bf16" else fp32
            return None if teraflops is None else teraflops * 1e12
    return None
