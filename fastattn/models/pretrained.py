"""Saving models, and reading them back, or from what Hugging Face's save_pretrained wrote.

config.json         the configuration; ours says "fastattn_model", Hugging Face's "model_type"
model.safetensors   the weights, or several files that model.safetensors.index.json lists
"""

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .name_maps import FAMILIES, Family

Folder = str | os.PathLike
Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A model that its `config`, a dataclass, makes wholly: type(model)(config)."""

    config_class: type
    config: Any

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss can be told num_items_in_batch. Hugging Face's Trainer asks this before it accumulates gradients."""
        return "num_items_in_batch" in inspect.signature(type(self).forward).parameters

    def save_pretrained(self, folder: Folder) -> None:
        """Writes config.json and model.safetensors into a folder, which is made if it is not there.

        Raises:
            ImportError: safetensors is not installed.
        """
        save_file = _safetensors().save_file
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config = {"fastattn_model": type(self).__name__} | asdict(self.config)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls: type[Model], folder: Folder, *, dtype: torch.dtype | None = None, leave_out: Sequence[str] = ()
    ) -> Model:
        """The model in a folder, in evaluation mode.

        Args:
            folder: what `save_pretrained` wrote, ours or Hugging Face's for a family that `name_maps.FAMILIES` names.
            dtype: of the weights; None for the one they are stored in.
            leave_out: tensors of the folder that the model does without, by the beginnings of their names in it, such as
                ["classifier."] to read the encoder alone of a classifier. A tensor that is neither read nor left out is an
                error.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: no config.json, or no weights in safetensors' format.
            ValueError: a model of another class, a family or an option that is not supported, weights that are missing or
                left over, with their names, a beginning in leave_out that no name has.
        """
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json; expected a folder that save_pretrained wrote")
        fields = json.loads((path / "config.json").read_text())
        if "fastattn_model" in fields:
            name = fields.pop("fastattn_model")
            if name != cls.__name__:
                raise ValueError(f"{path} holds a {name}; expected a {cls.__name__}: call {name}.from_pretrained")
            config, weights = cls.config_class(**fields), _read_weights(path, leave_out)
        else:
            family = _family(fields, cls.__name__, path)
            config = cls.config_class(**family.config(fields))
            weights = _renamed(_read_weights(path, leave_out), family, config, path)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            model = cls(config)
        _compare(set(model.state_dict()), set(weights), path)
        if dtype is not None:
            weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and reading models needs safetensors; install it with: pip install 'fastattn[models]'"
        ) from error
    return safetensors.torch


def _read_weights(path: Path, leave_out: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out is {leave_out!r}; expected a list of beginnings of names: [{leave_out!r}]")
    weights = _read_all(path)
    for beginning in leave_out:
        if not any(name.startswith(beginning) for name in weights):
            raise ValueError(
                f"leave_out has {beginning!r}, with which no name in {path} begins; they are {sorted(weights)}"
            )
    return {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(leave_out))}


def _read_all(path: Path) -> dict[str, Tensor]:
    load_file = _safetensors().load_file
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return load_file(whole)
    if not index.is_file():
        raise FileNotFoundError(
            f"{path} has neither model.safetensors nor model.safetensors.index.json; save the model with safetensors"
        )
    weights: dict[str, Tensor] = {}
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        weights |= load_file(path / name)
    return weights


def _family(fields: dict[str, Any], class_name: str, path: Path) -> Family:
    name, architectures = fields.get("model_type"), fields.get("architectures") or []
    families = FAMILIES.get(name, ()) if isinstance(name, str) else ()
    if not families:
        raise ValueError(f"{path} has model_type {name!r}; {class_name} can read {', '.join(_families(class_name))}")
    found = next((family for family in families if family.model == class_name), None)
    if found is None or found.architecture not in (None, *architectures):
        fitting = next((family for family in families if family.architecture in architectures), families[0])
        held = ", ".join(architectures) or name
        raise ValueError(f"{path} holds a {held}: call {fitting.model}.from_pretrained")
    return found


def _families(class_name: str) -> list[str]:
    return [repr(name) for name, families in FAMILIES.items() if any(f.model == class_name for f in families)]


def _renamed(theirs: dict[str, Tensor], family: Family, config: Any, path: Path) -> dict[str, Tensor]:
    """Weights under our names, joined and transposed. A name of theirs that goes nowhere is an error."""
    prefix = family.prefix
    theirs = {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if not family.ignored(name)}
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    for name, weight in family.weights(config):
        absent = [source for source in weight.sources if source not in theirs]
        missing += absent
        if not absent:
            used.update(weight.sources)
            ours[name] = weight.join([theirs[source] for source in weight.sources])
    for copy, original in family.copies(config).items():
        if copy in theirs and original in theirs:
            used.add(copy)
            if not torch.equal(theirs[copy], theirs[original]):
                raise ValueError(
                    f"{path} says that {copy} is tied to {original}, but they differ; set tie_word_embeddings to false in "
                    f"its config.json"
                )
    _compare(used | set(missing), set(theirs), path)
    return ours


def _compare(expected: set[str], given: set[str], path: Path) -> None:
    missing, left_over = sorted(expected - given), sorted(given - expected)
    if missing or left_over:
        raise ValueError(
            f"the weights in {path} are not those that its config.json asks for: missing {missing or 'none'}, left over "
            f"{left_over or 'none'}" + ("; leave_out can name what is not to be read" if left_over else "")
        )
