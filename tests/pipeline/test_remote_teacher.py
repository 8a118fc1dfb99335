"""Teachers in Ray actors: what they send, and that one which dies is asked again."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from road import Road
from vllm_server import VLLM

from bitray import Config
from bitray.data import embedded, train_tokenizer
from bitray.models.batch import Batch
from bitray.models.loading import build_model, load_model, load_tokenizer, save_model
from bitray.models.sparse import TopK
from bitray.pipeline.remote_teacher import RemoteTeacher, pool
from bitray.pipeline.run import run
from bitray.settings import UserError
from bitray.training.loop import autocast_for
from bitray.training.teacher import InProcessTeacher, top_k_of
from bitray.training.teacher_settings import Actors

CPU = torch.device("cpu")
VOCABULARY = 320


def make_batch(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(0, 61, (2, 16)).astype(np.int32)
    return Batch.from_rows(ids, [[5, 8], [16]], [0, 0])


def test_a_problem_is_told_and_a_batch_not_asked_about_is_asked_about() -> None:
    asked: list[int] = []

    def ask(batch: Batch):
        asked.append(int(batch.input_ids[0, 0]))
        if len(asked) == 2:
            raise_later = UserError("it is gone")

            def wait() -> TopK:
                raise raise_later

            return wait
        return lambda: TopK.blank(2, 16, 3, 4, 1.0)

    teacher = RemoteTeacher(ask, CPU, 2)
    first, second = make_batch(0), make_batch(1)
    assert teacher.problem([first]) is None
    assert teacher(first, layers=False).ids.shape == (2, 16, 3)
    assert teacher.problem([first, second]) == "it is gone"
    assert asked == [int(each.input_ids[0, 0]) for each in (first, second)]


@pytest.mark.ray
def test_actors_answer_in_turn_and_are_asked_again_after_a_death(
    ray_cluster: None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_model({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }).requires_grad_(False)  # fmt: skip
    save_model(model, str(tmp_path))
    settings = Actors(count=2, cpus=0.5, top_k=7, send="fp16", ahead=3)
    teacher = pool(settings, str(tmp_path), 2.0, CPU)
    here = InProcessTeacher(model, autocast_for(CPU, "fp32"))
    names = [each for each in ray.util.list_named_actors() if each.startswith("bitray-teacher-")]
    assert len(names) == 2

    given = [(ticket, make_batch(ticket)) for ticket in range(8)]
    for ticket, batch in teacher.asked(iter(given)):
        if ticket == 2:
            process = ray.get(ray.get_actor(names[0]).__ray_call__.remote(lambda _: os.getpid()))
            os.kill(process, signal.SIGKILL)
        assert teacher.problem([batch]) is None
        answer, expected = teacher(batch, layers=False), top_k_of(here, batch, 7, 2.0)
        assert answer.temperature == 2.0 and answer.logp.dtype == torch.float16
        assert torch.equal(answer.ids, expected.ids)
        torch.testing.assert_close(answer.logp.float(), expected.logp, rtol=2e-3, atol=1e-3)
    teacher.close()


@pytest.mark.ray
def test_actors_that_cannot_start_are_one_sentence(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.teacher: the actors cannot load .*config") as told:
        pool(Actors(cpus=0.5), str(tmp_path), 1.0, CPU)
    assert len(str(told.value).splitlines()) == 1


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a dense model and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("student"))
    texts = list(embedded.documents("prose", max_bytes=60_000))
    torch.manual_seed(1)
    model = build_model({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64,
    })  # fmt: skip
    save_model(model, folder, train_tokenizer(texts, VOCABULARY))
    return folder


def run_taught(student: str, folder: Path, kind: str, *words: str) -> Road:
    """A short run with this kind of teacher."""
    config = Config.load(overrides=[
        f"output_dir={folder}", f"experiment={kind}", "model=smollm2_135m", f"model.path={student}",
        f"model.teacher.type={kind}",
        "data.sources.code.max_bytes=20000", "data.sources.arithmetic.max_bytes=20000",
        "data.sources.prose.max_bytes=20000", "data.split.validation=0.2", "data.split.probe=0",
        "training.max_steps=4", "training.batch_size=2", "training.max_seq_length=64",
        "training.gradient_accumulation_steps=2", "training.log_every=1", "evaluation.rows=2",
        "scaling.num_workers=1", *words,
    ])  # fmt: skip
    run(config)
    return Road(config)


@pytest.mark.ray
@pytest.mark.slow
def test_whoever_teaches_the_run_is_the_same(
    ray_cluster: None, student: str, tmp_path: Path
) -> None:
    """In process, actors, and a server, all of which tell the whole vocabulary."""
    server = VLLM(load_model(student), load_tokenizer(student), max_logprobs=VOCABULARY)
    kinds = {
        "in_process": (),
        "actors": ("model.teacher.cpus=0.25", f"model.teacher.top_k={VOCABULARY}"),
        "server": (f"model.teacher.url={server.url}", f"model.teacher.top_k={VOCABULARY}"),
    }
    losses = {}
    for kind, words in kinds.items():
        said = ("training=stage2_pretrain", "training.objectives.logits_distill.temperature=1")
        taught = run_taught(student, tmp_path, kind, *said, *words)
        losses[kind] = taught.metrics("stage2", "train/logits_distill_loss")
    server.close()
    assert server.prompts and len(losses["in_process"]) == 4
    np.testing.assert_allclose(losses["actors"], losses["in_process"], rtol=1e-3)
    np.testing.assert_allclose(losses["server"], losses["in_process"], rtol=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_actors_teach_block_diffusion_and_what_a_phase_raises(
    ray_cluster: None, student: str, tmp_path: Path
) -> None:
    """As a teacher in process of which as many tokens are compared; the student knows one more."""
    names, losses = ("logits_distill", "tcs_distill"), {}
    for kind, words in {"in_process": (), "actors": ("model.teacher.cpus=0.25",)}.items():
        said = (
            "training=dlm_distill", "training.objectives.dlm.block=8",
            "training.objectives.tcs_distill.top_k=64",
            "training.objectives.logits_distill={weight: 0, temperature: 5, top_k: 64}",
            "training.curriculum.phases=[{until: 0.5}, {until: 1, weights: {logits_distill: 1}}]",
        )  # fmt: skip
        found = run_taught(student, tmp_path, kind, *said, *words)
        losses[kind] = [found.metrics("dlm_distill", f"train/{name}_loss") for name in names]
    for mine, theirs in zip(losses["actors"], losses["in_process"], strict=True):
        assert len(mine) > 1 and mine[0] > 0
        np.testing.assert_allclose(mine, theirs, rtol=1e-3)
