"""The bar that distillation has to reach, on figures made up for it."""

import pytest
from compare_recipes import Found


def found(*mine: float) -> Found:
    """Cross-entropy alone ends at 2, dense training at 1, the recipe as said."""
    seeds = range(len(mine))
    losses = {
        "dense": dict.fromkeys(seeds, 1.0),
        "ce": dict.fromkeys(seeds, 2.0),
        "logits": dict(enumerate(mine)),
    }
    return Found(seeds, dict.fromkeys(seeds, 3.0), losses)


@pytest.mark.parametrize(
    ("mine", "below"),
    [
        ((1.5, 1.5), []),
        ((1.55, 1.40), []),
        ((1.65, 1.10), ["logits"]),  # under 40 % on a seed
        ((1.55, 1.52), ["logits"]),  # under 50 % on average
        ((1.50, float("nan")), ["logits"]),  # broke down
    ],
)
def test_a_bar_on_every_seed_and_on_their_mean(mine: tuple[float, ...], below: list[str]) -> None:
    assert found(*mine).below_bar() == below


def test_the_table_shows_the_share_of_every_seed_and_their_mean() -> None:
    last = found(1.55, 1.25).table().splitlines()[-1]
    assert last.split() == ["logits", "1.5500", "1.2500", "1.4000", "45%", "75%", "60%"]
