"""Teachers in Ray actors: what they send, and that one which dies is asked again."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from road import Road, alone
from vllm_server import VLLM

from bitray import Config
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
LOGITS_ONLY = (
    "stages.stage1_9.objectives.hidden_distill.weight=0",
    "stages.stage1_9.lm_loss_weight=null",
)


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


@pytest.fixture
def taught(road: Road, configured: Callable[..., Config]) -> Callable[..., tuple[Road, Road]]:
    """The last steps of Stage 2 once more, with another teacher; and what `alone` compares with."""

    def run_on(experiment: str, *words: str) -> tuple[Road, Road]:
        source = str(road.checkpoints("stage2") / "step_000008")
        config = configured(
            experiment, f"stages.stage2.resume.checkpoint_path={source}", *LOGITS_ONLY,
            f"model.teacher.top_k={VOCABULARY}", "scaling.num_workers=1", "export.gguf=[]",
            "export.huggingface=false", *words,
        )  # fmt: skip
        run(config)
        reference = Road(config)
        reference.final = road.final  # type: ignore[method-assign]
        return Road(config), reference

    return run_on


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_taught_by_actors_is_the_run_taught_in_process(
    road: Road, taught: Callable[..., tuple[Road, Road]]
) -> None:
    made, _ = taught(
        "by_actors", "model.teacher.type=actors", "model.teacher.cpus=0.25",
        f"model.teacher.path={road.final('stage0')}",
    )  # fmt: skip
    np.testing.assert_allclose(made.metrics("stage2"), road.metrics("stage2")[8:], rtol=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_taught_by_a_server_is_the_run_taught_in_process(
    road: Road, taught: Callable[..., tuple[Road, Road]]
) -> None:
    tokenizer = load_tokenizer(road.final("stage0"))
    server = VLLM(load_model(road.final("stage0")), tokenizer, max_logprobs=VOCABULARY)
    at_one = [
        f"stages.{name}.objectives.logits_distill.temperature=1" for name in ("stage1_9", "stage2")
    ]
    made, reference = taught(
        "by_server", "model.teacher.type=server", f"model.teacher.url={server.url}", *at_one
    )
    server.close()
    assert server.prompts, "it was asked"
    source = str(road.checkpoints("stage2") / "step_000008")
    losses, _ = alone(reference, "stage2", load_model(source), resumed=source)
    np.testing.assert_allclose(made.metrics("stage2"), losses, rtol=1e-4)
