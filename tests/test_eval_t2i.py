"""ShapesEval, and the layouts of GenEval and DPG-Bench.

Run: python -m pytest tests/test_eval_t2i.py
"""
import json

import numpy as np
import pytest
from PIL import Image

import eval_t2i
from conftest import run_script

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


def test_bad_prompt_files_are_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a star"}\n')
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="every line must be JSON with a prompt"):
        run_script(eval_t2i, "--prompts", path, "--out", out)
    path.unlink()
    with pytest.raises(ValueError, match="no prompt in"):
        run_script(eval_t2i, "--prompts", tmp_path, "--out", out)


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
