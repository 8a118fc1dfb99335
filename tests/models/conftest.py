"""What the tests of models share."""

from collections.abc import Iterator

import jaxtyping
import pytest
from tiny_models import make_batch

from bitray.models.batch import Batch


@pytest.fixture
def batch() -> Batch:
    """Two packed rows with padding, a full one, and one of padding alone."""
    return make_batch([[10, 12], [5, 5, 5], [32], []])


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types are not checked at run time: for what users may do and annotations forbid."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
