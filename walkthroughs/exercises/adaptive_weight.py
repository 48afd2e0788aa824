"""Exercise: the balance of reconstruction and adversarial loss.

Replace the raise by your code, import what you need at the top, then run:
    python walkthroughs/exercises/check.py adaptive_weight
"""


def adaptive_weight(rec_gradient, gan_gradient):
    """lambda: the factor that makes the GAN's gradient as long as the reconstruction loss's.

        lambda = |rec_gradient| / (|gan_gradient| + 1e-6),  at most 1e4

    |.| is the Euclidean norm over all elements.

    rec_gradient, gan_gradient: gradients of both losses with respect to the weight of the decoder's
    last layer, tensors of one shape.
    Returns: a scalar tensor.
    Source: VQGAN (arXiv 2012.09841) eq. 7, with the constants of RAE's release.
    Lines of the solution: 1.
    """
    raise NotImplementedError("your code here")
