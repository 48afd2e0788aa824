"""Exercise: images to tokens, and back.

Replace each raise by your code, import what you need at the top (such as einops), then run:
    python walkthroughs/exercises/check.py patchify
"""


def patchify(images, patch):
    """Cut images into square patches, one token for each.

    Tokens are ordered row by row, as one reads. Within a token come the rows of the patch (p), in
    each row its pixels (q), of each pixel its channels (c): index (p * patch + q) * c + channel.

    images: b c H W. H and W are multiples of patch, and may differ.
    patch: side of a patch, pixels.
    Returns: tokens b n patch*patch*c, n = (H / patch) * (W / patch).
    Lines of the solution: 1.
    """
    raise NotImplementedError("your code here")


def unpatchify(tokens, grid, patch):
    """The inverse of patchify for square RGB images: the last step of the decoder.

    tokens: b n patch*patch*3, n = grid*grid. grid: patches per side. patch: side of a patch.
    Returns: images b 3 H W, H = W = grid * patch.
    Source: MAE (arXiv 2111.06377). Lines of the solution: 1.
    """
    raise NotImplementedError("your code here")
