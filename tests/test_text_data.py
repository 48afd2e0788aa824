"""Captions and conversations of open_data(chat=...). Run: python -m pytest tests/test_text_data.py"""
import json
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest

import test_data
from data import batches, open_data
from shapes import Scene
from test_data import equal, fill, identities, identity, number_colour, picture, tar

in_time = test_data.in_time    # here too, a test that hangs fails
ASK = {"from": "human", "value": "what is it?"}
TELL = {"from": "gpt", "value": "a cat"}
SHOW = {"from": "gpt", "value": "here:\n<image>"}


def chat(scene, rng):
    """A conversation about a scene, random and with the scene's own words."""
    captions = scene.captions()
    return [("user", captions[rng.integers(len(captions))]), ("assistant", "<image>")]


@pytest.fixture
def none_held_out(monkeypatch):
    """Scene k is that of number k, as training skips none."""
    monkeypatch.setattr(Scene, "held_out", lambda self: False)


def folder_of(path, beside, n=None):
    """A folder of numbered images with what is beside them: {"3.txt": content, ...}."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(n or 1 + max(int(name.split(".")[0]) for name in beside)):
        (path / f"{i}.png").write_bytes(picture(number_colour(i), (8, 8)))
    for name, content in beside.items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path, lines):
    lines = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) + "\n" for x in lines]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def talk_of(tmp_path, **record):
    """The conversation of one image with this record, the same from .json, from a tar and from a .jsonl."""
    folder = folder_of(tmp_path / "one", {"0.json": record})
    shard = tar(tmp_path / "one.tar", {"0.png": picture(), "0.json": json.dumps(record).encode()})
    lines = jsonl(tmp_path / "one.jsonl", [{"image": "one/0.png", **record}])
    one, two, three = (open_data(path, 8, chat=chat)[0]["text"] for path in (folder, shard, lines))
    assert one == two == three
    return one


def generation(caption):
    return [("user", caption), ("assistant", "<image>")]


def texts(data, numbers):
    return [data[k]["text"] for k in numbers]


def fails(message, *args, **options):
    with pytest.raises(ValueError, match=message):
        open_data(*args, **{"chat": chat, **options})


# ------------------------------------------------------------------------------------------------- captions
def test_a_caption_becomes_a_request(tmp_path):
    beside = {"0.txt": "a cat\n", "1.json": {"caption": "a dog"}, "2.json": {"text": " a bee "},
              "3.json": {"captions": ["an ant"]}}
    data = open_data(folder_of(tmp_path, beside), 8, chat=chat)
    found = {identity(data[k]["image"]): data[k]["text"] for k in range(4)}
    assert found == dict(enumerate(map(generation, ("a cat", "a dog", "a bee", "an ant"))))
    assert data.class_names == ["image"] and data.num_classes == 1 and not data.labelled


@pytest.mark.parametrize("name, content", [("0.txt", "one\n\n  two\r\nthree"),
                                           ("0.json", {"captions": ["one", "two", "three"]})])
def test_each_of_several_captions_is_drawn_as_often(name, content, tmp_path):
    data = open_data(folder_of(tmp_path, {name: content}), 8, chat=chat)
    found = Counter(text[0][1] for text in texts(data, range(300)))
    assert found.keys() == {"one", "two", "three"} and min(found.values()) > 70
    other = open_data(str(tmp_path), 8, seed=1, chat=chat)
    assert texts(data, range(50)) == texts(data, range(50)) != texts(other, range(50))


@pytest.mark.parametrize("content", ["", "\n", " \n\t\r\n", {"caption": ""}, {"captions": [""]}])
def test_an_empty_caption_is_one(content, tmp_path):
    name = "0.json" if isinstance(content, dict) else "0.txt"
    assert open_data(folder_of(tmp_path, {name: content}), 8, chat=chat)[0]["text"] == generation("")


def test_txt_goes_before_the_caption_in_json_and_conversations_before_both(tmp_path):
    both = folder_of(tmp_path / "a", {"0.txt": "a cat", "0.json": {"caption": "a dog"}})
    talk = folder_of(tmp_path / "b", {"0.txt": "a cat", "0.json": {"conversations": [ASK, SHOW]}})
    assert open_data(both, 8, chat=chat)[0]["text"] == generation("a cat")
    assert open_data(talk, 8, chat=chat)[0]["text"][1] == ("assistant", SHOW["value"])


def test_unicode_and_byte_order_marks(tmp_path):
    word = "ein blaues Dreieck, 蓝色三角形, 🔺👩‍🚀 e\u0301 \u2028 ok"
    beside = {"0.txt": word, "1.txt": b"\xef\xbb\xbf" + word.encode(),
              "2.json": json.dumps({"caption": word}),
              "3.json": b"\xef\xbb\xbf" + json.dumps({"caption": word}, ensure_ascii=False).encode()}
    assert texts(open_data(folder_of(tmp_path, beside), 8, chat=chat), range(4)) == [generation(word)] * 4
    assert talk_of(tmp_path, conversations=[{**ASK, "value": word}, SHOW])[0] == ("user", word)
    names = jsonl(tmp_path / "x.jsonl", [{"image": "ü🔺.png", "caption": word}])
    (tmp_path / "ü🔺.png").write_bytes(picture(number_colour(5)))
    item = open_data(names, 8, chat=chat)[0]
    assert item["text"] == generation(word) and identity(item["image"]) == 5


def test_missing_captions_are_counted(tmp_path):
    some = folder_of(tmp_path / "some", {"0.txt": "a", "2.txt": ""}, 5)
    advice = r"put x\.txt or x\.json beside x\.jpg \(in \.jsonl a caption\), empty where .*unconditional"
    fails(rf"some: 3 of 5 images have no text, first .*1\.png.*; {advice}", some, 8)
    fails("3 of 5", [f"a={some}:1", "b=shapes:1"], 8)
    none = folder_of(tmp_path / "none", {}, 2)
    fails(rf"none: 2 of 2 images have no text, first .*0\.png.*{advice}", none, 8)
    fails(r"1 of 1 images", folder_of(tmp_path / "empty", {"0.json": {"captions": []}}), 8)
    shard = tar(tmp_path / "a.tar", {"0.png": picture(), "0.txt": b"x", "1.png": picture()})
    fails(r"1 of 2 images have no text, first .*a\.tar \(1\.png\)", shard, 8)
    lines = jsonl(tmp_path / "a.jsonl", [{"image": "some/0.png", "caption": "a"}, {"image": "some/1.png"}])
    fails(r"1 of 2 images have no text, first .*1\.png \(line 2\)", lines, 8)
    assert len(open_data(some, 8)) == 5 and len(open_data(lines, 8)) == 2


@pytest.mark.parametrize("name, content, message", [
    ("0.txt", b"\xff\xfe", "0.png.*utf-8.*UTF-8"), ("0.json", "{", "0.png.*json"),
    ("0.json", "[1]", "0.png.*json"),
    ("0.json", {"caption": 3}, "0.png"), ("0.json", {"captions": "abc"}, "0.png.*caption"),
    ("0.json", {"captions": [3]}, "0.png"), ("0.json", {"captions": None}, "0.png"),
    ("0.json", {"text": ["a"]}, "0.png"), ("0.txt", "an <image> of", "0.png captions must not hold <image>"),
    ("0.json", '{"caption": "\\ud83d"}', "0.png.*surrogate")])
def test_captions_that_make_no_sense(name, content, message, tmp_path):
    fails(f"(?s)^--data {tmp_path}/f: {message}", folder_of(tmp_path / "f", {name: content}), 8)
    shard = {name: (tmp_path / "f" / name).read_bytes(), "0.png": picture()}
    fails(f"(?s)^--data {tmp_path}/a.tar: {message}", tar(tmp_path / "a.tar", shard), 8)


def test_without_chat_nothing_changes(tmp_path):
    beside = {"0.txt": b"\xff", "1.json": "no json", "2.json": {"label": 7}}
    data = open_data(os.path.dirname(folder_of(tmp_path / "set" / "c0", beside)), 8)
    assert data.class_names == ["c0"] and texts(data, range(3)) == [""] * 3
    files = {"0.png": picture(), "0.json": b'{"captions": ["a", "b"], "conversations": "none"}',
             "1.png": picture(), "1.txt": b"c <image>"}
    assert set(texts(open_data(tar(tmp_path / "a.tar", files), 8), range(2))) == {"a\nb", "c <image>"}
    assert open_data("shapes", 16)[3]["text"] == Scene.random(0, 3).caption()


# -------------------------------------------------------------------------------------------- conversations
def test_roles_and_the_place_of_the_image(tmp_path):
    shown = talk_of(tmp_path, conversations=[ASK, SHOW])
    assert shown == [("user", ASK["value"]), ("assistant", SHOW["value"])]
    place = {**ASK, "value": "what is in\n<image>\n?"}
    assert talk_of(tmp_path, conversations=[place, TELL])[0] == ("user", place["value"])
    several = talk_of(tmp_path, conversations=[{"from": "system", "value": "be brief"}, ASK, TELL, ASK, SHOW])
    assert [role for role, _ in several] == ["user", "assistant"] * 2 and several[3][1] == SHOW["value"]
    assert several[0] == ("user", ASK["value"])


def test_without_image_mark_the_image_comes_first(tmp_path):
    found = talk_of(tmp_path, conversations=[ASK, TELL, ASK, TELL])
    assert found[0] == ("user", "<image>\nwhat is it?") and str(found).count("<image>") == 1


TALKS = [[], [TELL], [TELL, ASK], [ASK, ASK], [ASK, TELL, TELL], [ASK],
         [ASK, TELL, ASK], [ASK, SHOW, ASK, SHOW],
         [{**ASK, "value": "<image> <image>"}, TELL], [{**ASK, "value": "<image>"}, SHOW],
         [{**ASK, "from": "user"}, TELL], [{**ASK, "from": "Human"}, TELL], [{**ASK, "from": None}, TELL],
         [{"from": "system", "value": "hm"}]]
NO_TALKS = [[{"from": "human"}, TELL], [{"value": "x"}, TELL], [ASK, {**TELL, "value": 3}], [[ASK, TELL]],
            [ASK, {**TELL, "value": None}], [{**ASK, "from": ["human"]}, TELL], {"from": "human"},
            ["hello", "you"], "hello", None, 3]


@pytest.mark.parametrize("turns", TALKS + NO_TALKS)
def test_conversations_that_make_no_sense(turns, tmp_path):
    required = "must be human, gpt, human, gpt .* at most 1 <image>" if turns in TALKS else ""
    required += '.*conversations: .{"from": "human" or "gpt", "value": text}'
    folder = folder_of(tmp_path / "f", {"0.json": {"conversations": turns}})
    fails(f"^--data {folder}: 0.png .*{required}", folder, 8)
    lines = jsonl(tmp_path / "a.jsonl", [{"image": "f/0.png", "caption": "fine"},
                                         {"image": "f/0.png", "conversations": turns}])
    fails(f"^--data {lines}: line 2 .*{required}", lines, 8)
    assert len(open_data(folder, 8)) == 1 and len(open_data(lines, 8)) == 2      # only chats need them


# ---------------------------------------------------------------------------------------------------- .jsonl
def test_jsonl_generates_understands_and_talks(tmp_path):
    folder = folder_of(tmp_path / "f", {}, 4)
    lines = jsonl(tmp_path / "a.jsonl", [
        {"image": "f/0.png", "conversations": [ASK, SHOW], "metadata": {}},
        {"image": ["f/1.png"], "conversations": [ASK, TELL]},
        {"image": f"{folder}/2.png", "caption": "a dog"},
        {"image": [f"{folder}/3.png"], "captions": ["a bee"]},
        {"conversations": [ASK, TELL]}, {"image": [], "conversations": [{**ASK, "value": "hi"}, TELL]},
        {"image": None, "conversations": [{**ASK, "value": "null"}, TELL]}])
    data = open_data(lines, 8, chat=chat)
    assert len(data) == 7
    black = [data[k] for k in range(7) if not data[k]["image"].any()]
    assert sorted(x["text"][0][1] for x in black) == ["hi", "null", "what is it?"]   # no <image>
    assert all(x["image"].shape == (3, 8, 8) and x["broken"] == [] for x in black)
    items = [data[k] for k in range(7)]
    found = {identity(x["image"]): x["text"] for x in items if x["image"].any()}
    assert found == {0: [("user", ASK["value"]), ("assistant", SHOW["value"])], 2: generation("a dog"),
                     1: [("user", "<image>\nwhat is it?"), ("assistant", "a cat")], 3: generation("a bee")}
    plain = open_data(lines, 8)                                                  # just the images
    assert len(plain) == 4 and sorted(identities(plain, range(4))) == [0, 1, 2, 3]
    assert not plain.labelled and plain[0]["text"] in ("", "a dog", "a bee")
    cropped = open_data(lines, 16, chat=chat, crop="random", flip=True)
    assert all(cropped[k]["image"].shape == (3, 16, 16) for k in range(7))


@pytest.mark.parametrize("line, message", [
    ({"image": ["0.png", "1.png"], "caption": "two"}, "images .*0.png.*1.png.* must be one"),
    ({"image": ["0.png", "1.png"], "conversations": [ASK, TELL]}, "must be one"),
    ({"caption": "x"}, "must be one"), ({}, "must be one"), ({"image": None, "caption": "x"}, "must be one"),
    ({"image": 3, "caption": "x"}, ""),
    ({"image": {"path": "x"}, "caption": "x"}, ""), ("\n", ""), ("[1]\n", "list"), ("3\n", "int"),
    ('"a"\n', "str"), ("{\n", ""), ('{"image": "0.png"} x\n', "Extra data"),
    ({"conversations": [ASK, SHOW]}, "at most 0 <image>"), ({"conversations": []}, "human, gpt")])
def test_lines_that_make_no_sense(line, message, tmp_path):
    good = {"image": "0.png", "caption": "x"}
    lines = jsonl(tmp_path / "a.jsonl", [good, line, good])
    fails(rf"^--data {lines}: line 2 .*{message}.*\.json\(l\) .*image", lines, 8)


def test_a_line_that_is_no_utf_8_and_an_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"image": "x.png", "caption": "x"}\n{"image": "\xff"}\n')
    fails("a.jsonl: line 2 .*utf-8", str(tmp_path / "a.jsonl"), 8)
    fails("must hold images", jsonl(tmp_path / "b.jsonl", []), 8)
    talk = jsonl(tmp_path / "c.jsonl", [{"conversations": [ASK, TELL]}])
    assert len(open_data(talk, 8, chat=chat)) == 1
    fails("must hold images", talk, 8, chat=None)
    with pytest.raises(FileNotFoundError, match=r"d\.jsonl does not exist; give shapes or text, .*\.jsonl"):
        open_data(str(tmp_path / "d.jsonl"), 8, chat=chat)


def test_images_of_a_jsonl_that_are_missing_are_broken_ones(tmp_path, capfd):
    folder_of(tmp_path, {}, 30)
    record = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(31)]
    data = open_data(jsonl(tmp_path / "a.jsonl", record), 8, chat=chat)
    for *_, images, labels, talks in batches(data, 31, 31, workers=0, stop=2):
        assert [text[0][1] for text in talks] == [f"number {identity(image)}" for image in images]
    assert f"broken image 1, replaced by another: {tmp_path}/30.png" in capfd.readouterr().err
    (tmp_path / "29.png").unlink()
    with pytest.raises(ValueError, match=r"2 broken images of 31.*at most 1%"):
        list(batches(open_data(str(tmp_path / "a.jsonl"), 8, chat=chat), 31, 31, workers=1, stop=2))


def test_hold_out_of_a_jsonl(tmp_path):
    folder_of(tmp_path, {}, 20)
    lines = jsonl(tmp_path / "a.jsonl", [{"image": f"{i}.png", "caption": f"{i}"} for i in range(20)])
    train, val = (open_data(lines, 8, 3, split=split, hold_out=6, chat=chat) for split in ("train", "val"))
    seen, held = ([int(text[0][1]) for text in texts(data, range(len(data)))] for data in (train, val))
    assert len(held) == 6 and sorted(seen + held) == list(range(20)) and held == identities(val, range(6))
    assert held == identities(open_data(lines, 8, split="val", hold_out=6), range(6))
    fails("--hold_out 20 must be below", lines, 8, hold_out=20)


# --------------------------------------------------------------------------------------------------- shapes
def test_the_function_makes_the_conversation_of_a_scene(none_held_out):
    data, calls = open_data("shapes", 16, seed=4, chat=chat), []
    for k in (*range(60), 10**7):
        scene = Scene.random(4, k)
        (_, said), last = data[k]["text"]
        assert np.array_equal(data[k]["image"].permute(1, 2, 0), scene.render(16))
        assert said in scene.captions() and last == ("assistant", "<image>")
        assert data[k]["text"] == data[k]["text"] and data[k]["broken"] == []    # rng is one of (seed, k)
        calls.append(scene.captions().index(said))
    assert len(set(calls)) > 3
    other = open_data("shapes", 16, seed=4, chat=lambda scene, rng: [("user", scene.caption())])
    assert texts(other, range(9)) == [[("user", Scene.random(4, k).caption())] for k in range(9)]
    assert all(other[k]["image"].equal(data[k]["image"]) for k in range(9))


def test_stage_3_asks_for_scenes_and_about_them(none_held_out):
    converse = pytest.importorskip("train_t2i").converse
    data = open_data("shapes", 16, seed=4, chat=partial(converse, questions=0.3))
    asked = 0
    for k in range(100):
        talk, scene = data[k]["text"], Scene.random(4, k)
        said = [text for _, text in talk]
        assert np.array_equal(data[k]["image"].permute(1, 2, 0), scene.render(16))
        assert [role for role, _ in talk] == ["user", "assistant"] * (len(talk) // 2) and talk
        assert "".join(said).count("<image>") == 1 and {type(text) for text in said} == {str}
        assert said[1].endswith("<image>") and len(talk) == 2 or said[0].startswith("<image>\n")
        asked += len(talk) > 2
    assert 12 < asked < 48                                       # 30 +- 4.6
    never = open_data("shapes", 16, chat=partial(converse, questions=0.0, plan=False))
    assert all(never[k]["text"][1] == ("assistant", "<image>") for k in range(50))


def test_training_skips_scenes_that_are_held_out(monkeypatch):
    monkeypatch.setattr(Scene, "held_out", lambda self: self.objects[0].colour in ("red", "blue", "cyan"))
    plain, train, val = (open_data("shapes", 16, seed=2, objects=1, **options) for options in
                         ({}, {"chat": chat}, {"chat": chat, "split": "val"}))
    held = [Scene.random(2, k, 1).held_out() for k in range(200)]
    assert 60 < sum(held) < 140
    seen = set()
    for k in range(200):
        same = train[k]["image"].equal(plain[k]["image"])
        assert same != held[k] and train[k]["image"].equal(train[k]["image"])
        seen.add(train[k]["image"].numpy().tobytes())
        colour = train.class_names[train[k]["label"]].split()[0]
        assert colour not in ("red", "blue", "cyan")
    assert len(seen) == 200
    assert sum(Scene.random(0, 2**40 + k, 1).held_out() for k in range(50)) > 10     # validation skips none
    plain = open_data("shapes", 16, objects=1, split="val")
    assert all(val[k]["image"].equal(plain[k]["image"]) for k in range(50))


def test_no_scene_of_training_is_one_that_is_held_out():
    train, val, plain = (open_data("shapes", 16, split=split, chat=talk) for split, talk in (
        ("train", whether_held_out), ("val", whether_held_out), ("train", None)))
    assert {text[0][1] for text in texts(train, range(200))} == {False}
    assert {text[0][1] for text in texts(val, range(200))} == {False, True}
    held = [Scene.random(0, k).held_out() for k in range(200)]
    assert [not train[k]["image"].equal(plain[k]["image"]) for k in range(200)] == held and any(held)


def whether_held_out(scene, rng):
    return [("user", scene.held_out())]


# ------------------------------------------------------------------------------------------- labels, mixtures
def test_labels_play_no_part(tmp_path):
    fill(tmp_path / "a", 2, classes=0)
    fill(tmp_path / "a", 4, classes=2)
    for path in (tmp_path / "a").rglob("*.png"):
        path.with_suffix(".txt").write_text("x")
    folder = open_data(str(tmp_path / "a"), 8, chat=chat)
    assert len(folder) == 6 and not folder.labelled and {folder[k]["label"] for k in range(6)} == {0}
    files = {"0.png": picture(), "0.txt": b"x", "0.cls": b"cat", "1.png": picture(),
             "1.json": b'{"label": [1], "text": "y"}'}
    assert len(open_data(tar(tmp_path / "a.tar", files), 8, chat=chat)) == 2
    specs = [f"a={tmp_path}/a:1", f"b={tmp_path}/a.tar:1", "c=shapes:1"]
    mixture = open_data(specs, 16, chat=chat, objects=1)
    assert not mixture.labelled and mixture.num_classes == 1
    assert {mixture[k]["label"] for k in range(30)} == {0}


@pytest.fixture
def mixture(tmp_path):
    """Sources of every kind, a folder, a tar, a .jsonl and the shapes, weighted 4 : 3 : 2 : 1."""
    folder = folder_of(tmp_path / "f", {f"{i}.txt": "folder\nfolder 2" for i in range(7)})
    files = {f"{i}.png": picture(number_colour(i)) for i in range(5)} | {f"{i}.txt": b"tar" for i in range(5)}
    ask = {"from": "human", "value": "jsonl"}
    lines = jsonl(tmp_path / "a.jsonl", [{"image": "f/0.png", "conversations": [ask, SHOW]},
                                         {"conversations": [ask, TELL]}])
    shard = tar(tmp_path / "b.tar", files)
    return [f"a={folder}:0.4", f"b={shard}:.3", f"c={lines}:0.2", "d=shapes:0.1"]


def test_mixtures_by_weight(mixture):
    data = open_data(mixture, 16, chat=chat)
    said = Counter(text[0][1].split()[0] for text in texts(data, range(1000)))
    assert [said[kind] for kind in ("folder", "tar", "jsonl")] == [400, 300, 200]
    one = open_data([mixture[0], mixture[0].replace("/f:", "/a.jsonl:")], 16, chat=chat)    # a source of two
    assert len(one) == 9 and one.counts == [1000]


@pytest.mark.parametrize("start", [0, 3])
def test_workers_and_resuming_change_nothing(start, mixture):
    options = dict(seed=5, chat=chat, crop="random", flip=True)
    straight = list(batches(open_data(mixture, 16, **options), 6, 3, workers=0, stop=6))
    assert all(isinstance(text, list) and isinstance(text[0], tuple) for x in straight for text in x[4])
    for workers in (0, 1, 2):
        resumed = batches(open_data(mixture, 16, **options), 6, 3, start=start, workers=workers, stop=6)
        assert equal(resumed, straight[2 * start:])
    ranks = [list(batches(open_data(mixture, 16, **options), 6, 3, 0, r, 2, 0, stop=6)) for r in (0, 1)]
    assert equal(sorted(ranks[0] + ranks[1], key=lambda x: x[:2]), straight)
    pixels = open_data(mixture[0][2:-4], 16, seed=5, crop="random", flip=True)   # a chat changes no picture
    talks = open_data(mixture[0][2:-4], 16, **options)
    assert all(pixels[k]["image"].equal(talks[k]["image"]) for k in range(20))


def test_what_the_caller_does_to_a_conversation_stays_with_him(mixture):
    data = open_data(mixture, 16, chat=chat)
    before = [list(text) for text in texts(data, range(40))]
    for k in range(40):
        data[k]["text"].clear()
    assert texts(data, range(40)) == before
