"""Real text that every Python carries: the documentation strings of its standard library, and its sources."""

import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"}
TABLES = ("encodings", "pydoc_data", "_sysconfigdata")  # how the names of packages begin that a program wrote


@dataclass(frozen=True)
class Passage:
    """A paragraph of a docstring, or a source, and the dotted name of the module, class or function that it is from."""

    source: str
    text: str


def stdlib_passages(limit: int | None = None, packages: tuple[str, ...] = ()) -> list[Passage]:
    """Paragraphs of the standard library's docstrings, in the order of its files.

    The files are parsed, not imported. A paragraph without a letter, or already seen, is left out. `limit` takes that
    many, evenly spread; `packages` takes those of some top-level packages only.
    """
    passages, seen = [], set()
    for path, module in _modules(packages):
        for name, doc in _docstrings(path, module):
            for text in paragraphs(doc):
                if text not in seen:
                    seen.add(text)
                    passages.append(Passage(name, text))
    if limit is None or limit >= len(passages):
        return passages
    return [passages[i * len(passages) // limit] for i in range(limit)]


def stdlib_sources(packages: tuple[str, ...] = ()) -> list[Passage]:
    """The sources of the standard library's modules, in the order of its files, without those that a program wrote."""
    modules = [(path, name) for path, name in _modules(packages) if not name.startswith(TABLES)]
    return [Passage(name, text) for path, name in modules if (text := path.read_text(errors="replace"))]


def stdlib_docstrings(packages: tuple[str, ...] = ()) -> Iterator[tuple[str, Passage]]:
    """The docstrings themselves, line breaks and all, in the order of the files; each after its module's dotted name."""
    for path, module in _modules(packages):
        for name, doc in _docstrings(path, module):
            yield module, Passage(name, doc)


@dataclass(frozen=True)
class Function:
    """A function or method: its dotted name, its arguments as they stand between the brackets, its docstring ("" for none)
    and its source without the indentation that all its lines share."""

    name: str
    arguments: str
    doc: str
    source: str


def stdlib_functions(packages: tuple[str, ...] = ()) -> Iterator[tuple[str, Function]]:
    """Functions, methods and the functions in them, in the order of the files; each after its module's dotted name."""
    for path, module in _modules(packages):
        lines = path.read_text(errors="replace").splitlines()
        for name, node in _named_nodes(path, module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                yield module, Function(name, ast.unparse(node.args), ast.get_docstring(node) or "", source)


def paragraphs(doc: str) -> list[str]:
    """A docstring's paragraphs that have a letter in them, each on one line."""
    texts = (" ".join(paragraph.split()) for paragraph in doc.split("\n\n"))
    return [text for text in texts if any(c.isalpha() for c in text)]


def _modules(packages: tuple[str, ...]):
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        wanted = not packages or parts[0] in packages
        if wanted and not SKIPPED.intersection(parts) and not parts[0].startswith("config-"):
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(path: Path, module: str):
    for name, node in _named_nodes(path, module):
        doc = ast.get_docstring(node)
        if doc:
            yield name, doc


def _named_nodes(path: Path, module: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old modules are not this program's concern
        tree = ast.parse(path.read_bytes())
    stack = [(module, tree)]
    while stack:
        name, node = stack.pop()
        yield name, node
        children = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        stack.extend((f"{name}.{child.name}", child) for child in reversed(children))
