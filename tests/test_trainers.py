"""Hugging Face's Trainer and Accelerate train an accelerated model as they train the model it was."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers_cases import BERT, GPT2, VOCAB, assert_near

import fastattn

accelerate = pytest.importorskip("accelerate")

STEPS, BATCH = 4, 4
CLASSIFIER = BERT | {"num_labels": 3, "num_hidden_layers": 1}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**CLASSIFIER)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**(GPT2 | {"n_layer": 1}))),
}


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """(accelerated, as it was), of equal weights."""
    torch.manual_seed(0)
    eager = MODELS[name]()
    eager.set_attn_implementation("eager")
    fast = copy.deepcopy(eager)
    fastattn.accelerate(fast)
    return fast, eager


def examples(name: str) -> list[dict[str, torch.Tensor]]:
    """Sentences of several lengths, padded on the right; GPT-2 learns the tokens, BERT a class."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(STEPS * BATCH):
        mask = (torch.arange(9) < 9 - i % 5).long()
        ids = torch.randint(1, VOCAB, (9,), generator=generator) * mask
        labels = torch.tensor(i % 3) if name == "bert" else torch.where(mask.bool(), ids, -100)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def trained_by_trainer(model: nn.Module, name: str, folder: Path) -> list[float]:
    """Losses of every step; in two accumulated halves, with clipped gradients, as people train."""
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=2,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=examples(name))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_by_accelerate(model: nn.Module, name: str, folder: Path) -> list[float]:
    accelerator = accelerate.Accelerator(cpu=True, project_dir=str(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(examples(name), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert type(accelerator.unwrap_model(model)).__name__ == type(MODELS[name]()).__name__
    return losses


@pytest.mark.parametrize("train", [trained_by_trainer, trained_by_accelerate])
@pytest.mark.parametrize("name", MODELS)
def test_the_losses_are_those_of_the_model_it_was(name, train, tmp_path):
    """Later losses rest on every earlier gradient."""
    fast, eager = models(name)
    losses, expected = (torch.tensor(train(model, name, tmp_path)) for model in (fast, eager))
    assert len(losses) == STEPS
    assert_near(losses, expected, "losses", 1e-4)
    assert len(set(expected.tolist())) == STEPS
