"""ShapesEval, and the layouts of GenEval and DPG-Bench.

Run: python -m pytest tests/test_eval_t2i.py
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval_t2i
import storage
from conftest import run_script
from release import SHIPPED_T2I

QUICK = ["--sampling_steps", "2", "--guidance", "1"]
COLOURS = ("red", "blue")


def draw_geneval(tmp_path):
    """Draw two prompts in GenEval's layout. Returns the folder and the lines of metadata."""
    records = [dict(tag="colors", include=[{"class": "star"}], prompt=f"a {colour} star")
               for colour in COLOURS]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "geneval"
    run_script(eval_t2i, "--prompts", path, "--out", out, *QUICK)
    return out, lines


def test_geneval_reads_folders_of_samples_and_metadata(tmp_path):
    out, lines = draw_geneval(tmp_path)
    folders = sorted(path.name for path in out.iterdir())
    assert folders == ["00000", "00001"]                   # evaluate_images.py: isdigit()
    for folder, line in zip(folders, lines, strict=True):
        metadata = (out / folder / "metadata.jsonl").read_text()
        assert json.loads(metadata) == json.loads(line)
        names = sorted(path.name for path in (out / folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]       # \d+\.png


def test_dpg_bench_reads_pictures_of_two_by_two(tmp_path):
    geneval, _ = draw_geneval(tmp_path)                    # the same images, apart
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    names = ("partiprompts0", "stanford7")
    for name, colour in zip(names, COLOURS, strict=True):
        (prompts / f"{name}.txt").write_text(f"a {colour} star\n")

    out = tmp_path / "dpg"
    run_script(eval_t2i, "--prompts", prompts, "--out", out, *QUICK)

    files = sorted(path.name for path in out.iterdir())
    assert files == ["partiprompts0.png", "stanford7.png"]     # compute_dpg_bench.py: id, then "."
    for number, name in enumerate(names):
        sheet = Image.open(out / f"{name}.png")
        assert sheet.size == (128, 128)
        corners = ((0, 0), (64, 0), (0, 64), (64, 64))     # its crops with --resolution 64
        for i, (left, top) in enumerate(corners):
            crop = sheet.crop((left, top, left + 64, top + 64))
            alone = Image.open(geneval / f"0000{number}" / "samples" / f"000{i}.png")
            assert (np.array(crop) == np.array(alone)).all()


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for i, colour in enumerate(COLOURS):
        (prompts / f"{i}.txt").write_text(f"a {colour} star\n")
    argv = ["--prompts", prompts, *QUICK, "--batch", 3, "--out", tmp_path / "dpg"]
    generate_prompts = eval_t2i.sample.generate_prompts
    drawn = []

    def generate_and_die(t2i, rae, texts, args, numbers, *rest):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.extend(numbers)
        return generate_prompts(t2i, rae, texts, args, numbers, *rest)

    monkeypatch.setattr(eval_t2i.sample, "generate_prompts", generate_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_script(eval_t2i, *argv)
    assert drawn == [0, 1, 2]
    assert not (tmp_path / "dpg").exists()

    def generate_and_record(t2i, rae, texts, args, numbers, *rest):
        drawn.extend(numbers)
        return generate_prompts(t2i, rae, texts, args, numbers, *rest)

    monkeypatch.setattr(eval_t2i.sample, "generate_prompts", generate_and_record)
    run_script(eval_t2i, *argv)
    assert drawn == list(range(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpg", "prompts"]


@pytest.mark.parametrize("content, message", [
    (b"", "no prompt in"),
    (b"\n \n", "no prompt in"),
    (b'{"text": "a star"}', "line 1: .*every line must be JSON with a prompt"),
    (b'{"prompt": "a star"}\n["a star"]', "line 2: .*every line must be JSON with a prompt"),
    (b"a star", "line 1: .*every line must be JSON with a prompt"),
    (b"3", 'line 1: no "prompt" in 3; every line must be JSON with a prompt'),
    (b"[" * 100_000, "line 1: .*every line must be JSON with a prompt"),
    (b'{"prompt": 3}', "00000: a prompt must be a text, not int"),
    (b'{"prompt": null}', "00000: a prompt must be a text, not NoneType"),
    (b'{"prompt": " "}', "00000: prompt ' ' must say what to draw"),
    (b'{"prompt": "an <image>"}', "00000: prompt .* without <image>"),
    (b'{"prompt": "' + b"star " * 80_000 + b'"}', "00000: a prompt has 400000 characters"),
    (b'{"prompt": "\xff"}', "is no UTF-8"),
    (b"\x00" * (2 ** 24 + 1), "has 16777217 bytes, more than prompts need"),
])
def test_files_without_prompts_are_refused(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--prompts .*bad.jsonl.*{message}"):
        run_script(eval_t2i, "--prompts", path, "--out", tmp_path / "out")


def test_folders_without_prompts_are_refused(tmp_path):
    flags = ["--prompts", tmp_path, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="no prompt in"):
        run_script(eval_t2i, *flags)
    for content, message in ((b"", "x: prompt '' must say what to draw"), (b"\xff", "no UTF-8"),
                             (b"star " * 80_000, "has 400000 bytes")):
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run_script(eval_t2i, *flags)
    (tmp_path / "x.txt").unlink()
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(FileNotFoundError, match="x.txt is no file"):
        run_script(eval_t2i, *flags)


def test_prompts_that_do_not_exist_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl is no file; give a .jsonl, or a"):
        run_script(eval_t2i, "--prompts", tmp_path / "nothing.jsonl", "--out", tmp_path / "out")


def test_prompts_as_windows_writes_them_are_read(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a star"}\r\n\r\n'
                     b'{"prompt": "a ring\xe2\x80\xa8"}\r\n')
    texts = [prompt.text for prompt in eval_t2i.read_prompts(path)]
    assert texts == ["a star", "a ring\u2028"]


@pytest.mark.shipped
def test_shapes_eval_refuses_a_model_of_another_world(tmp_path):
    state = dict(storage.load_checkpoint(SHIPPED_T2I))
    for data, world in ((["photos"], "photos"), (["a=photos:1", "b=x.jsonl:2"], "a=photos:1 b=")):
        state["args"] = dict(state["args"], data=data)
        torch.save(state, tmp_path / "t2i.pt")
        with pytest.raises(ValueError, match=f"t2i.pt was trained on {world}.*, without shapes"):
            run_script(eval_t2i, "--ckpt", tmp_path / "t2i.pt")


@pytest.mark.parametrize("data", [["shapes"], ["a=shapes:3", "b=photos:1"], []])
def test_shapes_eval_takes_models_of_shapes_and_published_ones(data):
    args = dict(data=data) if data else {}
    eval_t2i.check_world(dict(args=args), "t2i.pt")


@pytest.mark.parametrize("argv", [[], ["--out", "x.png"], ["--out", "x", "--n", "8"]])
def test_prompts_need_a_folder_and_no_number(argv, capsys):
    with pytest.raises(SystemExit):
        eval_t2i.parse_args(["--prompts", "file.jsonl", *argv])
    assert "leave --n out, and give --out FOLDER" in capsys.readouterr().err


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists; delete it, or name another folder"):
        run_script(eval_t2i, "--prompts", "file.jsonl", "--out", tmp_path)


def test_every_category_needs_an_image(capsys):
    with pytest.raises(SystemExit):
        eval_t2i.parse_args(["--n", "5"])
    assert "--n/--num_images: 5 must be at least 6" in capsys.readouterr().err
