"""The scripts that made the assets refuse what they can't use in a sentence, before their work.

Run: python -m pytest tests/test_assets.py
"""
import pytest
import torch

import storage
from conftest import SHIPPED, run_script
from test_help import load


@pytest.mark.parametrize("name, flags", [
    ("assets/teach_verifier.py", ["--ckpt", "{}", "--out", "OUT/verifier"]),
    ("assets/export.py", ["{}", "OUT/x.safetensors"]),
    ("assets/make_tiny_encoder.py", ["--init", "{}", "--images", 500, "--steps", 1,
                                     "--out", "OUT/x.safetensors"]),
])
def test_missing_and_foreign_files_are_named(tmp_path, name, flags):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    for file in ("nothing.pt", "text.pt", "foreign.pt"):
        argv = [str(flag).replace("OUT", str(tmp_path)).format(tmp_path / file) for flag in flags]
        with pytest.raises((ValueError, OSError), match=file):
            run_script(load(name), *argv)


def test_export_writes_what_can_be_sampled_from(tmp_path):
    export = load("assets/export.py")
    run_script(export, SHIPPED, tmp_path / "x.safetensors")
    exported = storage.load_checkpoint(tmp_path / "x.safetensors")
    shipped = storage.load_checkpoint(SHIPPED)
    assert exported["args"] == shipped["args"]
    assert torch.equal(exported["ema"]["pos_embed"], shipped["ema"]["pos_embed"])
    with pytest.raises(ValueError, match="OUTPUT .*x.pt can't be written .* use one of .safetens"):
        run_script(export, SHIPPED, tmp_path / "x.pt")
