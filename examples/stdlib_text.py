"""Real text that every Python carries: the documentation strings of its standard library."""

import ast
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"}


@dataclass(frozen=True)
class Passage:
    """A paragraph of a docstring, and the dotted name of the module, class or function that it documents."""

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
            for paragraph in doc.split("\n\n"):
                text = " ".join(paragraph.split())
                if any(c.isalpha() for c in text) and text not in seen:
                    seen.add(text)
                    passages.append(Passage(name, text))
    if limit is None or limit >= len(passages):
        return passages
    return [passages[i * len(passages) // limit] for i in range(limit)]


def _modules(packages: tuple[str, ...]):
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        wanted = not packages or parts[0] in packages
        if wanted and not SKIPPED.intersection(parts) and not parts[0].startswith("config-"):
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(path: Path, module: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old modules are not this program's concern
        tree = ast.parse(path.read_bytes())
    stack = [(module, tree)]
    while stack:
        name, node = stack.pop()
        doc = ast.get_docstring(node)
        if doc:
            yield name, doc
        children = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
        stack.extend((f"{name}.{child.name}", child) for child in reversed(children))
