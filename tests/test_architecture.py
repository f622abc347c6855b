"""The rooms and the one-way order between them, read from the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxft"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> what of jaxft it may import, besides itself. `errors` is a leaf that anybody may raise from.
MAY_IMPORT = {
    "core": (),
    "quant": ("core",),
    "peft": ("core",),
    "models": ("core",),
    "sharding": ("core",),
    "checkpoint": ("core", "quant", "peft", "models", "sharding"),
    "data": (),
    "objectives": (),
    "rewards": ("border.errors",),
    "border": (),
    "training": ("core", "quant", "sharding", "checkpoint", "objectives"),
    "rollout": ("core", "models", "data", "sharding", "objectives.terms", "rewards"),
}
# files at the top of the package (and the command line) see every room; no room sees them
TOP = {
    "__init__",
    "__main__",
    "calibrate",
    "cli",
    "config",
    "flax",
    "model",
    "plan",
    "recipes",
    "report",
    "run",
    "run_dir",
    "scoring",
    "testing",
    "vocabulary",
}

# room -> third-party packages that must never be imported in it, at any depth of nesting
FORBIDDEN = {
    "core": ("flax", "optax", "orbax", "transformers", "datasets", "grain", "pydantic", "rich", "torch", "numpy"),
    "peft": ("flax", "transformers", "datasets", "grain", "pydantic", "torch"),
    "models": ("flax", "transformers", "datasets", "grain", "pydantic", "torch"),
    "objectives": ("flax", "optax", "orbax", "transformers", "datasets", "grain", "pydantic", "torch", "numpy"),
    "data": ("jax", "flax", "torch", "pydantic"),
    "training": ("flax", "transformers", "datasets", "grain", "pydantic", "torch"),
    "rollout": ("flax", "datasets", "pydantic", "torch"),
    "sharding": ("flax", "pydantic", "torch"),
    "checkpoint": ("flax", "pydantic", "torch"),
    "rewards": ("jax", "flax", "transformers", "datasets", "grain", "pydantic", "torch"),
}

# folder -> the literal table in its __init__.py, what in its text makes a module one of its entries, and those apart
TABLES = {
    "peft": ("METHODS", r"^class \w+\((Targeted|Slotted)\)|^def adapt\([^)]*\bconfig\b", ("sites",)),
    "objectives": ("OBJECTIVES", r"^def \w+\(config: \w+, scores: Scores, ", ()),
    "models/families": ("FAMILIES", "", ()),
    "rewards": ("REWARDS", r"^def \w+\(config: \w+\) -> Function", ()),
}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(dotted: str) -> str:
    """`jaxft.models.families.llama` -> `models`; a file at the top of the package is its own name."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute dotted names a file imports (each name of a `from` import too), wherever in it they stand."""
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found += [(f"{origin}.{alias.name}", node.lineno) for alias in node.names]
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_room_is_declared():
    rooms = {room(module(path)) for path in FILES}
    assert rooms <= {*MAY_IMPORT, *TOP}, f"say in MAY_IMPORT or TOP what these may see: {rooms - {*MAY_IMPORT, *TOP}}"


def test_imports_go_one_way():
    wrong = []
    for path in FILES:
        here = room(module(path))
        if here in TOP:
            continue
        allowed = tuple(f"jaxft.{other}" for other in (here, *MAY_IMPORT[here]))
        wrong += [
            f"{where(path, line)} imports {name}; {here} may see {MAY_IMPORT[here] or 'nothing'}"
            for name, line in imports(path)
            if within(name, ("jaxft",)) and not within(name, allowed)
        ]
    assert not wrong, "\n".join(wrong)


def test_forbidden_packages():
    wrong = []
    for path in FILES:
        forbidden = FORBIDDEN.get(room(module(path)), ())
        wrong += [f"{where(path, line)} imports {name}" for name, line in imports(path) if within(name, forbidden)]
    assert not wrong, "\n".join(wrong)


def test_torch_is_never_imported():
    """The parity extras are for tests: nothing that runs for a user needs torch, peft or trl."""
    parity = ("torch", "peft", "trl", "bitsandbytes", "accelerate")
    wrong = [where(path, line) for path in FILES for name, line in imports(path) if within(name, parity)]
    assert not wrong, wrong


def test_only_the_bridge_and_nobody_else_imports_flax():
    wrong = [
        where(path, line)
        for path in FILES
        for name, line in imports(path)
        if within(name, ("flax",)) and path.parent != PACKAGE / "flax"
    ]
    assert not wrong, wrong


def test_no_private_jax():
    sources = [*FILES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    private = "jax." + "_src"
    assert not [str(path.relative_to(ROOT)) for path in sources if private in path.read_text()]


def test_files_are_short():
    sources = [*FILES, *(ROOT / "scripts").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): n for path in sources if (n := len(path.read_text().splitlines())) > 400}
    assert not long, long


def test_no_dumping_grounds():
    names = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    sources = [*FILES, *(ROOT / "scripts").rglob("*"), *(ROOT / "tests").rglob("*")]
    assert not [str(path.relative_to(ROOT)) for path in sources if path.stem in names]


def test_every_file_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.read_text() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, silent


@pytest.mark.parametrize("folder", [folder for folder in TABLES if (PACKAGE / folder / "__init__.py").exists()])
def test_every_module_is_in_its_table(folder):
    """A new method, objective, family or reward is its file and one line of the literal table: no file is forgotten."""
    table, marker, apart = TABLES[folder]
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    literal = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and table
        in [t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target]) if isinstance(t, ast.Name)]
    ]
    assert len(literal) == 1 and isinstance(literal[0], ast.Dict), f"{folder}/__init__.py has no literal {table}"
    named = {node.id for node in ast.walk(literal[0]) if isinstance(node, ast.Name)}
    modules = {
        path.stem
        for path in (PACKAGE / folder).glob("*.py")
        if path.stem not in ("__init__", *apart) and re.search(marker, path.read_text(), re.MULTILINE)
    }
    assert modules <= named, f"not in {table}: {sorted(modules - named)}"


@pytest.mark.parametrize(
    "modules", ["jaxft, jaxft.cli, jaxft.cli.arguments", "jaxft; jaxft.trainable_mask", "jaxft.config"]
)
def test_import_is_light(modules):
    """`import jaxft`, the command line and reading a config load none of the heavy packages."""
    heavy = ("datasets", "grain", "flax", "transformers", "torch", "orbax", "optax", "pyarrow", "pandas")
    code = f"import sys, {modules}\nprint([name for name in {heavy!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout == "[]\n", out.stdout
