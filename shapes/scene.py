"""Scenes of coloured shapes: how they are drawn at random, rendered and compared.

A scene is plain data. Lengths and positions are fractions of the image side, x to the right,
y downwards; angles are in radians, clockwise as seen.
"""
from dataclasses import dataclass
from itertools import combinations, permutations
from math import atan, atan2, cos, hypot, pi, remainder, sin, sqrt
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------- vocabulary
PALETTE = {                              # rgb in 0..255; no two colours are nearer than 118
    "red": (222, 38, 42),
    "yellow": (244, 204, 26),
    "green": (38, 160, 62),
    "cyan": (30, 196, 214),
    "blue": (38, 78, 218),
    "purple": (150, 46, 190),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# The class id is 6 * number of the colour + number of the shape.
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
SIZES = {"small": 0.13, "large": 0.175}  # radius of the circle of equal area

# ---------------------------------------------------------------- what random scenes look like
MIN_GAP = 0.04              # between objects: 2.5 px at 64 px; half as much to the border
PLACEMENT_TRIES = 24        # positions tried for an object before all objects are placed anew
COLOUR_JITTER = 10          # largest change of an object's colour, per channel of 0..255
REPEAT_PROBABILITY = 0.3    # of several objects to share a class: something to count
CLEARLY = 1.5               # "left of" needs |dx| > 1.5 |dy|: within 34 degrees of the axis

# ---------------------------------------------------------------- geometry of the shapes
STAR_INNER = 0.48           # inner over outer radius of the star; a regular pentagram has 0.38
RING_INNER = 0.55           # inner over outer radius of the ring
BAR_WIDTH = 1 / 4           # width over length of the two bars of the cross

# Circumradius R of each shape of area pi: at equal size, all shapes cover equally many pixels.
CIRCUMRADIUS = {
    "circle": 1.0,
    "square": sqrt(pi / 2),                                  # its area is 2 R^2
    "triangle": sqrt(pi / sqrt(27 / 16)),                    # sqrt(27 / 16) R^2
    "star": sqrt(pi / (5 * STAR_INNER * sin(pi / 5))),       # ten triangles
    # Two bars, their overlap counted once.
    "cross": sqrt(pi * (1 + BAR_WIDTH ** 2) / (8 * BAR_WIDTH - 4 * BAR_WIDTH ** 2)),
    "ring": 1 / sqrt(1 - RING_INNER ** 2),                   # a disc without its hole
}
# Half the length of a bar. One corner of the cross lies at BAR_REACH * (1, BAR_WIDTH).
BAR_REACH = CIRCUMRADIUS["cross"] / hypot(1, BAR_WIDTH)

# Rotational symmetry: the number of tips, and the angle of one of them from the x axis. The tips
# of a cross are the middles of its arms. Circle and ring have none: turned, they look the same.
TIPS = {"square": 4, "triangle": 3, "star": 5, "cross": 4}
TIP_ANGLE = {"square": pi / 4, "triangle": pi / 6, "star": -pi / 10, "cross": 0.0}


class Outline(NamedTuple):
    """The edge of an object around its centre."""
    shape: str
    radius: float            # of the circle of equal area, in any unit of length
    rotation: float


# Signed distances of points (x, y) to the outline of each upright shape of area pi: negative
# inside, exact beside the edges, too small beyond the corners, which stay sharp that way.
def circle_distance(x, y):
    return np.sqrt(x * x + y * y) - CIRCUMRADIUS["circle"]


def ring_distance(x, y):
    outer = CIRCUMRADIUS["ring"]
    middle = outer * (1 + RING_INNER) / 2
    half_width = outer * (1 - RING_INNER) / 2
    return np.abs(np.sqrt(x * x + y * y) - middle) - half_width


def square_distance(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - CIRCUMRADIUS["square"] / sqrt(2)


def triangle_distance(x, y):
    """One tip up. Inside are the points above the base and below the two other edges."""
    base = y
    other_edges = np.abs(x) * sqrt(0.75) - y / 2
    inradius = CIRCUMRADIUS["triangle"] / 2
    return np.maximum(base, other_edges) - inradius


def star_distance(x, y):
    """One tip up. The plane is folded into a tenth of a turn, which holds a single edge."""
    fifth = 2 * pi / 5
    angle = np.abs(np.remainder(np.arctan2(x, -y) + fifth / 2, fifth) - fifth / 2)
    normal_angle = atan2(1 - STAR_INNER * cos(pi / 5), STAR_INNER * sin(pi / 5))
    edge_distance = CIRCUMRADIUS["star"] * cos(normal_angle)
    return np.sqrt(x * x + y * y) * np.cos(angle - normal_angle) - edge_distance


def cross_distance(x, y):
    """The plane is folded onto one half of one arm."""
    along = np.maximum(np.abs(x), np.abs(y))
    across = np.minimum(np.abs(x), np.abs(y))
    return np.maximum(along - BAR_REACH, across - BAR_REACH * BAR_WIDTH)


SIGNED_DISTANCE = {
    "circle": circle_distance,
    "square": square_distance,
    "triangle": triangle_distance,
    "star": star_distance,
    "cross": cross_distance,
    "ring": ring_distance,
}


def coverage(outline, dx, dy):
    """Return how much of each pixel lies inside an outline.

    outline: Outline, radius in pixels
    dx, dy: offsets of the pixels from the centre of the outline, px; arrays that broadcast
    Returns an array in 0..1, with a ramp one pixel wide across the outline.
    """
    # Turn and scale the plane so that the shape stands upright and has the area pi.
    cosine = cos(outline.rotation) / outline.radius
    sine = sin(outline.rotation) / outline.radius
    x = cosine * dx + sine * dy
    y = cosine * dy - sine * dx
    distance = SIGNED_DISTANCE[outline.shape](x, y)
    return np.clip(0.5 - outline.radius * distance, 0, 1)


def reach(outline, direction):
    """Return how far an outline extends in a direction (support function of the convex hull)."""
    circumradius = outline.radius * CIRCUMRADIUS[outline.shape]
    if outline.shape not in TIPS:
        return circumradius
    angle_between_tips = 2 * pi / TIPS[outline.shape]
    from_tip = direction - outline.rotation - TIP_ANGLE[outline.shape]
    angle = abs(remainder(from_tip, angle_between_tips))     # to the nearest tip
    if outline.shape == "cross":
        angle -= atan(BAR_WIDTH)                             # to the nearest corner of that arm
    return circumradius * cos(angle)


# ---------------------------------------------------------------- placing objects
def is_free(outline, x, y, placed):
    """Return whether an outline at (x, y) keeps MIN_GAP from all others.

    placed: list of pairs (outline, (x, y))
    """
    for other, (other_x, other_y) in placed:
        # Convex hulls that are apart along the line between their centres do not touch.
        direction = atan2(other_y - y, other_x - x)
        distance = hypot(other_x - x, other_y - y)
        if distance <= MIN_GAP + reach(outline, direction) + reach(other, direction + pi):
            return False
    return True


def draw_free_centre(rng, outline, placed):
    """Draw a centre that keeps MIN_GAP from border and others; None if no try succeeds."""
    right, down, left, up = (MIN_GAP / 2 + reach(outline, k * pi / 2) for k in range(4))
    for u, v in rng.random((PLACEMENT_TRIES, 2)).tolist():
        x = left + u * (1 - left - right)
        y = up + v * (1 - up - down)
        if is_free(outline, x, y, placed):
            return x, y
    return None


def draw_centres(rng, outlines):
    """Draw the centre of each outline; None if one of them finds no room."""
    placed = []
    for outline in outlines:
        centre = draw_free_centre(rng, outline, placed)
        if centre is None:
            return None
        placed.append((outline, centre))
    return [centre for _, centre in placed]


def arrange(rng, shapes, sizes, rotations):
    """Draw centres for objects; large ones shrink one after another until there is room for all.

    Returns two lists in the order of the shapes: centres, sizes.
    """
    sizes = list(sizes)
    while True:
        outlines = []
        for shape, size, rotation in zip(shapes, sizes, rotations, strict=True):
            outlines.append(Outline(shape, SIZES[size], rotation))
        centres = draw_centres(rng, outlines)
        if centres is not None:
            return centres, sizes
        if "large" in sizes:
            sizes[sizes.index("large")] = "small"


# ---------------------------------------------------------------- drawing at random
def draw_classes(scene_draws, object_draws, label):
    """Return the class name of each object; for each object all classes are equally likely.

    scene_draws, object_draws: as in Scene.random
    label: class id of the first object, or None
    """
    names = [CLASSES[int(draws[0] * len(CLASSES))] for draws in object_draws]
    if label is not None:
        names[0] = CLASSES[label]
    if scene_draws[1] < REPEAT_PROBABILITY:
        # The first two, three ... or all objects have the same class.
        repeats = min(len(names), 2 + int(scene_draws[2] * (len(names) - 1)))
        for k in range(1, repeats):
            names[k] = names[0]
    return names


def jitter(rgb, draws):
    """Return an rgb with each channel changed by up to COLOUR_JITTER; draws: three in [0, 1)."""
    changes = [COLOUR_JITTER * (2 * draw - 1) for draw in draws]
    return [value + change for value, change in zip(rgb, changes, strict=True)]


def draw_background(rng):
    """Draw the rgb of the four corners of a background: array (2, 2, 3).

    Pale to middle greys: their channels differ by at most 40, those of objects by 100 or more.
    """
    brightness = rng.uniform(150, 235)
    tint = rng.uniform(-12, 12, 3)
    brightness_of_corner = rng.uniform(-20, 20, (2, 2, 1))
    tint_of_corner = rng.uniform(-8, 8, (2, 2, 3))
    return np.minimum(brightness + tint + brightness_of_corner + tint_of_corner, 250)


# ---------------------------------------------------------------- rendering
def interpolate_corners(corners, size):
    """Return a picture that blends bilinearly between its corners.

    corners: (2, 2, 3), row and column of the corner, rgb
    Returns an array (size, size, 3), float32.
    """
    position = (np.arange(size, dtype=np.float32) + 0.5) / size
    weights = np.stack([1 - position, position])             # 2 size: of left and right
    corners = np.asarray(corners, np.float32)                # 2 2 3
    edges = np.einsum("ax,yac->yxc", weights, corners)       # 2 size 3: top and bottom
    picture = weights.T @ edges.reshape(2, -1)               # size (size 3)
    return picture.reshape(size, size, 3)


def pixel_range(centre, extent):
    """Return the slice of the pixels within an extent of a centre, both in pixels."""
    first = int(centre - extent)
    last = int(centre + extent)
    return slice(max(first, 0), max(last + 1, 0))            # empty outside of the picture


def draw_object(image, obj):
    """Blend an object into an image of float32 h w 3, in place."""
    size = len(image)
    x, y = obj.centre[0] * size, obj.centre[1] * size        # px
    outline = Outline(obj.shape, SIZES[obj.size] * size, obj.rotation)
    extent = outline.radius * CIRCUMRADIUS[obj.shape] + 1    # px, one of them for the soft edge
    columns = pixel_range(x, extent)
    rows = pixel_range(y, extent)

    pixel_centres = np.arange(size, dtype=np.float32) + 0.5
    dx = pixel_centres[columns] - np.float32(x)              # w
    dy = pixel_centres[rows, None] - np.float32(y)           # h 1
    alpha = coverage(outline, dx, dy)[:, :, None]            # h w 1
    image[rows, columns] += alpha * (np.float32(obj.rgb) - image[rows, columns])


# ---------------------------------------------------------------- objects and scenes
def relation(a, b):
    """Return where object a clearly is: "left of", "right of", "above" or "below" b, or None."""
    dx = b.centre[0] - a.centre[0]
    dy = b.centre[1] - a.centre[1]
    if abs(dx) > CLEARLY * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) > CLEARLY * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def nested_tuples(corners):
    """Return an array (2, 2, 3) as tuples, which can be compared and hashed."""
    return tuple(tuple(tuple(rgb) for rgb in row) for row in corners.tolist())


@dataclass(frozen=True)
class Object:
    """One flat shape.

    shape, colour, size: one of SHAPES, COLOURS, SIZES each
    centre: (x, y), fractions of the image side
    rotation: radians, clockwise as seen
    rgb: three values in 0..255; None: those of the palette
    Raises ValueError for an unknown name or an rgb out of range.
    """
    shape: str
    colour: str
    size: str = "large"
    centre: tuple = (0.5, 0.5)
    rotation: float = 0.0
    rgb: tuple = None

    def __post_init__(self):
        for field, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field} {value!r} is unknown; use one of {', '.join(known)}")
        rgb = PALETTE[self.colour] if self.rgb is None else tuple(self.rgb)
        if len(rgb) != 3 or min(rgb) < 0 or max(rgb) > 255:
            raise ValueError(f"rgb {rgb} must be three values in 0..255; "
                             "leave it out for the palette's")
        object.__setattr__(self, "rgb", rgb)                 # as the dataclass is frozen

    @property
    def name(self):
        """Name of the class, such as "red star"."""
        return f"{self.colour} {self.shape}"

    @property
    def label(self):
        """Class id, 0..35."""
        return CLASSES.index(self.name)


@dataclass(frozen=True)
class Scene:
    """Objects on a smooth background.

    objects: list or tuple of Object; later ones are drawn over earlier ones
    background: rgb in 0..255 of its corners, ((top left, top right), (bottom left, bottom right))
    Raises ValueError for a background of another shape or range.
    """
    objects: tuple
    background: tuple = (((225, 225, 220), (215, 220, 225)), ((220, 215, 210), (205, 205, 210)))

    def __post_init__(self):
        corners = np.asarray(self.background, float)
        if corners.shape != (2, 2, 3) or corners.min() < 0 or corners.max() > 255:
            raise ValueError(f"background {corners.shape} must be (2, 2, 3) in 0..255; "
                             "give four rgb")
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "background", nested_tuples(corners))

    @classmethod
    def random(cls, seed, index, objects=(1, 2, 3, 4), label=None):
        """Return scene number `index` of the endless stream `seed`.

        All classes are equally likely, and both sizes are while there is room.

        objects: the number of objects, or a tuple of numbers to draw from; 1 to 4
        label: class id of the first object, 0..35; None: drawn
        Raises ValueError if one of them is out of range.
        """
        counts = (objects,) if isinstance(objects, (int, np.integer)) else tuple(objects)
        if not counts or not set(counts) <= {1, 2, 3, 4}:
            raise ValueError(f"objects={objects!r} must be 1 to 4 or a tuple of such; try (1, 2)")
        if label is not None and label not in range(len(CLASSES)):
            raise ValueError(f"label={label!r} must be a class id, 0 to 35; see shapes.CLASSES")

        # Eight numbers in [0, 1) for the scene and for each of at most four objects:
        #   scene_draws    number of objects, whether classes repeat, how often
        #   object_draws   class, size, rotation, red, green, blue
        rng = np.random.default_rng((seed, index))
        scene_draws, *object_draws = rng.random((5, 8)).tolist()
        count = counts[int(scene_draws[0] * len(counts))]
        object_draws = object_draws[:count]

        names = draw_classes(scene_draws, object_draws, label)
        sizes = ["small" if draws[1] < 0.5 else "large" for draws in object_draws]
        rotations = [2 * pi * draws[2] for draws in object_draws]
        shapes = [name.split()[1] for name in names]
        centres, sizes = arrange(rng, shapes, sizes, rotations)

        scene_objects = []
        for k, name in enumerate(names):
            colour, shape = name.split()
            rgb = jitter(PALETTE[colour], object_draws[k][3:6])
            scene_objects.append(Object(shape, colour, sizes[k], centres[k], rotations[k], rgb))
        return cls(scene_objects, draw_background(rng))

    def render(self, size=64):
        """Return the anti-aliased picture, the same at any size.

        size: side in pixels, an integer of at least 16
        Returns an array (size, size, 3), uint8.
        Raises ValueError for another size.
        """
        if not isinstance(size, (int, np.integer)) or size < 16:
            raise ValueError(f"size {size!r} must be an integer of at least 16 pixels; try 64")
        image = interpolate_corners(self.background, size)   # h w 3, float32 in 0..255
        for obj in self.objects:
            draw_object(image, obj)
        return (image + 0.5).astype(np.uint8)                # rounded

    def relations(self):
        """Return all triples (i, word, j) that hold: (0, "left of", 1) if object 0 is left of 1.

        The words are "left of", "right of", "above" and "below".
        """
        triples = []
        for i, j in permutations(range(len(self.objects)), 2):
            word = relation(self.objects[i], self.objects[j])
            if word is not None:
                triples.append((i, word, j))
        return triples

    def held_out(self):
        """Return whether this scene shows a combination that stage 3 never trains on.

        Held out are some pairs of classes (5% of them) and some counts of a class (14%). Both
        rules are arithmetic on class ids that spreads over colours and shapes.
        """
        labels = [obj.label for obj in self.objects]
        for a, b in combinations(set(labels), 2):
            if (a + b) % 19 == 0:
                return True
        for label in labels:
            count = labels.count(label)
            if count > 1 and (label + 5 * count) % 7 == 0:
                return True
        return False

    # What is said of a scene stands in language.py. That module builds scenes, so it imports this
    # one; these methods import it in turn when they are called.
    def caption(self):
        """Return the plain caption, such as "two red circles and a blue star"."""
        from shapes import language
        return language.caption(self)

    def captions(self):
        """Return a list of true captions that name every object, the plain one first."""
        from shapes import language
        return language.captions(self)

    def questions(self):
        """Return a list of pairs (question, answer), each question with exactly one answer."""
        from shapes import language
        return language.questions(self)
