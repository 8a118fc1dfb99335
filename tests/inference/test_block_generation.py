"""Generation by block diffusion: the mask of training, and how guesses become text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from bitray.data.tokenizer import train_tokenizer
from bitray.inference import Diffusion, Sampling, diffusion, generate
from bitray.inference.diffusion import Reader, diffuse
from bitray.models.batch import Batch
from bitray.models.diffusion import eligible, masked_batch
from bitray.models.loading import build_model
from bitray.models.mask_token import add_mask_token
from bitray.models.packed import last_hidden
from bitray.settings import UserError

GREEDY = Sampling(temperature=0, max_new_tokens=20)
MASK, BLOCK = 60, 4


CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def make(model_type: str = "llama") -> PreTrainedModel:
    """Dense: activations rounded to codes would make a step of a last bit."""
    torch.manual_seed(0)
    model = build_model(CONFIG | {"model_type": model_type}).eval()
    model.config.mask_token_id, model.config.diffusion_block = MASK, BLOCK
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@settings(max_examples=8)
@given(st.integers(2, 30), st.integers(1, 7), st.integers(0, 9))
def test_blocks_on_a_cache_are_the_forward_of_training(
    model_type: str, length: int, block: int, seed: int
) -> None:
    """A random document, packed behind another one; whatever is masked of each block."""
    model, draw = make(model_type), torch.Generator().manual_seed(seed)
    ids = torch.randint(60, (1, length + 5), generator=draw)
    batch = Batch.from_rows(ids.numpy(), [[5, length]], [0])
    masked = eligible(batch) & (torch.rand(ids.shape, generator=draw) < 0.6)
    with torch.no_grad():
        states = last_hidden(model, masked_batch(batch, [masked], block))
        noisy, clean = model.lm_head(states)[0].split(length + 5)
        reader = Reader(model, block)
        for start in range(5, length + 5, block):
            columns = slice(start, min(start + block, length + 5))
            guess = ids[0, columns].masked_fill(masked[0, columns], MASK)
            for _ in range(2):  # what is noisy leaves no trace
                torch.testing.assert_close(
                    reader(guess, noisy=True), noisy[columns], rtol=1e-4, atol=1e-4
                )
            torch.testing.assert_close(
                reader(ids[0, columns], noisy=False), clean[columns], rtol=1e-4, atol=1e-4
            )


def naive(model: PreTrainedModel, ids: list[int], how: Diffusion, count: int) -> list[int]:
    """The most likely text without a cache: every guess from the whole forward of training."""
    text = list(ids)
    while len(text) < len(ids) + count:
        start = len(text) // BLOCK * BLOCK
        hidden = list(range(len(text), start + BLOCK))
        text += [MASK] * len(hidden)
        forwards = 0
        while hidden:
            logits = whole_forward(model, text, hidden)
            logits[:, MASK] = -torch.inf
            sure, tokens = logits.softmax(-1).max(-1)
            order = sorted(range(len(hidden)), key=lambda k: -float(sure[k]))
            if how.strategy == "adaptive":
                kept = [k for k in order if sure[k] >= how.threshold] or order[:1]
            elif how.strategy == "iterative":
                kept = order[: -(-len(hidden) // (how.steps - forwards))]
            else:
                kept = order
            for k in kept:
                text[hidden[k]] = int(tokens[k])
            hidden = [place for k, place in enumerate(hidden) if k not in kept]
            forwards += 1
    return text[len(ids) :][:count]


def whole_forward(model: PreTrainedModel, text: list[int], hidden: list[int]) -> Tensor:
    ids = torch.tensor([text])
    batch = Batch.from_rows(ids.numpy(), [[len(text)]], [0])
    masked = torch.zeros_like(batch.real)
    masked[0, hidden] = True
    with torch.no_grad():
        view = masked_batch(batch, [masked], BLOCK)
        logits = model.lm_head(last_hidden(model, view))[0]
    # a block's first token is predicted by the clean token before it
    return torch.stack([logits[p - 1 + (len(text) if p % BLOCK == 0 else 0)] for p in hidden])


@pytest.mark.parametrize("prompt", [1, 3, 4, 9])
@pytest.mark.parametrize(
    "how",
    [
        Diffusion(strategy="greedy"),
        Diffusion(strategy="iterative", steps=2),
        Diffusion(strategy="iterative", steps=BLOCK),
        Diffusion(strategy="adaptive", threshold=0.3),
        Diffusion(strategy="adaptive", threshold=1.0),
    ],
    ids=lambda how: f"{how.strategy}-{how.threshold}-{how.steps}",
)
def test_text_is_that_of_the_naive_definition(prompt: int, how: Diffusion) -> None:
    model = make()
    ids = torch.randint(60, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    found = list(diffuse(model, ids, GREEDY, how, None))
    assert found == naive(model, ids, how, 20)
    assert len(set(found)) > 3, "a model that repeats itself shows little"


@pytest.mark.parametrize(
    ("how", "forwards"),
    [
        (Diffusion(strategy="greedy"), 1),
        (Diffusion(strategy="iterative", steps=2), 2),
        (Diffusion(strategy="adaptive", threshold=1.0), BLOCK),
        (Diffusion(strategy="adaptive", threshold=1e-9), 1),
    ],
)
def test_forwards_of_a_block(
    how: Diffusion, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three full blocks: so many guesses each, and one forward into the cache."""
    calls: list[bool] = []
    read = Reader.__call__
    monkeypatch.setattr(
        diffusion.Reader, "__call__",
        lambda self, ids, noisy, last=False: calls.append(noisy) or read(self, ids, noisy, last),
    )  # fmt: skip
    list(diffuse(make(), [1] * BLOCK, Sampling(temperature=0, max_new_tokens=12), how, None))
    assert calls == [False, *([True] * forwards + [False]) * 3]


def test_a_seed_says_what_is_drawn() -> None:
    model = make()
    drawn = [
        list(diffuse(model, [1, 2], Sampling(max_new_tokens=12, temperature=2.0, seed=seed),
                     Diffusion(), None))
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert MASK not in drawn[0] + drawn[2]


def test_the_block_is_that_of_training_unless_said_otherwise() -> None:
    model = make()
    texts = {
        block: list(diffuse(model, [1, 2, 3], GREEDY, Diffusion(block=block), None))
        for block in (None, BLOCK, 7)
    }
    assert texts[None] == texts[BLOCK] != texts[7]


def test_text_ends_where_the_causal_half_says_so_or_at_a_guessed_end() -> None:
    model, ids = make(), [5, 17, 60 - 1]
    found = list(diffuse(model, ids, GREEDY, Diffusion(), None))
    reader = Reader(model, BLOCK)
    with torch.no_grad():
        following = reader(torch.tensor(ids + found), noisy=False).argmax(-1)[len(ids) - 1 :]
    for end in (int(following[4]), found[7]):
        stop = min(k for k in range(20) if end in (found[k], int(following[k])))
        assert list(diffuse(model, ids, GREEDY, Diffusion(), end)) == found[:stop]


def test_the_last_positions_of_the_model_make_a_short_block() -> None:
    model = make()
    model.config.max_position_embeddings = 30  # no multiple of the block
    found = list(diffuse(model, [1] * 10, GREEDY, Diffusion(), None))
    assert len(found) == 20
    with pytest.raises(UserError, match="do not fit into the model's 30 positions"):
        list(diffuse(model, [1] * 11, GREEDY, Diffusion(), None))


def test_a_model_without_a_mask_token_is_refused() -> None:
    model = make()
    model.config.mask_token_id = None
    with pytest.raises(UserError, match="this model has no mask token"):
        list(diffuse(model, [1], GREEDY, Diffusion(), None))


def test_both_modes_speak_and_never_say_the_mask() -> None:
    tokenizer = train_tokenizer(["def words(text):\n    return text.split()\n"] * 3, 280)
    torch.manual_seed(0)
    model = build_model(CONFIG | {"vocab_size": 280})
    add_mask_token(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[280] *= 1000  # loud, wherever its sign is right
    for mode in (None, Diffusion()):
        text = generate(model, tokenizer, "def ", GREEDY, mode)
        assert text and "mask" not in text
