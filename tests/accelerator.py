"""An accelerator that is none: device "gpu", whose tensors keep their numbers on the CPU.

    with Emulation() as emulation:
        x = torch.randn(3, device=GPU)
        if x.sum() > 0: ...
    emulation.waits                        # that line: Python waited for the device

It has CUDA's manners. A tensor of the device and one of the CPU cannot meet, but for scalars and
indices. Python waits for the device where it reads a number, asks how many elements fulfil a
condition, or copies from memory that is not pinned. Autocast chooses precisions as on CUDA. The
numbers are those of the CPU's kernels, random ones included, so that a script must give the same
results with and without the emulation.

Importing this module gives the process the device, for good. It needs a private interface of torch;
without that, importing fails.
"""
import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent
aten = torch.ops.aten


# ---------------------------------------------------------------------------- the device
def make_device():
    """Teach torch the device "gpu". Returns it."""
    class DeviceModule(backend_registration._DummyBackendModule):
        """What torch asks for as torch.gpu: in autocast and when activations are recomputed."""
        device = contextlib.nullcontext

        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

        def get_rng_state(self, device=None):
            return torch.get_rng_state()

        def set_rng_state(self, state, device=None):
            torch.set_rng_state(state)

        def set_device(self, device):
            pass

    backend_registration._setup_privateuseone_for_python_backend("gpu", DeviceModule())
    return torch.device("gpu", 0)


GPU = make_device()
CPU = torch.device("cpu")


class GpuTensor(torch.Tensor):
    """A tensor of the device. on_cpu: its numbers."""
    @staticmethod
    def __new__(cls, on_cpu):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype,
            device=GPU)
        tensor.on_cpu = on_cpu
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return Emulation.current.run(op, args, kwargs or {})

    def __deepcopy__(self, memo):
        copy = GpuTensor(self.on_cpu.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __getitem__(self, index):
        if not isinstance(index, tuple):
            index = (index,)
        # torch would make tensors of lists, out of our sight.
        return super().__getitem__(tuple(
            torch.tensor(i, dtype=torch.long) if isinstance(i, list) else i for i in index))

    def __reduce_ex__(self, protocol):             # how it is saved, to be loaded on the CPU
        return self.on_cpu.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"GpuTensor({self.on_cpu})"

    def tolist(self):
        Emulation.current.wait("tolist")
        return self.on_cpu.tolist()

    def numpy(self, **options):
        raise TypeError("can't convert a tensor of device gpu to numpy; use Tensor.cpu() first")

    def __array__(self, *args, **options):
        return self.numpy()


def to_gpu(value):
    """A tensor of the device in place of one of the CPU; anything else as it is."""
    is_on_cpu = isinstance(value, torch.Tensor) and not isinstance(value, GpuTensor)
    return GpuTensor(value) if is_on_cpu else value


def pinned(tensor):
    """The tensor of the CPU, noted as one in memory that is pinned."""
    tensor.is_in_pinned_memory = True
    return tensor


def to_cpu(value):
    """The numbers of a tensor of the device; anything else as it is."""
    return value.on_cpu if isinstance(value, GpuTensor) else value


# ---------------------------------------------------------------------------- operations
COPIES = (aten._to_copy.default, aten.copy_.default)
# What reads numbers in order to know the value, or the size, of its result.
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
         aten.equal.default, aten._unique2.default, aten.unique_dim.default,
         aten.repeat_interleave.Tensor)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default)


class Wait(NamedTuple):
    """A moment at which Python waits for the device."""
    place: str                   # file:line of the product
    reason: str

    def __str__(self):
        return f"{self.place} ({self.reason})"


class Emulation(TorchDispatchMode):
    """Context in which tensors can be made on the device.

    waits: list of Waits so far. steps: len(waits) at the end of each step, see mark_step().
    """
    current = None

    def __init__(self):
        super().__init__()
        self.waits = []
        self.steps = []
        self.patches = []

    def mark_step(self):
        self.steps.append(len(self.waits))

    def waits_of_steps(self):
        """A list of Waits for each step but the first, from the end of the step before it."""
        return [self.waits[start:end]
                for start, end in zip(self.steps, self.steps[1:], strict=False)]

    # ------------------------------------------------------------------------ context
    def __enter__(self):
        Emulation.current = self
        tensor, as_tensor = torch.tensor, torch.as_tensor

        # These two make a tensor below the reach of the emulation.
        def make_tensor(data, *, dtype=None, device=None):
            made = tensor(data, dtype=dtype)
            return made if device is None else made.to(device)

        def make_as_tensor(data, dtype=None, device=None):
            if isinstance(data, torch.Tensor):
                return data.to(device or data.device, dtype or data.dtype)
            made = as_tensor(data, dtype=dtype)
            return made if device is None else made.to(device)

        def pin_memory(tensor_on_cpu, device=None):
            return pinned(tensor_on_cpu.clone())

        self.replace(torch, "tensor", make_tensor)
        self.replace(torch, "as_tensor", make_as_tensor)
        self.replace(torch.Tensor, "pin_memory", pin_memory)
        return super().__enter__()

    def __exit__(self, *error):
        for owner, name, original in reversed(self.patches):
            setattr(owner, name, original)
        super().__exit__(*error)

    def replace(self, owner, name, value):
        self.patches.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    # ------------------------------------------------------------------------ one operation
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.run(op, args, kwargs or {})

    def run(self, op, args, kwargs):
        """Compute an operation on the CPU; the result is the device's if it were so on CUDA."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, GpuTensor)]
        on_cpu = [x for x in tensors if not isinstance(x, GpuTensor)]
        target = kwargs.get("device")
        is_for_gpu = bool(on_gpu) if target is None else torch.device(target).type == "gpu"
        if kwargs.get("pin_memory"):
            return pinned(op(*args, **{**kwargs, "pin_memory": False}))
        if not on_gpu and not is_for_gpu:
            return op(*args, **kwargs)
        if on_gpu:
            self.check_devices(op, args, on_cpu)
        if is_for_gpu:
            self.check_generator(op, kwargs.get("generator"))
        self.note_waits(op, args, kwargs, on_gpu, on_cpu, is_for_gpu)
        if op is aten._fused_sdp_choice.default:
            return 0                                   # attention by plain matmuls, as on our CPUs

        kwargs_on_cpu = tree_map(to_cpu, kwargs)
        if target is not None and is_for_gpu:
            kwargs_on_cpu["device"] = CPU
        result = op(*tree_map(to_cpu, args), **kwargs_on_cpu)
        returns = op._schema.returns
        is_in_place = len(returns) == 1 and returns[0].alias_info is not None \
            and returns[0].alias_info.is_write
        if is_in_place:
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(to_gpu, result) if is_for_gpu else result

    def check_devices(self, op, args, on_cpu):
        """Raise RuntimeError if tensors of the CPU meet those of the device.

        On CUDA, scalars may be the CPU's, and indices of a tensor of the device.
        """
        arrays = [x for x in on_cpu if x.dim() > 0]
        may_meet = op in COPIES or op in INDEXING and isinstance(args[0], GpuTensor)
        if arrays and not may_meet:
            shapes = [tuple(x.shape) for x in arrays]
            raise RuntimeError(f"tensors on two devices: {op} of one on gpu and of {shapes} on cpu")

    def check_generator(self, op, generator):
        if generator is not None and generator.device.type != "gpu":
            raise RuntimeError(f"{op} on gpu with a generator of {generator.device}")

    def note_waits(self, op, args, kwargs, on_gpu, on_cpu, is_for_gpu):
        """Note whether Python waits for the device in an operation."""
        if on_gpu and op in READS:
            self.wait(op.name())
        if on_gpu and op in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                self.wait("index by a mask")
            elif any(not isinstance(index, GpuTensor) and index.dim() > 0 for index in indices):
                self.wait("index of the CPU")
        if op is aten._to_copy.default and on_gpu and not is_for_gpu:
            self.wait("copy to the CPU")
        if op is aten._to_copy.default and on_cpu and is_for_gpu:
            self.note_upload(on_cpu[0], kwargs.get("non_blocking", False))
        if op is aten.copy_.default and on_gpu and on_cpu:
            if isinstance(args[0], GpuTensor):
                non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
                self.note_upload(on_cpu[0], non_blocking)
            else:
                self.wait("copy to the CPU")

    def note_upload(self, source, non_blocking):
        """A copy to the device; a CPU scalar travels with the kernel's arguments."""
        is_pinned = getattr(source, "is_in_pinned_memory", False)
        if not (is_pinned and non_blocking):
            self.wait("copy from memory that is not pinned")

    def wait(self, reason):
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if ROOT in file.parents and TESTS not in file.parents:
                place = f"{file.relative_to(ROOT)}:{frame.f_lineno}"
                self.waits.append(Wait(place, reason))
                return
            frame = frame.f_back
        self.waits.append(Wait("?", reason))


# ---------------------------------------------------------------------------- autocast
# What CUDA's autocast does to an operation's tensors. Source: torch's documentation of
# torch.amp, "CUDA Ops that can autocast to float16", "to float32" and "to the widest type".
TO_LOW = [
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "conv1d", "conv2d",
    "conv3d", "convolution", "scaled_dot_product_attention"]
TO_FP32 = [
    "layer_norm", "group_norm", "exp", "log", "rsqrt", "pow.Tensor_Scalar", "softplus", "l1_loss",
    "mse_loss", "cross_entropy_loss", "nll_loss", "binary_cross_entropy_with_logits",
    "cosine_similarity", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod",
    "cumsum", "linalg_vector_norm", "norm.ScalarOpt_dim"]
TO_WIDEST = ["cat", "stack", "index_put", "scatter_add", "addcmul", "dot", "vdot"]

AUTOCAST_KEY = "AutocastPrivateUse1"
fallthrough = torch.library.Library("_", "IMPL")
fallthrough.fallback(torch.library.fallthrough_kernel, AUTOCAST_KEY)
casts = torch.library.Library("aten", "IMPL")


def is_float_on_gpu(value):
    return (isinstance(value, torch.Tensor) and value.device.type == "gpu"
            and value.is_floating_point() and value.dtype != torch.float64)


def add_cast(name, choose_dtype):
    """Cast the tensors of the operation `name`. choose_dtype: their dtypes -> the one to cast to.
    """
    packet, _, overload = name.partition(".")
    op = getattr(getattr(aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST_KEY))

    def with_cast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            dtypes = {x.dtype for x in tree_leaves((args, kwargs)) if is_float_on_gpu(x)}
            dtype = choose_dtype(dtypes)

            def cast(value):
                return value.to(dtype) if is_float_on_gpu(value) else value

            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    casts.impl(name, with_cast, AUTOCAST_KEY)


def low_dtype(dtypes):
    return torch.get_autocast_dtype("gpu")


def fp32(dtypes):
    return torch.float32


def widest_dtype(dtypes):
    return torch.float32 if torch.float32 in dtypes else torch.bfloat16


for name in TO_LOW:
    add_cast(name, low_dtype)
for name in TO_FP32:
    add_cast(name, fp32)
for name in TO_WIDEST:
    add_cast(name, widest_dtype)
