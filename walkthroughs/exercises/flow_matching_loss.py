"""Exercise: the objective of flow matching.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py flow_matching_loss
"""


def flow_matching_loss(model, x0, y, t, eps):
    """Squared error of the predicted velocity, a mean for each sample.

        x_t = (1-t) x0 + t eps,  v = eps - x0

    Time runs from data (t = 0) to noise (t = 1). Beware of shapes: t has one number for each
    sample, and x0 has c h w of them.

    model: function (x_t b c h w, t b, y) -> predicted velocity b c h w.
    x0: latents b c h w. y: condition, for the model only. t: times b in [0,1].
    eps: standard normal noise b c h w.
    Returns: losses b, with their gradient.
    Source: RAE (arXiv 2510.11690) section 2. Lines of the solution: 4.
    """
    raise NotImplementedError("your code here")
