"""The documentation: what is drawn and listed is what there is."""

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import dfa_lens as dfa

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def test_drawings_are_up_to_date():
    import drawings

    for name, draw in drawings.DRAWINGS.items():
        kept = (ROOT / "docs" / "images" / f"{name}.svg").read_text()
        assert kept == draw().svg(), "run `python tools/drawings.py`"


def test_imports_run_downwards():
    """What plots and the three big steps may not know."""
    import drawings

    graph = drawings.imports(late=False)
    assert not drawings.reach(graph, "plots") & {"adapter", "models", "training"} - drawings.reach(graph, "results")
    assert "tasks" not in drawings.reach(graph, "attribution") | drawings.reach(graph, "training")
    for name in graph:
        assert name not in drawings.reach(graph, name), f"{name} imports itself through others"


def test_every_page_is_reachable_and_every_link_leads_somewhere():
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages = {page for page in pages if not page.startswith(("_build", "demos/"))}
    listed = set()
    for index in ("index", "api/index"):
        folder = index.rpartition("/")[0]
        for block in re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs" / f"{index}.md").read_text(), re.S):
            entries = [line for line in block.split("\n") if line and not line.startswith(":")]
            listed |= {f"{folder}/{entry}".lstrip("/") for entry in entries}
    assert pages - {"index"} == listed - {"demos/*"}
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs" / f"{page}.md" for page in pages)]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            target = path.parent / link
            if "docs/demos" in target.as_posix():  # a copy that the build makes
                target = ROOT / "demos" / target.name
            assert link.startswith(("http", "mailto:")) or target.exists(), f"{path.name}: {link}"


def public():
    """Every public class, function and method of the package, with its docstring."""
    for path in sorted((ROOT / "dfa_lens").rglob("*.py")):
        name = ".".join(("dfa_lens", *path.relative_to(ROOT / "dfa_lens").with_suffix("").parts))
        if path.name == "train.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield f"{name}.{node.name}", ast.get_docstring(node)


def test_the_names_of_the_package_have_examples():
    """What `import dfa_lens` offers directly is documented with an example that runs (the doctests)."""
    without = []
    for name in dfa.__all__:
        value = getattr(dfa, name)
        if inspect.isclass(value) and issubclass(value, (Exception, Warning)):
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            methods = [
                m.__doc__ or "" for _, m in inspect.getmembers(value, inspect.isroutine) if not _.startswith("_")
            ]
            if ">>>" not in (value.__doc__ or "") and not any(">>>" in each for each in methods):
                without.append(name)
    assert not without


# what a Setting of a study calls, not a reader
INNER = {"attention_kernel", "behaviour_kernel", "diagnose", "labels"}


def test_functions_of_public_modules_have_examples():
    for module in ("controls", "diagnostics", "features", "hooks", "plots", "statistics", "tasks", "zoo", "study"):
        loaded = import_module(f"dfa_lens.{module}")
        own = [
            value
            for name, value in vars(loaded).items()
            if inspect.isfunction(value)
            and not name.startswith("_")
            and value.__module__.startswith(f"dfa_lens.{module}")
        ]
        without = [each.__name__ for each in own if ">>>" not in (each.__doc__ or "") and each.__name__ not in INNER]
        assert not without, f"{module}: {without}"


def test_the_glossary_is_sorted():
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^(?! )(\S.*)\n  \S", text, re.M)
    assert len(terms) > 25
    assert [term.lower() for term in terms] == sorted(term.lower() for term in terms)
