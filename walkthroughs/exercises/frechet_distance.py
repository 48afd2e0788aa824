"""Exercise: the Fréchet distance, which FID is.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py frechet_distance
"""


def frechet_distance(mean1, cov1, mean2, cov2):
    """Fréchet distance of two Gaussians.

        |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))

    The root is that of a matrix: (A B)^(1/2) times itself is A B. Its trace is also the sum of the
    square roots of the eigenvalues of A B, which are real and not negative, but for rounding.
    With fewer images than features, covariances do not have full rank: some eigenvalues are 0.

    mean1, mean2: f, fp64 tensors. cov1, cov2: f f, fp64 tensors, symmetric.
    Returns: a float.
    Source: arXiv 1706.08500. Lines of the solution: 23. 3 give the same distance. Most of the
    others refuse bad input with a message.
    """
    raise NotImplementedError("your code here")
