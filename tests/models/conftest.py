"""What the tests of models share."""

import pytest
from tiny_models import make_batch

from bitray.models.batch import Batch


@pytest.fixture
def batch() -> Batch:
    """Two packed rows with padding, a full one, and one of padding alone."""
    return make_batch([[10, 12], [5, 5, 5], [32], []])
