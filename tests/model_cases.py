"""What the tests of fastattn.models share: small models, ragged batches, comparisons."""

import torch

from fastattn.models import (
    DecoderLM,
    DecoderLMConfig,
    Encoder,
    EncoderConfig,
    SequenceClassifier,
    SpanAnswerer,
    TokenTagger,
)

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "d_model": 32, "layers": 2, "heads": 4}
DECODERS = {
    "gpt": DecoderLMConfig(**SIZES, max_positions=48),
    "llama": DecoderLMConfig.llama_like(**SIZES, kv_heads=2, dim_feedforward=48, rope_theta=500.0),
}

HEADS = {
    "classes": (SequenceClassifier, {"labels": 5, "pooling": "mean"}, torch.tensor([4, 0, -100, 2])),
    "classes of a pooler": (SequenceClassifier, {"labels": 5, "pooler": True}, torch.tensor([4, 0, -100, 2])),
    "several classes": (SequenceClassifier, {"labels": 3}, torch.eye(4)[:, :3]),
    "tags": (TokenTagger, {"labels": 4}, torch.arange(36).reshape(4, 9) % 4),
    "spans": (SpanAnswerer, {}, torch.tensor([[2, 6], [0, 3], [0, 0], [1, -100]])),
}


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases, too, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def decoder(name: str, **changes) -> DecoderLM:
    torch.manual_seed(sum(map(ord, name)))
    config = DecoderLMConfig(**(vars(DECODERS[name]) | changes))
    return shake(DecoderLM(config)).eval()


def encoder(**changes) -> Encoder:
    torch.manual_seed(11)
    return shake(Encoder(EncoderConfig(**(SIZES | {"max_positions": 24} | changes)))).eval()


def headed(kind: str, **changes) -> tuple[torch.nn.Module, torch.Tensor]:
    """A head on an encoder, and labels for `padded("right")`."""
    head, fields, labels = HEADS[kind]
    return shake(head.from_encoder(encoder(**changes), **fields)).eval(), labels


def padded(side: str, lengths: tuple[int, ...] = (9, 4, 1, 7)) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(input_ids, attention_mask, the sequences themselves); "scattered" has padding inside, too."""
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]
    longest = max(lengths) + (3 if side == "scattered" else 0)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        places = {
            "right": torch.arange(length),
            "left": torch.arange(longest - length, longest),
            "scattered": torch.randperm(longest, generator=generator)[:length].sort().values,
        }[side]
        ids[row, places], mask[row, places] = sequence, 1
    return ids, mask, sequences


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: grad for (name, _), grad in zip(model.named_parameters(), found, strict=True)}


def assert_close(given: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to tolerance of each value and of the largest."""
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def assert_same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every gradient there, and equal up to tolerance of the largest value in it (or a millionth of the largest of all)."""
    assert given.keys() == expected.keys()
    assert all(grad is not None for grad in (*given.values(), *expected.values()))
    floor = 1e-6 * max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        error = (given[name].double() - grad.double()).abs().max().item()
        assert error <= tolerance * grad.abs().max().item() + floor, f"gradient of {name}: off by {error:.2e}"
