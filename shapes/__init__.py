"""The built-in world: scenes of coloured shapes, what is said of them, and how they are read."""
from shapes.language import (
    ALIGN_QUESTION,
    DESCRIBE_QUESTION,
    REQUESTS,
    WHERE_QUESTION,
    altered,
    converse,
    fulfils,
    layout,
    listing,
    reword,
    shapes_eval_prompts,
    unknown_words,
)
from shapes.letters import LETTERS, Text
from shapes.reader import read_scene
from shapes.scene import CLASSES, COLOURS, PALETTE, SHAPES, SIZES, Object, Scene

__all__ = [
    "ALIGN_QUESTION",
    "CLASSES",
    "COLOURS",
    "DESCRIBE_QUESTION",
    "LETTERS",
    "PALETTE",
    "REQUESTS",
    "SHAPES",
    "SIZES",
    "WHERE_QUESTION",
    "Object",
    "Scene",
    "Text",
    "altered",
    "converse",
    "fulfils",
    "layout",
    "listing",
    "read_scene",
    "reword",
    "shapes_eval_prompts",
    "unknown_words",
]
