"""English that every Python installation has: its documentation topics and the docstrings of its standard library.

The documents depend on the Python version and on nothing else; which of them are held out depends on their names alone.
"""

import ast
import dataclasses
import hashlib
import importlib
import pathlib
import pydoc_data.topics
import sys
import sysconfig
import types
from collections.abc import Iterator

# Tests, applications, and modules that differ between packagings of the same Python.
_SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


@dataclasses.dataclass(frozen=True)
class Document:
    """A topic or a module: entries of the form `heading\\n\\ntext`, in their order in the source."""

    name: str
    entries: tuple[str, ...]


def read_corpus() -> list[Document]:
    """All documents of this Python, sorted by name; an entry that stands in several appears in the first one only."""
    seen: set[str] = set()
    documents = []
    for name, entries in sorted({**dict(_topics()), **dict(_source_modules()), **dict(_builtin_modules())}.items()):
        new = tuple(dict.fromkeys(f"{heading}\n\n{text}" for heading, text in entries if text not in seen))
        seen.update(text for _, text in entries)
        if new:
            documents.append(Document(name, new))
    return documents


def is_held_out(document: Document, share: float = 0.04) -> bool:
    """Whether a document is kept for evaluation: decided by the hash of its name, the same everywhere."""
    digest = hashlib.sha256(document.name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _topics() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for name, text in pydoc_data.topics.topics.items():
        yield f"topics/{name}", [(f"topic {name}", text.strip())]


def _source_modules() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith("config-"):
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield f"modules/{module}", list(_docstrings(ast.parse(path.read_bytes()), module))


def _docstrings(node: ast.AST, qualified_name: str) -> Iterator[tuple[str, str]]:
    """Heading and docstring of a module, class or function and of what it defines, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield _heading(node, qualified_name), text
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        defines = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _docstrings(child, f"{qualified_name}.{name}" if defines else qualified_name)


def _heading(node: ast.AST, qualified_name: str) -> str:
    match node:
        case ast.Module():
            return f"module {qualified_name}"
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return f"{qualified_name}({ast.unparse(node.args)})"
    return f"class {qualified_name}"


def _builtin_modules() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Modules compiled into the interpreter, whose docstrings stand in no source file."""
    for name in sys.builtin_module_names:
        module = importlib.import_module(name)
        entries = [(f"module {name}", module.__doc__)] + [
            (f"{name}.{path}", value.__doc__) for path, value in _members(module)
        ]
        yield f"builtins/{name}", [(heading, text.strip()) for heading, text in entries if isinstance(text, str)]


def _members(owner: types.ModuleType | type) -> Iterator[tuple[str, object]]:
    for name, value in sorted(vars(owner).items()):
        if isinstance(value, type) and isinstance(owner, types.ModuleType) and value.__name__ == name:
            yield name, value
            yield from ((f"{name}.{member}", method) for member, method in _members(value))
        elif callable(value) and not name.startswith("__"):
            yield name, value
