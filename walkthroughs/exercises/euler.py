"""Exercise: a first-order solver.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py euler
"""


def euler(velocity, x, times):
    """Integrate dx/dt = velocity from the first of the times to the last, by Euler's steps.

        x <- x + (t_next - t) velocity(x, t)

    The times run from noise to data, so t_next - t is negative. They are not evenly spaced.

    velocity: function (x b c h w, t b) -> dx/dt b c h w. It takes one time for each sample, in the
    dtype of x.
    x: state at the first time, b c h w. It must not be changed in place.
    times: from 1 (noise) down to 0 (data) or above, steps + 1 of them, fp64.
    Returns: state at the last time, b c h w, dtype of x.
    Lines of the solution: 4.
    """
    raise NotImplementedError("your code here")
