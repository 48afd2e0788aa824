"""Exercise: rotary positions in two dimensions.

Replace each raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py rope
"""
import torch.nn as nn


class RoPE(nn.Module):
    """Rotary positions of the tokens of a square grid, for queries and keys.

    The channels of a head are taken in adjacent pairs, 0 and 1, 2 and 3, and so on. Each pair
    (x1, x2) is turned by an angle, counterclockwise:

        (x1 cos - x2 sin,  x1 sin + x2 cos)

    The pairs of the first half of the channels turn by the row of the token, those of the second
    half by its column. Within each half, pair i = 0, 1, ... turns by

        position * 10000 ** (-i / (head_dim / 4))

    Rows and columns count from 0. The tokens lie row by row, as one reads.
    Source: LightningDiT (arXiv 2501.01423), RoFormer (2104.09864)
    """
    def __init__(self, head_dim, grid):
        """Prepare cosines and sines.

        head_dim: channels of a head, a multiple of 4. grid: tokens per side, so n = grid*grid.
        Lines of the solution: 4, with build_rotary_pos_embed of timm.layers; 8 without.
        """
        raise NotImplementedError("your code here")

    def forward(self, x):
        """Turn the channels of each token.

        x: queries or keys, b k n head_dim, with k heads.
        Returns: b k n head_dim, dtype of x.
        Lines of the solution: 1, with apply_rot_embed of timm.layers; 4 without.
        """
        raise NotImplementedError("your code here")
