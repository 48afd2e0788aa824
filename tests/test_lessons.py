"""The twelve lessons: their form, their notebooks, and that each runs and reaches its numbers.

Run: python -m pytest tests/test_lessons.py
"""
import ast
import importlib.util
import json
import re
import runpy
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "walkthroughs"))
import lesson as lesson_module  # noqa: E402
from lesson import Lesson, command_line  # noqa: E402

pytestmark = pytest.mark.shipped

LESSONS = sorted((ROOT / "walkthroughs").glob("[01]*.py"))
HEADINGS = ["Question", "Predict", "Read", "Run", "Figure", "Number", "Exercise",
            "The paper says / ours differs"]
PRODUCT_FILES = [*ROOT.glob("*.py"), *ROOT.glob("shapes/*.py")]

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=[path.stem for path in LESSONS])


def cells_of(path):
    """The cells of a lesson: (is it prose?, text without the line that begins it)."""
    cells = []
    for part in re.split(r"^# %%", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        first_line, _, text = part.partition("\n")
        cells.append(("[markdown]" in first_line, text))
    return cells


def prose_of(path):
    """All prose of a lesson, without the comment signs."""
    texts = [re.sub(r"^# ?", "", text, flags=re.MULTILINE)
             for is_prose, text in cells_of(path) if is_prose]
    return "\n".join(texts)


def set_up_cell(path):
    """The first cell of code: it finds the project, or clones it."""
    return next(text for is_prose, text in cells_of(path) if not is_prose)


# ---------------------------------------------------------------------------- form
def test_there_are_twelve():
    numbers = [path.name[:2] for path in LESSONS]
    assert numbers == [f"{n:02d}" for n in range(1, 13)]


@every_lesson
def test_headings_stand_in_order(path):
    headings = re.findall(r"^## (.+)$", prose_of(path), re.MULTILINE)
    assert headings == HEADINGS


@every_lesson
def test_every_tag_exists_where_it_is_said_to_be(path):
    tags = set(re.findall(r"\[([LDST]\d+)\]", prose_of(path)))
    assert tags
    code = "\n".join(file.read_text("utf-8") for file in PRODUCT_FILES)
    assert tags <= set(re.findall(r"# \[([LDST]\d+)\]", code))


@every_lesson
def test_names_that_prose_takes_from_the_product_exist(path):
    """Prose says "`euler` in sample.py": that file must define the name."""
    named = re.findall(r"`(\w+)(?:\.(\w+))?` in (\w+)\.py", prose_of(path).replace("\n", " "))
    for name, attribute, module in named:
        source = (ROOT / f"{module}.py").read_text("utf-8")
        assert re.search(rf"\b{name}\b", source), f"{name} in {module}.py"
        assert not attribute or re.search(rf"\b{attribute}\b", source), f"{attribute} in {module}"


@every_lesson
def test_answers_are_folded_away(path):
    exercise = prose_of(path).split("## Exercise")[1].split("## The paper")[0]
    assert "<details>" in exercise and "</details>" in exercise


def test_the_set_up_cell_is_the_same_in_all():
    assert len({set_up_cell(path) for path in LESSONS}) == 1


# ---------------------------------------------------------------------------- running
def sweeps_of(path):
    """Names of the sweeps of a lesson: the first argument of each lesson.sweep()."""
    names = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_call and node.func.attr == "sweep":
            names.append(ast.literal_eval(node.args[0]))
    return names


@every_lesson
def test_lesson_runs_and_reaches_its_numbers(path, tmp_path, monkeypatch, capsys):
    flags = ["--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(path), run_name="__main__")

    report = json.loads((tmp_path / path.stem / "numbers.json").read_text())
    assert report["numbers"]
    for name, number in report["numbers"].items():
        assert number["is_expected"], f"{name}: {number}"
    assert list((tmp_path / path.stem).glob("*.png"))
    assert "NOT as expected" not in capsys.readouterr().out


@every_lesson
def test_results_of_sweeps_are_there_with_three_seeds(path):
    names = sweeps_of(path)
    if not names:
        pytest.skip("the lesson has no sweep")
    kept = json.loads((ROOT / "walkthroughs" / "results" / f"{path.stem}.json").read_text())
    assert sorted(kept) == sorted(names)
    for sweep in kept.values():
        assert len(sweep["seeds"]) >= 3
        for numbers_of_seeds in sweep["results"].values():
            assert len(numbers_of_seeds) == len(sweep["seeds"])


# ---------------------------------------------------------------------------- notebooks
@every_lesson
def test_the_notebook_is_made_from_the_lesson(path):
    """`make notebooks` makes it."""
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(path.parent / "notebooks" / f"{path.stem}.ipynb")
    from_lesson = jupytext.read(path)
    assert ([(cell.cell_type, cell.source) for cell in notebook.cells]
            == [(cell.cell_type, cell.source) for cell in from_lesson.cells])


@every_lesson
def test_the_notebook_has_the_outputs_of_a_whole_run(path):
    notebook = json.loads((path.parent / "notebooks" / f"{path.stem}.ipynb").read_text("utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == path.read_text("utf-8").count("lesson.show(")
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert f"{path.stem}: " in printed                 # its last line
    assert str(ROOT) not in printed


# ---------------------------------------------------------------------------- the first cell
def run_set_up(folder, **environment):
    """Run the set-up cell as a notebook in a folder does, and print where it found the project."""
    code = set_up_cell(LESSONS[0]) + "\nprint(root)\nimport lesson\n"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment,
                          capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path):
    """A small repository that has what the first cell looks for."""
    folder = tmp_path / "repository"
    (folder / "walkthroughs").mkdir(parents=True)
    (folder / "walkthroughs" / "lesson.py").write_text("print('the lesson module')\n")
    (folder / "requirements.txt").write_text("")
    for words in (["init", "--quiet"], ["add", "."],
                  ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "-m", "x"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def test_the_first_cell_clones_the_project_on_a_bare_server(tmp_path, repository):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run_set_up(elsewhere, NANORAE=str(repository), PATH="/usr/bin:/bin:/usr/local/bin")
    assert "the lesson module" in result.stdout, result.stderr
    assert str(elsewhere / "nanoRAE") in result.stdout
    # again, in the same place: what is there is taken
    assert run_set_up(elsewhere, PATH="").returncode == 0


def test_the_first_cell_finds_the_project_above(repository):
    notebooks = repository / "walkthroughs" / "notebooks"
    notebooks.mkdir()
    result = run_set_up(notebooks, PATH="")
    assert result.stdout.splitlines()[0] == str(repository), result.stderr


def test_the_first_cell_says_what_to_do_where_nothing_is_found(tmp_path):
    result = run_set_up(tmp_path, PATH="")
    assert result.returncode != 0
    assert "set NANORAE to an address that git can clone" in result.stderr


def test_the_first_cell_installs_what_is_missing(monkeypatch):
    commands = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(set_up_cell(LESSONS[0]), {})
    assert commands == [[sys.executable, "-m", "pip", "install", "-q", "-r",
                         str(ROOT / "requirements.txt")]]


# ---------------------------------------------------------------------------- lesson.py
@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begin a lesson with flags."""
    def begin_with(*flags):
        monkeypatch.setattr(sys, "argv", ["test.py", "--out", str(tmp_path), *flags])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        return Lesson("test")
    return begin_with


def test_numbers_are_compared_with_what_is_expected(begin, capsys):
    lesson = begin("--quick")
    lesson.number("a", 3.0, 2, 4)
    lesson.number("b", 5.0, 2, 4)
    lesson.number("c", 5.0, 2, 4, quick=(4, 6))
    lesson.end()
    printed = capsys.readouterr().out
    assert "a = 3, as expected" in printed and "b = 5, NOT as expected (2 to 4)" in printed
    numbers = json.loads((lesson.folder / "numbers.json").read_text())["numbers"]
    assert [number["is_expected"] for number in numbers.values()] == [True, False, True]


def test_a_stopped_sweep_goes_on(begin):
    calls = []

    def run(arm, seed, folder):
        calls.append((arm, seed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"x": seed + len(arm)}

    with pytest.raises(KeyboardInterrupt):
        begin("--full", "--quick").sweep("widths", ["a", "bb"], run)
    lesson = begin("--full", "--quick")
    results = lesson.sweep("widths", ["a", "bb"], run)
    assert calls == [("a", 0), ("bb", 0), ("bb", 0)]
    assert lesson_module.values_of(results, ["a", "bb"], "x").tolist() == [[1], [2]]
    kept = json.loads((lesson.folder / "results.json").read_text())
    assert kept["widths"]["results"]["a"][0]["x"] == 1
    begin("--full", "--quick").sweep("widths", ["a", "bb"], run)       # all of it anew
    assert len(calls) == 5


def test_missing_results_and_useless_folders_are_named_in_a_line(begin, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="test.json does not exist; run .* with --full"):
        begin().sweep("widths", ["a"], None)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["test.py", "--out", str(tmp_path / "file")])
    with pytest.raises((ValueError, OSError), match="file"):
        Lesson("test")


@pytest.mark.parametrize("error, line", [
    (ValueError("two\nlines"), "error: two"), (KeyboardInterrupt(), "stopped; finished runs"),
    (KeyboardInterrupt("stopped in a training"), "stopped in a training"),
])
def test_errors_of_users_end_in_one_line(error, line, capsys):
    lesson_module.end_in_one_line(type(error), error, None)
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


def test_results_that_are_torn_are_named(tmp_path):
    (tmp_path / "result.json").write_text('{"PSNR": 3')
    with pytest.raises(ValueError, match="result.json is no JSON .* delete it"):
        lesson_module.read_json(tmp_path / "result.json")


def test_a_training_that_was_stopped_is_not_taken_for_finished(tmp_path):
    class Script:                                      # ends early, as after a signal
        @staticmethod
        def parse_args(words):
            return lesson_module.argparse.Namespace(steps=4)

        @staticmethod
        def main(args):
            lesson_module.storage.save_checkpoint(tmp_path / "last.pt", step=3)

    with pytest.raises(KeyboardInterrupt, match="finished runs of --full are kept"):
        lesson_module.train(Script, tmp_path)


def test_flags_become_words():
    flags = {"lr": 0.1, "data": ["a", "b"], "freeze_llm": True}
    assert command_line(flags) == ["--lr", "0.1", "--data", "a", "b", "--freeze_llm"]
