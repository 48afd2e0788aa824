"""Pictures of many images: a grid under captions, and an animation of grids."""
import math
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import storage

# Suffix -> how Pillow saves a picture.
PICTURES = {
    ".png": dict(format="png"),
    ".jpg": dict(format="jpeg", quality=95),
    ".jpeg": dict(format="jpeg", quality=95),
    ".webp": dict(format="webp", lossless=True),
}


def save_picture(image, path):
    """Write a PIL image in the format of its suffix, which is one of PICTURES."""
    options = PICTURES[Path(path).suffix.lower()]
    storage.write_whole(path, lambda f: image.save(f, **options))


# ---------------------------------------------------------------------------- grids
LETTER, LINE, MARGIN = 6, 12, 2            # pixels, of the 11 px font and between images
GRID_COLUMNS = 12
CAPTION_LINES = 4                          # of longer captions the beginning is shown
# Pixels along each side of a grid. Viewers and browsers show larger pictures badly or not at all,
# as their textures end at 8192 or 16384.
GRID_SIDE = 8192


def grid_columns(num_captions, width):
    """Columns of a grid of images `width` pixels wide."""
    return min(GRID_COLUMNS, num_captions, max(1, GRID_SIDE // (width + MARGIN)))


def most_in_grid(num_captions, width, height):
    """How many images of width x height pixels fit in a grid under so many captions."""
    columns = grid_columns(num_captions, width)
    head = 4 + LINE * CAPTION_LINES
    rows = max(1, GRID_SIDE // (head + height + 2 * MARGIN))            # with one image each
    if num_captions > rows * columns:
        return rows * columns
    row_height = GRID_SIDE // math.ceil(num_captions / columns)
    return num_captions * max(1, (row_height - head - MARGIN) // (height + MARGIN))


def caption_lines(text, width):
    """A caption as the lines to print above an image `width` pixels wide, without odd characters.
    """
    letters = max(4, width // LETTER)
    text = text[:CAPTION_LINES * letters * 4].replace("_", " ")         # a book would take long
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return wrap(text, letters, max_lines=CAPTION_LINES, placeholder="...")


def draw_grid(images, captions):
    """A PIL picture of uint8 images n H W 3; image i stands under caption i % len(captions)."""
    height, width = images.shape[1:3]
    captions = [caption_lines(text, width) for text in captions[:len(images)]]
    columns = grid_columns(len(captions), width)
    head = 4 + LINE * max(len(lines) for lines in captions)
    per_caption = math.ceil(len(images) / len(captions))
    band = head + per_caption * (height + MARGIN) + MARGIN              # height of a caption's row
    size = (columns * (width + MARGIN) + MARGIN, math.ceil(len(captions) / columns) * band)
    sheet = Image.new("RGB", size, "white")
    page = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, image in enumerate(np.asarray(images)):
        number, place = divmod(i, len(captions))                        # of the images of a caption
        left = place % columns * (width + MARGIN) + MARGIN
        top = place // columns * band + head
        sheet.paste(Image.fromarray(image), (left, top + number * (height + MARGIN)))
        if number == 0:
            centre = (left + width / 2, top - head / 2)
            text = "\n".join(captions[place])
            page.multiline_text(centre, text, "black", font, "mm", 1, "center")
    return sheet


# ---------------------------------------------------------------------------- animations
FRAME_MS, LAST_FRAME_MS = 120, 2000        # how long frames are shown
# The plot of t beside the grid, in pixels.
SCHEDULE_SIZE = (220, 240)
SCHEDULE_AXES = (58, 34, 208, 184)         # left, top, right, bottom


def draw_schedule(times, step):
    """A PIL picture of t over the solver's steps, with a dot at t after `step` steps.

    times: of the solver. A grey line shows them without the time shift.
    """
    steps = len(times) - 1
    left, top, right, bottom = SCHEDULE_AXES

    def place(step, t):
        return left + (right - left) * step / steps, bottom - (bottom - top) * t

    picture = Image.new("RGB", SCHEDULE_SIZE, "white")
    page = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    page.rectangle(SCHEDULE_AXES, outline="silver")
    page.line([place(0, 1), place(steps, 0)], "darkgray")
    page.line([place(k, t) for k, t in enumerate(times)], "black", 2)
    x, y = place(step, times[step])
    page.ellipse((x - 4, y - 4, x + 4, y + 4), "red")
    page.text((left, top - 12), f"t = {times[step]:.3f}", "red", ImageFont.load_default(15), "ls")
    page.text((left - 8, top), "noise 1", "black", font, "rm")
    page.text((left - 8, (top + bottom) / 2), "t", "black", font, "rm")
    page.text((left - 8, bottom), "data 0", "black", font, "rm")
    page.text((left, bottom + 8), "0", "black", font, "ma")
    page.text(((left + right) / 2, bottom + 8), "steps done", "black", font, "ma")
    page.text((right, bottom + 8), f"{steps}", "black", font, "ma")
    page.text((left, bottom + 26), "black: shifted time grid", "black", font, "la")
    page.text((left, bottom + 40), "grey: without the shift", "gray", font, "la")
    return picture


def draw_frame(images, captions, times, step):
    """A PIL picture of a frame in 256 colours: the grid of its images, beside it the schedule."""
    grid = draw_grid(images, captions)
    schedule = draw_schedule(times, step)
    size = (grid.width + schedule.width, max(grid.height, schedule.height))
    frame = Image.new("RGB", size, "white")
    frame.paste(grid, (0, 0))
    frame.paste(schedule, (grid.width, (frame.height - schedule.height) // 2))
    # Median cut, Pillow's default, is no closer to the picture, and takes 1.8 times the bytes.
    return frame.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)


def save_animation(out, times, frames, captions):
    """Write an animation as a GIF, which holds its last frame and starts again.

    times: of the solver. frames: number of a step -> images uint8 n H W 3, see draw_frame().
    """
    pictures = [draw_frame(images, captions, times, step) for step, images in frames.items()]
    milliseconds = [FRAME_MS for _ in pictures[1:]] + [LAST_FRAME_MS]
    options = dict(format="gif", save_all=True, append_images=pictures[1:], duration=milliseconds,
                   loop=0)
    storage.write_whole(out, lambda f: pictures[0].save(f, **options))
