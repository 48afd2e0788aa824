"""Grade the exercises: what is done, what is still a hole, and what is wrong, in a sentence.

    python walkthroughs/exercises/check.py
    python walkthroughs/exercises/check.py time_shift euler

Each NAME.py beside this file has an idea of the project as a hole. Results are compared with the
project's own function on random inputs. Ends with exit code 0 if all named exercises are right.
"""
import sys
import traceback
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from comparison import Failed, Wrong
from hints import find_hint
from references import EXERCISES

import run_flags
import runtime

HERE = Path(__file__).resolve().parent
OK = "ok"
HOLE = "your code here"           # the message of the NotImplementedError in a hole


def parse_args(argv=None):
    p = run_flags.Parser(__doc__, {})
    p.add_argument("names", nargs="*", metavar="NAME",
                   help=f"Exercises to check, of {', '.join(EXERCISES)} (default: all).")
    p.add_argument("--dir", type=Path, default=HERE,
                   help="Folder of the files to check (default: the folder of this script).")
    options = p.parse_args(argv)
    unknown = [name for name in options.names if name not in EXERCISES]
    if unknown:
        p.error(f"{' '.join(unknown)}: choose from {' '.join(EXERCISES)}")
    return options


# %% One exercise
def grade(name, folder):
    """OK, or what is missing or wrong in folder/NAME.py, in one line."""
    path = Path(folder) / f"{name}.py"
    if not path.exists():
        return f"there is no {path}"
    torch.manual_seed(0)
    try:
        module = load(path)
        for part in EXERCISES[name]:
            part.check(module)
    except Exception as error:                         # the student's code may raise anything
        return describe(error, path)
    return OK


def load(path):
    """The student's file as a module. The usual import would keep it in __pycache__, and could take
    the old one for a file that was saved twice within a second.
    """
    module = types.ModuleType(f"exercise_{path.stem}")
    code = compile(path.read_text("utf-8"), str(path), "exec")
    exec(code, module.__dict__)
    return module


def describe(error, path):
    """What an exception says of the student's file, with the line that led to it."""
    inputs = ""
    if isinstance(error, Failed):
        inputs = f" (inputs: {error})"
        error = error.__cause__
    line = None
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            line = frame.lineno                        # the innermost one of the file is the last
    place = f" ({path.name}, line {line})" if line else ""
    message = runtime.one_line(error)
    if isinstance(error, Wrong):
        return f"{message}{place}{inputs}"
    if isinstance(error, NotImplementedError) and message == HOLE:
        return f"still a hole{place}"
    hint = find_hint(path.stem, message)
    if hint:
        message = f"{hint}. The message: {message}"
    return f"raises {type(error).__name__}{place}: {message}{inputs}"


# %% All of them
def main(options):
    names = options.names or list(EXERCISES)
    missing = []
    for name in names:
        result = grade(name, options.dir)
        print(f"{name:20}{result}", flush=True)
        if result != OK:
            missing.append(name)
    if missing:
        done = len(names) - len(missing)
        raise SystemExit(f"{done} of {len(names)} exercises are done; not yet: "
                         f"{' '.join(missing)}")
    print(f"all {len(names)} done" if len(names) > 1 else "done")


if __name__ == "__main__":
    runtime.run(main, parse_args)
