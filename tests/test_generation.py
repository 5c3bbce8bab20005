"""Generation: the answer follows from the logits of whole texts alone, whatever the cache, the batch and the search do."""

import itertools

import pytest
import torch

from fastattn.generation import Sampler, generate, stream
from fastattn.models import DecoderLM, DecoderLMConfig

WORDS = 11


@pytest.fixture(scope="module", params=["gpt", "llama"])
def model(request: pytest.FixtureRequest) -> DecoderLM:
    torch.manual_seed(1)
    make = DecoderLMConfig.llama_like if request.param == "llama" else DecoderLMConfig
    model = DecoderLM(make(vocab_size=WORDS, d_model=32, layers=2, heads=4)).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # so that no two logits are close
    return model


@pytest.fixture
def prompts() -> list[list[int]]:
    return [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def whole_logits(model: DecoderLM, tokens: list[int]) -> torch.Tensor:
    """(seq, vocabulary), by no cache."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])).hidden)[0]


def test_greedy_takes_the_largest_logit_of_the_whole_text(model, prompts):
    for prompt, new in zip(prompts, generate(model, prompts, 8)):
        logits = whole_logits(model, prompt + new.tolist())
        assert new.tolist() == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompts_answer_does_not_depend_on_the_others(model, prompts, beams):
    together = generate(model, prompts, 6, num_beams=beams, stop_tokens=[7, 3])
    alone = [generate(model, [prompt], 6, num_beams=beams, stop_tokens=[7, 3])[0] for prompt in prompts]
    assert [new.tolist() for new in together] == [new.tolist() for new in alone]


def test_a_text_ends_with_its_first_stop_token(model, prompts):
    free = [new.tolist() for new in generate(model, prompts, 8)]
    stop = free[0][3]
    for new, stopped in zip(free, generate(model, prompts, 8, stop_tokens=stop)):
        end = new.index(stop) + 1 if stop in new else len(new)
        assert stopped.tolist() == new[:end]


def test_a_stream_yields_what_generate_returns(model, prompts):
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, 6, temperature=1.0, seed=5):
        for prompt, token in step:
            new[prompt].append(token)
    assert new == [tokens.tolist() for tokens in generate(model, prompts, 6, temperature=1.0, seed=5)]
    assert new != [tokens.tolist() for tokens in generate(model, prompts, 6, temperature=1.0, seed=6)]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0])
def test_a_beam_that_is_wide_enough_finds_the_best_of_all_texts(model, length_penalty):
    prompt, length, stop = [2, 6, 5], 3, 4
    texts = [
        text
        for count in range(1, length + 1)
        for text in itertools.product(range(WORDS), repeat=count)
        if stop not in text[:-1] and (text[-1] == stop or count == length)
    ]

    def score(text: tuple[int, ...]) -> float:
        log_probs = whole_logits(model, prompt + list(text)).log_softmax(-1)[len(prompt) - 1 : -1]
        return float(log_probs.gather(1, torch.tensor(text)[:, None]).sum()) / len(text) ** length_penalty

    found = generate(
        model,
        [prompt],
        length,
        num_beams=WORDS**2,
        stop_tokens=stop,
        length_penalty=length_penalty,
        early_stopping="never",
    )
    assert tuple(found[0].tolist()) == max(texts, key=score)


def test_top_k_and_top_p_keep_the_most_probable_and_their_proportions():
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0], [0.0, 3.0, 0.1, 0.2]])
    whole = Sampler(temperature=0.7).probabilities(logits)
    torch.testing.assert_close(whole, (logits / 0.7).softmax(-1))
    kept = Sampler(temperature=0.7, top_k=2).probabilities(logits)
    assert (kept > 0).tolist() == [[True, False, True, False], [False, True, False, True]]
    p = float(whole[0, 0] + whole[0, 2]) - 1e-4  # the first row needs its two best to have so much
    kept = Sampler(temperature=0.7, top_p=p).probabilities(logits)
    assert (kept > 0)[0].tolist() == [True, False, True, False]
    torch.testing.assert_close(kept[0, 0] / kept[0, 2], whole[0, 0] / whole[0, 2])
    torch.testing.assert_close(kept.sum(-1), torch.ones(2))


def test_draws_have_the_frequencies_of_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(20_000, 3)
    sampler = Sampler(temperature=1.5)
    drawn = sampler.choose(logits, torch.Generator().manual_seed(0)).bincount(minlength=3) / 20_000
    expected = sampler.probabilities(logits[:1])[0]
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, "prompt 1 has shape"),
        ({"prompts": [[0.5]]}, "token numbers"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "temperature": 1.0}, "beam search draws nothing"),
        ({"num_beams": 2, "early_stopping": "soon"}, "'never'"),
        ({"length_penalty": 2.0}, "set num_beams above 1"),
        ({"top_k": 3}, "set a temperature"),
        ({"top_k": 0, "temperature": 1.0}, "top_k must be at least 1"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        generate(model, **{"prompts": [[1, 2]], "max_new_tokens": 2, **change})


def test_a_model_in_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(ValueError, match=r"model\.eval"):
            generate(model, [[1]], 1)
    finally:
        model.eval()


HUGGING_FACE = {
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
        )
    ),
    "llama": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
}


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.0, "early_stopping": True}]
)
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_the_same_tokens_as_hugging_faces_generate(kind, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    theirs = HUGGING_FACE[kind](transformers).eval()
    for parameter in theirs.parameters():
        parameter.data *= 4
    theirs.save_pretrained(tmp_path)
    ours = DecoderLM.from_pretrained(tmp_path).eval()
    prompts = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0  # theirs are padded on the left
    stops = [5, 17, 40]
    expected = theirs.generate(
        prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=0, **settings
    )[:, 7:]
    found = generate(ours, [row[kept.bool()] for row, kept in zip(prompts, mask)], 12, stop_tokens=stops, **settings)
    for new, row in zip(found, expected):
        assert new.tolist() == row[: len(new)].tolist()
        assert not row[len(new) :].any()  # padding
