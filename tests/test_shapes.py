"""The built-in world: pictures, words and reader agree, and the reader is unsure where it must be.

Run: python -m pytest tests/test_shapes.py
"""
import io
import math
import re
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from shapes import CLASSES, COLOURS, SHAPES, Object, Scene, read_scene

NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
RED, GREEN, BROWN = (222, 38, 42), (38, 160, 62), (120, 70, 20)
GREY = 210                                     # of a plain background


def inventory(objects):
    """Return the shapes and colours of objects in an order that does not depend on theirs."""
    return sorted((obj.shape, obj.colour) for obj in objects)


# ---------------------------------------------------------------- pictures
def test_a_scene_is_a_function_of_seed_and_index():
    first = Scene.random(3, 7)
    second = Scene.random(3, 7)

    assert first == second
    assert hash(first) == hash(second)
    assert np.array_equal(first.render(), second.render())
    assert first != Scene.random(3, 8)
    assert first != Scene.random(4, 7)


def test_the_picture_is_the_same_at_every_resolution():
    for index in range(50):
        scene = Scene.random(1, index)
        small = scene.render(64).astype(float)
        large = scene.render(128).astype(float)
        halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        difference = np.abs(small - halved)
        # Up to 71 at sharp tips, 0.32 on average.
        assert difference.mean() < 0.5
        assert difference.max() < 90
        assert (difference > 25).mean() < 0.005


def test_the_picture_has_the_size_that_is_asked_for():
    scene = Scene.random(1, 0)
    assert scene.render(37).shape == (37, 37, 3)
    assert scene.render().shape == (64, 64, 3)
    assert scene.render().dtype == np.uint8


def test_objects_neither_overlap_nor_touch_nor_leave_the_picture():
    border = np.ones((256, 256), bool)
    border[1:-1, 1:-1] = False
    white = np.full((2, 2, 3), 255)
    for index in range(80):
        scene = Scene.random(2, index, (3, 4))
        masks = [Scene([obj], white).render(256).min(2) < 250 for obj in scene.objects]
        for i, mask in enumerate(masks):
            assert not (mask & border).any()
            too_near = ndimage.distance_transform_edt(~mask) < 8           # 2 px at 64 px
            for other in masks[:i]:
                assert not (too_near & other).any()


def test_classes_counts_and_sizes_are_balanced():
    scenes = [Scene.random(5, index) for index in range(3000)]
    several = [scene for scene in scenes if len(scene.objects) > 1]
    single = [scene for scene in scenes if len(scene.objects) == 1]

    counts = Counter(len(scene.objects) for scene in scenes)
    labels = Counter(obj.label for scene in scenes for obj in scene.objects)
    repeats = sum(len(set(inventory(scene.objects))) < len(scene.objects) for scene in several)
    sizes = Counter(scene.objects[0].size for scene in single)

    assert set(counts) == {1, 2, 3, 4}
    assert max(counts.values()) < 1.2 * min(counts.values())
    assert len(labels) == 36
    assert max(labels.values()) < 1.5 * min(labels.values())
    assert 0.25 < repeats / len(several) < 0.5
    assert 0.8 < sizes["small"] / sizes["large"] < 1.25


def test_label_and_number_of_objects_can_be_chosen():
    one_object = [Scene.random(0, label, 1, label=label) for label in range(36)]
    two_or_four = [Scene.random(0, label, (2, 4), label=label) for label in range(36)]
    counts = {len(Scene.random(0, index, (2, 4)).objects) for index in range(50)}

    assert [scene.objects[0].label for scene in one_object] == list(range(36))
    assert [scene.objects[0].name for scene in two_or_four] == CLASSES
    assert counts == {2, 4}


def test_speed():
    # Other programs use the machine, too, so try until it is as fast as it should be.
    rates = []
    for seed in range(20):
        start = time.process_time()
        for index in range(500):
            Scene.random(seed, index).render(64)
        rates.append(500 / (time.process_time() - start))
        if rates[-1] > 1000:
            break
    print(f"{max(rates):.0f} images/s")
    assert max(rates) > 1000


# ---------------------------------------------------------------- what the reader must read
def fractions_read(scenes, change=None, size=64):
    """Return the fractions of the scenes whose objects are read rightly, and wrongly.

    change: function of the picture that damages it first
    """
    right = wrong = 0
    for scene in scenes:
        image = scene.render(size)
        if change is not None:
            image = change(image)
        objects = read_scene(image)
        if objects is None:
            continue
        if inventory(objects) == inventory(scene.objects):
            right += 1
        else:
            wrong += 1
    return right / len(scenes), wrong / len(scenes)


def test_the_reader_reads_fresh_pictures():
    single, single_wrong = fractions_read([Scene.random(11, k, 1) for k in range(600)])
    several, several_wrong = fractions_read([Scene.random(12, k, (2, 3, 4)) for k in range(600)])

    print(f"single {single:.4f}, several {several:.4f}")
    assert single >= 0.995
    assert several >= 0.98
    assert single_wrong == several_wrong == 0


@pytest.mark.parametrize("size", [48, 96, 128, 256])
def test_the_reader_reads_at_other_resolutions(size):
    right, wrong = fractions_read([Scene.random(13, k) for k in range(60)], size=size)
    assert right >= 0.98
    assert wrong == 0


def blur(image, sigma=0.7):
    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def add_noise(image):
    noise = np.random.default_rng(int(image.sum())).normal(0, 0.02, image.shape)
    return (image / 255 + noise).clip(0, 1)


def compress(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def shrink(image):
    small = Image.fromarray(image).resize((48, 48), Image.BILINEAR)
    return np.asarray(small.resize((64, 64), Image.BILINEAR))


@pytest.mark.parametrize("damage", [blur, add_noise, compress, shrink])
def test_the_reader_stands_mild_damage(damage):
    right, wrong = fractions_read([Scene.random(14, k, 1) for k in range(250)], damage)
    print(f"{right:.3f}")
    assert right >= 0.97
    assert wrong == 0


def test_what_is_read_redraws_the_picture():
    for index in range(50):
        scene = Scene.random(15, index)
        picture = scene.render()

        again = Scene(read_scene(picture), scene.background)

        sizes = sorted(obj.size for obj in scene.objects)
        assert sorted(obj.size for obj in again.objects) == sizes
        assert np.abs(again.render().astype(float) - picture).mean() < 2
        for obj in scene.objects:
            assert min(math.dist(obj.centre, other.centre) for other in again.objects) < 0.01


def test_colours_are_read_of_all_objects():
    for k in range(100):
        scene = Scene.random(18, k)
        colours = read_scene(scene.render(), colours=True)
        assert sorted(colours) == sorted(obj.colour for obj in scene.objects)


# ---------------------------------------------------------------- what the reader must not read
def paint(*masks_and_colours):
    """Return a grey picture with pixels painted: pairs (mask, rgb)."""
    image = np.full((64, 64, 3), GREY, np.uint8)
    for mask, rgb in masks_and_colours:
        image[mask] = rgb
    return image


def pixel_offsets():
    """Return x and y of each pixel from the centre of the picture, in pixels."""
    y, x = np.mgrid[:64, :64] - 32.0
    return x, y


def test_the_reader_is_unsure_of_noise():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert read_scene(rng.integers(0, 256, (64, 64, 3), np.uint8)) is None


def test_the_reader_is_unsure_of_clouds():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cloud = ndimage.gaussian_filter(rng.normal(0, 1, (64, 64, 3)), (4, 4, 0))
        assert read_scene((0.5 + 0.25 * cloud / cloud.std()).clip(0, 1)) is None


def test_the_reader_is_unsure_of_empty_pictures():
    for k in range(20):
        assert read_scene(Scene([], Scene.random(16, k).background).render()) is None
    assert read_scene(np.zeros((64, 64, 3), np.uint8)) is None
    assert read_scene(np.ones((32, 32, 3))) is None


def test_the_reader_is_unsure_of_blurry_pictures():
    images = [blur(Scene.random(16, k).render(), sigma=4) for k in range(60)]
    assert sum(read_scene(image) is not None for image in images) <= 1


def test_the_reader_is_unsure_of_two_pictures_in_one():
    for k in range(60):
        image = Scene.random(16, k, 1).render() // 2 + Scene.random(17, k, 1).render() // 2
        assert read_scene(image) is None


def blended_and_spliced(one, other):
    """Return two pictures: both objects half transparent, and the halves of both side by side."""
    first = Scene([one]).render()
    second = Scene([other]).render()
    blended = first // 2 + second // 2
    spliced = np.concatenate([first[:, :32], second[:, 32:]], 1)
    return blended, spliced


def test_the_reader_is_unsure_of_objects_between_two_shapes():
    read = []
    for i, shape in enumerate(SHAPES):
        for other_shape in SHAPES[:i]:
            if {shape, other_shape} == {"circle", "square"}:               # it is a rounded square
                continue
            one = Object(shape, "blue", rotation=0.3)
            other = Object(other_shape, "blue", rotation=0.3)
            for image in blended_and_spliced(one, other):
                read.append(read_scene(image) is not None)
    print(f"{sum(read)} of {len(read)} read")
    assert sum(read) <= 0.05 * len(read)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reader_is_unsure_of_objects_between_two_colours(shape):
    for image in blended_and_spliced(Object(shape, "red"), Object(shape, "green")):
        assert read_scene(image) is None


def foreign_pictures():
    """Return pictures of one object that is none of the world's: name -> picture."""
    x, y = pixel_offsets()
    distance = np.hypot(x, y)
    disc = distance < 12.8
    crescent = disc & (np.hypot(x - 6.4, y) > 11.2)
    bar = (np.abs(x) < 16) & (np.abs(y) < 4.8)
    return {
        "half disc": paint((disc & (x > 0), RED)),
        "bar": paint((bar, RED)),
        "crescent": paint((crescent, RED)),
        "dot": paint((distance < 4.8, RED)),
        "huge disc": paint((distance < 19.2, RED)),
        "brown disc": paint((disc, BROWN)),
    }


@pytest.mark.parametrize("name", foreign_pictures())
def test_the_reader_is_unsure_of_foreign_objects(name):
    assert read_scene(foreign_pictures()[name]) is None


def test_the_colour_of_a_foreign_shape_can_be_read():
    x, y = pixel_offsets()
    fat_crescent = (np.hypot(x, y) < 12) & (np.hypot(x - 8, y) > 9)
    image = paint((fat_crescent, RED))

    assert read_scene(image) is None
    assert read_scene(image, colours=True) == ["red"]


def pictures_without_a_colour():
    """Return pictures whose colours must not be read: name -> picture."""
    x, y = pixel_offsets()
    distance = np.hypot(x, y)
    disc = distance < 12
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return {
        "noise": noise,
        "blank": paint(),
        "brown": paint((disc, BROWN)),
        "speck": paint((distance < 4, RED)),
        "huge": paint((distance < 20, RED)),
        "two colours": paint((disc, RED), (disc & (x > 0), GREEN)),
    }


@pytest.mark.parametrize("name", pictures_without_a_colour())
def test_the_reader_is_unsure_of_colours_in_a_mess(name):
    assert read_scene(pictures_without_a_colour()[name], colours=True) is None


# ---------------------------------------------------------------- captions
def class_in(item):
    """Return (count, size or None, name) for an item such as "two small red crosses"."""
    number, *size, colour, shape = item.split()
    count = NUMBERS[number]
    if count > 1:
        shape = shape.removesuffix("es") if shape == "crosses" else shape.removesuffix("s")
    return count, size[0] if size else None, f"{colour} {shape}"


def relation_holds(one, word, other, scene):
    """Return whether an object of class `one` stands so to one of class `other`."""
    axis = 0 if word in ("left of", "right of") else 1
    ones = [obj.centre[axis] for obj in scene.objects if obj.name == one]
    others = [obj.centre[axis] for obj in scene.objects if obj.name == other]
    if word in ("left of", "above"):
        return any(b - a > 0.05 for a in ones for b in others)
    return any(a - b > 0.05 for a in ones for b in others)


def holds(text, scene):
    """Return whether a caption is true and names all objects.

    Its grammar: "[number objects:] list", or "class relation class[, and list]".
    """
    text = re.sub(r"^(a picture of|\w+ objects:) ", "", text)
    named = Counter()
    pattern = r"a (\w+ \w+) (left of|right of|above|below) a (\w+ \w+)(?:, and (.*))?$"
    related = re.match(pattern, text)
    if related:
        one, word, other, text = related.groups()
        if not relation_holds(one, word, other, scene):
            return False
        named.update([one, other])
    items = re.split(r", | and ", text) if text else []
    for item in items:
        count, size, name = class_in(item)
        named[name] += count
        if size:
            same = [obj for obj in scene.objects if (obj.size, obj.name) == (size, name)]
            if len(same) != count:
                return False
    return named == Counter(obj.name for obj in scene.objects)


def test_captions_are_true_and_complete():
    words = ("two", "left of", "above", "crosses", "small")
    seen = Counter()
    for index in range(300):
        scene = Scene.random(21, index)
        other = Scene.random(22, index)
        captions = scene.captions()

        assert captions[0] == scene.caption()
        assert len(captions) == len(set(captions))
        for caption in captions:
            assert holds(caption, scene)
            if inventory(scene.objects) != inventory(other.objects):
                assert not holds(caption, other)
            seen.update(word for word in words if word in caption)
    assert min(seen[word] for word in words) > 20


CIRCLE = Object("circle", "red", centre=(0.2, 0.5))
STAR = Object("star", "blue", "small", centre=(0.8, 0.5))
CROSS = Object("cross", "green", centre=(0.5, 0.2))


def test_captions_of_one_object_word_for_word():
    assert Scene([CIRCLE]).captions() == [
        "a red circle",
        "a picture of a red circle",
        "a large red circle",
    ]


def test_captions_of_two_objects_word_for_word():
    scene = Scene([CIRCLE, STAR])
    assert scene.caption() == "a red circle and a blue star"
    assert set(scene.captions()) > {
        "a red circle left of a blue star",
        "a blue star right of a red circle",
        "a blue star and a red circle",
        "two objects: a red circle and a blue star",
    }


@pytest.mark.parametrize("objects, caption", [
    ([CROSS, CIRCLE, CROSS], "two green crosses and a red circle"),
    ([CROSS, CIRCLE, STAR], "a green cross, a red circle and a blue star"),
    ([], "nothing"),
])
def test_plain_caption(objects, caption):
    assert Scene(objects).caption() == caption


def test_relations_are_only_those_that_are_clear():
    upper_left = Object("circle", "red", centre=(0.2, 0.2))
    lower_right = Object("star", "red", centre=(0.8, 0.8))
    assert Scene([CIRCLE, STAR]).relations() == [(0, "left of", 1), (1, "right of", 0)]
    assert Scene([upper_left, lower_right]).relations() == []


# ---------------------------------------------------------------- questions
def objects_called(phrase, scene):
    """Return the objects that are called so: "objects", "red objects", "star", "blue crosses"."""
    words = phrase.replace("crosses", "cross").split()
    words += [word.removesuffix("s") for word in words]                    # the singular
    colours = [colour for colour in COLOURS if colour in words] or COLOURS
    shapes = [shape for shape in SHAPES if shape in words] or SHAPES
    return [obj for obj in scene.objects if obj.colour in colours and obj.shape in shapes]


def answer(question, scene):
    """Return the answer from the objects alone; None if the question does not have exactly one."""
    match = re.match(r"how many (.*) are there\?", question)
    if match:
        count = len(objects_called(match[1], scene))
        words = {number: word for word, number in NUMBERS.items() if word != "a"}
        return words.get(count)

    match = re.match(r"is there a (.*)\?", question)
    if match:
        return "yes" if objects_called(match[1], scene) else "no"

    match = re.match(r"what (colour|shape|size) is the (.*)\?", question)
    if match:
        attribute, phrase = match.groups()
        objects = objects_called(phrase, scene)
        return getattr(objects[0], attribute) if len(objects) == 1 else None

    match = re.match(r"is the (.*) (left of|right of|above|below) the (.*)\?", question)
    if match:
        one, word, other = match.groups()
        if len(objects_called(one, scene)) != 1 or len(objects_called(other, scene)) != 1:
            return None
        x, y = objects_called(one, scene)[0].centre
        other_x, other_y = objects_called(other, scene)[0].centre
        is_true = {"left of": x < other_x, "right of": x > other_x,
                   "above": y < other_y, "below": y > other_y}
        return "yes" if is_true[word] else "no"

    raise ValueError(f"answer() does not know the question {question!r}; teach it this kind")


def test_questions_have_true_and_unique_answers():
    answers = Counter()
    kinds = Counter()
    for index in range(300):
        scene = Scene.random(23, index)
        pairs = scene.questions()

        assert len(dict(pairs)) == len(pairs)
        assert pairs == Scene.random(23, index).questions()
        for question, given_answer in pairs:
            assert given_answer == answer(question, scene), (question, scene.caption())
            answers[given_answer] += 1
            kinds[" ".join(question.split()[:2])] += 1
    assert answers["yes"] == answers["no"] > 500
    assert set(kinds) == {
        "how many", "is there", "is the", "what colour", "what shape", "what size",
    }


def test_questions_word_for_word():
    questions = dict(Scene([CIRCLE, STAR]).questions())
    expected = {
        "how many objects are there?": "two",
        "what colour is the star?": "blue",
        "what shape is the red object?": "circle",
        "what size is the star?": "small",
        "is the circle left of the star?": "yes",
        "is the star left of the circle?": "no",
    }
    assert expected.items() <= questions.items()


# ---------------------------------------------------------------- errors
def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("call, message", [
    (lambda: Scene.random(0, 0).render(8), "size 8 .* at least 16.*try 64"),
    (lambda: Scene.random(0, 0).render(64.0), "size 64.0 must be an integer"),
    (lambda: Scene.random(0, 0, objects=5), "objects=5 must be 1 to 4"),
    (lambda: Scene.random(0, 0, objects=()), r"objects=\(\) must be 1 to 4"),
    (lambda: Scene.random(0, 0, label=36), "label=36 must be a class id"),
    (lambda: Object("hexagon", "red"), "shape 'hexagon' is unknown; use one of circle"),
    (lambda: Object("circle", "mauve"), "colour 'mauve' is unknown; use one of red"),
    (lambda: Object("circle", "red", "tiny"), "size 'tiny' is unknown; use one of small"),
    (lambda: Object("circle", "red", rgb=(300, 0, 0)), "rgb .* three values in 0..255"),
    (lambda: Scene([], zeros(2, 3)), r"background \(2, 3\) must be \(2, 2, 3\)"),
    (lambda: read_scene(zeros(3, 64, 64)), r"image of shape \(3, 64, 64\) must be .*permute"),
    (lambda: read_scene(zeros(8, 8, 3)), "n >= 32"),
    (lambda: read_scene(np.full((64, 64, 3), 200.0)), "to 200.0 must be .*try .clip"),
    (lambda: read_scene(np.full((64, 64, 3), np.nan)), "to nan must be"),
    (lambda: read_scene(zeros(64, 64, 3, dtype=np.int64)), "int64 .* must be uint8"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
