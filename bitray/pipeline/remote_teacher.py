"""Teachers on other machines: asked ahead of the loop, they answer with their likeliest tokens."""

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions
import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedTokenizerBase

from bitray.data.stream import Prefetched
from bitray.models.batch import Batch
from bitray.models.sparse import TopK
from bitray.pipeline.cli import told
from bitray.pipeline.teacher_server import Client, ServerTeacher, checked
from bitray.settings import UserError
from bitray.training.loop import Tickets, autocast_for
from bitray.training.parallel import from_rank_zero, world
from bitray.training.teacher import open_teacher, top_k_of
from bitray.training.teacher_settings import Actors, InProcess, Server

Ask = Callable[[Batch], Callable[[], TopK]]
"""Asks about a batch on the CPU without waiting; what it returns waits for the answer."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class RemoteTeacher:
    """A `Teacher` that has been asked before it is called."""

    def __init__(
        self, ask: Ask, device: torch.device, ahead: int, close: Callable[[], None] = lambda: None
    ) -> None:
        self.ask, self.device, self.ahead, self.close = ask, device, ahead, close
        # by the tensor itself: the loop hands over the very batches that were asked about
        self._answers: Any = WeakIdKeyDictionary()

    def asked(self, tickets: Tickets) -> Prefetched:
        """The same tickets, on the device, at most `ahead` of them waiting, all asked about."""
        return Prefetched(self._asking(tickets), self.ahead)

    def _asking(self, tickets: Tickets) -> Iterator[tuple[int, Batch]]:
        for ticket, batch in tickets:
            placed = batch.to(self.device)
            self._answers[placed.input_ids] = self.ask(batch)
            yield ticket, placed

    def problem(self, batches: Sequence[Batch]) -> str | None:
        """Wait for the answers about some batches; why there is none, in one sentence."""
        try:
            for batch in batches:
                self._answer(batch)
        except UserError as error:
            return told(error)
        except ray.exceptions.RayError as error:
            return f"model.teacher: an actor did not answer: {str(error).strip().splitlines()[0]}"
        return None

    def __call__(self, batch: Batch, layers: bool, attention: int | None = None) -> TopK:
        assert not layers and attention is None, "a remote teacher sends no hidden states"
        return self._answer(batch).to(self.device)

    def _answer(self, batch: Batch) -> TopK:
        if batch.input_ids not in self._answers:
            self._answers[batch.input_ids] = self.ask(batch.to("cpu"))
        answer: TopK = self._answers[batch.input_ids]()
        self._answers[batch.input_ids] = lambda: answer
        return answer


# ------------------------------------------------------------------------------------ Ray actors


class TeacherActor:
    """A process with a whole teacher."""

    def __init__(self, path: str, revision: str | None, send: str) -> None:
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        autocast = autocast_for(device, "auto")
        self.teacher = open_teacher(InProcess(), path, device, autocast, revision)
        self.device, self.send = device, DTYPES[send]

    def answer(self, batch: Batch, k: int, temperature: float) -> TopK:
        """The k likeliest tokens at every real position."""
        found = top_k_of(self.teacher, batch.to(self.device), k, temperature)
        return TopK(found.ids, found.logp.to(self.send), temperature)

    def ready(self) -> None:
        """Returns once the teacher is loaded."""


def pool(
    settings: Actors,
    path: str,
    temperature: float,
    device: torch.device,
    revision: str | None = None,
) -> RemoteTeacher:
    """The actors that all workers share, asked in turn. Rank 0 owns them: they end with it.

    One that dies is started again by Ray and asked again. Every worker calls this. `UserError`
    where they cannot be started.
    """
    owned: list[Any] = []
    names = from_rank_zero(lambda: _start(settings, path, revision, owned))
    actors: list[Any] = [ray.get_actor(name) for name in names]
    turns = itertools.islice(itertools.cycle(actors), world()[0], None)

    def ask(batch: Batch) -> Callable[[], TopK]:
        reference = next(turns).answer.remote(batch, settings.top_k, temperature)
        return lambda: ray.get(reference)

    def close() -> None:
        for actor in owned:
            ray.kill(actor)

    return RemoteTeacher(ask, device, settings.ahead, close)


def _start(settings: Actors, path: str, revision: str | None, owned: list[Any]) -> list[str]:
    """Names of new actors; `owned` keeps them alive."""
    kind: Any = ray.remote(
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
        max_restarts=settings.max_restarts,
        max_task_retries=-1,
    )(TeacherActor)
    names = [f"bitray-teacher-{uuid.uuid4().hex[:8]}-{at}" for at in range(settings.count)]
    owned += [kind.options(name=name).remote(path, revision, settings.send) for name in names]
    try:
        ray.get([actor.ready.remote() for actor in owned])
    except ray.exceptions.RayError as error:
        why = told(error) or str(error).strip().splitlines()[-1]
        raise UserError(f"model.teacher: the actors cannot load {path}: {why}") from None
    return names


# ---------------------------------------------------------------------------------------- server


def served(
    settings: Server, tokenizer: PreTrainedTokenizerBase, vocabulary: int, device: torch.device
) -> RemoteTeacher:
    """The teacher behind a server, once its tokenizer is known to be the student's."""
    client = Client(settings, from_rank_zero(lambda: checked(settings, tokenizer).model))
    teacher = ServerTeacher(client, vocabulary)
    return RemoteTeacher(teacher.ask, device, settings.ahead, teacher.close)
