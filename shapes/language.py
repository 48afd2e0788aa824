"""What is said of scenes: captions, questions, conversations, and the prompts of ShapesEval.

A conversation is a list of pairs (role, text) with the roles "user" and "assistant". "<image>"
stands for the picture: the user shows it to the model, the assistant draws it.
`rng` is always a NumPy generator; one in the same state gives the same words.
"""
import re
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

from shapes.scene import CLASSES, COLOURS, SHAPES, SIZES, Object, Scene

NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve", "many",
)
POSITIONS = ("left of", "right of", "above", "below")        # the words of Scene.relations
BOARD_COLUMNS = "abcdefghij"                                 # plans name places as on a chess board

# Ways to ask for a picture, which may hold any caption.
REQUESTS = (
    "draw {}",
    "generate an image of {}",
    "can you generate a photo of {}?",
    "please show me {}",
    "an image of {}",
    "i would like {}",
    "{} on a grey background",
    "there is {}",
)
# Other words for the same: regular expressions and their replacements. Each applies to one prompt
# in eight, so most prompts keep most of their words.
REWORDINGS = (
    ("(left|right) of", r"to the \1 of"),
    ("below", "under"),
    (r"\ba ", "one "),
    (r"\ba ", ""),
    ("two", "2"),
    ("three", "3"),
    (" and ", " with "),
    (f"({'|'.join(COLOURS)}) (\\w+)", r"\2 in \1"),
)
REWORDING_PROBABILITY = 1 / 8

ALIGN_QUESTION = "Does this image align with the prompt: {}?"        # Source: Scale-RAE
DESCRIBE_QUESTION = "Describe this image."                           # Source: Scale-RAE
WHERE_QUESTION = "Where is everything?"


def choose(options, rng):
    """Return one of the options; all are equally likely."""
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------- captions
def number_word(n):
    """Return "no", "one", "two" ... "twelve"; "many" beyond."""
    return NUMBERS[min(n, len(NUMBERS) - 1)]


def plural(noun):
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"         # crosses, stars


def counted(noun, n):
    """Return "a red star" for one, "three red stars" for several."""
    if n == 1:
        return f"a {noun}"
    return f"{number_word(n)} {plural(noun)}"


def listing(names):
    """Return names counted and joined: "two red circles, a blue star and a green cross"."""
    if not names:
        return "nothing"
    different_names = dict.fromkeys(names)                           # each once, in their order
    *others, last = [counted(name, names.count(name)) for name in different_names]
    if not others:
        return last
    return f"{', '.join(others)} and {last}"


def caption(scene):
    """Return the plain caption, such as "two red circles and a blue star"."""
    return listing([obj.name for obj in scene.objects])


def captions(scene):
    """Return a list of different true captions that name every object, the plain one first.

    The others add sizes, the number of objects or a relation, or change the order of the objects.
    """
    names = [obj.name for obj in scene.objects]
    names_with_sizes = [f"{obj.size} {obj.name}" for obj in scene.objects]
    plain = caption(scene)
    texts = [plain, f"a picture of {plain}", listing(names_with_sizes)]
    if len(names) > 1:
        texts.append(listing(names[::-1]))
        texts.append(f"{counted('object', len(names))}: {plain}")
    for i, word, j in scene.relations():
        if names[i] != names[j]:
            texts.append(relation_caption(names, i, word, j))
    return list(dict.fromkeys(texts))                                # without duplicates


def relation_caption(names, i, word, j):
    """Return such as "a red star left of a blue ring, and a green cross"."""
    text = f"a {names[i]} {word} a {names[j]}"
    others = [name for k, name in enumerate(names) if k not in (i, j)]
    if others:
        text += f", and {listing(others)}"
    return text


# ---------------------------------------------------------------- questions
# Each function takes a scene and returns its questions of one kind: a list of pairs
# (question, answer). To ask something new, write such a function and add it to QUESTION_KINDS,
# below: training and evaluation ask whatever is there. Leave out a question that has no answer in
# this scene, or several, and keep answers to a few words. In training, questions that begin with
# the same two words are asked as often as those that begin with two others. tests/test_shapes.py
# answers all questions in a second way: its answer() and its set of kinds must learn the new kind.
def counting_questions(scene):
    """How many objects are there: in all, of each class, of each shape, of each colour?"""
    things = ["object" for _ in scene.objects]
    things += [obj.name for obj in scene.objects]
    things += [obj.shape for obj in scene.objects]
    things += [f"{obj.colour} object" for obj in scene.objects]
    pairs = []
    for thing in dict.fromkeys(things):                              # each once, in their order
        pairs.append((f"how many {plural(thing)} are there?", number_word(things.count(thing))))
    return pairs


def presence_questions(scene):
    """Is there a ...? For each class in the scene, and for as many that are missing.

    Each missing class shares its colour or its shape with an object. So to know which colours and
    which shapes the scene has is not enough: one must know which colour belongs to which shape.
    """
    names = [obj.name for obj in scene.objects]
    colours = [obj.colour for obj in scene.objects]
    shapes = [obj.shape for obj in scene.objects]
    similar_names = []
    for name in CLASSES:
        colour, shape = name.split()
        if name not in names and (colour in colours or shape in shapes):
            similar_names.append(name)

    # Seeded by the places of the objects: the questions are a function of the scene alone.
    seed = [int(1e6 * abs(value)) for obj in scene.objects for value in obj.centre]
    similar_names = np.random.default_rng(seed).permutation(similar_names).tolist()
    present = list(dict.fromkeys(names))
    missing = similar_names[:len(present)]
    pairs = [(f"is there a {name}?", "yes") for name in present]
    pairs += [(f"is there a {name}?", "no") for name in missing]
    return pairs


def attribute_questions(scene):
    """What colour or size is the star? What shape is the red object? If there is only one."""
    colours = [obj.colour for obj in scene.objects]
    shapes = [obj.shape for obj in scene.objects]
    pairs = []
    for obj in scene.objects:
        if shapes.count(obj.shape) == 1:
            pairs.append((f"what colour is the {obj.shape}?", obj.colour))
            pairs.append((f"what size is the {obj.shape}?", obj.size))
        if colours.count(obj.colour) == 1:
            pairs.append((f"what shape is the {obj.colour} object?", obj.shape))
    return pairs


def position_questions(scene):
    """Is the star left of the ring? Each question is asked both ways, to balance yes and no."""
    names = [obj.name for obj in scene.objects]
    pairs = []
    for i, word, j in scene.relations():
        if names.count(names[i]) == 1 and names.count(names[j]) == 1:
            a = short_name(scene, i)
            b = short_name(scene, j)
            pairs.append((f"is the {a} {word} the {b}?", "yes"))
            pairs.append((f"is the {b} {word} the {a}?", "no"))
    return pairs


def short_name(scene, i):
    """Return the shape of object i if no other object has it, else the name of its class."""
    obj = scene.objects[i]
    shapes = [other.shape for other in scene.objects]
    return obj.shape if shapes.count(obj.shape) == 1 else obj.name


QUESTION_KINDS = (
    counting_questions,
    presence_questions,
    attribute_questions,
    position_questions,
)


def questions(scene):
    """Return a list of pairs (question, answer); each question has exactly one true answer."""
    pairs = []
    for questions_of_kind in QUESTION_KINDS:
        pairs += questions_of_kind(scene)
    return pairs


def group_questions(pairs):
    """Return a list of lists: the pairs whose questions begin with the same two words.

    pairs: list of (question, answer)
    """
    groups = {}
    for question, answer in pairs:
        beginning = " ".join(question.split()[:2])                   # "how many", "what colour"
        groups.setdefault(beginning, []).append((question, answer))
    return list(groups.values())


# ---------------------------------------------------------------- plans: what is where
def cell(obj):
    """Return where an object is on a board: columns a to j from the left, rows 0 to 9 down."""
    column = BOARD_COLUMNS[int(10 * obj.centre[0])]
    row = int(10 * obj.centre[1])
    return f"{column}{row}"


def layout(objects, thing=None):
    """Return where objects are: "small red star c7, large blue ring h2".

    thing: "star", "red star" or "red object": only the cells of these objects, "c7"; None: all
    """
    if thing is None:
        places = [f"{obj.size} {obj.name} {cell(obj)}" for obj in objects]
    else:
        places = [cell(obj) for obj in objects if is_called(obj, thing)]
    if not places:
        return "nowhere"
    return ", ".join(places)


def is_called(obj, thing):
    return thing in (obj.name, obj.shape, f"{obj.colour} object")


# ---------------------------------------------------------------- other words for a prompt
def reword(text, rng):
    """Return a caption in other words; every second one is put as a request."""
    for pattern, replacement in REWORDINGS:
        if rng.random() < REWORDING_PROBABILITY:
            text = re.sub(pattern, replacement, text)
    # A random word beside the prompt teaches the model to pass over words that it does not know.
    if rng.random() < REWORDING_PROBABILITY:
        word = random_word(rng)
        text = f"{word} {text}" if rng.random() < 1 / 2 else f"{text} {word}"
    if rng.random() < 1 / 2:
        text = choose(REQUESTS, rng).format(text)
    return text


def random_word(rng):
    """Return 2 to 7 random lower-case letters."""
    length = rng.integers(2, 8)
    codes = rng.integers(ord("a"), ord("z") + 1, length)
    return "".join(chr(code) for code in codes)


# ---------------------------------------------------------------- scenes that differ a little
MIRROR, SWAP_COLOURS, REPLACE, REMOVE = range(4)


def altered(scene, rng):
    """Return a scene that differs in one respect: its captions are almost right for this one.

    MIRROR: all places are mirrored, which reverses each relation.
    SWAP_COLOURS: two objects swap their colours.
    REPLACE: one object gets either another colour or another shape.
    REMOVE: one object is missing; a single object is replaced instead.
    A mirror or a swap that would change no caption becomes REMOVE, too.
    """
    objects = list(scene.objects)
    alteration = rng.integers(4)
    if alteration == MIRROR and has_unique_names(objects):
        return Scene([mirrored(obj) for obj in objects])
    if alteration == SWAP_COLOURS and len(objects) > 1:
        a, b, *others = [objects[i] for i in rng.permutation(len(objects))]
        if a.shape != b.shape and a.colour != b.colour:
            return Scene([recoloured(a, b.colour), recoloured(b, a.colour), *others])
    removed = objects.pop(rng.integers(len(objects)))
    if alteration == REPLACE or not objects:
        objects.append(replacement(removed, rng))
    return Scene(objects)


def has_unique_names(objects):
    """Return whether there are several objects and no two of one class."""
    names = {obj.name for obj in objects}
    return len(objects) > 1 and len(names) == len(objects)


def mirrored(obj):
    x, y = obj.centre
    return Object(obj.shape, obj.colour, obj.size, (1 - x, 1 - y))


def recoloured(obj, colour):
    return Object(obj.shape, colour, obj.size, obj.centre)


def replacement(obj, rng):
    """Return an object in the same place with either another colour or another shape."""
    similar_names = []
    for name in CLASSES:
        colour, shape = name.split()
        same_colour = colour == obj.colour
        same_shape = shape == obj.shape
        if same_colour != same_shape:                                # one of the two, not both
            similar_names.append(name)
    colour, shape = choose(similar_names, rng).split()
    return Object(shape, colour, obj.size, obj.centre)


# ---------------------------------------------------------------- conversations
def converse(scene, rng, questions, plan=True):
    """Return a conversation about a scene, for stage 3 to learn from.

    scene: Scene
    questions: probability of three questions about the picture instead of a prompt to draw it
    plan: whether the assistant says what is where before it draws
    Returns a list of pairs (role, text).
    """
    # data.py seeds its generator as Scene.random does: its numbers have drawn this very scene.
    # Those of a child generator are independent of what the scene shows.
    rng = rng.spawn(1)[0]
    if rng.random() >= questions:
        return drawing_conversation(scene, rng, plan)
    return question_conversation(scene, rng)


def drawing_conversation(scene, rng, plan):
    """Return two turns: a prompt, then the plan and the image."""
    shapes = [obj.shape for obj in scene.objects]
    texts = [*scene.captions(), listing(shapes)]
    # Relations are the hardest to learn: 40% of the prompts are surely about one, if there is any.
    texts_with_relation = [text for text in texts if has_relation(text)]
    if texts_with_relation and rng.random() < 0.4:
        texts = texts_with_relation
    text = choose(texts, rng)

    # The plan follows the order of the prompt, so each object is found where it was asked for.
    answer = "<image>"
    if plan:
        objects = sorted(scene.objects, key=lambda obj: first_mention(obj, text))
        answer = layout(objects) + answer
    return [("user", reword(text, rng)), ("assistant", answer)]


def has_relation(text):
    return any(f" {word} " in text for word in POSITIONS)


def first_mention(obj, text):
    """Return where a caption first names an object: the number of letters before it."""
    names = (f"{obj.size} {obj.name}", obj.name, obj.shape)          # the longest that is there
    mentioned = [name for name in names if name in text]
    return text.find(mentioned[0])


def question_conversation(scene, rng):
    """Return six turns: three questions about the picture in random order, each with its answer.

    One is of scene.questions(), and one asks whether the picture aligns with a prompt. The third
    is another of scene.questions() (20%), or it asks for a description (20%), where everything is
    (20%) or where one thing is (40%).
    """
    # A wrong prompt never names a held-out combination: that would teach that it is always wrong.
    texts = scene.captions()
    other = altered(scene, rng)
    wrong_texts = []
    if not other.held_out():
        wrong_texts = [text for text in other.captions() if text not in texts]
    text = choose(texts, rng)
    align = align_question(text, wrong_texts, rng)

    objects = sorted(scene.objects, key=lambda obj: obj.centre[::-1])        # topmost first
    where = where_question(objects, rng)
    # First the group (questions that begin alike), then the question: groups differ in size.
    groups = group_questions(scene.questions())
    first_group, second_group = rng.integers(len(groups), size=2)
    first = choose(groups[first_group], rng)
    second = choose(groups[second_group], rng)
    describe = (DESCRIBE_QUESTION, text)
    where_all = (WHERE_QUESTION, layout(objects))
    third = choose([second, describe, where_all, where, where], rng)
    return ask_in_random_order([first, align, third], rng)


def align_question(text, wrong_texts, rng):
    """Return (question, answer): does the image align with a prompt?

    The prompt is the true text, or every second time, if there are any, one of the wrong texts.
    """
    prompt = reword(text, rng)
    answer = "yes"
    if wrong_texts and rng.random() < 1 / 2:
        prompt = reword(choose(wrong_texts, rng), rng)
        answer = "no"
    return ALIGN_QUESTION.format(prompt), answer


def where_question(objects, rng):
    """Return (question, answer): where is one of the objects, or at times, any class?"""
    names = [obj.name for obj in objects]
    any_name = choose(CLASSES, rng)                                  # mostly it is nowhere
    name = choose([any_name, *names, *names], rng)
    colour, shape = name.split()
    # Twice the shape: shapes are harder to learn than colours.
    thing = choose([name, f"{colour} object", shape, shape], rng)
    return f"where is the {thing}?", layout(objects, thing)


def ask_in_random_order(pairs, rng):
    """Return a conversation about one picture: the turns of each question and its answer.

    pairs: list of (question, answer)
    """
    turns = []
    for i in rng.permutation(len(pairs)):
        question, answer = pairs[i]
        if not turns:
            question = f"<image>\n{question}"                        # only the first one
        turns.append(("user", question))
        turns.append(("assistant", answer))
    return turns


# ---------------------------------------------------------------- ShapesEval
# GenEval (arXiv 2310.11513) for the built-in world: six categories of prompts; the reader judges
# what is drawn. Pairs of classes and counts of one class are those that training never shows.
PROMPTS_PER_CATEGORY = 50
TEMPLATES = (
    "{}",
    "a picture of {}",
    "draw {}",
    "an image of {}",
    "there is {}",
    "please show me {}",
    "generate an image of {}",
    "i would like {}",
    "can you generate a photo of {}?",
)


class Test(NamedTuple):
    """A prompt and what its image must show."""
    category: str
    prompt: str
    names: list              # of all objects: classes such as "red star", or shapes
    relation: tuple = None   # (name, word, name), with a word of POSITIONS


def single_object_tests():
    """A shape, in any colour."""
    return [Test("single object", f"a {shape}", [shape]) for shape in SHAPES]


def two_objects_tests():
    """Two different shapes, in any colours."""
    return [Test("two objects", f"a {a} and a {b}", [a, b]) for a, b in permutations(SHAPES, 2)]


def counting_tests():
    """Two to four objects of one class, in a number in which training never shows it."""
    tests = []
    for name in CLASSES:
        for count in (2, 3, 4):
            names = [name for _ in range(count)]
            if scene_of(names).held_out():
                tests.append(Test("counting", listing(names), names))
    return tests


def colours_tests():
    """A shape in a colour."""
    return [Test("colours", f"a {name}", [name]) for name in CLASSES]


def position_tests():
    """Two classes that training never shows together, in each relation."""
    tests = []
    for a, b in held_out_pairs():
        for word in POSITIONS:
            tests.append(Test("position", f"a {a} {word} a {b}", [a, b], (a, word, b)))
    return tests


def colour_attribution_tests():
    """Two such classes that differ in colour and in shape, so that colours can be mixed up."""
    tests = []
    for a, b in held_out_pairs():
        if not set(a.split()) & set(b.split()):
            tests.append(Test("colour attribution", f"a {a} and a {b}", [a, b]))
    return tests


CATEGORIES = (
    single_object_tests,
    two_objects_tests,
    counting_tests,
    colours_tests,
    position_tests,
    colour_attribution_tests,
)


def scene_of(names):
    """Return a scene of objects of these classes, all in one place."""
    objects = []
    for name in names:
        colour, shape = name.split()
        objects.append(Object(shape, colour))
    return Scene(objects)


def held_out_pairs():
    """Return the pairs of classes that training never shows together, in both orders."""
    return [(a, b) for a, b in permutations(CLASSES, 2) if scene_of([a, b]).held_out()]


def fill_templates(tests):
    """Return 50 tests: all in random order with the first template, then with the second ..."""
    order = np.random.default_rng(0).permutation(len(tests))         # the same for ever
    filled = []
    for template in TEMPLATES:
        for i in order:
            filled.append(tests[i]._replace(prompt=template.format(tests[i].prompt)))
    return filled[:PROMPTS_PER_CATEGORY]


def shapes_eval_prompts():
    """Return the 300 tests of ShapesEval, one of each category in turn: a list of Test."""
    categories = [fill_templates(tests_of_category()) for tests_of_category in CATEGORIES]
    tests = []
    for one_of_each in zip(*categories, strict=True):
        tests += one_of_each
    return tests


def fulfils(objects, names, relation):
    """Return whether an image shows exactly the objects of a test, and in its relation.

    objects: what read_scene returns; None, an image that it cannot read, fulfils nothing
    names, relation: those of the Test
    """
    if objects is None:
        return False
    asks_for_colours = " " in names[0]                               # "red star" or "star"
    shown_names = [obj.name if asks_for_colours else obj.shape for obj in objects]
    if sorted(shown_names) != sorted(names):
        return False
    if relation is None:
        return True
    name, word, other_name = relation
    for i, shown_word, j in Scene(objects).relations():
        if (shown_names[i], shown_word, shown_names[j]) == (name, word, other_name):
            return True
    return False


# ---------------------------------------------------------------- words that no scene can show
def words_of(texts):
    """Return the words in texts in lower case, and other letters and signs beyond ASCII, each once.

    Single letters are left out: "a", and the columns of a plan's board.
    """
    words = re.findall(r"[^\W\d_]+|[^\x00-\x7f]", " ".join(texts).lower())
    return [word for word in dict.fromkeys(words) if not re.fullmatch("[a-z]", word)]


@cache
def vocabulary():
    """Return two sets of words: of a request for a picture, and of what the picture shows."""
    replacements = [replacement for _, replacement in REWORDINGS]
    nouns = ["object", *SHAPES]
    things = [*nouns, *map(plural, nouns), *COLOURS, *SIZES, *NUMBERS, *POSITIONS]
    things += [test.prompt for test in shapes_eval_prompts()]
    return set(words_of([*REQUESTS, *TEMPLATES, *replacements])), set(words_of(things))


def unknown_words(prompt):
    """Return what a prompt asks for that is not of this world, if that is half of it or more.

    "draw a red otter on a grey background" asks for red, which is known, and for otter: ["otter"].
    Words of the request itself do not count.
    """
    request_words, known_words = vocabulary()
    asked_for = [word for word in words_of([prompt]) if word not in request_words]
    unknown = [word for word in asked_for if word not in known_words]
    if 2 * len(unknown) < len(asked_for):
        return []
    return unknown
