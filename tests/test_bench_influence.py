"""What remixing is compared with in its benchmark; the script itself judges its bars."""

from types import SimpleNamespace

import pytest
from bench_influence import JUNK, best_static

from bitray.training.settings import TrainingSettings


def test_static_mixtures_lie_on_the_bounds() -> None:
    """8 sources between 0.05 and 0.6: code has 0.6, and 0.05 are left for one other or for all."""
    sources = ("code", "near", "mixed", "prose", "arithmetic", "tables", *JUNK)
    mixtures = []

    def run(weights: dict[str, float]) -> SimpleNamespace:
        mixtures.append(weights)
        return SimpleNamespace(loss=float(len(mixtures)))

    made = SimpleNamespace(settings=TrainingSettings(max_steps=1), run=run)
    losses = best_static(made, sources)
    assert losses == {"near": 1, "mixed": 2, "prose": 3, "alike": 4}
    assert all(tuple(weights) == sources for weights in mixtures), "their order numbers them"
    assert all(weights["code"] == 0.6 for weights in mixtures)
    others = [[weights[name] for name in sources[1:]] for weights in mixtures]
    assert others[0] == pytest.approx([0.1] + 6 * [0.05])
    assert others[1] == pytest.approx([0.05, 0.1] + 5 * [0.05])
    assert others[2] == pytest.approx([0.05, 0.05, 0.1] + 4 * [0.05])
    assert others[3] == pytest.approx(7 * [0.4 / 7])
