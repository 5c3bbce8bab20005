"""Generation: the answer follows from the logits of whole texts alone, whatever the cache, the batch and the search do."""

import itertools

import pytest
import torch

from fastattn.generation import Sampler, generate, stream
from fastattn.models import DecoderLM, DecoderLMConfig, EncoderDecoder, EncoderDecoderConfig

WORDS = 11
SIZES = {"vocab_size": WORDS, "d_model": 32, "layers": 2, "heads": 4, "tied_head": False}
T5 = {"buckets": 4, "max_distance": 6, "gated": True}
Model = DecoderLM | EncoderDecoder
MODELS = {
    "gpt": lambda: DecoderLM(DecoderLMConfig(**SIZES)),
    "llama": lambda: DecoderLM(DecoderLMConfig.llama_like(**SIZES, kv_heads=2)),
    "t5": lambda: EncoderDecoder(EncoderDecoderConfig(**SIZES, **T5)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(1)
    model = MODELS[request.param]().eval()
    stir(model)
    return model


def stir(model: torch.nn.Module) -> None:
    """So that no two logits are close, and what is written depends on what was read."""
    for parameter in model.parameters():
        parameter.data *= 4


@pytest.fixture
def prompts() -> list[list[int]]:
    return [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def logits_of(model: Model, prompt: list[int], new: list[int]) -> torch.Tensor:
    """(new, vocabulary), what each of the new tokens is drawn from, by no cache."""
    with torch.no_grad():
        if isinstance(model, EncoderDecoder):
            written = torch.tensor([[model.config.start_token, *new[:-1]]])
            return model.logits(model(torch.tensor([prompt]), decoder_input_ids=written).hidden)[0]
        return model.logits(model(torch.tensor([prompt + new])).hidden)[0, len(prompt) - 1 : -1]


def test_greedy_takes_the_largest_logit_of_the_whole_text(model, prompts):
    texts = generate(model, prompts, 8)
    assert len({tuple(new.tolist()) for new in texts}) > 1
    for prompt, new in zip(prompts, texts):
        assert new.tolist() == logits_of(model, prompt, new.tolist()).argmax(-1).tolist()


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
    for step in stream(model, prompts, 6, temperature=9.0, seed=5):
        for prompt, token in step:
            new[prompt].append(token)
    assert new == [tokens.tolist() for tokens in generate(model, prompts, 6, temperature=9.0, seed=5)]
    assert new != [tokens.tolist() for tokens in generate(model, prompts, 6, temperature=9.0, seed=6)]


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
        log_probs = logits_of(model, prompt, list(text)).log_softmax(-1)
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


PADDING = 60
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
    "t5": lambda t: t.T5ForConditionalGeneration(t5_config(t, "relu")),
    "t5-gated": lambda t: t.T5ForConditionalGeneration(t5_config(t, "gated-gelu")),
}


def t5_config(t, feed_forward: str):
    return t.T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj=feed_forward,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        decoder_start_token_id=3,
        tie_word_embeddings=feed_forward == "relu",
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 0.0, "early_stopping": True}]
)
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_the_same_tokens_as_hugging_faces_generate(kind, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    theirs = HUGGING_FACE[kind](transformers).eval()
    seq2seq = theirs.config.is_encoder_decoder
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = (EncoderDecoder if seq2seq else DecoderLM).from_pretrained(tmp_path)
    prompts = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0  # theirs are padded on the left
    stops = [5, 17, 40]
    theirs_settings = {"do_sample": False, "eos_token_id": stops, "pad_token_id": PADDING, **settings}
    expected = theirs.generate(prompts, attention_mask=mask, max_new_tokens=12, **theirs_settings)
    expected = expected[:, 1 if seq2seq else 7 :]
    assert len({tuple(row.tolist()) for row in expected}) > 1
    found = generate(ours, [row[kept.bool()] for row, kept in zip(prompts, mask)], 12, stop_tokens=stops, **settings)
    for new, row in zip(found, expected):
        assert new.tolist() == row[: len(new)].tolist()
        assert (row[len(new) :] == PADDING).all()
