"""Exercise: a transformer block with adaLN.

Replace each raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py adaln_block
"""
import torch.nn as nn

from model import Attention, SwiGLU


def modulate(x, shift, scale):
    """Scale and shift x. A scale of 0 changes nothing: then x is multiplied by 1.

    x: b n d. shift, scale: b 1 d (the same for all tokens) or b n d.
    Returns: b n d.
    Source: DiT (arXiv 2212.09748). Lines of the solution: 1.
    """
    raise NotImplementedError("your code here")


class Block(nn.Module):
    """Attention and MLP, each with adaLN: the condition gives its shift, scale and gate."""
    def __init__(self, d, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(d, eps=1e-6)
        self.attn = Attention(d, heads)                 # (x b n d, rope) -> b n d
        self.norm2 = nn.RMSNorm(d, eps=1e-6)
        self.mlp = SwiGLU(d)                            # b n d -> b n d
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, cond, rope):
        """Attention, then the MLP, each normalised, modulated, gated and added to x.

            x <- x + gate1 attn(modulate(norm1(x), shift1, scale1))
            x <- x + gate2 mlp(modulate(norm2(x), shift2, scale2))

        adaLN_modulation gives, along the last dimension and in this order, shift1, scale1, gate1,
        shift2, scale2, gate2, d channels each.

        x: b n d. cond: condition, b 1 d (for the image) or b n d (for each token).
        rope: rotary positions, to be handed to self.attn.
        Returns: b n d.
        Source: DiT (arXiv 2212.09748), adaLN-zero. Lines of the solution: 3.
        """
        raise NotImplementedError("your code here")
