"""Generated tokens against transformers' own `generate`, and how the next token is chosen."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitray.data.tokenizer import train_tokenizer
from bitray.inference import Sampling, generate
from bitray.inference.generation import tokens
from bitray.inference.sampling import choose
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.nn import set_strength, strength_of
from bitray.settings import UserError

GREEDY = Sampling(temperature=0, max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["def words(text):\n    return text.split()\n"] * 3, 280)


def make(model_type: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    config = {
        "model_type": model_type, "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return to_bitnet(build_model(config), "paper")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_greedy_is_what_transformers_generates(model_type: str) -> None:
    model = make(model_type).eval()
    ids = [5, 17, 60, 3]
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, use_cache=False,
        eos_token_id=None, pad_token_id=0,
    )[0, 4:].tolist()  # fmt: skip
    set_strength(model, 0.25)
    assert list(tokens(model, ids, GREEDY, None)) == expected
    assert strength_of(model) == 0.25, "training goes on as before"
    assert len(set(expected)) > 3, "a model that repeats itself shows little"


def test_it_ends_at_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make()
    ids = tokenizer("def ", add_special_tokens=False)["input_ids"]
    all_of_them = list(tokens(model, ids, GREEDY, None))
    end = all_of_them[5]
    assert list(tokens(model, ids, GREEDY, end)) == all_of_them[: all_of_them.index(end)]
    assert generate(model, tokenizer, "def ", GREEDY) == tokenizer.decode(
        list(tokens(model, ids, GREEDY, tokenizer.eos_token_id)), skip_special_tokens=True
    )


def test_a_seed_says_what_is_drawn() -> None:
    model = make()
    drawn = [
        list(tokens(model, [1, 2], Sampling(max_new_tokens=12, temperature=2.0, seed=seed), None))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_follow_the_distribution_that_is_left() -> None:
    """Probabilities 0.4, 0.3, 0.2, 0.1 at temperature 1."""
    logits = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()[None]
    generator = torch.Generator().manual_seed(0)

    def shares(**said: float) -> np.ndarray:
        sampling = Sampling.model_validate({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | said)
        found = choose(logits.expand(4000, 4), sampling, generator).numpy()
        return np.bincount(found, minlength=4) / len(found)

    np.testing.assert_allclose(shares(), [0.2, 0.4, 0.1, 0.3], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    # the fewest whose sum reaches 0.75: 0.4 + 0.3 + 0.2
    np.testing.assert_allclose(shares(top_p=0.75), [2 / 9, 4 / 9, 0, 3 / 9], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.01), [0, 1, 0, 0])
    cold = np.array([0.2, 0.4, 0.1, 0.3]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), cold / cold.sum(), atol=0.03)


def test_an_empty_prompt_starts_from_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make()
    start = tokenizer.eos_token_id
    expected = tokenizer.decode(
        list(tokens(model, [start], GREEDY, start)), skip_special_tokens=True
    )
    assert generate(model, tokenizer, "", GREEDY) == expected


def test_more_than_the_model_has_positions_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt of 50 tokens and max_new_tokens=20 .* 64 pos"):
        list(tokens(make(), [1] * 50, GREEDY, None))
