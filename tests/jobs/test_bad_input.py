"""What a user can put right: one sentence, exit code 2, and nothing lost that was there.

All jobs run with their arguments as on a command line, beside the folder of a run (`kept`).
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from command_line import SMALL_MODEL, SMALL_STAGES, Command, tree
from hub_server import Hub
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bitray.nn import bit_linears
from bitray.pipeline.finish import as_trained
from bitray.pipeline.folders import resolve_checkpoint
from bitray.pipeline.smoke import Smoke

pytestmark = pytest.mark.usefixtures("kept")

LOCAL = ["data=local", "data.sources.books.path=books"]
FRESH = "resume.fresh=true"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["training.optimizer.lrr=1"], "optimizer.lrr: there is no such setting (nearest: 'lr')"),
        (["trainin.seed=1"], "trainin: there is no such setting or group (nearest: 'training')"),
        (["training.max_steps=soon"], "training.max_steps: input should be a valid integer"),
        (["training.packing.enabled=never"], "packing.enabled: input should be a valid boolean"),
        (["scaling=laptopp"], "scaling=laptopp: no such choice (nearest: 'laptop'); there are: "),
        (["distributed=single"], "scaling=single: no such choice (nearest: 'single_gpu')"),
        (["model="], "model: nothing is chosen; there are: demo, "),
        (["stages.stage20.seed=3"], "this pipeline has no such stage (nearest: 'stage2')"),
        (["data=local"], "data.sources: no source of text is named; give data.sources.NAME.path="),
        (["data.sources.code.type=locale"], "code.type: 'locale' is not one of local, streaming"),
        (["export.gguf=[i3_s]"], "'i3_s' is not one of i2_s, tq1_0, tq2_0, f16, bf16, f32 (n"),
        (["pretrain"], "'pretrain': expected key=value or group=name (see --help)"),
        (["training.objectives.tcs_distill.weight=1"], "tcs_distill compares what dlm masks"),
        (["stages.stage2=5"], "stages.stage2: takes settings by name, not 5"),
        (["model.config.hidden_size=250"], "(250) is not a multiple of the number of attention"),
        (["model.config.num_attention_heads=3"], "of attention heads (3)"),
        (["model.config.max_position_embeddings=x"], "'max_position_embeddings' expected int, got"),
        (["--dryrun"], "--dryrun: there is no such flag (nearest: '--dry-run')"),
        (["--dry"], "--dry: there is no such flag (nearest: '--dry-run')"),
        (["--config"], "--config: expected one argument"),
        (["logging.level=debug"], "logging.level: there is no such setting"),
    ],
)  # fmt: skip
def test_a_word_that_is_wrong(command: Command, words: list[str], sentence: str) -> None:
    assert sentence in command("pretrain", FRESH, *words).sentence()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training:\n\tseed: 1\n", "token; YAML wants spaces, not tabs"),
        ("a:\n  b: 1\n\tseed: 1\n", "mine.yaml, line 3: found character '\\t'"),
        ("output_dir: a\nexperiment: b\noutput_dir: b\n", "line 3: 'output_dir' was already given"),
        ("training:\n  optimizer:\n    lrr: 1.0\n", "optimizer.lrr (mine.yaml, line 3): there is"),
        ("training:\n  seed: one\n", "training.seed (mine.yaml, line 2): input should"),
        ("- a\n- b\n", "mine.yaml: expected 'key: value' lines, found list"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_told_with_its_line(
    command: Command, here: Path, text: str, sentence: str
) -> None:
    (here / "mine.yaml").write_text(text)
    assert sentence in command("pretrain", "--config", "mine.yaml").sentence()


@pytest.mark.parametrize("word", ["-1", "0", "two"])
def test_rows_to_show_are_counted_from_one(command: Command, word: str) -> None:
    told = command("prepare", "--preview", word).sentence()
    assert told == f"argument --preview: '{word}' is no number of rows; give 1 or more"


def test_a_configuration_file_that_is_not_there(command: Command, here: Path) -> None:
    (here / "mine.yaml").write_text("")
    told = command("pretrain", "--config", "mime.yaml").sentence()
    assert told == "--config mime.yaml: no such file (nearest: 'mine.yaml')"


def test_contradictions_are_told_all_at_once(command: Command) -> None:
    """Of both sorts: what a setting's own class refuses, and what several of them say together."""
    sources = ("code", "prose", "arithmetic")
    told = command(
        "pretrain",
        *(f"data.sources.{name}.weight=0" for name in sources),
        "stages.stage2.lambda_warmup.min=0.9",
        "stages.stage2.lambda_warmup.max=0.5",
        "stages.stage1_9.lambda_warmup.warmup_steps=31",
        "stages.stage0.max_seq_length=4096",
        "stages.stage0.objectives.continue_pretrain.weight=0",
    ).sentences()
    text = "\n".join(told)
    assert len(told) == 5, text
    assert "data: the weights of all sources are 0" in text
    assert "stages.stage2.lambda_warmup: min (0.9) is above max" in text
    assert "stages.stage1_9.lambda_warmup.warmup_steps: 31 is longer than the stage" in text
    assert "stages.stage0.max_seq_length: 4096 is more than the 2048 positions of demo" in text
    assert "stages.stage0.objectives: no objective has a weight" in text


# ----------------------------------------------------------------------------------------- cluster


def test_more_workers_and_readers_than_cpus(command: Command) -> None:
    words = ["scaling.num_workers=900", "scaling.cpus_per_worker=2", "scaling.readers=8"]
    told = command("pretrain", "--dry-run", *words).sentence()
    assert "needs 1802 CPUs (900 workers x 2 + 8 readers x 0.25), this machine has " in told


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "nobody answers"), ("http://127.0.0.1:1", "submitted")]
)
def test_an_address_without_a_cluster_is_told_at_once(
    command: Command, flags: list[str], address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would try to connect for five minutes."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    told = command("pretrain", *flags).sentence()
    assert f"RAY_ADDRESS={address}: " in told and said in told and "HOST:PORT" in told


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_8_bit_floats_without_a_gpu_that_has_them(command: Command, flags: list[str]) -> None:
    said = command("pretrain", *flags, FRESH, "training.fp8.enabled=true").sentence()
    assert "stages.stage1_9.fp8: needs GPUs of compute capability 9.0" in said


@pytest.mark.parametrize(("words", "why"), [
    ([], "needs GPUs, these workers have CPUs; take sdpa"),
    (["scaling=single_gpu", "training.optimizer.type=muonclip"],
     "never makes the logits that muonclip measures; take sdpa"),
])  # fmt: skip
def test_attention_by_blocks_where_it_cannot_be(
    command: Command, words: list[str], why: str
) -> None:
    said = command("pretrain", "--dry-run", FRESH, "training.attention=flex", *words)
    assert any(f"stages.stage1_9.attention: flex {why}" in each for each in said.sentences())


def test_the_int8_kernel_without_a_gpu(command: Command) -> None:
    said = command("pretrain", "--dry-run", FRESH, "training.int8_kernel=true")
    why = "stages.stage1_9.int8_kernel: needs GPUs, these workers have CPUs; set int8_kernel=false"
    assert any(why in each for each in said.sentences())


def test_a_teacher_server_that_is_not_there(command: Command, models: Path) -> None:
    said = command(
        "pretrain", "--dry-run", "training=stage2_pretrain", "model=smollm2_135m",
        f"model.path={models / 'dense'}", "training.max_seq_length=32",
        "model.teacher.type=server", "model.teacher.url=http://127.0.0.1:9/v1",
        "model.teacher.attempts=1", "training.objectives.logits_distill.temperature=1",
    ).sentence()  # fmt: skip
    assert "model.teacher.url: http://127.0.0.1:9/v1/models does not answer after 1 tries" in said


def test_more_gpus_than_exist(command: Command) -> None:
    words = ["scaling.num_workers=64", "scaling.cpus_per_worker=0.001", "scaling.use_gpu=true"]
    told = command("pretrain", "--dry-run", *words).sentence()
    assert "needs 64 GPUs, this machine has " in told and "scaling=laptop" in told


# -------------------------------------------------------------------------------------------- data


def test_a_data_path_that_is_not_there(command: Command, here: Path) -> None:
    """Known before Ray starts, by a dry run too; every source that is wrong is named."""
    (here / "books").mkdir()
    (here / "books" / "a.txt").write_text("text")
    words = ["data=local", f"data.sources.mine.path={here}/book", "data.sources.fine.path=books"]
    for more in ([], ["--dry-run"], [FRESH]):
        told = command("pretrain", *words, *more).sentence()
        assert told.startswith(f"source 'mine': {here}/book: no such file or folder")
        assert told.endswith("(nearest: 'books')")
    told = command("pretrain", *words, "data.sources.no.path=nothere").sentences()
    assert [line.split(":")[0] for line in told] == ["source 'mine'", "source 'no'"]


def test_an_empty_source(command: Command, here: Path) -> None:
    (here / "books").mkdir()
    told = command("pretrain", *LOCAL).sentence()
    assert told.startswith("source 'books': books: no .parquet, .jsonl") and "is empty" in told
    (here / "books" / "photo.png").write_bytes(b"")
    assert "its 1 files are of other kinds" in command("pretrain", *LOCAL).sentence()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["weight=-0.5"], "books.weight: input should be greater than or equal to 0"),
        (["prompt='{text}'"], "books: prompt and completion go together"),
        (["prompt={text}", "completion=text"], "prompt: YAML reads this as a mapping, not as"),
        (["prompt={te", "completion=text"], "books.prompt: expected '}' before end of string"),
        (["filters.text.min_lenght=3"], "text.min_lenght: there is no such setting (nearest: 'm"),
        (["filters.text.at_least=many"], "text.at_least: input should be a valid number"),
        (["filters.text.at_least=2", "filters.text.at_most=1"], "at_least (2.0) is above at_"),
        (["max_tokens=0"], "books.max_tokens: input should be greater than or equal to 1"),
        (["max_documets=3"], "max_documets: there is no such setting (nearest: 'max_documents')"),
        (["path=hf://dataset/a/b"], "hf://dataset/a/b: expected hf://datasets/OWNER/NAME"),
        (["path=hf://datasets/org/no"], "has no such dataset, or it is private"),
        (["type=streaming", "path=org/no"], "hf://datasets/org/no: the Hub at http://127.0.0.1:"),
    ],
)  # fmt: skip
def test_a_source_that_is_wrong(
    command: Command, hub: Hub, here: Path, words: list[str], sentence: str
) -> None:
    """Said before Ray starts; the Hub here holds nothing."""
    (here / "books").mkdir()
    (here / "books" / "a.txt").write_text("text")
    said = ["data=local", *(f"data.sources.books.{word}" for word in ("path=books", *words))]
    assert sentence in command("pretrain", *said).sentence()


@pytest.fixture
def prepare_words(models: Path) -> list[str]:
    """Words of a run whose tokenizer is there, so that its data is what is looked at next."""
    return [*SMALL_MODEL, *SMALL_STAGES, f"model.tokenizer={models / 'dense'}", *LOCAL]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestUnreadable:
    """Data that shows what it is only when it is read, by tasks of Ray."""

    def test_a_corrupt_parquet(
        self, command: Command, here: Path, prepare_words: list[str]
    ) -> None:
        """Named, by the small job and by the big one, which keeps the run that it would replace;
        and the same command goes on once the file is gone."""
        (here / "books").mkdir()
        (here / "books" / "bad.parquet").write_bytes(b"PAR1" + bytes(64))
        for job, more in (("prepare", []), ("pretrain", [FRESH])):
            told = command(job, *prepare_words, *more).sentence()
            assert f"{here}/books/bad.parquet: cannot be read, it may be damaged" in told

    def test_a_corrupt_gzip(self, command: Command, here: Path, prepare_words: list[str]) -> None:
        (here / "books").mkdir()
        whole = gzip.compress(b'{"text": "one"}\n' * 4000)
        (here / "books" / "bad.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        told = command("prepare", *prepare_words).sentence()
        assert f"{here}/books/bad.jsonl.gz: cannot be read, it may be damaged" in told

    def test_filters_that_leave_nothing(
        self, command: Command, here: Path, prepare_words: list[str]
    ) -> None:
        (here / "books").mkdir()
        (here / "books" / "a.jsonl").write_text('{"text": "one", "score": 1}\n' * 40)
        told = command("prepare", *prepare_words, "data.sources.books.filters.score.at_least=2")
        expected = "source 'books' holds no document (40 rows, 0 empty, 40 left out by its filters"
        assert told.sentence().startswith(expected)

    def test_all_documents_held_out(
        self, command: Command, here: Path, prepare_words: list[str]
    ) -> None:
        (here / "books").mkdir()
        (here / "books" / "a.txt").write_text("the only one")
        words = [*prepare_words, "data.split.validation=0.99", "data.split.probe=0.009"]
        told = command("prepare", *words).sentence()
        assert told == "source 'books': data.split holds out all of its 1 documents"

    def test_no_document_held_out_to_validate_on(
        self, command: Command, here: Path, prepare_words: list[str]
    ) -> None:
        """Refused after preparing and before anything of the old run goes."""
        (here / "books").mkdir()
        (here / "books" / "a.txt").write_text("the only one " * 100)
        words = [*prepare_words, "data.split.validation=0", "data.split.probe=0", FRESH]
        told = command("pretrain", *words).sentence()
        assert "data.split.validation: no source has a held-out document" in told

    def test_a_document_of_ten_windows_is_cut_and_counted(
        self, command: Command, here: Path, prepare_words: list[str]
    ) -> None:
        (here / "books").mkdir()
        (here / "books" / "a.jsonl").write_text(
            json.dumps({"text": "z9" * 320}) + "\n" + json.dumps({"text": "short"}) + "\n"
        )
        words = [*prepare_words, "data.split.validation=0", "data.split.probe=0"]
        done = command("prepare", *words)
        assert done.code == 0, done.err
        table = done.out[done.out.index("source ") :].splitlines()
        header, row = table[0].split(), table[2].split()
        assert row[header.index("documents")] == "2" and row[header.index("cut")] == "1"
        assert 11 <= int(row[header.index("rows")]) <= 12


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpt2", "gpt2"),
        ("pickled", "its weights are pickled (pytorch_model.bin), which may run code when read"),
        ("wide", "the tokenizer has 300 tokens but the model's embedding only 280 rows"),
        ("dens", "no such model folder (nearest: 'dense')"),
    ],
)
def test_a_model_that_cannot_be_taken(
    command: Command, models: Path, corpus: str, name: str, sentence: str
) -> None:
    """Before Ray starts and before a run is replaced; by a dry run too."""
    words = ["model=smollm2_135m", f"model.path={models / name}", "model.name=mine", *SMALL_STAGES]
    words += ["pipeline=standard", "data=local", f"data.sources.books.path={corpus}"]
    words += ["experiment=bitray_demo"]
    for more in ("--dry-run", FRESH):
        assert sentence in command("pretrain", *words, more).sentence()


# ----------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["training.objectives.dml.weight=1"], "dml: there is no such setting (nearest: 'dlm')"),
        (["training.optimizer.type=muonn"], "'muonn' is not one of adamw, adamw_8bit, apollo"),
        (["training=lrc_calibration", "training.lrc.rank=999"],
         "lrc.rank: 999 is larger than the smaller side of a layer of"),
        (["training=lrc_calibration", "training.lrc.rank=1.5"],
         "1.5 is neither a share below 1 nor a whole number"),
        (["training.activation_sparsity={enabled: true, mode: block, n: 5, m: 4}"],
         "n (5) of every m (4) activations cannot be kept"),
        (["training.curriculum.phases=[{until: 0.4}, {until: 0.9}]"],
         "phases end at 0.4, 0.9 of the stage; each `until` has to be above the one before it, "
         "and the last one 1.0"),
        (["training.curriculum.phases=[{until: 0.5, weights: {continue_pretrain: 0, "
          "logits_distill: 0}}, {until: 1.0}]"],
         "stages.stage2"),
        (["model.teacher.path={models}/stranger"],
         "{models}/stranger has another tokenizer than the student: the first id that differs is"),
        (["model.teacher.path={models}/dens"], "no such model folder (nearest: 'dense')"),
        (["training.objectives.attention_distill={weight: 1, layer: 7}"], "layer"),
        (["training.objectives.attention_distill={weight: 1, relation_heads: 3}"],
         "stages.stage2: attention_distill.relation_heads: 3 does not divide the 256 numbers of a "
         "projection; take a divisor of 128"),
        (["training.objectives.attention_distill={weight: 1, relation_heads: 128}",
          "model.teacher.path={models}/narrow"],
         "relation_heads: 128 does not divide the 192 numbers"),
        (["training.objectives.attention_distill={weight: 1, relations: probabilities}",
          "model.teacher.path={models}/narrow"],
         "stages.stage2: attention_distill.relations: probabilities needs a teacher whose"),
        (["training.objectives.hidden_distill={weight: 1, layer_weights: [1, 2, 3]}"],
         "stages.stage2: hidden_distill.layer_weights has 3 numbers but the model has 2 decoder"),
        (["training.objectives.hidden_distill={weight: 1}", "model.teacher.path={models}/narrow"],
         "the student has 2 decoder layers and the teacher 1; take a teacher of 2, or logits_dis"),
    ],
)  # fmt: skip
def test_a_method_that_cannot_be(
    command: Command, models: Path, words: list[str], sentence: str
) -> None:
    """By a dry run, so before anything begins."""
    stage, *more = (
        words if words[0].startswith("training=") else ["training=stage2_pretrain", *words]
    )
    said = ["model=smollm2_135m", f"model.path={models / 'dense'}", stage]
    said += ["training.max_steps=4", "training.max_seq_length=32"]
    said += [word.replace("{models}", str(models)) for word in more]
    told = command("pretrain", "--dry-run", *said).sentence()
    assert sentence.replace("{models}", str(models)) in told


def test_an_unsupported_architecture_names_the_supported_ones(
    command: Command, models: Path
) -> None:
    words = [f"model.path={models / 'gpt2'}", "model=smollm2_135m", "pipeline=standard"]
    told = command("pretrain", *words, "training.max_seq_length=64").sentence()
    assert "gpt2" in told and all(name in told for name in ("llama", "qwen2", "qwen3"))


def test_a_pretrained_model_is_not_pretrained_again(command: Command, models: Path) -> None:
    """By the demo's Stage 0, which is what a run without another pipeline has."""
    words = ["model=smollm2_135m", f"model.path={models / 'dense'}", "training.max_seq_length=64"]
    words += ["model.name=mine", "export.gguf=[]", "export.huggingface=false"]
    for more in ("--dry-run", FRESH):
        told = command("pretrain", *words, more).sentence()
        assert told.startswith("stages.stage0: pretrains a model that is built here, but mine is")
        assert "pipeline=standard" in told
    assert command("pretrain", *words, "--dry-run", "stages.stage0.max_steps=0").code == 0
    smoke = Smoke.load(words=["combo=ce_only", *words[:3]])
    assert {name: each.total_steps for name, each in smoke.stages.items()} == {
        "stage0": 0,
        "stage2": 20,
    }


def test_a_mask_token_that_means_something_else(command: Command, models: Path) -> None:
    words = ["model=smollm2_135m", f"model.path={models / 'dense'}", "pipeline=standard"]
    words += ["training.max_seq_length=64", "training.objectives.dlm.weight=1"]
    for more in ("--dry-run", FRESH):
        told = command("pretrain", *words, "model.mask_token=<|pad|>", more).sentence()
        assert told.startswith("model.mask_token: '<|pad|>' (id 1) already means something")


def test_rows_longer_than_a_pretrained_model_has_positions(command: Command, models: Path) -> None:
    words = ["model=smollm2_135m", f"model.path={models / 'dense'}", "model.name=mine"]
    words += ["pipeline=standard", "training.max_seq_length=64", "stages.stage2.max_seq_length=129"]
    told = command("pretrain", *words).sentence()
    assert told == "stages.stage2.max_seq_length: 129 is more than the 128 positions of mine"


def test_an_export_that_cannot_be_is_refused_before_training(
    command: Command, models: Path
) -> None:
    """llama.cpp has no Qwen2 with SubLN; the types with the same reason are told together."""
    words = ["model=smollm2_135m", f"model.path={models / 'qwen2'}", "pipeline=standard"]
    words += ["training.max_seq_length=64", "export.gguf=[i2_s,f16]"]
    for more in ("--dry-run", FRESH):
        told = command("pretrain", *words, "experiment=bitray_demo", more).sentence()
        assert told.startswith("export.gguf: i2_s, f16: ")
        assert "no architecture for qwen2 with SubLN" in told and "subln='none'" in told


def test_an_export_of_a_model_that_will_not_be_ternary(command: Command, models: Path) -> None:
    words = ["model=smollm2_135m", f"model.path={models / 'dense'}", "training.max_seq_length=64"]
    words += ["export.huggingface=true", "training.max_steps=4", "--dry-run"]
    late = [*words, "training=stage1_9_layerwise", "training.lambda_warmup.warmup_steps=4"]
    told = command("pretrain", *late).sentence()
    assert told.startswith("export: stage stage1_9 ends at quantisation strength 0.75, and only")
    rounded = command("pretrain", *words, "training=stage1_subln").sentence()
    assert rounded.startswith("export: stage stage1 ends at quantisation strength 0, and only")
    in_time = [*words, "training=stage1_9_layerwise", "training.lambda_warmup.warmup_steps=3"]
    assert command("pretrain", *in_time).code == 0


def test_an_export_whose_tokenizer_no_engine_knows(
    command: Command, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "dense", tmp_path / "words")
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(
        tmp_path / "words"
    )
    said = ["model=smollm2_135m", f"model.path={tmp_path / 'words'}", "pipeline=standard"]
    said += ["training.max_seq_length=64", "model.quantization.subln=none", "--dry-run"]
    assert "tokenizer: " in command("pretrain", *said, "export.gguf=[f32]").sentence()
    assert command("pretrain", *said, "export.huggingface=true").code == 0


def test_a_checkpoint_to_start_from_that_is_not_there(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be forgotten silently where an earlier stage has a result."""
    name = "runs/bitray_demo/stage0_checkpoint/checkpoints/step_9"
    told = command("pretrain", f"stages.stage2.resume.checkpoint_path={name}").sentence()
    assert told.startswith(f"stages.stage2 is to start from {name}: no such model folder")
    monkeypatch.setenv("RESUME_CHECKPOINT", "runs/nothing/final")
    assert "runs/nothing/final: no such" in command("pretrain").sentence()


# ------------------------------------------------------------------------------- the smaller jobs


@pytest.mark.parametrize("job", ["evaluate", "generate", "export"])
def test_a_checkpoint_that_is_not_there(command: Command, job: str) -> None:
    more = {"generate": ["prompt=x"], "export": ["format=gguf", "output=x.gguf"]}.get(job, [])
    told = command(job, "checkpoint=runs/bitray_dem", *more).sentence()
    assert told == "runs/bitray_dem: no such model folder (nearest: 'bitray_demo')"
    told = command(job, "checkpoint=runs/bitray_demo", *more).sentence()
    assert told.startswith("runs/bitray_demo: no config.json")


def test_what_has_to_be_given(command: Command) -> None:
    told = command("export", "checkpoint=x").sentences()
    assert told == ["format: has to be given", "output: has to be given"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["format=gguf", "type=i2s"], "type: 'i2s' is not one of i2_s, tq1_0, tq2_0, f1"),
        (["format=ggml"], "format: 'ggml' is not one of gguf, huggingface (nearest: 'gguf')"),
        (["format=gguf", "outptu=x"], "outptu: there is no such setting or group (near"),
        (["format=gguf", "output=runs"], "runs: a folder; name the file to write in it"),
        (["format=huggingface", "output=runs/bitray_demo"], "exists and holds no"),
        (["format=gguf", "output=runs/bitray_demo/fingerprint.json/x"], "fingerprint.json: "),
    ],
)  # fmt: skip
def test_an_export_that_is_asked_for_wrongly(
    command: Command, models: Path, words: list[str], sentence: str
) -> None:
    given = {"output": "x.gguf"} | dict(word.split("=", 1) for word in words)
    said = [f"{key}={value}" for key, value in given.items()]
    assert sentence in command("export", f"checkpoint={models / 'ternary'}", *said).sentence()


def test_a_model_that_is_not_wholly_ternary_yet_is_not_exported(
    command: Command, here: Path, run_dir: str, models: Path
) -> None:
    step = f"checkpoint={run_dir}/stage1_9_checkpoint"
    for form in (["format=gguf", "output=x.gguf"], ["format=huggingface", "output=x"]):
        told = command("export", step, *form).sentence()
        assert "quantisation strength is 0.4; only strength 1 has ternary weights" in told
    dense = f"checkpoint={models / 'dense'}"
    told = command("export", dense, "format=gguf", "output=x.gguf").sentence()
    assert "the model has no ternary layer" in told
    assert sorted(tree(here)) == sorted(["runs", *(f"runs/{n}" for n in tree(here / "runs"))])
    layers = bit_linears(as_trained(resolve_checkpoint(f"{run_dir}/stage1_9_checkpoint")))
    assert {round(float(layer.strength), 6) for layer in layers} == {0.4}, "as a run exports it"


def test_a_prompt_that_is_too_long(command: Command, models: Path) -> None:
    given = [f"checkpoint={models / 'ternary'}", f"prompt={'x1' * 60}"]
    told = command("generate", *given, "sampling.max_new_tokens=9").sentence()
    assert "prompt of 120 tokens and max_new_tokens=9 do not fit into the model's 128" in told


def test_block_diffusion_without_a_mask_token(command: Command, models: Path) -> None:
    where = models / "ternary"
    told = command("generate", f"checkpoint={where}", "prompt=a", "mode=diffusion").sentence()
    assert told.startswith(f"{where}: this model has no mask token") and "objectives.dlm" in told


def test_a_model_alone_has_no_data_to_be_evaluated_on(command: Command, models: Path) -> None:
    told = command("evaluate", f"checkpoint={models / 'dense'}").sentence()
    assert "does not lie in a run, so say on what to evaluate it" in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=x.gguf"], "model=x.gguf: no such file"),
        (["model=x.gguf", "mode=diffusion"], "mode=diffusion: llama.cpp runs GGUF files autoreg"),
        (["model=./nowhere"], "./nowhere: no such model folder"),
        (["model=dense", "mode=diffusion"], "this model has no mask token"),
        (["model=dense", "host=0.0.0.0"], "host=0.0.0.0: whoever reaches it could use the model; "),
        (["model=dense", "host=999.1.1.1"], "set BITRAY_SERVE_TOKEN"),
        (["port=8080"], "model: has to be given"),
        (["model=dense", "port=99999"], "port: input should be less than or equal to 65535"),
        (["model=dense", "prt=1"], "prt: there is no such setting or group (nearest: 'port')"),
    ],
)  # fmt: skip
def test_what_cannot_be_served(
    command: Command, here: Path, models: Path, words: list[str], sentence: str
) -> None:
    (here / "dense").symlink_to(models / "dense")
    words = words if any(word.startswith("port") for word in words) else [*words, "port=0"]
    assert sentence in command("serve", *words).sentence()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tasks.a.path=qa.jsonl"], "tasks.a: "),
        (["tasks.a.path=qa.jsonl", "tasks.a.completion='{answer}'", "tasks.a.choices=[x, y]"],
         "answers 'yes', which is none of 'x', 'y'"),
        (["tasks.a.path=qa.jsonl", "tasks.a.rws=3"],
         "tasks.a.rws: there is no such setting (nearest: 'rows')"),
        (["tasks=downstreem"], "tasks=downstreem: no such choice (nearest: 'downstream')"),
        (["lm_eval.task=[a]"], "lm_eval.task: there is no such setting (nearest: 'tasks')"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_asked(
    command: Command, here: Path, models: Path, words: list[str], sentence: str
) -> None:
    (here / "qa.jsonl").write_text(json.dumps({"prompt": "is it?", "answer": "yes"}) + "\n")
    assert sentence in command("evaluate", f"checkpoint={models / 'dense'}", *words).sentence()
