"""The built-in worlds: scenes of coloured shapes -> image, captions, questions; and the verifier that reads;
lines of text, and how many of their letters are still to be read.

A scene is plain data. Lengths and positions are fractions of the image side, x to the right, y downwards.
"""
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from math import atan, atan2, cos, hypot, pi, remainder, sin, sqrt

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

PALETTE = {"red": (222, 38, 42), "yellow": (244, 204, 26), "green": (38, 160, 62),     # rgb in 0..255, no two
           "cyan": (30, 196, 214), "blue": (38, 78, 218), "purple": (150, 46, 190)}    # nearer than 118
COLOURS, SHAPES = tuple(PALETTE), ("circle", "square", "triangle", "star", "cross", "ring")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]  # class id = colour * 6 + shape
COUNTS = "no one two three four five six seven eight nine ten eleven twelve many".split()
SIZES = {"small": 0.13, "large": 0.175}  # radius of the circle of equal area, the same for all shapes
GAP = 0.04                               # least distance between objects, 2.5 px at 64 px; half to the border
JITTER = 10                              # variation of an object's colour, per channel
REPEATS = 0.3                            # share of scenes of several objects that repeat a class, to count
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHJKLMNPRT23456789"          # none that look alike: O 0 S s ...
STAR, HOLE, BAR = 0.48, 0.55, 1 / 4      # inner over outer radius; width over length of the cross's bars
CLEAR = 1.5                              # "left of" needs |dx| > 1.5 |dy|: within 34 degrees of the axis
# Number of tips or corners; and that number times the angle of one of them. A cross points by its arms.
FOLDS = {"square": (4, pi), "triangle": (3, pi / 2), "star": (5, -pi / 2), "cross": (4, 0.0)}
EXTENT = {"circle": 1.0, "square": sqrt(pi / 2), "triangle": sqrt(pi / sqrt(27 / 16)),  # circumradius of
          "cross": sqrt(pi * (1 + BAR ** 2) / (8 * BAR - 4 * BAR ** 2)),                # the shape of area pi
          "star": sqrt(pi / (5 * STAR * sin(pi / 5))), "ring": 1 / sqrt(1 - HOLE ** 2)}
ARM = EXTENT["cross"] / hypot(1, BAR)    # half the length of a bar: the cross's corner is at ARM * (1, BAR)


@dataclass(frozen=True)
class Object:
    """One flat shape; `rgb`, in 0..255, is the palette's colour if left out."""
    shape: str
    colour: str
    size: str = "large"
    centre: tuple = (0.5, 0.5)
    rotation: float = 0.0                # radians, clockwise as seen
    rgb: tuple = None

    def __post_init__(self):
        for key, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} {getattr(self, key)!r} is unknown; use one of {', '.join(known)}")
        object.__setattr__(self, "rgb", PALETTE[self.colour] if self.rgb is None else tuple(self.rgb))
        if len(self.rgb) != 3 or min(self.rgb) < 0 or max(self.rgb) > 255:
            raise ValueError(f"rgb {self.rgb} must be three values in 0..255; leave it out for the palette's")

    name = property(lambda self: f"{self.colour} {self.shape}")
    label = property(lambda self: CLASSES.index(self.name))


def _coverage(shape, dx, dy, rotation, radius):
    """Share of each pixel inside the shape, at dx and dy from its centre; all lengths in pixels."""
    c, s, extent = cos(rotation) / radius, sin(rotation) / radius, EXTENT[shape]
    x, y = c * dx + s * dy, c * dy - s * dx
    # The signed distance to the outline of the shape of area pi, exact beside its edges, negative inside.
    if shape in ("circle", "ring"):
        hole = HOLE if shape == "ring" else -1                             # -1: no hole, a disc
        distance = np.abs(np.sqrt(x * x + y * y) - extent * (1 + hole) / 2) - extent * (1 - hole) / 2
    elif shape == "triangle":            # three half-planes, a tip up; inradius = circumradius / 2
        distance = np.maximum(y, np.abs(x) * sqrt(0.75) - y / 2) - extent / 2
    elif shape == "star":                # folded into a tenth of a turn, which holds one edge
        angle = np.abs(np.remainder(np.arctan2(x, -y) + pi / 5, 2 * pi / 5) - pi / 5)
        edge = atan2(1 - STAR * cos(pi / 5), STAR * sin(pi / 5))
        distance = np.sqrt(x * x + y * y) * np.cos(angle - edge) - extent * cos(edge)
    else:
        far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        distance = far - extent / sqrt(2) if shape == "square" else np.maximum(far - ARM, near - ARM * BAR)
    return np.clip(0.5 - radius * distance, 0, 1)


def _reach(shape, radius, rotation, direction):
    """How far the shape extends from its centre in a direction: the support function of its convex hull."""
    tips, phase = FOLDS.get(shape, (1e9, 0.0))                             # a circle is all tips
    aside = abs(remainder(direction - rotation - phase / tips, 2 * pi / tips))
    return radius * EXTENT[shape] * cos(aside - atan(BAR) * (shape == "cross"))


def _place(rng, outlines):
    """Centres that keep the gap between outlines (shape, radius, rotation), None if there is no room."""
    placed = []
    for own in outlines:
        right, down, left, up = (GAP / 2 + _reach(*own, k * pi / 2) for k in range(4))
        for u, v in rng.random((24, 2)).tolist():                          # 24 tries, then all start anew
            x, y = left + u * (1 - left - right), up + v * (1 - up - down)
            # Apart along the line of centres is apart: that line's direction is t.
            if all(hypot(a - x, b - y) > GAP + _reach(*own, t := atan2(b - y, a - x)) + _reach(*other, t + pi)
                   for a, b, other in placed):
                placed.append((x, y, own))
                break
        else:
            return None
    return [(x, y) for x, y, _ in placed]


def listing(names):
    """The names counted and joined, such as "two red circles, a blue star and a green cross"."""
    items = [f"a {x}" if n == 1 else f"{COUNTS[min(n, 13)]} {x}{'e' * x.endswith('s')}s"
             for x, n in {x: names.count(x) for x in names}.items()]
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:]))) or "nothing"


@dataclass(frozen=True)
class Scene:
    """Objects on a smooth background: rgb in 0..255 of its corners ((top left, top right), (bottom ...))."""
    objects: tuple
    background: tuple = (((225, 225, 220), (215, 220, 225)), ((220, 215, 210), (205, 205, 210)))

    def __post_init__(self):
        corners = np.asarray(self.background, float)
        if corners.shape != (2, 2, 3) or corners.min() < 0 or corners.max() > 255:
            raise ValueError(f"background {corners.shape} must be (2, 2, 3) in 0..255; give four rgb")
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "background", tuple(tuple(map(tuple, row)) for row in corners.tolist()))

    @classmethod
    def random(cls, seed, index, objects=(1, 2, 3, 4), label=None):
        """Scene number `index` of the endless stream `seed`; classes are uniform, sizes while there is room.

        objects: the number of objects or a tuple of numbers to draw from, 1 to 4
        label: class id of the first object, 0..35; drawn if None. Raises ValueError if one is out of range.
        """
        counts = (objects,) if isinstance(objects, (int, np.integer)) else tuple(objects)
        if not counts or not set(counts) <= {1, 2, 3, 4}:
            raise ValueError(f"objects={objects!r} must be 1 to 4 or a tuple of such; try (1, 2)")
        if label is not None and label not in range(len(CLASSES)):
            raise ValueError(f"label={label!r} must be a class id, 0 to 35; see shapes.CLASSES")
        rng = np.random.default_rng((seed, index))
        u, *each = rng.random((5, 8)).tolist()                             # of the scene; of each object
        each = each[:counts[int(u[0] * len(counts))]]
        kinds = [CLASSES[int(draw[0] * len(CLASSES))].split() for draw in each]
        kinds[0] = kinds[0] if label is None else CLASSES[label].split()
        same = min(len(each), 2 + int(u[2] * (len(each) - 1))) if u[1] < REPEATS else 1
        kinds[:same] = kinds[:1] * same                                    # classes remain uniform
        sizes = ["small" if draw[1] < 0.5 else "large" for draw in each]
        turns = [2 * pi * draw[2] for draw in each]
        while not (centres := _place(rng, [(s, SIZES[z], t) for (_, s), z, t in zip(kinds, sizes, turns)])):
            sizes[sizes.index("large") if "large" in sizes else 0] = "small"         # crowded: one shrinks
        rgb = [[v + JITTER * (2 * w - 1) for v, w in zip(PALETTE[k[0]], d[3:])] for k, d in zip(kinds, each)]
        made = [Object(s, c, *rest) for (c, s), *rest in zip(kinds, sizes, centres, turns, rgb)]
        # Pale to middle greys, whose channels differ by at most 40; those of an object differ by 100 or more.
        grey = rng.uniform(150, 235) + rng.uniform(-12, 12, 3) + rng.uniform(-20, 20, (2, 2, 1))
        return cls(made, np.minimum(grey + rng.uniform(-8, 8, (2, 2, 3)), 250))

    def render(self, size=64):
        """The anti-aliased picture, the same at any size from 16 pixels up. Returns (size, size, 3) uint8."""
        if not isinstance(size, (int, np.integer)) or size < 16:
            raise ValueError(f"size {size!r} must be an integer of at least 16 pixels; try 64")
        at = np.arange(size, dtype=np.float32) + 0.5
        blend = np.stack([1 - at / size, at / size])                       # 2, size: weights of the corners
        rows = np.einsum("ax,yac->yxc", blend, np.asarray(self.background, np.float32)).reshape(2, -1)
        image = (blend.T @ rows).reshape(size, size, 3)
        for o in self.objects:
            x, y, radius = o.centre[0] * size, o.centre[1] * size, SIZES[o.size] * size
            reach = radius * EXTENT[o.shape] + 1
            cols, rows = (slice(max(int(v - reach), 0), max(int(v + reach) + 1, 0)) for v in (x, y))
            dx, dy = at[cols] - np.float32(x), at[rows, None] - np.float32(y)
            mask = _coverage(o.shape, dx, dy, o.rotation, radius)[:, :, None]
            image[rows, cols] += mask * (np.float32(o.rgb) - image[rows, cols])
        return (image + 0.5).astype(np.uint8)

    def relations(self):
        """Triples (i, word, j): object i is clearly left of, right of, above or below object j."""
        found = []
        for (i, a), (j, b) in permutations(enumerate(self.objects), 2):
            dx, dy = np.subtract(b.centre, a.centre)
            if max(abs(dx), abs(dy)) > CLEAR * min(abs(dx), abs(dy)):
                words = ("right of", "left of") if abs(dx) > abs(dy) else ("below", "above")
                found.append((i, words[bool(dx + dy > 0)], j))
        return found

    def caption(self):
        """The plain caption, such as "two red circles and a blue star"."""
        return listing([o.name for o in self.objects])

    def captions(self):
        """True captions that name every object, the plain one first: order, size, number and position."""
        names, plain = [o.name for o in self.objects], self.caption()
        found = [plain, f"a picture of {plain}", listing([f"{o.size} {o.name}" for o in self.objects])]
        found += [listing(names[::-1]), f"{listing(['object'] * len(names))}: {plain}"] * (len(names) > 1)
        for i, word, j in self.relations():
            if names[i] != names[j]:
                rest = [name for k, name in enumerate(names) if k not in (i, j)]
                found.append(f"a {names[i]} {word} a {names[j]}" + f", and {listing(rest)}" * bool(rest))
        return list(dict.fromkeys(found))

    def held_out(self):
        """Whether it shows a pair of classes (5%), or a class so often (14%), as no scene of stage 3 does."""
        labels = [o.label for o in self.objects]
        return any((a + b) % 19 == 0 for a, b in combinations(set(labels), 2)) or \
            any((a + 5 * n) % 7 == 0 for a in labels if (n := labels.count(a)) > 1)

    def questions(self):
        """Pairs (question, answer) on number, presence, colour, shape, size and relative position."""
        names, shapes, colours = ([getattr(o, k) for o in self.objects] for k in ("name", "shape", "colour"))
        things = ["object"] * len(names) + names + shapes + [f"{c} object" for c in colours]
        found = [(f"how many {x}{'e' * x.endswith('s')}s are there?", COUNTS[min(things.count(x), 13)])
                 for x in dict.fromkeys(things)]
        # As many absent as present classes, each sharing an attribute with an object: colour binds to shape.
        near = [c for c in CLASSES if c not in names and (c.split()[0] in colours or c.split()[1] in shapes)]
        rng = np.random.default_rng([int(1e6 * abs(v)) for o in self.objects for v in o.centre])
        found += [(f"is there a {name}?", "yes") for name in dict.fromkeys(names)]
        found += [(f"is there a {name}?", "no") for name in rng.permutation(near)[:len(set(names))].tolist()]
        for o in self.objects:
            if shapes.count(o.shape) == 1:
                found += [(f"what {k} is the {o.shape}?", getattr(o, k)) for k in ("colour", "size")]
            if colours.count(o.colour) == 1:
                found.append((f"what shape is the {o.colour} object?", o.shape))
        for i, word, j in self.relations():
            if names.count(names[i]) == names.count(names[j]) == 1:
                a, b = (shapes[k] if shapes.count(shapes[k]) == 1 else names[k] for k in (i, j))
                found += [(f"is the {a} {word} the {b}?", "yes"), (f"is the {b} {word} the {a}?", "no")]
        return found


@dataclass(frozen=True)
class Text:
    """Lines of letters in cells of one width, turned about the image's centre, on a background as a Scene's.

    pitch: width of a cell, height of the letters, as a fraction of the side; lines are 1.3 x as far apart.
    turn: degrees, counter-clockwise as seen. ink: rgb in 0..255.
    """
    lines: tuple
    pitch: float = 0.12
    turn: float = 0.0
    ink: tuple = (20, 20, 20)
    background: tuple = (((255, 255, 255),) * 2,) * 2

    @classmethod
    def random(cls, seed, index):
        """Text number `index` of the endless stream `seed`: 1 to 3 lines of 2 to 5 letters."""
        rng = np.random.default_rng((seed, index, 1))
        rows, columns = rng.integers(1, 4), rng.integers(2, 6)
        lines = tuple("".join(rng.choice([*LETTERS], columns)) for _ in range(rows))
        dark, light = rng.uniform(0, 110, 3), rng.uniform(160, 255) + rng.uniform(-20, 0, (2, 2, 3))
        ink, back = (dark, light) if rng.random() < 0.7 else (255 - dark, 255 - light)
        pitch = rng.uniform(0.7, 1) * min(0.9 / columns, 0.9 / (1.3 * rows), 0.3)
        return cls(lines, pitch, rng.uniform(-8, 8), tuple(ink.tolist()), tuple(map(tuple, back.tolist())))

    def caption(self):
        """Its lines."""
        return "\n".join(self.lines)

    def cells(self):
        """(letter, x, y) of each letter; x, y: its centre before the turn, from the image's centre."""
        height, middle = 1.3 * self.pitch, (len(self.lines) - 1) / 2
        return [(letter, (c - (len(line) - 1) / 2) * self.pitch, (r - middle) * height)
                for r, line in enumerate(self.lines) for c, letter in enumerate(line)]

    def render(self, size=64):
        """The picture, (size, size, 3) uint8."""
        side = 2 * size                                    # letters stand on whole pixels, halves of ours
        sheet, font = Image.new("L", (side, side)), ImageFont.load_default(1.25 * self.pitch * side)
        for letter, x, y in self.cells():
            ImageDraw.Draw(sheet).text(((x + 0.5) * side, (y + 0.5) * side), letter, 255, font, "mm")
        mask = np.asarray(sheet.rotate(self.turn, Image.BICUBIC).reduce(2), np.float32)[:, :, None] / 255
        back = np.asarray(Scene((), self.background).render(size), np.float32)
        return (back + mask * (np.float32(self.ink) - back) + 0.5).astype(np.uint8)

    def read(self, image):
        """Share of its letters that, of all letters, are the most like their cells of a uint8 image."""
        image = np.asarray(Image.fromarray(image).resize((READ, READ), Image.BOX))
        size, turn, cells = READ, np.deg2rad(self.turn), self.cells()
        each = np.stack([replace(self, lines=tuple(x * len(line) for line in self.lines)).render(size)
                         for x in LETTERS]).astype(np.float32)         # an image of each letter alone
        error, right = np.square(each - image.astype(np.float32)).sum(3), 0      # letters H W
        for letter, x, y in cells:
            x, y = x * cos(turn) + y * sin(turn), y * cos(turn) - x * sin(turn)
            rows, columns = (slice(max(0, round((v + 0.5 - self.pitch / 2) * size)),
                                   round((v + 0.5 + self.pitch / 2) * size) + 1) for v in (y, x))
            right += LETTERS[error[:, rows, columns].sum((1, 2)).argmin()] == letter
        return right / len(cells)


# The verifier: classical image analysis, told nothing of the scene. Its limits lie between the worst of
# fresh, slightly blurred, noisy and JPEG pictures and the best of melted, blended and spliced ones, at 64 px.
READ = 64                                # side in pixels at which every picture is read
FOREGROUND = 0.2                         # rgb distance from the background; the faintest object has 0.32
COLOUR_ERROR = 0.2                       # largest rgb distance from the palette, whose least spacing is 0.46
FAINT = 0.8                              # contrast over that of the palette's colour; fresh 0.9, JPEG 0.81
STRAY = 0.3                              # rgb distance from all mixtures with the background: a second colour
SPECK = 8                                # pixels; the smallest object has 217, JPEG leaves 6 stray ones
STEEP, SMOOTH = 1.5, 0.8                 # contrast and sigma of outlines: soft and rough cost little
SLIP = 0.55                              # mean pixels between outlines; fresh 0.1, JPEG 0.4, blur of 3 0.53
LEAD = 0.75                              # misfit over the second-best shape's; JPEG 0.5, blends over 0.8
_x = np.broadcast_to(np.linspace(-1, 1, READ, dtype=np.float32), (READ, READ))
SURFACES = np.stack([np.ones_like(_x), _x, _x.T, _x * _x.T, _x * _x, _x.T * _x.T], 2)    # of degree 2


def _read_object(background, offset, own, corner, colours):
    """The object in a window at (top, left), or None, from its background, offset from it and own pixels."""
    strength = np.linalg.norm(offset, axis=2)
    core = own & (strength >= np.median(strength[own]))
    full, behind = np.median(offset[core], 0), background[core].mean(0)
    errors = np.linalg.norm(np.float32(list(PALETTE.values())) / 255 - behind - full, axis=1)
    colour = COLOURS[errors.argmin()]
    wanted = np.float32(PALETTE[colour]) / 255 - behind                    # the palette colour's offset
    alpha = np.clip(offset @ full / max(full @ full, 1e-6), 0, 1)           # share of the object in a pixel
    stray = np.linalg.norm((offset - alpha[:, :, None] * full)[own], axis=1) > STRAY
    if errors.min() > COLOUR_ERROR or full @ wanted < FAINT * (wanted @ wanted) or stray.sum() >= SPECK:
        return None
    alpha = np.clip(0.5 + STEEP * (alpha - 0.5), 0, 1) * ndimage.binary_dilation(own, iterations=2)
    radius, centre = sqrt(alpha.sum() / pi), ndimage.center_of_mass(alpha)
    small, large = (r * READ for r in SIZES.values())
    fits = 0.75 * small < radius < 1.35 * large                            # a size of this world
    if colours or not fits:
        return colour if fits else None
    dy, dx = np.indices(alpha.shape, np.float32) - np.float32(centre)[:, None, None]
    # Tips and corners lie far out, so the m-fold angular moment points at them: the rotation in closed form.
    spot, far = dx + 1j * dy, np.maximum(np.hypot(dx, dy), 1)
    moment = {s: (alpha * spot ** m / far ** (m - 2)).sum() for s, (m, _) in FOLDS.items()}
    rotation = {s: float(np.angle(moment[s]) - phase) / m for s, (m, phase) in FOLDS.items()}
    drawn = np.stack([_coverage(s, dx, dy, rotation.get(s, 0.0), radius) for s in SHAPES])
    outline = 6 * (drawn * (1 - drawn)).sum((1, 2))                        # 1 / 6: integral over the ramp
    seen, *drawn = ndimage.gaussian_filter(np.stack([alpha, *drawn]), (0, SMOOTH, SMOOTH))
    misfit = np.abs(seen - drawn).sum((1, 2))
    best, second = np.argsort(misfit)[:2]
    if misfit[best] > min(SLIP * outline[best], LEAD * misfit[second]):
        return None
    return Object(SHAPES[best], colour, "small" if radius < sqrt(small * large) else "large",
                  tuple(((np.add(corner, centre) + 0.5) / READ)[::-1].tolist()),
                  rotation.get(SHAPES[best], 0.0), (255 * (behind + full)).clip(0, 255).tolist())


def read_scene(image, colours=False):
    """Reads the objects back from any picture: Scene(read_scene(image)) has its caption and relations.

    image: (n, n, 3), n >= 32, uint8 in 0..255 or float in 0..1. colours: read only these, whatever the shape
    Returns a list of Object or colours, topmost first, or None if unsure: nothing, or none of the 36 classes.
    Raises ValueError for another shape, type or range.
    """
    image = np.asarray(image)
    if image.shape != image.shape[:1] * 2 + (3,) or len(image) < 32:
        raise ValueError(f"image of shape {image.shape} must be (n, n, 3), n >= 32; try .permute(1, 2, 0)")
    most = 255 if image.dtype == np.uint8 else 1
    if image.dtype.kind not in "fu" or not -1e-3 <= image.min() <= image.max() <= most + 1e-3:    # nan fails
        raise ValueError(f"image of {image.dtype} to {image.max()} must be uint8 or in 0..1; try .clip(0, 1)")
    image = image.astype(np.float32) / most
    if (zoom := READ / len(image)) != 1:
        image = ndimage.gaussian_filter(image, (max(0, 1 / zoom - 1) / 2,) * 2 + (0,))     # against aliasing
        image = ndimage.zoom(image, (zoom, zoom, 1), order=1, mode="nearest", grid_mode=True)
    # The background: a quadratic surface through the unsaturated pixels, then through those near it.
    pixels, some = image[::2, ::2].reshape(-1, 3), SURFACES[::2, ::2].reshape(-1, 6)
    keep = np.ptp(pixels, 1) < 0.25                                        # backgrounds 0.16, objects 0.4
    for _ in range(2):
        if keep.mean() < 0.3:                                              # four large objects leave 0.6
            return None
        fit = np.linalg.lstsq(some[keep].T @ some[keep], some[keep].T @ pixels[keep], rcond=None)[0]
        keep = np.abs(pixels - some @ fit).max(1) < FOREGROUND / 2
    offset = image - (background := SURFACES @ fit)
    labels, found = ndimage.label(np.linalg.norm(offset, axis=2) > FOREGROUND)[0], []
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        top, left = (max(s.start - 4, 0) for s in box)                     # 4 px of margin for the soft edge
        window = np.s_[top:box[0].stop + 4, left:box[1].stop + 4]
        own = labels[window] == k
        if own.sum() >= SPECK:
            found.append(_read_object(background[window], offset[window], own, (top, left), colours))
    return found if found and None not in found else None
