"""Shapes in signatures are checked at run time while the tests run: in every function and dataclass that has any.

jaxtyping has an import hook of its own, which wraps all functions, most of which have no shape. Some of those run a
thousand times a pass or are made anew in each, and wrapping them took more than half of the tests' time.
"""

from __future__ import annotations

import ast
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

#: What our signatures use of jaxtyping.
KINDS = {"Bool", "Float", "Int"}
#: The name of the decorator in modules that are checked.
CHECKED = "_shapes_are_checked"


def has_shape(node: ast.AST | None) -> bool:
    """Whether an annotation has a shape in it: ``Float[Tensor, "n"] | None``."""
    return node is not None and any(
        isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id in KINDS
        for part in ast.walk(node)
    )


class Decorating(ast.NodeTransformer):
    """Decorates functions with a shape in their signature, and classes, for the fields of those that are dataclasses."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if has_shape(node.args) or has_shape(node.returns):
            node.decorator_list.append(ast.Name(CHECKED, ast.Load()))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.Name(CHECKED, ast.Load()))
        return node


class Loader(SourceFileLoader):
    """Compiles a module anew, decorated; nothing of it is kept in a cache of bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = Decorating().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        # an int is welcome where a float is, as for every type checker
        checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
        setattr(module, CHECKED, jaxtyped(typechecker=checker))
        super().exec_module(module)


class Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".", maxsplit=1)[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        if b"jaxtyping" not in spec.loader.get_data(spec.loader.path):
            return None
        spec.loader = Loader(name, spec.loader.path)
        return spec


def check(package: str) -> None:
    """Check the shapes of a package that is not imported yet."""
    sys.meta_path.insert(0, Finder(package))
