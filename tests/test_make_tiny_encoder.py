"""The descriptor that the shipped encoder was pretrained to regress, on a scene of known objects.

The scene has two objects on grey: a large red square with its centre at (24, 40) px, which is
nearest to the 16 px patch in column 1 and row 2, and a small blue circle at (56, 8), in column 3
and row 0.
Run: python -m pytest tests/test_make_tiny_encoder.py
"""
import importlib

import numpy as np
import pytest

from shapes import Object, Scene

make_tiny_encoder = importlib.import_module("assets.make_tiny_encoder")

GREY = ((128, 128, 128), (128, 128, 128))         # left and right corner of its row
ROTATION = 0.2                                         # of the square, radians
SQUARE_PATCH, CIRCLE_PATCH = 2 * 4 + 1, 0 * 4 + 3      # numbers of the patches, row by row
CENTRES = {SQUARE_PATCH: (24, 40), CIRCLE_PATCH: (56, 8)}
COLOURS = {SQUARE_PATCH: (222, 38, 42), CIRCLE_PATCH: (38, 78, 218)}
# Of disks of the same area, in sides of the image.
RADII = {SQUARE_PATCH: 0.175, CIRCLE_PATCH: 0.13}


def descriptor_of_scene(rotation):
    """The parts of the descriptor, name -> 16 patches x columns."""
    square = Object("square", "red", "large", (0.375, 0.625), rotation=rotation)
    circle = Object("circle", "blue", "small", (0.875, 0.125))
    image = Scene([square, circle], (GREY, GREY)).render(64)
    descriptor = make_tiny_encoder.descriptor(image)
    parts, first = {}, 0
    for name, (width, _) in make_tiny_encoder.PARTS.items():
        parts[name] = descriptor[:, first:first + width]
        first += width
    assert first == descriptor.shape[1]
    return parts


@pytest.fixture(scope="module")
def parts():
    return descriptor_of_scene(ROTATION)


def test_each_patch_has_all_parts(parts):
    for name, (width, _) in make_tiny_encoder.PARTS.items():
        assert parts[name].shape == (16, width)


@pytest.mark.parametrize("patch", [SQUARE_PATCH, CIRCLE_PATCH])
def test_centre_is_given_as_waves(parts, patch):
    x, y = CENTRES[patch]
    wave_numbers = 1 / np.array(make_tiny_encoder.WAVES)
    angles = 2 * np.pi * np.concatenate([x * wave_numbers, y * wave_numbers])
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(parts["centre"][patch], expected, atol=0.08)


@pytest.mark.parametrize("patch", [SQUARE_PATCH, CIRCLE_PATCH])
def test_colour_and_radius(parts, patch):
    colour = np.array(COLOURS[patch]) / 127.5 - 1
    np.testing.assert_allclose(parts["colour"][patch], np.tile(colour, 4), atol=0.05)
    assert abs(parts["radius"][patch, 0] - np.log(64 * RADII[patch])) < 0.05


def test_distance_to_the_outline_of_the_square(parts):
    # The 8 x 8 points of the patch, from the centre of the square.
    x, y = np.meshgrid(np.arange(17, 32, 2) - 24, np.arange(33, 48, 2) - 40)
    cos, sin = np.cos(ROTATION), np.sin(ROTATION)
    half_side = np.sqrt(np.pi) / 2 * RADII[SQUARE_PATCH] * 64
    # Signed, exact beside the edges of the square.
    distance = np.maximum(abs(cos * x + sin * y), abs(cos * y - sin * x)) - half_side

    squashed = parts["distance"][SQUARE_PATCH].reshape(8, 8)

    np.testing.assert_allclose(squashed, np.tanh(distance / make_tiny_encoder.RANGE), atol=0.12)


def test_folds_tell_a_square_from_a_circle(parts):
    three, four, five = parts["folds"][SQUARE_PATCH]
    assert four > 0.4 and max(three, five) < 0.1
    assert parts["folds"][CIRCLE_PATCH].max() < 0.1


def test_rotation_turns_the_fourfold_moment(parts):
    def fourfold_moment(parts):
        real, imaginary = parts["rotation"][SQUARE_PATCH].reshape(2, 3)[:, 1]
        return complex(real, imaginary)

    turned = descriptor_of_scene(ROTATION + 0.3)
    phase = np.angle(fourfold_moment(turned) / fourfold_moment(parts))
    assert abs(phase - 4 * 0.3) < 0.1


def test_ground(parts):
    np.testing.assert_allclose(parts["ground"], 128 / 127.5 - 1, atol=0.02)


def test_picture_without_objects_has_a_finite_descriptor():
    empty = np.full((64, 64, 3), 128, np.uint8)
    assert np.isfinite(make_tiny_encoder.descriptor(empty)).all()
