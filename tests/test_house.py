"""The rules of the house that a program can check. Run: python -m pytest tests/test_house.py"""
import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.shipped

PRODUCT_FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("shapes/*.py")])
FOLDERS_OF_CODE = (".", "shapes", "tests", "assets", "walkthroughs", "walkthroughs/exercises")


def name_in_readme(path):
    return path.relative_to(ROOT).as_posix()


every_product_file = pytest.mark.parametrize("path", PRODUCT_FILES, ids=name_in_readme)


# ---------------------------------------------------------------------------- README and assets
def test_readme_table_has_the_true_line_counts():
    """Rows look like: | `model.py` | what it has | 450 |"""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.py)` \|.*\| (\d+) \|$", readme, re.MULTILINE)
    in_table = {name: int(lines) for name, lines in rows}
    true_counts = {}
    for path in PRODUCT_FILES:
        true_counts[name_in_readme(path)] = len(path.read_text().splitlines())
    assert in_table == true_counts


def test_assets_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "assets").iterdir()
             if path.is_file()}
    assert sum(sizes.values()) <= 40e6
    assert sizes["tiny_encoder.safetensors"] <= 8e6


# ---------------------------------------------------------------------------- linters
def test_ruff_finds_nothing():
    """The rules are in pyproject.toml."""
    pytest.importorskip("ruff")
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet",
                             "--output-format", "concise", "."],
                            cwd=ROOT, capture_output=True, text=True)
    assert result.stdout + result.stderr == ""


def test_pyflakes_finds_nothing():
    pytest.importorskip("pyflakes")
    files = [str(path) for folder in FOLDERS_OF_CODE for path in (ROOT / folder).glob("*.py")]
    result = subprocess.run([sys.executable, "-m", "pyflakes", *files],
                            capture_output=True, text=True)
    assert result.stdout == ""


@every_product_file
def test_nothing_that_the_house_forbids(path):
    forbidden = (r"import \*|parse_known_args|strict=False|weights_only=False|TODO|\bfloat16"
                 r"|GradScaler")
    assert re.findall(forbidden, path.read_text()) == []


# ---------------------------------------------------------------------------- imports
# Imports point downwards. Modules of one level may only import each other where it says so.
LEVELS = [
    {"runtime", "storage", "run_flags", "saving", "speed", "progress", "sharding", "pictures",
     "muon"},
    {"model", "llm", "data", "index", "listing", "order", "shapes"},
    {"t2i", "release", "baselines", "metrics", "evaluation"},
    {"sample", "eval_decoder", "eval_fid", "eval_t2i"},
    {"train_decoder", "train_dit", "train_t2i"},
]
WITHIN_A_LEVEL = {
    ("storage", "runtime"), ("run_flags", "runtime"), ("run_flags", "storage"),
    ("saving", "runtime"), ("saving", "storage"), ("progress", "runtime"), ("progress", "storage"),
    ("pictures", "storage"), ("progress", "run_flags"), ("progress", "speed"),
    ("sharding", "runtime"), ("sharding", "storage"), ("sharding", "saving"),
    ("sharding", "run_flags"),
    ("llm", "model"), ("data", "index"), ("data", "listing"), ("data", "order"), ("data", "shapes"),
    ("index", "listing"),
    ("release", "baselines"), ("metrics", "release"), ("evaluation", "release"),
    ("t2i", "release"),
    ("eval_decoder", "sample"), ("eval_fid", "sample"), ("eval_t2i", "sample"),
}
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def module_of(path):
    """The module that a product file is part of: the files of shapes/ are parts of one module."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path):
    """Names of the product's modules that a file imports, in functions as well."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.split(".")[0])
    return modules & LEVEL_OF.keys()


@every_product_file
def test_imports_point_downwards(path):
    importer = module_of(path)
    assert importer in LEVEL_OF, f"give {importer} a place in LEVELS"
    for imported in imported_modules(path) - {importer}:
        downwards = LEVEL_OF[imported] < LEVEL_OF[importer]
        assert downwards or (importer, imported) in WITHIN_A_LEVEL, f"{importer} imports {imported}"


@every_product_file
def test_nothing_imports_a_training_script(path):
    training_scripts = {"train_decoder", "train_dit", "train_t2i"}
    assert imported_modules(path) & training_scripts - {module_of(path)} == set()


def imports_within_shapes():
    """For each file of shapes/, the names of the other ones that it imports."""
    graph = {path.stem: set() for path in ROOT.glob("shapes/*.py")}
    for path in ROOT.glob("shapes/*.py"):
        # Imports inside functions are made when the modules are complete.
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                parts = set((node.module or "").split("."))
                graph[path.stem] |= (names | parts) & graph.keys() - {path.stem}
            elif isinstance(node, ast.Import):
                parts = {part for alias in node.names for part in alias.name.split(".")}
                graph[path.stem] |= parts & graph.keys() - {path.stem}
    return graph


def test_files_of_shapes_import_each_other_without_a_circle():
    graph = imports_within_shapes()
    while graph:
        importing_none = {name for name, imported in graph.items() if not imported & graph.keys()}
        assert importing_none, f"a circle of imports among {sorted(graph)}"
        graph = {name: graph[name] for name in graph.keys() - importing_none}


# ---------------------------------------------------------------------------- habits
EXPRESSIONS_RUN_FOR_THEIR_EFFECTS = (
    ast.BoolOp, ast.Tuple, ast.List, ast.IfExp, ast.Compare, ast.ListComp, ast.SetComp,
    ast.DictComp, ast.GeneratorExp)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_text_or_container(node):
    """A string, a list, a tuple or a dict, as far as the source shows it."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (str, bytes))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple", "dict", "str")
    return isinstance(node, (ast.List, ast.Tuple, ast.Dict, ast.JoinedStr, *COMPREHENSIONS))


def is_condition(node):
    """True or False, as far as the source shows it."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("bool", "isinstance")
    return isinstance(node, (ast.Compare, ast.BoolOp))


def is_pair(node):
    """Two values written out as a tuple or a list, such as (a, b)."""
    if not isinstance(node, (ast.Tuple, ast.List)):
        return False
    return len(node.elts) == 2 and not any(isinstance(x, ast.Starred) for x in node.elts)


def habits_to_avoid(source):
    """A list of "line: what is wrong there" for a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, EXPRESSIONS_RUN_FOR_THEIR_EFFECTS):
            found.append(f"{node.lineno}: an expression as a statement; use `if` or `for`")
        if isinstance(node, (ast.Call, *COMPREHENSIONS)):
            children = ast.walk(node)
            if any(isinstance(child, ast.NamedExpr) for child in children):
                found.append(f"{node.lineno}: a walrus inside a call or comprehension")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if is_text_or_container(one) and (is_condition(other) or isinstance(one, ast.Dict)):
                    found.append(f"{node.lineno}: a list, text or dict times a condition")
        if isinstance(node, ast.Subscript) and is_pair(node.value):
            found.append(f"{node.lineno}: a pair indexed by a condition")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append(f"{node.lineno}: a lambda with a name")
    return found


@pytest.mark.parametrize("source", [
    "ready and launch()",
    "ready or launch()",
    "first(), second()",
    "[launch(x) for x in range(3)]",
    "launch() if ready else wait()",
    "launch(n := 3)",
    "[m for x in range(3) if (m := x * x)]",
    "names = ['a'] * (n > 3)",
    "text = 'and more' * bool(n)",
    "text = (not n) * f'{n}'",
    "x = (1, 2)[n > 3]",
    "double = lambda x: 2 * x",
])
def test_each_habit_is_found(source):
    assert habits_to_avoid(source) != []


@pytest.mark.parametrize("source", [
    '"""A docstring."""',
    "while (n := read()):\n    use(n)",
    "zeros = [0] * n",
    "line = '-' * 80",
    "mask = x * (x > 0)",
    "launch(1 if ready else 2)",
    "sorted(names, key=lambda name: name.lower())",
    'caption = [*class_names, "none"][label]',
])
def test_plain_code_is_not_taken_for_a_habit(source):
    assert habits_to_avoid(source) == []


@every_product_file
def test_statements_do_and_expressions_are(path):
    assert habits_to_avoid(path.read_text()) == []
