"""The shared log-softmax: right numbers, computed once, never for another tensor."""

from unittest import mock

import torch
from torch.nn import functional as F

from bitray.models import logits
from bitray.models.logits import log_softmax, shared_log_softmax


def test_numbers_are_those_of_torch() -> None:
    z = torch.randn(5, 11)
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(log_softmax(z, temperature), F.log_softmax(z / temperature, -1))


def test_one_computation_per_tensor_and_temperature() -> None:
    z, other = torch.randn(5, 11), torch.randn(5, 11)
    with mock.patch.object(logits, "_log_softmax", wraps=logits._log_softmax) as computed:
        with shared_log_softmax():
            assert log_softmax(z, 1.0) is log_softmax(z, 1.0)
            assert log_softmax(z, 1.0) is not log_softmax(other, 1.0)
            assert log_softmax(z, 1.0) is not log_softmax(z, 2.0)
        assert computed.call_count == 3
        log_softmax(z, 1.0)
        log_softmax(z, 1.0)
        assert computed.call_count == 5  # outside of the scope nothing is held


def test_a_freed_tensor_does_not_lend_its_place() -> None:
    """A memo by `id` alone would answer for a new tensor at an old address."""
    with shared_log_softmax():
        for seed in range(20):
            z = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(log_softmax(z, 1.0), F.log_softmax(z, -1))


def test_gradients_of_all_users_add_up() -> None:
    z = torch.randn(4, 9, requires_grad=True)
    with shared_log_softmax():
        (log_softmax(z, 1.0)[:, 0].sum() + 2 * log_softmax(z, 1.0)[:, 1].sum()).backward()
    expected = z.detach().requires_grad_()
    p = F.log_softmax(expected, -1)
    (p[:, 0].sum() + 2 * p[:, 1].sum()).backward()
    torch.testing.assert_close(z.grad, expected.grad)
