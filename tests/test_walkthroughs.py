"""Lessons and assets refuse what they can't use in a sentence, before their work.

Run: python -m pytest tests/test_walkthroughs.py
"""
import json

import pytest
import torch
from PIL import Image

import runtime
from conftest import ROOT, SHIPPED, run_script
from test_help import load

SHIPPED_RAE = ROOT / "assets" / "tiny_rae.safetensors"


# ---------------------------------------------------------------------------- curves
def test_curves_pass_over_torn_and_foreign_lines(tmp_path, capsys):
    curves = load("walkthroughs/curves.py")
    good = [json.dumps(dict(args={}, commit="x")),     # of no step
            json.dumps(dict(step=1, loss=2.0, lr=0.1, psnr=None)),
            json.dumps(dict(step=2, loss=1.5, loss_by_t=[1.0, None]))]
    good += ['{"step": 1' + "0" * 400 + ', "loss": 9.0}',          # numbers that no axis has
             '{"step": 3, "loss": 1e308, "$\\\\frac$ \\\\ud800": 1.0}']
    torn = ['{"step": 3, "lo', "null", "[" * 10_000, "Killed"]
    (tmp_path / "log.jsonl").write_bytes("\n".join(good + torn).encode() + b"\n\xff\xfe\x00")

    run_script(curves, tmp_path, "--out", tmp_path / "new" / "x.jpg")

    output = capsys.readouterr().out
    assert "log.jsonl: 5 lines are no records of a log, and passed over" in output
    assert f"{tmp_path}: loss 1.5, $" in output
    assert Image.open(tmp_path / "new" / "x.jpg").format == "JPEG"


@pytest.mark.parametrize("content, message", [
    (None, "log.jsonl does not exist; name the folder of a run"),
    ("", "has logged no step so far"),
    ('{"step": 1, "loss": null}\n', "have logged no term that is a finite number"),
])
def test_curves_need_a_run_with_numbers(tmp_path, content, message):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        run_script(load("walkthroughs/curves.py"), tmp_path, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name, flags", [
    ("walkthroughs/zoom.py", ["{}"]),
    ("assets/teach_verifier.py", ["--ckpt", "{}"]),
    ("assets/export.py", ["{}", "OUT/x.safetensors"]),
    ("assets/make_tiny_encoder.py", ["--init", "{}", "--images", 500, "--steps", 1,
                                     "--out", "OUT/x.safetensors"]),
])
def test_missing_and_foreign_files_are_named(tmp_path, name, flags):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    for file in ("nothing.pt", "text.pt", "foreign.pt"):
        argv = [str(flag).replace("OUT", str(tmp_path)).format(tmp_path / file) for flag in flags]
        if name.startswith("walkthroughs"):
            argv += ["--out", tmp_path / "out.png" if "zoom" in name else tmp_path / "out"]
        with pytest.raises((ValueError, OSError), match=file):
            run_script(load(name), *argv)


def test_zoom_needs_as_many_images_as_it_shows(tmp_path):
    for i in range(3):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="--first 2 and --n 8 need 10 images, and .* has 3"):
        run_script(load("walkthroughs/zoom.py"), SHIPPED_RAE, "--data", tmp_path, "--first", 2,
                   "--out", tmp_path / "zoom.png")


def test_export_writes_what_can_be_sampled_from(tmp_path):
    export = load("assets/export.py")
    run_script(export, SHIPPED, tmp_path / "x.safetensors")
    exported = runtime.load_checkpoint(tmp_path / "x.safetensors")
    shipped = runtime.load_checkpoint(SHIPPED)
    assert exported["args"] == shipped["args"]
    assert torch.equal(exported["ema"]["pos_embed"], shipped["ema"]["pos_embed"])
    with pytest.raises(ValueError, match="OUTPUT .*x.pt can't be written .* use one of .safetens"):
        run_script(export, SHIPPED, tmp_path / "x.pt")
