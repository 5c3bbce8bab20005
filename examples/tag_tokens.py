"""Fine-tune a pretrained encoder to say of each token in Python source what it is there: a parameter, a method, a comment…

The text is the functions and methods of Python's standard library, a sequence each, as `tokenize` cuts them; the classes are
from `tokenize` and, of names, from `ast`. What would give strings and comments away is taken from them, their quotes and hash
signs, and the encoder's tokenizer drops line breaks, indentation and capitals: a word has to be told by what stands around it,
and a parameter by the function's head. Whole modules are held out. The baselines are the class that a subword most often
has, by itself and after the subword before it.

Run it: python examples/tag_tokens.py

On two threads of an Intel Xeon, in three minutes: 89.9% of the subwords right in both, against 60.0% and 67.4% by the
baselines; a step takes 1002 ms with fastattn and 1351 ms without, 1.35 times as fast, and 350 MiB instead of 652; the losses
differ by 2.7e-07 at most. 40% of a batch is padding, which fastattn does not compute.
"""

import argparse
import ast
import builtins
import io
import keyword
import re
import tokenize
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from learning import Comparison, chart, report
from minilm import fine_tune, load_model, load_tokenizer, padding, shuffled_batches, split_by_module
from stdlib_text import stdlib_sources
from transformers import AutoModelForTokenClassification, BatchEncoding, PreTrainedModel

CLASSES = (
    "keyword",
    "operator",
    "number",
    "string",
    "comment",
    "function",  # the name after def
    "parameter",  # where it is declared and where it is used
    "argument",  # the name before = in a call
    "variable",  # that the function assigns to
    "module",
    "builtin",
    "global",  # any other name
    "method",  # after a dot, and called
    "attribute",  # after a dot
)
MAX_TOKENS = 128
FEWEST_WORDS, MOST_WORDS = 20, 150  # in a function
IGNORED = -100  # as cross entropy has it


class Function(NamedTuple):
    """A function's words, in order, and the class of each, an index of CLASSES."""

    module: str
    words: list[str]
    classes: list[int]


def functions(module: str, source: str) -> list[Function]:
    """The functions and methods of a module. One with an f-string is left out: Python's versions cut those differently."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old modules
        tree = ast.parse(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    modules = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    lines = [token.start[0] for token in tokens]
    found = []
    for node in _outermost_functions(tree):
        if any(isinstance(inside, ast.JoinedStr) for inside in ast.walk(node)):
            continue
        words, classes = [], []
        names = _classes_of_names(node, modules)
        own = tokens[bisect_left(lines, node.lineno) : bisect_right(lines, node.end_lineno)]
        for before, token in zip([None, *own], own):
            text, kind = _word(token, before, names)
            if text and token.start != _docstring(node):
                words.append(text)
                classes.append(CLASSES.index(kind))
        if FEWEST_WORDS <= len(words) <= MOST_WORDS:
            found.append(Function(module, words, classes))
    return found


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef):
            yield from _outermost_functions(child)


def _docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int] | None:
    first = node.body[0]
    return (first.lineno, first.col_offset) if ast.get_docstring(node) is not None else None


def _classes_of_names(function: ast.AST, modules: set[str]) -> dict[tuple[int, int], str]:
    """By line and column, what the names in a function are, except after def."""
    nodes = list(ast.walk(function))
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    found = {}
    for node in nodes:
        if isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            found[node.lineno, node.col_offset] = "argument"
        elif isinstance(node, ast.Attribute):
            kind = "method" if id(node) in called else "attribute"
            found[node.end_lineno, node.end_col_offset - len(node.attr)] = kind
        elif isinstance(node, ast.Name):
            scopes = (
                ("parameter", parameters),
                ("variable", stored),
                ("module", modules),
                ("builtin", vars(builtins)),
            )
            found[node.lineno, node.col_offset] = next((kind for kind, ids in scopes if node.id in ids), "global")
    return found


def _word(token: tokenize.TokenInfo, before: tokenize.TokenInfo | None, names: dict) -> tuple[str, str]:
    """What the model sees of a token, nothing where it is only layout, and its class."""
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return token.string, "keyword"
        return token.string, "function" if before and before.string == "def" else names.get(token.start, "global")
    if token.type == tokenize.STRING:
        return re.sub(r"^\w*(\"\"\"|'''|\"|')(.*)\1$", r"\2", token.string, flags=re.DOTALL).strip(), "string"
    if token.type == tokenize.COMMENT:
        return token.string.strip("# "), "comment"
    kinds = {tokenize.NUMBER: "number", tokenize.OP: "operator"}
    return (token.string, kinds[token.type]) if token.type in kinds else ("", "operator")


def load(every: int = 3, share: float = 0.2) -> tuple[list[Function], list[Function]]:
    """Functions to train on, and those held out, from every so many-th of the modules."""
    sources = [source for source in stdlib_sources() if source.text.isascii()][::every]  # columns count bytes in ast
    found = [function for source in sources for function in functions(source.source, source.text)]
    return split_by_module(found, lambda function: function.module, share)


def encode(items: Sequence[Function], tokenizer) -> BatchEncoding:
    """Their subwords; every subword has the class of its word, and what is none has IGNORED."""
    options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    batch = tokenizer([function.words for function in items], is_split_into_words=True, **options)
    labels = [
        [IGNORED if word is None else function.classes[word] for word in batch.word_ids(row)]
        for row, function in enumerate(items)
    ]
    batch["labels"] = torch.tensor(labels)
    return batch


def most_frequent(train: Sequence[BatchEncoding], test: Sequence[BatchEncoding], before: int) -> float:
    """The share of subwords that have the class most frequent for them, given `before` subwords before them.

    What was never seen after those is taken after fewer, and a new subword has the most frequent class of all.
    """
    counts: defaultdict[tuple[int, ...], Counter] = defaultdict(Counter)

    def places(batches: Sequence[BatchEncoding]) -> Iterator[tuple[list[tuple[int, ...]], int]]:
        for batch in batches:
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                for i, label in enumerate(labels):
                    if label != IGNORED:
                        yield [tuple(ids[i - n : i + 1]) for n in range(before, -1, -1)] + [()], label

    for contexts, label in places(train):
        for context in contexts:
            counts[context][label] += 1
    hits = []
    for contexts, label in places(test):
        known = next(context for context in contexts if context in counts)
        hits.append(counts[known].most_common(1)[0][0] == label)
    return sum(hits) / len(hits)


def main(steps: int = 64, batch_size: int = 24, held_out: int = 200, out: Path = Path("out")) -> Comparison:
    tokenizer = load_tokenizer()
    train, test = load()
    test = sorted(test[:: -(-len(test) // held_out)], key=lambda function: len(function.words))
    questions = [encode(test[i : i + 64], tokenizer) for i in range(0, len(test), 64)]
    batches = [encode(items, tokenizer) for items in shuffled_batches(train, batch_size, steps)]
    everything = [encode(train, tokenizer)]
    levels = {
        "by subword": most_frequent(everything, questions, before=0),
        "by subword and the one before": most_frequent(everything, questions, before=1),
    }
    answers = sum((batch["labels"] != IGNORED).sum().item() for batch in questions)

    def accuracy(model: PreTrainedModel) -> float:
        return sum((model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in questions) / answers

    print(
        f"{len(train)} functions, {len(test)} held out with {answers} subwords; {padding(batches):.0%} of a batch is padding"
    )
    make_model = partial(load_model, AutoModelForTokenClassification, num_labels=len(CLASSES))
    comparison = fine_tune(make_model, batches, accuracy, evaluate_every=steps // 4)
    report(comparison, "accuracy", levels)
    panels = comparison.losses(), comparison.metric("accuracy on modules held out", levels)
    print(f"Chart: {chart(out / 'tag_tokens.png', 'What is each token of a source?', *panels)}")
    return comparison


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=64, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=24, help="functions in a batch (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="functions to test with (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the chart goes (default: %(default)s)")
    main(**vars(parser.parse_args()))
