"""Read a scene back from any picture, by classical image analysis.

The reader knows the shapes, colours and sizes of this world, but nothing of the scene:

1. fit_background    a smooth surface through the grey pixels
2. find_regions      connected pixels that differ from it
3. unmix             the opacity of the object in each pixel of a region
4. name_colour       the nearest colour of the palette
5. match_shape       each shape drawn in the same place, size and rotation: the best match

Each step may decline. The reader judges generated images and must not guess, so a single region
that is none of the 36 classes leaves the whole picture unread. All limits hold at 64 px. They lie
between the worst pictures that are to be read (fresh, slightly blurred, noisy, JPEG) and the best
that are not (melted, blended and spliced objects); tests/test_shapes.py makes both kinds.
"""
from math import pi, sqrt
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from shapes.scene import (
    COLOURS,
    PALETTE,
    SHAPES,
    SIZES,
    TIP_ANGLE,
    TIPS,
    Object,
    Outline,
    coverage,
)

READING_SIDE = 64           # px, to which every picture is resized first
SMALL, LARGE = (radius * READING_SIDE for radius in SIZES.values())          # radii in px
PALETTE_RGB = np.float32(list(PALETTE.values())) / 255                       # 6 3, in 0..1

# Colours and their Euclidean distances are in rgb of 0..1.
MAX_SATURATION = 0.25       # largest minus smallest channel; backgrounds have 0.16, objects 0.4
MIN_BACKGROUND = 0.3        # fraction of the pixels; four large objects leave 0.6
FOREGROUND = 0.2            # distance from the background; that of the faintest object is 0.32
SPECK = 8                   # px; the smallest object has 217, and JPEG leaves 6 stray ones
MARGIN = 4                  # px around a region, for its soft edge
MAX_COLOUR_ERROR = 0.2      # distance from the palette, whose colours are 0.46 apart or more
MIN_CONTRAST = 0.8          # over that of the palette's colour; fresh pictures have 0.9, JPEG 0.81
STRAY = 0.3                 # distance of a second colour from mixtures of object and background
MIN_RADIUS = 0.75 * SMALL   # px
MAX_RADIUS = 1.35 * LARGE   # px
STEEPNESS = 1.5             # factor by which edges are made steeper, so a soft edge costs little
BLUR = 0.8                  # sigma in px of the blur after that, so a rough edge costs little
MAX_EDGE_ERROR = 0.55       # mean px between outlines; fresh 0.1, JPEG 0.4, blur of sigma 3 0.53
MAX_AMBIGUITY = 0.75        # error over that of the second-best shape; JPEG 0.5, blends over 0.8


class Region(NamedTuple):
    """A window of the picture with one connected region in it."""
    top: int                 # px, row and column of the window's first pixel
    left: int
    mask: np.ndarray         # h w, bool: pixels of the region
    background: np.ndarray   # h w 3
    offset: np.ndarray       # h w 3: picture minus background


def read_scene(image, colours=False):
    """Read the objects of a picture: Scene(read_scene(image)) has its caption and relations.

    image: (n, n, 3) with n >= 32, uint8 in 0..255 or float in 0..1
    colours: read the colours alone, of objects of any shape
    Returns a list of Object, or of names of colours, topmost first; None if the reader is unsure:
        there is nothing, or something that is none of the 36 classes.
    Raises ValueError for another shape, type or range.
    """
    image = to_float(np.asarray(image))                      # n n 3
    image = to_reading_side(image)                           # 64 64 3
    background = fit_background(image)                       # 64 64 3
    if background is None:
        return None
    objects = []
    for region in find_regions(image, background):
        reading = read_region(region, colours)
        if reading is None:
            return None
        objects.append(reading)
    if not objects:
        return None
    return objects


def read_region(region, colours):
    """Return the Object in a region, or its colour alone if `colours`; None if unsure."""
    behind, contrast = measure_colour(region)
    colour = name_colour(behind, contrast)
    alpha = unmix(region.offset, contrast)                   # h w
    if colour is None or has_second_colour(region, contrast, alpha):
        return None

    alpha = sharpen(alpha, region.mask)
    radius = sqrt(alpha.sum() / pi)                          # px, of the circle of equal area
    if not MIN_RADIUS < radius < MAX_RADIUS:
        return None
    if colours:
        return colour

    row, column = ndimage.center_of_mass(alpha)              # px, in the window
    outline = match_shape(alpha, row, column, radius)
    if outline is None:
        return None
    size = "small" if radius < sqrt(SMALL * LARGE) else "large"
    x = (region.left + float(column) + 0.5) / READING_SIDE
    y = (region.top + float(row) + 0.5) / READING_SIDE
    rgb = (255 * (behind + contrast)).clip(0, 255).tolist()
    return Object(outline.shape, colour, size, (x, y), outline.rotation, rgb)


# ---------------------------------------------------------------- the picture
def to_float(image):
    """Return a picture as float32 in 0..1.

    Raises ValueError for another shape, type or range.
    """
    if image.ndim != 3 or image.shape != (len(image), len(image), 3) or len(image) < 32:
        raise ValueError(f"image of shape {image.shape} must be (n, n, 3), n >= 32; "
                         "try .permute(1, 2, 0)")
    white = 255 if image.dtype == np.uint8 else 1
    is_number = image.dtype.kind in "fu"
    # A comparison with NaN is false, so NaN is refused, too.
    if not is_number or not -1e-3 <= image.min() <= image.max() <= white + 1e-3:
        raise ValueError(f"image of {image.dtype} to {image.max()} must be uint8 or in 0..1; "
                         "try .clip(0, 1)")
    return image.astype(np.float32) / white


def to_reading_side(image):
    """Return a picture resized to 64 px, antialiased."""
    zoom = READING_SIDE / len(image)
    if zoom == 1:
        return image
    sigma = max(0, 1 / zoom - 1) / 2                         # px. Source: skimage.transform.resize
    image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
    return ndimage.zoom(image, (zoom, zoom, 1), order=1, mode="nearest", grid_mode=True)


# ---------------------------------------------------------------- 1. background
def quadratic_basis(side):
    """Return 1, x, y, xy, x^2, y^2 at each pixel, x and y in -1..1: array (side, side, 6)."""
    x = np.broadcast_to(np.linspace(-1, 1, side, dtype=np.float32), (side, side))
    y = x.T
    return np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], 2)


BASIS = quadratic_basis(READING_SIDE)


def fit_background(image):
    """Return the background, 64 64 3; None if too little of the picture can be one.

    It is a quadratic surface in each channel, fitted by least squares: first to all pixels that
    are nearly grey, then to those that are near this first surface.
    """
    # A quarter of the pixels is enough.
    pixels = image[::2, ::2].reshape(-1, 3)                  # n 3
    basis = BASIS[::2, ::2].reshape(-1, 6)                   # n 6
    keep = np.ptp(pixels, 1) < MAX_SATURATION                # n
    for _ in range(2):
        if keep.mean() < MIN_BACKGROUND:
            return None
        # Normal equations: (B^T B) coefficients = B^T pixels
        left_side = basis[keep].T @ basis[keep]              # 6 6
        right_side = basis[keep].T @ pixels[keep]            # 6 3
        coefficients = np.linalg.lstsq(left_side, right_side, rcond=None)[0]         # 6 3
        error = np.abs(pixels - basis @ coefficients).max(1)                         # n
        keep = error < FOREGROUND / 2
    return BASIS @ coefficients


# ---------------------------------------------------------------- 2. regions
def find_regions(image, background):
    """Return the Regions that differ from the background and are no specks, topmost first."""
    offset = image - background
    foreground = np.linalg.norm(offset, axis=2) > FOREGROUND
    labels, _ = ndimage.label(foreground)                    # 64 64: number of the region, or 0
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        top = max(rows.start - MARGIN, 0)
        left = max(columns.start - MARGIN, 0)
        window = np.s_[top:rows.stop + MARGIN, left:columns.stop + MARGIN]
        mask = labels[window] == number
        if mask.sum() >= SPECK:
            regions.append(Region(top, left, mask, background[window], offset[window]))
    return regions


# ---------------------------------------------------------------- 3. opacity
def measure_colour(region):
    """Return two rgb: the background behind an object, and the object's own colour minus that.

    They are measured on the core, the half of the pixels that differs most from the background,
    because pixels at the edge are mixtures. The median ignores the outliers of noise and JPEG.
    """
    strength = np.linalg.norm(region.offset, axis=2)
    core = region.mask & (strength >= np.median(strength[region.mask]))
    behind = region.background[core].mean(0)
    contrast = np.median(region.offset[core], 0)
    return behind, contrast


def unmix(offset, contrast):
    """Return the opacity alpha of the object in each pixel, h w in 0..1.

    offset = alpha * contrast, so alpha is the projection of the offset on the contrast.
    """
    return np.clip(offset @ contrast / max(contrast @ contrast, 1e-6), 0, 1)


def has_second_colour(region, contrast, alpha):
    """Return whether several pixels are no mixture of this object and the background."""
    residual = region.offset - alpha[:, :, None] * contrast                          # h w 3
    distance = np.linalg.norm(residual[region.mask], axis=1)                         # pixels
    return (distance > STRAY).sum() >= SPECK


# ---------------------------------------------------------------- 4. colour
def name_colour(behind, contrast):
    """Return the nearest colour of the palette; None if it is too far off or too faint."""
    errors = np.linalg.norm(PALETTE_RGB - behind - contrast, axis=1)                 # 6
    nearest = errors.argmin()
    expected = PALETTE_RGB[nearest] - behind                 # contrast of the palette's colour
    too_far = errors[nearest] > MAX_COLOUR_ERROR
    too_faint = contrast @ expected < MIN_CONTRAST * (expected @ expected)
    if too_far or too_faint:
        return None
    return COLOURS[nearest]


# ---------------------------------------------------------------- 5. shape
def sharpen(alpha, mask):
    """Return the opacity with a steeper edge, and zero away from the region."""
    steeper = np.clip(0.5 + STEEPNESS * (alpha - 0.5), 0, 1)
    return steeper * ndimage.binary_dilation(mask, iterations=2)


def measure_rotation(alpha, dx, dy, shape):
    """Return the rotation that an object has if it is of this shape, in radians.

    The m tips of a shape lie far out, so they dominate its m-fold angular moment

        sum over pixels of alpha * r^2 * exp(i m angle),

    whose argument is m times the angle of a tip.
    """
    if shape not in TIPS:
        return 0.0
    m = TIPS[shape]
    position = dx + 1j * dy                                  # h w, r * exp(i angle)
    r = np.maximum(np.hypot(dx, dy), 1)                      # at least 1 px, as it divides
    moment = (alpha * position ** m / r ** (m - 2)).sum()
    return float(np.angle(moment) - m * TIP_ANGLE[shape]) / m


def match_shape(alpha, row, column, radius):
    """Return the Outline that fits an opacity best; None if none fits well or two fit alike.

    alpha: h w, in 0..1
    row, column: centre of the object, px
    radius: of the circle of equal area, px
    """
    dy, dx = np.indices(alpha.shape, np.float32) - np.float32([row, column])[:, None, None]
    outlines = []
    for shape in SHAPES:
        rotation = measure_rotation(alpha, dx, dy, shape)
        outlines.append(Outline(shape, radius, rotation))
    templates = [coverage(outline, dx, dy) for outline in outlines]
    pictures = np.stack([alpha, *templates])                                         # 7 h w
    # Across an edge, a template a rises from 0 to 1 within 1 px, and a (1 - a) sums up to 1/6.
    edge_lengths = 6 * (pictures[1:] * (1 - pictures[1:])).sum((1, 2))               # 6, px

    pictures = ndimage.gaussian_filter(pictures, (0, BLUR, BLUR))
    errors = np.abs(pictures[0] - pictures[1:]).sum((1, 2))                          # 6, px^2
    best, second = np.argsort(errors)[:2]
    fits_badly = errors[best] > MAX_EDGE_ERROR * edge_lengths[best]
    is_ambiguous = errors[best] > MAX_AMBIGUITY * errors[second]
    if fits_badly or is_ambiguous:
        return None
    return outlines[best]
