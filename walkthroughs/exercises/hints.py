"""What the usual error messages of Python and PyTorch mean in these exercises.

Each table maps a regular expression, found in an error's message, to a sentence. An exercise's own
table is looked at first, then the one for all.
"""
import re

SHAPES_MISFIT = r"must match the (size of tensor|existing size)|not broadcastable|shape mismatch"
TENSOR_LACKS_NUMBERS_METHOD = r"'(int|float)' object has no attribute"
OUT_OF_RANGE = r"out of (range|bounds)"

ONE_NUMBER_A_SAMPLE = ("one number for each sample, b, fits beside b c h w only in the shape "
                       "b 1 1 1: reshape it")
ONE_STEP_FEWER = "N + 1 times make N steps: the last step begins at the last time but one"

FOR_ALL = {
    r"name '(torch|math|nn|F|einops|rearrange|repeat|reduce|pairwise|np|numpy)' is not defined":
        "import it at the top of the file",
    r"[Bb]oolean value of Tensor with more than one value":
        "if, and, or, not and chains such as a <= t <= b need one truth value, but the tensor has "
        "several: compare with &, in brackets, and choose with torch.where",
    r"cannot be converted to Scalar|[Oo]nly one element tensors can be converted":
        "float(), int(), item() and math's functions take one number, but the tensor has several: "
        "use torch's functions",
    r"\w+\(\): argument '\w+' \(position \d\) must be Tensor, not (int|float)":
        "torch's function takes a tensor, but this is a number of Python: use ** or math, or make "
        "it a tensor with torch.as_tensor",
    TENSOR_LACKS_NUMBERS_METHOD:
        "this is a number of Python, which has none of a tensor's methods: use ** or math, or make "
        "it a tensor with torch.as_tensor",
    r"to have the same dtype|expected scalar type":
        "tensors of two dtypes meet: convert one of them, x.to(dtype)",
    r"is invalid for input of size":
        "a reshape keeps the number of elements: multiply the sides and compare",
    SHAPES_MISFIT:
        "shapes do not fit: sides are compared from the last one, and have to be equal or 1",
}
FOR_ONE = {
    "flow_matching_loss": {SHAPES_MISFIT: ONE_NUMBER_A_SAMPLE},
    "add_noise": {SHAPES_MISFIT: ONE_NUMBER_A_SAMPLE},
    "cfg": {
        SHAPES_MISFIT: f"{ONE_NUMBER_A_SAMPLE}. This holds for true and false as well. The null "
                       "condition needs the shape of y",
        r"[Bb]oolean value of Tensor with more than one value":
            "t has one time for each sample, b, so `if` cannot decide for all of them: compare "
            "with &, (low <= t) & (t <= high), and choose for each sample with torch.where",
        r"argument '(fill_value|value)' .*must be Number, not Tensor":
            "null may be a tensor, which full and full_like do not take: torch.as_tensor(null) is "
            "a tensor in any case; broadcast it to the shape of y",
        TENSOR_LACKS_NUMBERS_METHOD:
            "null may be a number: torch.as_tensor(null) is a tensor in any case",
    },
    "euler": {OUT_OF_RANGE: ONE_STEP_FEWER},
    "heun": {OUT_OF_RANGE: ONE_STEP_FEWER},
    "rope": {
        SHAPES_MISFIT: "cosines and sines have the shape n head_dim/2: one for each token and each "
                       "pair of channels",
    },
    "latent_statistics": {
        SHAPES_MISFIT: "the sums are c h w: sum over the batch, the first axis, alone",
    },
    "adaln_block": {
        r"missing 1 required positional argument: 'rope'":
            "self.attn takes the rotary positions, too: self.attn(x, rope)",
    },
    "frechet_distance": {
        r"not positive-definite":
            "a Cholesky factor needs full rank, but with few images some eigenvalues are 0: use "
            "the eigenvalues themselves",
    },
}


def find_hint(name, message):
    """The sentence for an error's message in the exercise of this name, or None."""
    for table in (FOR_ONE.get(name, {}), FOR_ALL):
        for pattern, sentence in table.items():
            if re.search(pattern, message):
                return sentence
    return None
