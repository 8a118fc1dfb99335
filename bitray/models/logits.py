"""Log-probabilities of logits, computed once where several objectives ask for the same ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_Key = tuple[int, float]
_memo: ContextVar[dict[_Key, tuple[Tensor, Tensor]] | None] = ContextVar("memo", default=None)


@contextmanager
def shared_log_softmax() -> Iterator[None]:
    """Inside, `log_softmax` of the same tensor at the same temperature is computed once."""
    token = _memo.set({})
    try:
        yield
    finally:
        _memo.reset(token)


def log_softmax(logits: Float[Tensor, "n vocab"], temperature: float) -> Float[Tensor, "n vocab"]:
    """`log softmax(z / T)` in fp32; do not change the result in place, others may hold it."""
    memo = _memo.get()
    if memo is None:
        return _log_softmax(logits, temperature)
    key = (id(logits), temperature)  # the memo holds the logits, so an id cannot be reused
    if key not in memo:
        memo[key] = (logits, _log_softmax(logits, temperature))
    return memo[key][1]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits if temperature == 1.0 else logits / temperature
    return F.log_softmax(scaled.float(), -1)
