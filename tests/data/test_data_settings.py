"""What data settings refuse, and what they leave as it was said."""

import pytest
from pydantic import ValidationError

from bitray.data import DataSettings


def data(**sources: dict) -> DataSettings:
    return DataSettings(sources=sources)


def test_weights_are_relative_and_become_shares():
    settings = data(a={"path": "/a", "weight": 3}, b={"path": "/b"})
    assert settings.sources["a"].weight == 3, "kept as said"
    assert settings.shares() == {"a": 0.75, "b": 0.25}
    assert list(settings.sources) == ["a", "b"]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [(-0.1, "greater than or equal to 0"), (0, "weights of all sources are 0"), ("nan", "finite")],
)
def test_weights_that_mean_nothing_are_refused(weight, reason):
    with pytest.raises(ValidationError, match=reason):
        data(a={"path": "/a", "weight": weight})


def test_one_source_of_weight_zero_may_be_kept_for_evaluation():
    assert data(a={"path": "/a"}, b={"path": "/b", "weight": 0}).shares() == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("sources", [{}, {"../a": {"path": "/a"}}, {"": {"path": "/a"}}])
def test_sources_need_names_that_can_be_folders(sources):
    with pytest.raises(ValidationError):
        data(**sources)


def test_held_out_shares_must_leave_something():
    with pytest.raises(ValidationError, match="leave no training data"):
        DataSettings(sources={"a": {"path": "/a"}}, split={"probe": 0.5, "validation": 0.5})


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        data(a={"path": "/a", "colums": ["text"]})
