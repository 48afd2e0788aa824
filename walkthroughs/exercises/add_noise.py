"""Exercise: noise-augmented decoding.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py add_noise
"""


def add_noise(latents, tau, law):
    """Latents as the decoder sees them in training: with noise of a random strength.

        latents + sigma eps,  eps ~ N(0, 1),  sigma = |N(0, tau^2)|

    Each sample of the batch draws one sigma of its own, for all of its elements. Each element draws
    an eps of its own. So the decoder learns to forgive errors of the DiT, small and large.

    latents: b c h w. tau: scale of sigma, at least 0.
    law: law of sigma: "half_normal", as above and in the paper; or "uniform", as in the release,
    sigma = tau * U(0, 1).
    Returns: b c h w.
    Source: RAE (arXiv 2510.11690) section 4.3. Lines of the solution: 6.
    """
    raise NotImplementedError("your code here")
