"""Exercise: shift times towards noise.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py time_shift
"""


def time_shift(t, dim, base=4096):
    """Shift times towards noise, the more, the more dimensions the latents have.

        t' = a t / (1 + (a-1) t),  a = sqrt(dim / base)

    Noise of the same t hides high-dimensional latents less. t = 0 and t = 1 stay where they are.

    t: times in [0,1], a tensor of any shape (0 is data, 1 is noise).
    dim: dimensions of the latents, tokens x channels, an int.
    base: dimensions that need no shift, an int.
    Returns: shifted times, shape and dtype of t.
    Source: RAE (arXiv 2510.11690) eq. 5. Lines of the solution: 2.
    """
    raise NotImplementedError("your code here")
