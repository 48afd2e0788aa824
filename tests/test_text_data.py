"""Captions and conversations of open_data. Run: python -m pytest tests/test_text_data.py"""
import json
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest

import test_data
from data import batches, open_data
from shapes import Scene, converse
from test_data import (
    colour_of_number,
    equal_batches,
    number_of_image,
    numbers_of_images,
    plain_image,
    write_images,
    write_tar,
)

time_limit = test_data.time_limit                 # here, too, a test that hangs fails

ASK = {"from": "human", "value": "what is it?"}
TELL = {"from": "gpt", "value": "a cat"}
SHOW = {"from": "gpt", "value": "here:\n<image>"}


def request_scene(scene, rng):
    """A conversation about a scene, random and in the scene's own words."""
    captions = scene.captions()
    return [("user", captions[rng.integers(len(captions))]), ("assistant", "<image>")]


def open_conversations(specs, size=8, **options):
    return open_data(specs, size, **{"chat": request_scene, **options})


def assert_refused(message, specs, **options):
    with pytest.raises(ValueError, match=message):
        open_conversations(specs, **options)


def texts_of(data, indices):
    return [data[k]["text"] for k in indices]


def request(caption):
    """The conversation that a caption stands for."""
    return [("user", caption), ("assistant", "<image>")]


def write_folder(path, sidecars, n=None):
    """Write images 0.png, 1.png, ... and what is beside them: {"3.txt": content, ...}."""
    path.mkdir(parents=True, exist_ok=True)
    if n is None:
        n = 1 + max(int(name.split(".")[0]) for name in sidecars)
    for i in range(n):
        (path / f"{i}.png").write_bytes(plain_image(colour_of_number(i), (8, 8)))
    for name, content in sidecars.items():
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        (path / name).write_bytes(content)
    return str(path)


def write_jsonl(path, records):
    """Write a .jsonl of records, or of lines that are given as str."""
    lines = []
    for record in records:
        if isinstance(record, str):
            lines.append(record)
        else:
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def conversation_of(tmp_path, record):
    """The conversation of one image with this record: the same of .json, of a tar, of a .jsonl."""
    folder = write_folder(tmp_path / "one", {"0.json": record})
    files = {"0.png": plain_image(), "0.json": json.dumps(record).encode()}
    shard = write_tar(tmp_path / "one.tar", files)
    lines = write_jsonl(tmp_path / "one.jsonl", [{"image": "one/0.png", **record}])
    of_folder, of_tar, of_jsonl = (open_conversations(path)[0]["text"]
                                   for path in (folder, shard, lines))
    assert of_folder == of_tar == of_jsonl
    return of_folder


@pytest.fixture
def none_held_out(monkeypatch):
    """No scene is held out, so that image k shows scene k."""
    monkeypatch.setattr(Scene, "held_out", lambda self: False)


# ---------------------------------------------------------------- captions
def test_a_caption_becomes_a_request(tmp_path):
    sidecars = {"0.txt": "a cat\n", "1.json": {"caption": "a dog"}, "2.json": {"text": " a bee "},
                "3.json": {"captions": ["an ant"]}}
    data = open_conversations(write_folder(tmp_path, sidecars))
    items = [data[k] for k in range(4)]
    texts = {number_of_image(item["image"]): item["text"] for item in items}
    assert texts == {0: request("a cat"), 1: request("a dog"), 2: request("a bee"),
                     3: request("an ant")}
    assert data.class_names == ["image"] and data.num_classes == 1 and not data.labelled


@pytest.mark.parametrize("name, content", [
    ("0.txt", "one\n\n  two\r\nthree"), ("0.json", {"captions": ["one", "two", "three"]})])
def test_each_of_several_captions_is_drawn_as_often(name, content, tmp_path):
    folder = write_folder(tmp_path, {name: content})
    data = open_conversations(folder)
    counts = Counter(text[0][1] for text in texts_of(data, range(300)))
    assert counts.keys() == {"one", "two", "three"} and min(counts.values()) > 70

    other_seed = open_conversations(folder, seed=1)
    first = texts_of(data, range(50))
    assert first == texts_of(data, range(50))
    assert first != texts_of(other_seed, range(50))


@pytest.mark.parametrize("content", ["", "\n", " \n\t\r\n", {"caption": ""}, {"captions": [""]}])
def test_an_empty_caption_is_one(content, tmp_path):
    name = "0.json" if isinstance(content, dict) else "0.txt"
    data = open_conversations(write_folder(tmp_path, {name: content}))
    assert data[0]["text"] == request("")


def test_txt_goes_before_the_caption_in_json_and_conversations_before_both(tmp_path):
    record = {"caption": "a dog"}
    captions = write_folder(tmp_path / "a", {"0.txt": "a cat", "0.json": record})
    record = {"conversations": [ASK, SHOW]}
    conversation = write_folder(tmp_path / "b", {"0.txt": "a cat", "0.json": record})
    assert open_conversations(captions)[0]["text"] == request("a cat")
    assert open_conversations(conversation)[0]["text"][1] == ("assistant", SHOW["value"])


def test_unicode_and_byte_order_marks(tmp_path):
    word = "ein blaues Dreieck, 蓝色三角形, 🔺👩‍🚀 e\u0301 \u2028 ok"
    byte_order_mark = b"\xef\xbb\xbf"
    json_in_utf_8 = json.dumps({"caption": word}, ensure_ascii=False).encode()
    sidecars = {"0.txt": word, "1.txt": byte_order_mark + word.encode(),
                "2.json": json.dumps({"caption": word}), "3.json": byte_order_mark + json_in_utf_8}
    data = open_conversations(write_folder(tmp_path, sidecars))
    assert all(text == request(word) for text in texts_of(data, range(4)))
    conversation = conversation_of(tmp_path, {"conversations": [{**ASK, "value": word}, SHOW]})
    assert conversation[0] == ("user", word)

    lines = write_jsonl(tmp_path / "x.jsonl", [{"image": "ü🔺.png", "caption": word}])
    (tmp_path / "ü🔺.png").write_bytes(plain_image(colour_of_number(5)))
    item = open_conversations(lines)[0]
    assert item["text"] == request(word) and number_of_image(item["image"]) == 5


def test_missing_captions_are_counted(tmp_path):
    advice = (r"put x\.txt or x\.json beside x\.jpg \(in \.jsonl a caption\), "
              "empty where .*unconditional")
    some = write_folder(tmp_path / "some", {"0.txt": "a", "2.txt": ""}, 5)
    assert_refused(rf"some: 3 of 5 images have no text, first .*1\.png.*; {advice}", some)
    assert_refused("3 of 5", [f"a={some}:1", "b=shapes:1"])
    none = write_folder(tmp_path / "none", {}, 2)
    assert_refused(rf"none: 2 of 2 images have no text, first .*0\.png.*{advice}", none)
    empty = write_folder(tmp_path / "empty", {"0.json": {"captions": []}})
    assert_refused(r"1 of 1 images", empty)
    files = {"0.png": plain_image(), "0.txt": b"x", "1.png": plain_image()}
    shard = write_tar(tmp_path / "a.tar", files)
    assert_refused(r"1 of 2 images have no text, first .*a\.tar/1\.png", shard)
    records = [{"image": "some/0.png", "caption": "a"}, {"image": "some/1.png"}]
    lines = write_jsonl(tmp_path / "a.jsonl", records)
    assert_refused(r"1 of 2 images have no text, first .*1\.png \(line 2: ", lines)
    # Without conversations, no text is needed.
    assert len(open_data(some, 8)) == 5
    assert len(open_data(lines, 8)) == 2


@pytest.mark.parametrize("name, content, message", [
    ("0.txt", b"\xff\xfe", "0.png.*utf-8.*UTF-8"),
    ("0.json", "{", "0.png.*json"),
    ("0.json", "[1]", "0.png.*json"),
    ("0.json", {"caption": 3}, "0.png"),
    ("0.json", {"captions": "abc"}, "0.png.*caption"),
    ("0.json", {"captions": [3]}, "0.png"),
    ("0.json", {"captions": None}, "0.png"),
    ("0.json", {"text": ["a"]}, "0.png"),
    ("0.txt", "an <image> of", "0.png captions must not hold <image>"),
    ("0.json", '{"caption": "\\ud83d"}', "0.png.*surrogate")])
def test_captions_that_make_no_sense(name, content, message, tmp_path):
    folder = write_folder(tmp_path / "f", {name: content})
    files = {name: (tmp_path / "f" / name).read_bytes(), "0.png": plain_image()}
    shard = write_tar(tmp_path / "a.tar", files)
    assert_refused(f"(?s)^--data {folder}: {message}", folder)
    assert_refused(f"(?s)^--data {shard}: {message}", shard)


def test_without_conversations_nothing_changes(tmp_path):
    sidecars = {"0.txt": b"\xff", "1.json": "no json", "2.json": {"label": 7}}
    class_folder = write_folder(tmp_path / "set" / "c0", sidecars)
    data = open_data(os.path.dirname(class_folder), 8)
    assert data.class_names == ["c0"] and texts_of(data, range(3)) == ["", "", ""]

    record = b'{"captions": ["a", "b"], "conversations": "none"}'
    files = {"0.png": plain_image(), "0.json": record,
             "1.png": plain_image(), "1.txt": b"c <image>"}
    data = open_data(write_tar(tmp_path / "a.tar", files), 8)
    assert set(texts_of(data, range(2))) == {"a\nb", "c <image>"}
    assert open_data("shapes", 16)[3]["text"] == Scene.random(0, 3).caption()


# ---------------------------------------------------------------- conversations
def test_roles_and_the_place_of_the_image(tmp_path):
    shown = conversation_of(tmp_path, {"conversations": [ASK, SHOW]})
    assert shown == [("user", ASK["value"]), ("assistant", SHOW["value"])]

    question = {"from": "human", "value": "what is in\n<image>\n?"}
    asked = conversation_of(tmp_path, {"conversations": [question, TELL]})
    assert asked[0] == ("user", question["value"])

    system = {"from": "system", "value": "be brief"}
    several = conversation_of(tmp_path, {"conversations": [system, ASK, TELL, ASK, SHOW]})
    assert [role for role, _ in several] == ["user", "assistant", "user", "assistant"]
    assert several[3][1] == SHOW["value"]
    assert several[0] == ("user", ASK["value"])


def test_without_image_mark_the_image_comes_first(tmp_path):
    conversation = conversation_of(tmp_path, {"conversations": [ASK, TELL, ASK, TELL]})
    assert conversation[0] == ("user", "<image>\nwhat is it?")
    assert str(conversation).count("<image>") == 1


WRONG_TURNS = [
    [], [TELL], [TELL, ASK], [ASK, ASK], [ASK, TELL, TELL], [ASK], [ASK, TELL, ASK],
    [ASK, SHOW, ASK, SHOW],
    [{"from": "human", "value": "<image> <image>"}, TELL],
    [{"from": "human", "value": "<image>"}, SHOW],
    [{"from": "user", "value": "x"}, TELL],
    [{"from": "Human", "value": "x"}, TELL],
    [{"from": None, "value": "x"}, TELL],
    [{"from": "system", "value": "hm"}]]
NO_TURNS = [
    [{"from": "human"}, TELL],
    [{"value": "x"}, TELL],
    [ASK, {"from": "gpt", "value": 3}],
    [[ASK, TELL]],
    [ASK, {"from": "gpt", "value": None}],
    [{"from": ["human"], "value": "x"}, TELL],
    {"from": "human"}, ["hello", "you"], "hello", None, 3]


@pytest.mark.parametrize("turns", WRONG_TURNS + NO_TURNS)
def test_conversations_that_make_no_sense(turns, tmp_path):
    message = '.*conversations: .{"from": "human" or "gpt", "value": text}'
    if turns in WRONG_TURNS:
        message = "must be human, gpt, human, gpt .* at most 1 <image>" + message
    folder = write_folder(tmp_path / "f", {"0.json": {"conversations": turns}})
    records = [{"image": "f/0.png", "caption": "fine"},
               {"image": "f/0.png", "conversations": turns}]
    lines = write_jsonl(tmp_path / "a.jsonl", records)

    assert_refused(f"^--data {folder}: 0.png .*{message}", folder)
    assert_refused(f"^--data {lines}: line 2 .*{message}", lines)
    # Without conversations, they are not read.
    assert len(open_data(folder, 8)) == 1
    assert len(open_data(lines, 8)) == 2


# ---------------------------------------------------------------- .jsonl
def test_jsonl_generates_understands_and_talks(tmp_path):
    folder = write_folder(tmp_path / "f", {}, 4)
    hi = {"from": "human", "value": "hi"}
    null = {"from": "human", "value": "null"}
    lines = write_jsonl(tmp_path / "a.jsonl", [
        {"image": "f/0.png", "conversations": [ASK, SHOW], "metadata": {}},
        {"image": ["f/1.png"], "conversations": [ASK, TELL]},
        {"image": f"{folder}/2.png", "caption": "a dog"},
        {"image": [f"{folder}/3.png"], "captions": ["a bee"]},
        {"conversations": [ASK, TELL]},
        {"image": [], "conversations": [hi, TELL]},
        {"image": None, "conversations": [null, TELL]}])

    data = open_conversations(lines)
    assert len(data) == 7
    items = [data[k] for k in range(7)]
    without_image = [item for item in items if not item["image"].any()]
    questions = sorted(item["text"][0][1] for item in without_image)
    assert questions == ["hi", "null", "what is it?"]             # no <image> was added
    for item in without_image:
        assert item["image"].shape == (3, 8, 8) and item["broken"] == []
    texts = {number_of_image(item["image"]): item["text"] for item in items if item["image"].any()}
    assert texts == {
        0: [("user", ASK["value"]), ("assistant", SHOW["value"])],
        1: [("user", "<image>\nwhat is it?"), ("assistant", "a cat")],
        2: request("a dog"),
        3: request("a bee")}

    images_only = open_data(lines, 8)
    assert len(images_only) == 4
    assert sorted(numbers_of_images(images_only, range(4))) == [0, 1, 2, 3]
    assert not images_only.labelled and images_only[0]["text"] in ("", "a dog", "a bee")
    assert "conversations without an image 3 (line 5)" in images_only.describe()

    cropped = open_conversations(lines, 16, crop="random", flip=True)
    assert all(cropped[k]["image"].shape == (3, 16, 16) for k in range(7))


def test_blank_lines_byte_order_marks_and_windows_line_ends(tmp_path):
    write_folder(tmp_path, {}, 2)
    lines = (b'\xef\xbb\xbf{"image": "0.png", "caption": "a"}\r\n\r\n \n'
             b'{"image": "1.png", "caption": "b"}\r\n\n')
    (tmp_path / "a.jsonl").write_bytes(lines)
    data = open_conversations(f"{tmp_path}/a.jsonl")
    assert sorted(texts_of(data, range(2))) == [request("a"), request("b")]
    (tmp_path / "b.jsonl").write_bytes(lines + b"no json")
    assert_refused("b.jsonl: line 6 Expecting value", f"{tmp_path}/b.jsonl")


def test_a_json_of_one_array_is_read_as_a_jsonl(tmp_path):
    write_folder(tmp_path, {}, 2)
    records = [{"id": 1, "image": "0.png", "conversations": [ASK, SHOW]},
               {"image": "1.png", "caption": "b"}]
    lines = open_conversations(write_jsonl(tmp_path / "a.jsonl", records))
    for name, indent in (("a.json", None), ("b.json", 2), ("array.jsonl", 2)):
        (tmp_path / name).write_text("\ufeff\n" + json.dumps(records, indent=indent))
        data = open_conversations(f"{tmp_path}/{name}")
        assert len(data) == 2
        assert texts_of(data, range(4)) == texts_of(lines, range(4))
    (tmp_path / "c.json").write_text(json.dumps([*records, 3]))
    assert_refused("c.json: record 3 must be a json object, not a int", f"{tmp_path}/c.json")
    (tmp_path / "d.json").write_text("[1, ")
    assert_refused("d.json: array Expecting value", f"{tmp_path}/d.json")


def test_texts_that_no_image_uses_are_named(tmp_path):
    folder = write_folder(tmp_path, {"0.txt": "a", "1.txt": "b", "0.json": "{}"}, 1)
    data = open_conversations(folder)
    assert data.summary()[""]["passed_over"] == {
        ".txt of no image": {"count": 1, "first": "1.txt"}}
    # Without conversations, none is read.
    assert open_data(folder, 8).summary()[""]["passed_over"] == {
        ".txt": {"count": 2, "first": "0.txt"}, ".json": {"count": 1, "first": "0.json"}}


@pytest.mark.parametrize("line, message", [
    ({"image": ["0.png", "1.png"], "caption": "two"}, "images .*0.png.*1.png.* must be one"),
    ({"image": ["0.png", "1.png"], "conversations": [ASK, TELL]}, "must be one"),
    ({"caption": "x"}, "must be one"),
    ({}, "must be one"),
    ({"image": None, "caption": "x"}, "must be one"),
    ({"image": 3, "caption": "x"}, ""),
    ({"image": {"path": "x"}, "caption": "x"}, ""),
    ("[1]\n", "list"),
    ("3\n", "int"),
    ('"a"\n', "str"),
    ("{\n", ""),
    ('{"image": "0.png"} x\n', "Extra data"),
    ({"conversations": [ASK, SHOW]}, "at most 0 <image>"),
    ({"conversations": []}, "human, gpt")])
def test_lines_that_make_no_sense(line, message, tmp_path):
    good = {"image": "0.png", "caption": "x"}
    lines = write_jsonl(tmp_path / "a.jsonl", [good, line, good])
    assert_refused(rf"^--data {lines}: line 2 .*{message}.*\.json\(l\) .*image", lines)


def test_a_line_that_is_no_utf_8_and_an_empty_file(tmp_path):
    latin_1 = tmp_path / "a.jsonl"
    latin_1.write_bytes(b'{"image": "x.png", "caption": "x"}\n{"image": "\xff"}\n')
    assert_refused("a.jsonl: line 2 .*utf-8", str(latin_1))
    assert_refused("must hold images", write_jsonl(tmp_path / "b.jsonl", []))
    without_image = write_jsonl(tmp_path / "c.jsonl", [{"conversations": [ASK, TELL]}])
    assert len(open_conversations(without_image)) == 1
    assert_refused("must hold images", without_image, chat=None)
    message = r"d\.jsonl does not exist; give shapes or text, .*\.jsonl"
    with pytest.raises(FileNotFoundError, match=message):
        open_conversations(str(tmp_path / "d.jsonl"))


def test_images_of_a_jsonl_that_are_missing_are_broken_ones(tmp_path, capfd):
    write_folder(tmp_path, {}, 30)
    records = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(31)]
    lines = write_jsonl(tmp_path / "a.jsonl", records)

    data = open_conversations(lines)
    for _, _, images, _, texts in batches(data, 31, 31, workers=0, stop=2):
        captions = [f"number {number_of_image(image)}" for image in images]
        assert [text[0][1] for text in texts] == captions
    message = f"broken image 1, replaced by another: {tmp_path}/30.png"
    assert message in capfd.readouterr().err

    (tmp_path / "29.png").unlink()
    with pytest.raises(ValueError, match=r"2 broken images of 31.*at most 1%"):
        list(batches(open_conversations(lines), 31, 31, workers=1, stop=2))


def test_hold_out_of_a_jsonl(tmp_path):
    write_folder(tmp_path, {}, 20)
    records = [{"image": f"{i}.png", "caption": f"{i}"} for i in range(20)]
    lines = write_jsonl(tmp_path / "a.jsonl", records)

    train = open_conversations(lines, seed=3, split="train", hold_out=6)
    val = open_conversations(lines, seed=3, split="val", hold_out=6)

    in_train = [int(text[0][1]) for text in texts_of(train, range(len(train)))]
    in_val = [int(text[0][1]) for text in texts_of(val, range(len(val)))]
    assert len(in_val) == 6 and sorted(in_train + in_val) == list(range(20))
    assert in_val == numbers_of_images(val, range(6))
    without_conversations = open_data(lines, 8, split="val", hold_out=6)
    assert in_val == numbers_of_images(without_conversations, range(6))
    assert_refused("--hold_out 20 must be below", lines, hold_out=20)


# ---------------------------------------------------------------- shapes
def test_the_function_makes_the_conversation_of_a_scene(none_held_out):
    data = open_conversations("shapes", 16, seed=4)
    drawn_captions = set()
    for k in (*range(60), 10**7):
        scene = Scene.random(4, k)
        (_, caption), answer = data[k]["text"]
        assert np.array_equal(data[k]["image"].permute(1, 2, 0), scene.render(16))
        assert caption in scene.captions() and answer == ("assistant", "<image>")
        assert data[k]["text"] == data[k]["text"]                 # rng is one of (seed, k)
        assert data[k]["broken"] == []
        drawn_captions.add(scene.captions().index(caption))
    assert len(drawn_captions) > 3

    def plain_caption(scene, rng):
        return [("user", scene.caption())]
    plain = open_data("shapes", 16, seed=4, chat=plain_caption)
    assert texts_of(plain, range(9)) == [[("user", Scene.random(4, k).caption())] for k in range(9)]
    assert all(plain[k]["image"].equal(data[k]["image"]) for k in range(9))


def test_stage_3_asks_for_scenes_and_about_them(none_held_out):
    data = open_data("shapes", 16, seed=4, chat=partial(converse, questions=0.3))
    asked = 0
    for k in range(100):
        turns = data[k]["text"]
        roles = [role for role, _ in turns]
        texts = [text for _, text in turns]
        assert np.array_equal(data[k]["image"].permute(1, 2, 0), Scene.random(4, k).render(16))
        assert turns and len(turns) % 2 == 0
        assert set(roles[0::2]) == {"user"} and set(roles[1::2]) == {"assistant"}
        assert "".join(texts).count("<image>") == 1
        assert all(type(text) is str for text in texts)
        is_request = texts[1].endswith("<image>") and len(turns) == 2
        assert is_request or texts[0].startswith("<image>\n")
        asked += len(turns) > 2
    assert 12 < asked < 48                        # 30 +- 4.6

    only_requests = partial(converse, questions=0.0, plan=False)
    data = open_data("shapes", 16, chat=only_requests)
    assert all(data[k]["text"][1] == ("assistant", "<image>") for k in range(50))


def test_training_skips_scenes_that_are_held_out(monkeypatch):
    def held_out(scene):
        return scene.objects[0].colour in ("red", "blue", "cyan")
    monkeypatch.setattr(Scene, "held_out", held_out)
    plain = open_data("shapes", 16, seed=2, objects=1)
    train = open_conversations("shapes", 16, seed=2, objects=1)
    val = open_conversations("shapes", 16, seed=2, objects=1, split="val")

    is_held_out = [Scene.random(2, k, 1).held_out() for k in range(200)]
    assert 60 < sum(is_held_out) < 140
    images = set()
    for k in range(200):
        image = train[k]["image"]
        assert image.equal(plain[k]["image"]) != is_held_out[k]
        assert image.equal(train[k]["image"])
        images.add(image.numpy().tobytes())
        colour = train.class_names[train[k]["label"]].split()[0]
        assert colour not in ("red", "blue", "cyan")
    assert len(images) == 200

    # Validation skips none.
    assert sum(Scene.random(0, 2**40 + k, 1).held_out() for k in range(50)) > 10
    plain_val = open_data("shapes", 16, objects=1, split="val")
    assert all(val[k]["image"].equal(plain_val[k]["image"]) for k in range(50))


def say_whether_held_out(scene, rng):
    return [("user", scene.held_out())]


def test_no_scene_of_training_is_one_that_is_held_out():
    train = open_data("shapes", 16, chat=say_whether_held_out)
    val = open_data("shapes", 16, split="val", chat=say_whether_held_out)
    plain = open_data("shapes", 16)

    assert {text[0][1] for text in texts_of(train, range(200))} == {False}
    assert {text[0][1] for text in texts_of(val, range(200))} == {False, True}
    is_held_out = [Scene.random(0, k).held_out() for k in range(200)]
    replaced = [not train[k]["image"].equal(plain[k]["image"]) for k in range(200)]
    assert replaced == is_held_out and any(is_held_out)


# ---------------------------------------------------------------- labels and mixtures
def test_labels_play_no_part(tmp_path):
    folder = tmp_path / "a"
    write_images(folder, 2, classes=0)
    write_images(folder, 4, classes=2)
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text("x")
    data = open_conversations(str(folder))
    assert len(data) == 6 and not data.labelled
    assert {data[k]["label"] for k in range(6)} == {0}

    files = {"0.png": plain_image(), "0.txt": b"x", "0.cls": b"cat",
             "1.png": plain_image(), "1.json": b'{"label": [1], "text": "y"}'}
    shard = write_tar(tmp_path / "a.tar", files)
    assert len(open_conversations(shard)) == 2

    specs = [f"a={folder}:1", f"b={shard}:1", "c=shapes:1"]
    mixture = open_conversations(specs, 16, objects=1)
    assert not mixture.labelled and mixture.num_classes == 1
    assert {mixture[k]["label"] for k in range(30)} == {0}


@pytest.fixture
def folder(tmp_path):
    sidecars = {f"{i}.txt": "folder\nfolder 2" for i in range(7)}
    return write_folder(tmp_path / "f", sidecars)


@pytest.fixture
def mixture(tmp_path, folder):
    """A folder, a tar, a .jsonl and the shapes, weighted 4 : 3 : 2 : 1."""
    files = {}
    for i in range(5):
        files[f"{i}.png"] = plain_image(colour_of_number(i))
        files[f"{i}.txt"] = b"tar"
    shard = write_tar(tmp_path / "b.tar", files)
    question = {"from": "human", "value": "jsonl"}
    records = [{"image": "f/0.png", "conversations": [question, SHOW]},
               {"conversations": [question, TELL]}]
    lines = write_jsonl(tmp_path / "a.jsonl", records)
    return [f"a={folder}:0.4", f"b={shard}:.3", f"c={lines}:0.2", "d=shapes:0.1"]


def test_mixtures_by_weight(mixture):
    data = open_conversations(mixture, 16)
    counts = Counter(text[0][1].split()[0] for text in texts_of(data, range(1000)))
    assert [counts[source] for source in ("folder", "tar", "jsonl")] == [400, 300, 200]
    # Two specs of one name are one source.
    same_name = [mixture[0], mixture[0].replace("/f:", "/a.jsonl:")]
    one_source = open_conversations(same_name, 16)
    assert len(one_source) == 9 and one_source.mixture.counts == [1000]


@pytest.mark.parametrize("start", [0, 3])
def test_workers_and_resuming_change_nothing(start, mixture):
    def run(start=0, rank=0, world=1, workers=0):
        data = open_conversations(mixture, 16, seed=5, crop="random", flip=True)
        return list(batches(data, 6, 3, start, rank, world, workers, stop=6))

    straight = run()
    for _, _, _, _, texts in straight:
        assert all(isinstance(text, list) and isinstance(text[0], tuple) for text in texts)
    for workers in (0, 1, 2):
        assert equal_batches(run(start, workers=workers), straight[2 * start:])
    of_ranks = run(rank=0, world=2) + run(rank=1, world=2)
    assert equal_batches(sorted(of_ranks, key=lambda x: x[:2]), straight)


def test_conversations_change_no_picture(folder):
    plain = open_data(folder, 16, seed=5, crop="random", flip=True)
    with_conversations = open_conversations(folder, 16, seed=5, crop="random", flip=True)
    assert all(plain[k]["image"].equal(with_conversations[k]["image"]) for k in range(20))


def test_what_the_caller_does_to_a_conversation_changes_no_data(mixture):
    data = open_conversations(mixture, 16)
    before = [list(text) for text in texts_of(data, range(40))]
    for k in range(40):
        data[k]["text"].clear()
    assert texts_of(data, range(40)) == before
