"""A teacher behind HTTP, with vLLM's requests and answers, against the same model in process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vllm_server import VLLM

from bitray.data.tokenizer import train_tokenizer
from bitray.models.batch import Batch
from bitray.models.loading import build_model
from bitray.pipeline import teacher_server
from bitray.pipeline.remote_teacher import RemoteTeacher, served
from bitray.pipeline.teacher_server import Client, ServerTeacher, checked, documents
from bitray.settings import UserError
from bitray.training.loop import autocast_for
from bitray.training.teacher import InProcessTeacher, top_k_of
from bitray.training.teacher_settings import Server

VOCABULARY = 280
CPU = torch.device("cpu")
TEXTS = ["the cat sat on the mat and the dog ran", "a bird in the hand is worth two in the bush"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }).requires_grad_(False).eval()  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 3, VOCABULARY)


@pytest.fixture
def server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterator[VLLM]:
    running = VLLM(model, tokenizer)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_server, "FIRST_WAIT", 0.01)


def make_batch(seed: int = 0) -> Batch:
    """Packed rows, padding, a document of one token, one that is all prompt, and an empty row."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (4, 20)).astype(np.int32)
    lengths = [[8, 5], [20], [1, 7, 6], []]
    return Batch.from_rows(ids, lengths, [0] * 4, [[0, 0], [4], [0, 7, 3], []])


def client(server: VLLM, **settings: Any) -> Client:
    return Client(Server(url=server.url, **{"attempts": 3, "timeout": 20.0, **settings}))


@pytest.mark.parametrize("k", [1, 7, 20])
def test_answers_are_those_of_the_model_in_process(
    server: VLLM, model: PreTrainedModel, k: int
) -> None:
    """Documents asked about one by one give what the packed rows give, at the positions before."""
    batch = make_batch()
    got = ServerTeacher(client(server, top_k=k), VOCABULARY).ask(batch)()
    expected = top_k_of(InProcessTeacher(model, autocast_for(CPU, "fp32")), batch, k, 1.0)
    learnt = torch.zeros_like(batch.real)
    learnt[:, :-1] = batch.labels[:, 1:] != -100
    assert learnt.sum() == 7 + 4 + 16 + 3
    assert torch.equal(got.ids[learnt], expected.ids[learnt])
    torch.testing.assert_close(got.logp[learnt], expected.logp[learnt], rtol=1e-4, atol=1e-4)


def test_the_whole_vocabulary_has_no_rest(server: VLLM) -> None:
    server.max_logprobs = VOCABULARY
    got = ServerTeacher(client(server, top_k=VOCABULARY), VOCABULARY).ask(make_batch())()
    assert got.ids.shape == got.logp.shape == (4, 20, VOCABULARY)
    torch.testing.assert_close(got.logp[1, :19].exp().sum(-1), torch.ones(19))


def test_only_documents_with_something_to_learn_are_asked_about(server: VLLM) -> None:
    batch = make_batch()
    ServerTeacher(client(server), VOCABULARY).ask(batch)()
    ids = batch.input_ids.tolist()
    expected = [ids[0][:8], ids[0][8:13], ids[1], ids[2][8:14]]
    assert sorted(server.prompts) == sorted(expected)
    assert [each.ids for each in documents(batch)] == expected


def test_a_server_that_stumbles_is_asked_again(server: VLLM) -> None:
    asking = client(server)
    server.failures = 2
    ids, logp = ServerTeacher(asking, VOCABULARY).about([5, 6, 7])
    assert ids.shape == (2, 20) and logp.shape == (2, 21)


def test_a_server_that_is_gone_is_one_sentence(server: VLLM) -> None:
    asking = client(server)
    server.close()
    teacher = RemoteTeacher(ServerTeacher(asking, VOCABULARY).ask, CPU, 2)
    said = teacher.problem([make_batch()])
    assert said is not None and len(said.splitlines()) == 1
    assert said.startswith(f"model.teacher.url: {server.url}/completions does not answer after 3")
    assert "refused" in said


def test_a_server_that_is_silent_is_given_up(server: VLLM) -> None:
    asking = client(server, timeout=0.1, attempts=1)
    with server.lock, pytest.raises(UserError, match=r"after 1 tries .*timed out"):
        ServerTeacher(asking, VOCABULARY).about([5, 6, 7])


def test_what_the_server_refuses_is_told_in_its_words(server: VLLM) -> None:
    asking, before = client(server, top_k=21), server.requests
    with pytest.raises(
        UserError, match=r"refuses with 400: Requested prompt logprobs of 21, .* 20"
    ):
        ServerTeacher(asking, VOCABULARY).about([5, 6, 7])
    assert server.requests == before + 1, "asking again would not help"
    with pytest.raises(UserError, match=r"404: The model `other` does not exist"):
        ServerTeacher(client(server, model="other"), VOCABULARY).about([5, 6])


def test_which_of_several_models_has_to_be_said(server: VLLM) -> None:
    server.names = ["one", "two"]
    with pytest.raises(UserError, match=r"model\.teacher\.model: .* serves one, two; say which"):
        client(server)
    assert client(server, model="two").model == "two"


def test_tokenizers_that_differ_are_refused_by_the_first_id(
    server: VLLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_server, "IDS_AT_A_TIME", 64)
    settings = Server(url=server.url)
    assert checked(settings, tokenizer).model == "teacher"
    other = train_tokenizer(["entirely other words were seen here, not those"] * 3, VOCABULARY)
    texts = [(tokenizer.decode([at]), other.decode([at])) for at in range(VOCABULARY)]
    first = next(at for at, (a, b) in enumerate(texts) if a != b)
    with pytest.raises(UserError, match=rf"the first id that differs is {first}, the student's"):
        checked(settings, other)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda entries: entries[:-1], "log-probabilities of 3 tokens of a document of 4"),
        (lambda entries: None, "log-probabilities of 0 tokens of a document of 4"),
        (lambda entries: [None, entries[2], entries[1], entries[3]], "says nothing about token"),
        (lambda entries: [None, *({"280": {"logprob": 0.0}, **e} for e in entries[1:])],
         "speaks of token 280; the student has 280"),
        (lambda entries: [None, *(dict(list(e.items())[:1]) for e in entries[1:])],
         "told 1 likeliest tokens, not 20"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused(
    server: VLLM, monkeypatch: pytest.MonkeyPatch, change: Any, sentence: str
) -> None:
    answer = VLLM.completion

    def changed(self: VLLM, body: dict[str, Any]) -> tuple[int, Any]:
        code, told = answer(self, body)
        choice = told["choices"][0]
        choice["prompt_logprobs"] = change(choice["prompt_logprobs"])
        return code, told

    monkeypatch.setattr(VLLM, "completion", changed)
    with pytest.raises(UserError, match=sentence):
        ServerTeacher(client(server), VOCABULARY).about([250, 251, 252, 253])


def test_the_loop_finds_its_batches_answered(
    server: VLLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = served(Server(url=server.url, top_k=5, ahead=2), tokenizer, VOCABULARY, CPU)
    given = [(ticket, make_batch(ticket)) for ticket in range(6)]
    tickets = teacher.asked(iter(given))
    for ticket, (_, batch) in zip(range(6), given, strict=True):
        got, placed = next(tickets)
        assert got == ticket and teacher.problem([placed]) is None
        asked = len(server.prompts)
        answer = teacher(placed, layers=False)
        again = teacher(placed, layers=False)
        assert answer is not None and torch.equal(answer.ids, again.ids)
        alone = ServerTeacher(client(server, top_k=5), VOCABULARY).ask(batch)()
        assert torch.equal(answer.ids, alone.ids) and torch.equal(answer.logp, alone.logp)
        assert asked >= 4 * (ticket + 1)
    with pytest.raises(StopIteration):
        next(tickets)
    assert len(server.prompts) == 6 * 4 * 2, "every document once by each"


def test_it_is_asked_ahead_and_no_further(server: VLLM, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[int] = []
    teacher = RemoteTeacher(lambda batch: lambda: None, CPU, 2)  # type: ignore[arg-type,return-value]

    def tickets() -> Iterator[tuple[int, Batch]]:
        for ticket in range(20):
            seen.append(ticket)
            yield ticket, make_batch(ticket)

    asked = teacher.asked(tickets())
    next(asked)
    asked.close()
    asked._thread.join(5)
    assert 2 <= len(seen) <= 4, "two waiting, one in hand"
