"""Hugging Face's Trainer and Accelerate train an accelerated model as they train the model it was, and Trainer trains,
evaluates and predicts with the models of fastattn.models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import DECODERS, HEADS, SIZES, assert_same, decoder, headed, padded, shake
from torch import Tensor, nn
from transformers_cases import BERT, GPT2, VOCAB, assert_near

import fastattn
from fastattn.models import EncoderDecoder, EncoderDecoderConfig

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


def ours(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of fastattn.models and a batch, in which sequences have different numbers of labels."""
    ids, mask, _ = padded("right")
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in HEADS:
        model, labels = headed(name)
        if name == "tags":
            labels = labels.masked_fill(~mask.bool(), -100)
        if name == "spans":  # the same number of first and last tokens, so that the mean of their means is that of all
            labels = labels.clamp(min=0)
        return model, batch | {"labels": labels}
    if name != "t5":
        return decoder(name), batch | {"labels": ids.masked_fill(~mask.bool(), -100)}
    torch.manual_seed(3)
    model = shake(EncoderDecoder(EncoderDecoderConfig(**SIZES, decoder_layers=1))).eval()
    return model, batch | {"labels": ids[:, :5].masked_fill(~mask[:, :5].bool(), -100)}


OURS = pytest.mark.parametrize("name", [*DECODERS, "t5", *HEADS])


def trainer_of(model: nn.Module, batch: dict[str, Tensor], folder: Path, **changes: Any) -> transformers.Trainer:
    """Of which the batch is all the data there is, so that its order plays no part."""
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"} | changes
    metrics = {"preprocess_logits_for_metrics": settings.pop("preprocess_logits_for_metrics", None)}
    rows = [{key: x[row] for key, x in batch.items()} for row in range(BATCH)]
    settings = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return transformers.Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows, **metrics)


@OURS
def test_trainers_accumulated_parts_are_steps_on_the_whole_batch(name, tmp_path):
    model, batch = ours(name)
    plain, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    trainer = trainer_of(
        model,
        batch,
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=BATCH,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
    )
    trainer.train()
    optimizer = torch.optim.SGD(plain.train().parameters(), lr=0.1)
    expected = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = plain(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_near(torch.tensor(losses), torch.tensor(expected), "losses", 1e-4)
    moved, expected_move = (
        {key: x.detach() - start[key] for key, x in trained.named_parameters()} for trained in (model, plain)
    )
    assert_same(moved, expected_move, 1e-3)  # a step is the difference of two parameters, and these are rounded


@OURS
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_evaluates_and_predicts_what_the_model_gives(name, bf16, tmp_path):
    """In bfloat16 Accelerate makes the output anew, in float32."""
    model, batch = ours(name)
    trainer = trainer_of(model, batch, tmp_path, bf16=bf16, per_device_eval_batch_size=BATCH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = dict(model(**batch))
    loss = expected.pop("loss").item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    found = trainer.predict(trainer.eval_dataset)
    assert found.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    predictions = found.predictions if isinstance(found.predictions, tuple) else (found.predictions,)
    for given, tensor in zip(predictions, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(given), tensor.float())
    assert (found.label_ids == batch["labels"].numpy()).all()


def test_trainer_collects_of_a_language_model_only_what_is_asked_for(tmp_path):
    model, batch = ours("gpt")
    only_loss = trainer_of(model, batch, tmp_path, prediction_loss_only=True)
    assert only_loss.predict(only_loss.eval_dataset).predictions is None
    trainer = trainer_of(
        model,
        batch,
        tmp_path,
        preprocess_logits_for_metrics=lambda hidden, labels: model.logits(hidden).argmax(-1),
    )
    labels = batch.pop("labels")
    expected = model.logits(model(**batch).hidden).argmax(-1)
    found = trainer.predict(trainer.eval_dataset)
    assert (found.predictions == expected.numpy()).all()
    assert (found.label_ids == labels.numpy()).all()
    unlabelled = trainer.predict([{k: x for k, x in row.items() if k != "labels"} for row in trainer.eval_dataset])
    assert (unlabelled.predictions == expected.numpy()).all()
