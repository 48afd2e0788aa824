"""The built-in world: pictures, words and verifier agree, and the verifier is unsure where it must be.

Run: python -m pytest tests/test_shapes.py
"""
import io
import re
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from shapes import CLASSES, COLOURS, SHAPES, Object, Scene, read_scene

WORDS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}


def inventory(objects):
    return sorted((o.shape, o.colour) for o in objects)


def share_right(scenes, change=lambda image: image, size=64):
    """Share of scenes whose shapes, colours and count are read right, and wrong, once changed."""
    right = wrong = 0
    for scene in scenes:
        found = read_scene(change(scene.render(size)))
        if found is not None:
            right += inventory(found) == inventory(scene.objects)
            wrong += inventory(found) != inventory(scene.objects)
    return right / len(scenes), wrong / len(scenes)


def test_a_scene_is_a_function_of_seed_and_index():
    a, b = Scene.random(3, 7), Scene.random(3, 7)
    assert a == b and hash(a) == hash(b) and np.array_equal(a.render(), b.render())
    assert a != Scene.random(3, 8) and a != Scene.random(4, 7)


def test_the_picture_is_the_same_at_every_resolution():
    for index in range(50):
        scene = Scene.random(1, index)
        small, large = scene.render(64).astype(float), scene.render(128).astype(float)
        halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        difference = np.abs(small - halved)        # up to 71 at sharp tips, 0.32 on average
        assert difference.mean() < 0.5 and difference.max() < 90 and (difference > 25).mean() < 0.005
    assert scene.render(37).shape == (37, 37, 3) and scene.render().dtype == np.uint8


def test_objects_neither_overlap_nor_touch_nor_leave_the_picture():
    for index in range(80):
        scene = Scene.random(2, index, (3, 4))
        plain = [Scene([o], np.full((2, 2, 3), 255)).render(256).min(2) < 250 for o in scene.objects]
        border = np.ones((256, 256), bool)
        border[1:-1, 1:-1] = False
        for i, mask in enumerate(plain):
            assert not (mask & border).any()
            wide = ndimage.distance_transform_edt(~mask) < 8               # 2 px at 64 px
            assert not any((wide & other).any() for other in plain[:i])


def test_classes_counts_and_sizes_are_balanced():
    scenes = [Scene.random(5, index) for index in range(3000)]
    counts = Counter(len(s.objects) for s in scenes)
    assert set(counts) == {1, 2, 3, 4} and max(counts.values()) < 1.2 * min(counts.values())
    labels = Counter(o.label for s in scenes for o in s.objects)
    assert len(labels) == 36 and max(labels.values()) < 1.5 * min(labels.values())
    repeats = sum(len(set(inventory(s.objects))) < len(s.objects) for s in scenes if len(s.objects) > 1)
    assert 0.25 < repeats / sum(len(s.objects) > 1 for s in scenes) < 0.5
    single = Counter(s.objects[0].size for s in scenes if len(s.objects) == 1)
    assert 0.8 < single["small"] / single["large"] < 1.25
    assert [Scene.random(0, k, 1, label=k).objects[0].label for k in range(36)] == list(range(36))
    assert [Scene.random(0, k, (2, 4), label=k).objects[0].name for k in range(36)] == CLASSES
    assert {len(Scene.random(0, k, (2, 4)).objects) for k in range(50)} == {2, 4}


def test_speed():
    rates = []
    for turn in range(20):                                           # till it is: others use the machine
        start = time.process_time()
        for index in range(500):
            Scene.random(turn, index).render(64)
        rates.append(500 / (time.process_time() - start))
        if rates[-1] > 1000:
            break
    print(f"{max(rates):.0f} images/s")
    assert max(rates) > 1000


def test_the_verifier_reads_fresh_renderings():
    single, wrong = share_right([Scene.random(11, k, 1) for k in range(600)])
    several, wrong_too = share_right([Scene.random(12, k, (2, 3, 4)) for k in range(600)])
    print(f"single {single:.4f}, several {several:.4f}")
    assert single >= 0.995 and several >= 0.98 and wrong == wrong_too == 0


@pytest.mark.parametrize("size", [48, 96, 128, 256])
def test_the_verifier_reads_at_other_resolutions(size):
    right, wrong = share_right([Scene.random(13, k) for k in range(60)], size=size)
    assert right >= 0.98 and wrong == 0


def noisy(image):
    noise = np.random.default_rng(int(image.sum())).normal(0, 0.02, image.shape)
    return (image / 255 + noise).clip(0, 1)


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def shrunk(image):
    small = Image.fromarray(image).resize((48, 48), Image.BILINEAR)
    return np.asarray(small.resize((64, 64), Image.BILINEAR))


def blurred(sigma):
    return lambda image: ndimage.gaussian_filter(image, (sigma, sigma, 0))


@pytest.mark.parametrize("change", [blurred(0.7), noisy, jpeg, shrunk], ids="blur noise jpeg shrink".split())
def test_the_verifier_stands_mild_damage(change):
    right, wrong = share_right([Scene.random(14, k, 1) for k in range(250)], change)
    print(f"{right:.3f}")
    assert right >= 0.97 and wrong == 0


def test_the_reading_redraws_the_picture():
    for index in range(50):
        scene = Scene.random(15, index)
        found = Scene(read_scene(scene.render()), scene.background)
        assert sorted(o.size for o in found.objects) == sorted(o.size for o in scene.objects)
        assert np.abs(found.render().astype(float) - scene.render()).mean() < 2
        for o in scene.objects:
            assert min(np.hypot(*np.subtract(o.centre, f.centre)) for f in found.objects) < 0.01


def test_the_verifier_is_unsure_of_mush():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(20)]
    clouds = [ndimage.gaussian_filter(rng.normal(0, 1, (64, 64, 3)), (4, 4, 0)) for _ in range(20)]
    clouds = [(0.5 + 0.25 * cloud / cloud.std()).clip(0, 1) for cloud in clouds]
    blank = [Scene([], Scene.random(16, k).background).render() for k in range(20)]
    blurry = [blurred(4)(Scene.random(16, k).render()) for k in range(60)]
    mixed = [Scene.random(16, k, 1).render() // 2 + Scene.random(17, k, 1).render() // 2 for k in range(60)]
    for images, most in ((noise, 0), (clouds, 0), (blank, 0), (blurry, 1), (mixed, 0)):
        assert sum(read_scene(image) is not None for image in images) <= most
    assert read_scene(np.zeros((64, 64, 3), np.uint8)) is None and read_scene(np.ones((32, 32, 3))) is None


def test_the_verifier_is_unsure_of_half_melted_objects():
    """Two shapes of one colour blended or spliced in one place, and one shape in two colours; large ones."""
    read, total = 0, 0
    for i, one in enumerate(SHAPES):
        for other in SHAPES[:i]:
            if {one, other} == {"circle", "square"}:                       # their blend is a rounded square
                continue
            a, b = (Scene([Object(s, "blue", rotation=0.3)]).render() for s in (one, other))
            spliced = np.concatenate([a[:, :32], b[:, 32:]], 1)
            for image in (a // 2 + b // 2, spliced):
                read, total = read + (read_scene(image) is not None), total + 1
        a, b = (Scene([Object(one, colour)]).render() for colour in ("red", "green"))
        for image in (a // 2 + b // 2, np.concatenate([a[:, :32], b[:, 32:]], 1)):
            assert read_scene(image) is None
    print(f"{read} of {total} read")
    assert read <= 0.05 * total


def test_the_verifier_is_unsure_of_foreign_shapes():
    y, x = (np.mgrid[:64, :64] - 32) / 32
    disc, half = np.hypot(x, y) < 0.4, x > 0
    bar, crescent = (np.abs(x) < 0.5) & (np.abs(y) < 0.15), disc & (np.hypot(x - 0.2, y) > 0.35)
    dot, huge = np.hypot(x, y) < 0.15, np.hypot(x, y) < 0.6
    for mask in (disc & half, bar, crescent, dot, huge):
        image = np.full((64, 64, 3), 210, np.uint8)
        image[mask] = (222, 38, 42)
        assert read_scene(image) is None
    image = np.full((64, 64, 3), 210, np.uint8)
    image[disc] = (120, 70, 20)                                            # brown
    assert read_scene(image) is None


def test_colours_are_read_whatever_the_shape_but_not_from_mush():
    for k in range(100):
        scene = Scene.random(18, k)
        assert sorted(read_scene(scene.render(), colours=True)) == sorted(o.colour for o in scene.objects)
    y, x = np.mgrid[:64, :64] - 32.0
    image = np.full((64, 64, 3), 210, np.uint8)
    image[(np.hypot(x, y) < 12) & (np.hypot(x - 8, y) > 9)] = (222, 38, 42)       # a fat crescent
    assert read_scene(image) is None and read_scene(image, colours=True) == ["red"]
    rng = np.random.default_rng(0)
    brown, speck, huge, two = (np.full((64, 64, 3), 210, np.uint8) for _ in range(4))
    brown[np.hypot(x, y) < 12], speck[np.hypot(x, y) < 4] = (120, 70, 20), (222, 38, 42)
    huge[np.hypot(x, y) < 20], two[np.hypot(x, y) < 12] = (222, 38, 42), (222, 38, 42)
    two[(np.hypot(x, y) < 12) & (x > 0)] = (38, 160, 62)
    noise, blank = rng.integers(0, 256, (64, 64, 3), np.uint8), np.full((64, 64, 3), 210, np.uint8)
    for mush in (noise, blank, brown, speck, huge, two):
        assert read_scene(mush, colours=True) is None


def holds(text, scene):
    """Whether a caption is true and complete, by a small grammar: [number objects:] list, or a relation."""
    text = re.sub(r"^(a picture of|\w+ objects:) ", "", text)
    related = re.match(r"a (\w+ \w+) (left of|right of|above|below) a (\w+ \w+)(?:, and (.*))?$", text)
    names = Counter(o.name for o in scene.objects)
    if related:
        one, word, other, text = related.groups()
        key, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[word]
        at = {name: [o.centre[key] for o in scene.objects if o.name == name] for name in (one, other)}
        if not any(sign * (a - b) > 0.05 for a in at[one] for b in at[other]):
            return False
        names -= Counter([one, other])
    told = Counter()
    for item in re.split(r", | and ", text) if text else []:
        number, *size, colour, shape = item.split()
        count = WORDS[number]
        shape = shape if count == 1 else shape[:-2] if shape == "crosses" else shape[:-1]
        told[f"{colour} {shape}"] += count
        if size:
            same = [o for o in scene.objects if (o.size, o.name) == (size[0], f"{colour} {shape}")]
            if len(same) != count:
                return False
    return told == names


def test_captions_are_true_and_complete():
    seen, asked = Counter(), ("two", "left of", "above", "crosses", "small")
    for index in range(300):
        scene, other = Scene.random(21, index), Scene.random(22, index)
        captions = scene.captions()
        assert captions[0] == scene.caption() and len(captions) == len(set(captions))
        assert all(holds(caption, scene) for caption in captions)
        if inventory(scene.objects) != inventory(other.objects):
            assert not any(holds(caption, other) for caption in captions)
        seen.update(word for caption in captions for word in asked if word in caption)
    assert min(seen[word] for word in asked) > 20


def test_captions_word_for_word():
    circle, star = Object("circle", "red", centre=(0.2, 0.5)), Object("star", "blue", "small", (0.8, 0.5))
    assert Scene([circle]).captions() == ["a red circle", "a picture of a red circle", "a large red circle"]
    scene = Scene([circle, star])
    assert scene.caption() == "a red circle and a blue star"
    assert scene.relations() == [(0, "left of", 1), (1, "right of", 0)]
    assert {"a red circle left of a blue star", "a blue star right of a red circle",
            "a blue star and a red circle",
            "two objects: a red circle and a blue star"} < set(scene.captions())
    cross = Object("cross", "green", centre=(0.5, 0.2))
    assert Scene([cross, circle, cross]).caption() == "two green crosses and a red circle"
    assert Scene([cross, circle, star]).caption() == "a green cross, a red circle and a blue star"
    assert Scene([]).caption() == "nothing"
    diagonal = [Object("circle", "red", centre=(0.2, 0.2)), Object("star", "red", centre=(0.8, 0.8))]
    assert Scene(diagonal).relations() == []
    questions = dict(scene.questions())
    expected = {"how many objects are there?": "two", "what colour is the star?": "blue",
                "what shape is the red object?": "circle", "what size is the star?": "small",
                "is the circle left of the star?": "yes", "is the star left of the circle?": "no"}
    assert expected.items() <= questions.items()


def answer(question, scene):
    """The answer from the objects alone; None if the question doesn't have exactly one."""
    def matching(phrase):
        words = set(phrase.replace("crosses", "cross").split())
        words |= {word[:-1] for word in words if word[:-1] in SHAPES}
        colours, shapes = words & set(COLOURS) or COLOURS, words & set(SHAPES) or SHAPES
        return [o for o in scene.objects if o.colour in colours and o.shape in shapes]
    if found := re.match(r"how many (.*) are there\?", question):
        return {n: word for word, n in WORDS.items() if word != "a"}.get(len(matching(found[1])))
    if found := re.match(r"is there a (.*)\?", question):
        return "yes" if matching(found[1]) else "no"
    if found := re.match(r"what (colour|shape|size) is the (.*)\?", question):
        return getattr(matching(found[2])[0], found[1]) if len(matching(found[2])) == 1 else None
    one, word, other = re.match(r"is the (.*) (left of|right of|above|below) the (.*)\?", question).groups()
    a, b = matching(one), matching(other)
    if len(a) != 1 or len(b) != 1:
        return None
    dx, dy = b[0].centre[0] - a[0].centre[0], b[0].centre[1] - a[0].centre[1]
    return "yes" if {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[word] > 0 else "no"


def test_questions_have_true_and_unique_answers():
    answers, kinds = Counter(), Counter()
    for index in range(300):
        scene = Scene.random(23, index)
        questions = scene.questions()
        assert len(dict(questions)) == len(questions) and questions == Scene.random(23, index).questions()
        for question, told in questions:
            assert told == answer(question, scene), (question, told, scene.caption())
            answers[told] += 1
            kinds[" ".join(question.split()[:2])] += 1
    assert answers["yes"] == answers["no"] > 500
    assert set(kinds) == {"how many", "is there", "is the", "what colour", "what shape", "what size"}


@pytest.mark.parametrize("call, words", [
    (lambda: Scene.random(0, 0).render(8), "size 8 .* at least 16.*try 64"),
    (lambda: Scene.random(0, 0).render(64.0), "size 64.0 must be an integer"),
    (lambda: Scene.random(0, 0, objects=5), "objects=5 must be 1 to 4"),
    (lambda: Scene.random(0, 0, objects=()), r"objects=\(\) must be 1 to 4"),
    (lambda: Scene.random(0, 0, label=36), "label=36 must be a class id"),
    (lambda: Object("hexagon", "red"), "shape 'hexagon' is unknown; use one of circle"),
    (lambda: Object("circle", "mauve"), "colour 'mauve' is unknown; use one of red"),
    (lambda: Object("circle", "red", "tiny"), "size 'tiny' is unknown; use one of small"),
    (lambda: Object("circle", "red", rgb=(300, 0, 0)), "rgb .* three values in 0..255"),
    (lambda: Scene([], np.zeros((2, 3))), r"background \(2, 3\) must be \(2, 2, 3\)"),
    (lambda: read_scene(np.zeros((3, 64, 64), np.uint8)), r"image of shape \(3, 64, 64\) must be .*permute"),
    (lambda: read_scene(np.zeros((8, 8, 3), np.uint8)), "n >= 32"),
    (lambda: read_scene(np.full((64, 64, 3), 200.0)), "to 200.0 must be .*try .clip"),
    (lambda: read_scene(np.full((64, 64, 3), np.nan)), "to nan must be"),
    (lambda: read_scene(np.zeros((64, 64, 3), np.int64)), "int64 .* must be uint8")])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()
