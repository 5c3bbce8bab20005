"""accelerate() and restore() on modules of torch.nn and on modules that fastattn does not know."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastattn
from fastattn.accelerate import Report, accelerate, restore
from fastattn.integrations import swap


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def encoder(**settings) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, **({"dropout": 0.0, "batch_first": True} | settings))
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)


class Block(nn.Module):
    """A hand-written model around torch.nn's attention and norms."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.rms = nn.RMSNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x):
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.rms(x + self.mlp(x))


MODELS = {
    "layer-norm": lambda: nn.LayerNorm(32),
    "layer-norm-bare": lambda: nn.LayerNorm((5, 32), elementwise_affine=False),
    "rms-norm": lambda: nn.RMSNorm(32, eps=1e-6),
    "encoder": encoder,
    "encoder-pre-norm-gelu": lambda: encoder(norm_first=True, activation="gelu"),
    "encoder-seq-first": lambda: encoder(batch_first=False),
    "block": Block,
    "blocks": lambda: nn.Sequential(Block(), Block()),
}


def assert_near(given: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
    """Equal up to a hundred or so float32 roundings."""
    scale = expected.abs().max().item() if scale is None else scale
    assert (given - expected).abs().max().item() <= 2e-5 * scale


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_torchs(name, training):
    model = randomised(MODELS[name]()).train(training)
    reference = copy.deepcopy(model)
    accelerate(model)
    x = torch.randn(3, 5, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = model(x), reference(y)
    assert_near(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    scale = max(p.grad.abs().max().item() for p in [y, *reference.parameters()])
    assert_near(x.grad, y.grad, scale)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert_near(parameter.grad, other.grad, scale)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_whole_transformer(norm_first, batch_first):
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, norm_first=norm_first, batch_first=batch_first).eval()
    randomised(model)
    reference = copy.deepcopy(model)
    report = accelerate(model)
    assert {entry.module for entry in report.replaced} == {
        "Transformer",
        "TransformerEncoder",
        "TransformerDecoder",
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
        "MultiheadAttention",
        "LayerNorm",
    }
    assert report.left == ()
    assert isinstance(model.encoder.layers[0].self_attn, fastattn.nn.MultiheadAttention)
    src, tgt = torch.randn(3, 7, 32), torch.randn(3, 5, 32)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "tgt_is_causal": True,
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    assert_near(model(src, tgt, **masks), reference(src, tgt, **masks))


@pytest.mark.parametrize("grad", [False, True])
def test_torchs_fast_path_does_not_go_round_the_fused_modules(grad, monkeypatch):
    """In evaluation without gradients torch.nn leaves its Python code for one fused kernel of its own."""
    called = []
    op = "attention" if grad else "encoder_layer"
    real = getattr(fastattn.ops, op)
    monkeypatch.setattr(fastattn.ops, op, lambda *args, **kwargs: called.append(1) or real(*args, **kwargs))
    model = randomised(encoder()).eval()
    accelerate(model)
    with torch.set_grad_enabled(grad):
        model(torch.randn(3, 5, 32))
    assert len(called) == 2


def test_no_padding_is_computed_at_inference():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = randomised(nn.TransformerEncoder(layer, 2)).eval()
    reference = copy.deepcopy(model)
    accelerate(model)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 2:] = True
    x = torch.randn(3, 6, 32)
    with torch.no_grad():
        out, expected = (each(x, src_key_padding_mask=padding) for each in (model, reference))
    assert_near(out, expected)
    assert not out[padding].any()


@pytest.mark.parametrize("name", [*MODELS, "unknown"])
def test_the_weights_are_shared_the_state_is_unchanged_and_restore_undoes_it_bit_for_bit(name):
    model = randomised(MODELS[name]() if name != "unknown" else nn.Sequential(nn.Linear(32, 32), nn.Tanh())).eval()
    x = torch.randn(3, 5, 32)
    before = model(x)
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    order, parameters = list(state), list(model.parameters())
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    report = accelerate(model)
    assert accelerate(model) == report
    assert list(model.state_dict()) == order
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(x), before)
    restore(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_copy_and_a_pickle_are_accelerated_and_can_be_restored():
    model = randomised(encoder()).eval()
    report = accelerate(model)
    x = torch.randn(3, 5, 32)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert accelerate(twin) == report
        restore(twin)
        assert type(twin.layers[0]) is nn.TransformerEncoderLayer
    assert isinstance(model.layers[0], fastattn.nn.TransformerEncoderLayer)


def test_fastattns_own_modules_are_left_as_they_are():
    model = nn.Sequential(fastattn.nn.TransformerEncoderLayer(32, 4, 48), fastattn.nn.LayerNorm(32), nn.LayerNorm(32))
    report = accelerate(model)
    assert [entry.name for entry in report.replaced] == ["2"]
    assert report.left == ()
    restore(model)
    assert type(model[1]) is fastattn.nn.LayerNorm
    assert type(model[2]) is nn.LayerNorm


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1.0


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x * self.scale


def test_the_report_says_what_was_left_and_why():
    norms = OwnNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)
    model = nn.Sequential(nn.Linear(32, 32), norms[0], Scale(), nn.Embedding(3, 32), norms[1], norms[2])
    model[5].forward = lambda x: x  # someone else's patch
    report = accelerate(model)
    assert isinstance(report, Report)
    assert [(entry.name, entry.module, entry.by) for entry in report.replaced] == [
        ("4", "LayerNorm", "layer norm in one pass")
    ]
    assert {entry.name: entry.reason for entry in report.left} == {
        "0": "a linear layer on its own: torch's matrix product runs",
        "1": "a subclass of LayerNorm, whose forward may be its own",
        "2": "fastattn knows no module of this class",
        "3": "a look-up: torch's runs",
        "5": "its forward has been replaced on the instance",
    }
    assert str(report).splitlines()[0] == "fastattn: 1 modules accelerated, 5 left"
    for entry in report.left:
        assert entry.reason in str(report)


def test_the_package_exports_the_functions():
    assert fastattn.accelerate is accelerate
    assert fastattn.restore is restore


def test_a_module_used_twice_is_replaced_once():
    norm = nn.LayerNorm(32)
    model = nn.Sequential(norm, norm)
    assert len(accelerate(model).replaced) == 1
    restore(model)
    assert type(norm) is nn.LayerNorm


def test_hooks_stay():
    model = randomised(nn.Sequential(nn.LayerNorm(32)))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    accelerate(model)
    model(torch.randn(2, 32))
    assert seen == ["forward"]


@pytest.mark.parametrize("given", [None, "model", torch.ones(3), nn.LayerNorm])
def test_what_is_not_a_module_is_refused(given):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        accelerate(given)


def test_a_pickle_of_a_class_that_is_no_longer_known_says_what_to_do(monkeypatch):
    model = nn.LayerNorm(32)
    accelerate(model)
    saved = pickle.dumps(model)
    monkeypatch.setattr(swap, "_made", {})
    monkeypatch.setattr(swap, "_rows", {})
    with pytest.raises(TypeError, match=r"load it with the version that saved it"):
        pickle.loads(saved)


def test_transformers_is_optional():
    """accelerate neither needs nor imports it for models that are not transformers'."""
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'transformers':
            raise ModuleNotFoundError(f'No module named {name!r}')
sys.meta_path.insert(0, Absent())
import torch
from fastattn.accelerate import accelerate, restore
model = torch.nn.TransformerEncoderLayer(32, 4)
print(len(accelerate(model).replaced))
restore(model)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "4"), result.stderr
