"""Lessons and assets refuse what they can't use in a sentence, before their work.

Run: python -m pytest tests/test_walkthroughs.py
"""
import pytest
import torch

import runtime
from conftest import SHIPPED, run_script
from test_help import load


# ---------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name, flags", [
    ("walkthroughs/best_of.py", ["--ckpt", "{}", "--n", 1]),
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
        if name.startswith("walkthroughs"):
            argv += ["--out", tmp_path / "out"]
        with pytest.raises((ValueError, OSError), match=file):
            run_script(load(name), *argv)


def test_export_writes_what_can_be_sampled_from(tmp_path):
    export = load("assets/export.py")
    run_script(export, SHIPPED, tmp_path / "x.safetensors")
    exported = runtime.load_checkpoint(tmp_path / "x.safetensors")
    shipped = runtime.load_checkpoint(SHIPPED)
    assert exported["args"] == shipped["args"]
    assert torch.equal(exported["ema"]["pos_embed"], shipped["ema"]["pos_embed"])
    with pytest.raises(ValueError, match="OUTPUT .*x.pt can't be written .* use one of .safetens"):
        run_script(export, SHIPPED, tmp_path / "x.pt")


# ---------------------------------------------------------------------------- studies
def test_results_that_are_torn_are_named(tmp_path):
    study = load("walkthroughs/study.py")
    (tmp_path / "result.json").write_text('{"PSNR": 3')
    with pytest.raises(ValueError, match="result.json is no JSON .* delete it"):
        study.read_json(tmp_path / "result.json")


def test_a_training_that_was_stopped_is_not_taken_for_finished(tmp_path):
    study = load("walkthroughs/study.py")

    class Script:
        @staticmethod
        def main(args):                                # ends early, as after a signal
            runtime.save_checkpoint(f"{args.out}/last.pt", step=3)

    args = runtime.argparse.Namespace(out=tmp_path, steps=4)
    with pytest.raises(KeyboardInterrupt, match="finished runs are kept"):
        study.train_to_the_end(Script, args)


@pytest.mark.parametrize("name, message", [
    ("findings", "nope: choose from shift head captions"),
    ("autoencoders", "nope: choose from noise text losses"),
])
def test_unknown_studies_are_refused(name, message, capsys):
    with pytest.raises(SystemExit):
        load(f"walkthroughs/{name}.py").parse_args(["nope"])
    assert message in capsys.readouterr().err
