"""Exercise: mean and variance of the latents.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py latent_statistics
"""
from data import batches


def image_batches(data, n, batch):
    """The first n images of a dataset in batches, each b 3 H W in [0,1]. This is no hole."""
    for _, _, images, _, _ in batches(data, batch, batch, workers=0, stop=n // batch):
        yield images.float() / 255


def latent_statistics(encoder, data, n, batch):
    """Mean and variance of each latent element (each of the c*h*w) over n images, in one pass.

    The variance is the mean of squared deviations (divide by n, not n - 1). All latents together
    are too large for memory; keep sums. Means may be far from 0, and E[x^2] - E[x]^2 cancels then:
    sum in fp64.

    encoder: encoder.encode(images b 3 H W in [0,1]) gives latents b c h w, fp32.
    data: dataset; image_batches(data, n, batch) gives its images.
    n: number of images, a multiple of batch.
    Returns: mean and variance, c h w each, fp32.
    Source: RAE (arXiv 2510.11690) section 3.1. Lines of the solution: 14, as it also adds the
    sums of several processes. One process needs 9.
    """
    raise NotImplementedError("your code here")
