"""Exercise: a second-order solver.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py heun
"""


def heun(velocity, x, times):
    """Integrate dx/dt = velocity from the first of the times to the last, by Heun's steps.

        x_next = x + (t_next - t) velocity(x, t)                            Euler's guess
        v      = (velocity(x, t) + velocity(x_next, t_next)) / 2
        x     <- x + (t_next - t) v

    The last step, wherever it ends, is Euler's: it mostly ends at t = 0, where the velocity is not
    trained. So N steps take 2 N - 1 evaluations of the velocity.

    velocity: function (x b c h w, t b) -> dx/dt b c h w. It takes one time for each sample, in the
    dtype of x.
    x: state at the first time, b c h w. It must not be changed in place.
    times: from 1 (noise) down to 0 (data) or above, steps + 1 of them, fp64, not evenly spaced.
    Returns: state at the last time, b c h w, dtype of x.
    Source: Karras et al. (arXiv 2206.00364) algorithm 1. Lines of the solution: 8.
    """
    raise NotImplementedError("your code here")
