"""Lines of letters: a second built-in world, for the fine detail that an autoencoder keeps.

Lengths and positions are fractions of the image side, x to the right, y downwards.
"""
from dataclasses import dataclass, replace
from math import cos, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shapes.reader import READING_SIDE
from shapes.scene import Scene, nested_tuples

# No two letters look alike: without O beside 0, S beside s and so on.
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHJKLMNPRT23456789"
LINE_HEIGHT = 1.3            # distance of lines over the width of a cell
FONT_SIZE = 1.25             # over the width of a cell, which a letter then fills
DARK_ON_LIGHT = 0.7          # fraction of random texts; the others are light on dark
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Text:
    """Lines of letters in cells of one width, turned about the centre of the image.

    lines: tuple of str
    pitch: width of a cell, as a fraction of the image side
    turn: degrees, counter-clockwise as seen
    ink: rgb in 0..255
    background: as that of a Scene
    """
    lines: tuple
    pitch: float = 0.12
    turn: float = 0.0
    ink: tuple = (20, 20, 20)
    background: tuple = ((WHITE, WHITE), (WHITE, WHITE))

    @classmethod
    def random(cls, seed, index):
        """Return text number `index` of the endless stream `seed`.

        It has 1 to 3 lines of 2 to 5 letters each.
        """
        rng = np.random.default_rng((seed, index, 1))        # the 1 sets it apart from Scene.random
        line_count = rng.integers(1, 4)
        letter_count = rng.integers(2, 6)
        lines = []
        for _ in range(line_count):
            lines.append("".join(rng.choice(list(LETTERS), letter_count)))

        ink = rng.uniform(0, 110, 3)
        background = rng.uniform(160, 255) + rng.uniform(-20, 0, (2, 2, 3))
        if rng.random() >= DARK_ON_LIGHT:
            ink = 255 - ink
            background = 255 - background

        # At least 5% of the side stays free at each border; no letter is larger than 30% of it.
        max_pitch = min(0.9 / letter_count, 0.9 / (LINE_HEIGHT * line_count), 0.3)
        pitch = rng.uniform(0.7, 1) * max_pitch
        turn = rng.uniform(-8, 8)
        return cls(tuple(lines), pitch, turn, tuple(ink.tolist()), nested_tuples(background))

    def caption(self):
        """Return the lines as one string."""
        return "\n".join(self.lines)

    def cells(self):
        """Return triples (letter, x, y).

        x, y: centre of the letter's cell, from the centre of the image, before the turn
        """
        cells = []
        for row, line in enumerate(self.lines):
            y = (row - (len(self.lines) - 1) / 2) * (LINE_HEIGHT * self.pitch)
            for column, letter in enumerate(line):
                x = (column - (len(line) - 1) / 2) * self.pitch
                cells.append((letter, x, y))
        return cells

    def render(self, size=64):
        """Return the picture, (size, size, 3), uint8."""
        # Pillow puts letters on whole pixels, so draw them at twice the size and average 2 x 2.
        side = 2 * size
        sheet = Image.new("L", (side, side))
        pen = ImageDraw.Draw(sheet)
        font = ImageFont.load_default(FONT_SIZE * self.pitch * side)
        for letter, x, y in self.cells():
            centre = ((x + 0.5) * side, (y + 0.5) * side)
            pen.text(centre, letter, fill=255, font=font, anchor="mm")
        sheet = sheet.rotate(self.turn, Image.BICUBIC).reduce(2)

        background = Scene([], self.background).render(size)
        background = background.astype(np.float32)           # h w 3
        alpha = np.asarray(sheet, np.float32)[:, :, None] / 255                  # h w 1
        image = background + alpha * (np.float32(self.ink) - background)
        return (image + 0.5).astype(np.uint8)                # rounded

    def read(self, image):
        """Return the fraction of the letters that a picture of this text still shows.

        A letter counts if, of all LETTERS drawn in its place, it is the most like its cell.

        image: (n, n, 3), uint8
        """
        image = Image.fromarray(image).resize((READING_SIDE, READING_SIDE), Image.BOX)
        errors = self.errors_of_letters(np.asarray(image, np.float32))           # letters h w
        cells = self.cells()
        right = 0
        for letter, x, y in cells:
            rows, columns = self.window(x, y)
            error = errors[:, rows, columns].sum((1, 2))     # letters
            if LETTERS[error.argmin()] == letter:
                right += 1
        return right / len(cells)

    def errors_of_letters(self, image):
        """Return the squared error of each pixel if all letters were "a", all were "b" ...

        image: (h, w, 3), float32
        Returns an array (len(LETTERS), h, w).
        """
        errors = []
        for letter in LETTERS:
            lines = tuple(letter * len(line) for line in self.lines)
            picture = replace(self, lines=lines).render(READING_SIDE)
            errors.append(np.square(picture.astype(np.float32) - image).sum(2))
        return np.stack(errors)

    def window(self, x, y):
        """Return two slices, rows and columns of pixels, of the cell with centre (x, y)."""
        angle = np.deg2rad(self.turn)                        # the centre turns with the text
        turned_x = x * cos(angle) + y * sin(angle)
        turned_y = y * cos(angle) - x * sin(angle)
        slices = []
        for position in (turned_y, turned_x):
            first = round((position + 0.5 - self.pitch / 2) * READING_SIDE)
            last = round((position + 0.5 + self.pitch / 2) * READING_SIDE)
            slices.append(slice(max(0, first), last + 1))
        return slices
