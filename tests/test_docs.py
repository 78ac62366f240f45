"""The documentation: what is drawn and listed is what there is."""

import inspect
import re
import sys
from pathlib import Path

import grimp
import pytest

import dfa_lens as dfa

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
REDRAW = "run `make drawings`"


def test_drawings_are_up_to_date():
    import drawings

    for name, draw in drawings.DRAWINGS.items():
        kept = (ROOT / "docs" / "images" / f"{name}.svg").read_text()
        assert kept == draw().svg(), REDRAW


def test_the_leaderboards_page_is_that_of_its_rows():
    import leaderboard

    trained, planted = leaderboard.rows()
    assert leaderboard.PAGE.read_text() == leaderboard.page(trained, planted), "run python tools/leaderboard.py"
    assert leaderboard.FIGURE.read_text() == leaderboard.svg(trained), "run python tools/leaderboard.py"


@pytest.fixture(scope="module")
def imports():
    """Which module imports which, also inside functions; a subpackage counts as one."""
    whole = grimp.build_graph("dfa_lens", exclude_type_checking_imports=True, cache_dir=None)
    modules = whole.find_children("dfa_lens")
    for module in modules:
        whole.squash_module(module)
    graph = grimp.ImportGraph()
    for module in modules:
        for other in whole.find_modules_directly_imported_by(module) & modules - {module}:
            graph.add_import(importer=module, imported=other)
    return graph


def test_the_import_diagram_is_up_to_date(imports):
    """Every arrow is an import, and every import is an arrow or follows from some."""
    svg = (ROOT / "docs" / "images" / "imports.svg").read_text()
    drawn = grimp.ImportGraph()
    for importer, imported in re.findall(r"<title>(\.\w+)/?&#45;&gt;(\.\w+)/?</title>", svg):
        drawn.add_import(importer=f"dfa_lens{importer}", imported=f"dfa_lens{imported}")
        assert imports.direct_import_exists(importer=f"dfa_lens{importer}", imported=f"dfa_lens{imported}"), REDRAW
    assert drawn.modules == imports.modules, REDRAW
    # not drawn: NodeSet.from_points asks a model, the one import that runs upwards (pyproject.toml)
    imports.remove_import(importer="dfa_lens.data", imported="dfa_lens.models")
    for module in drawn.modules:
        for other in imports.find_modules_directly_imported_by(module):
            assert drawn.chain_exists(importer=module, imported=other), REDRAW


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path):
    """In the files beside the documentation, whose own links ``make docs`` checks."""
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert link.startswith(("http", "mailto:")) or (path.parent / link).exists(), link


PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_in_the_docs_runs(path, tmp_path, monkeypatch):
    """The blocks of a page, one after the other; a traceback shows the page's own lines."""
    monkeypatch.chdir(tmp_path)
    page, scope = path.read_text(), {}
    for block in re.finditer(r"```python\n(.*?)```", page, re.S):
        above = page.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block.group(1), path, "exec"), scope)


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
    for module in ("controls", "diagnostics", "similarity", "hooks", "plots", "statistics", "tasks", "zoo", "study"):
        loaded = getattr(dfa, module)
        own = [
            value
            for name, value in vars(loaded).items()
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith(loaded.__name__)
        ]
        without = [each.__name__ for each in own if ">>>" not in (each.__doc__ or "") and each.__name__ not in INNER]
        assert not without, f"{module}: {without}"


def test_the_glossary_is_sorted():
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^(?! )(\S.*)\n  \S", text, re.M)
    assert len(terms) > 25
    assert [term.lower() for term in terms] == sorted(term.lower() for term in terms)


def test_tests_that_a_page_names_are_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/accuracy.md").read_text()))
    there = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 15
    assert named <= there
