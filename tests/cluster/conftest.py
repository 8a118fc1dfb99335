"""Clusters of several nodes for the tests here, and the run that is disturbed in them."""

from collections.abc import Callable, Iterator

import pytest
from machines import Machines

HEAD = {"num_cpus": 1, "labels": {"role": "data"}}
WORKER = {"num_cpus": 1, "labels": {"role": "train"}}


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A head, which reads and prepares data, and two nodes for one worker each."""
    found = Machines(HEAD, WORKER, WORKER)
    yield found
    found.close()


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Command-line words of a tiny run of one stage with influence, two workers on two nodes."""
    root = tmp_path_factory.mktemp("runs")
    shape = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return lambda experiment, *more: [
        "training=stage0_pretrain", f"output_dir={root}", f"experiment={experiment}",
        *(f"model.config.{name}={value}" for name, value in shape.items()),
        *(f"data.sources.{name}.max_bytes=60000" for name in ("code", "prose", "arithmetic")),
        "data.split.validation=0.1", "data.split.probe=0.1", "evaluation.rows=4",
        "report.prompts=[]", "export.gguf=[]", "export.huggingface=false",
        "training.max_steps=40", "training.batch_size=2",
        "training.gradient_accumulation_steps=4", "training.max_seq_length=64",
        "training.log_every=1", "training.save_every=5", "training.keep_last=3",
        "training.influence.enabled=true", "training.influence.warmup_steps=4",
        "training.influence.update_interval=4", "training.influence.budget=99",
        "training.influence.probe_rows=2", "training.influence.groups=2",
        "training.influence.group_rows=2", "training.influence.learning_rate=0.8",
        "scaling.num_workers=2", "scaling.cpus_per_worker=1",
        "scaling.worker_labels={role: train}", "scaling.data_labels={role: data}",
        *more,
    ]  # fmt: skip
