"""Before a run: whether model, teacher, tokenizer and exports fit what the stages do with them."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray.data.tokenizer import check_vocabulary, tokenizer_identity
from bitray.export import can_export
from bitray.export.huggingface import form_of
from bitray.export.tokenizer import tokenizer_fields
from bitray.models.convert import is_bitnet, to_bitnet
from bitray.models.families import attention_projections, decoder_layers
from bitray.models.loading import (
    build_model,
    check_weights,
    load_tokenizer,
    local_model,
    skeleton,
)
from bitray.models.mask_token import set_mask_token
from bitray.nn import bit_linears, rank_of
from bitray.objectives import AttentionDistill, HiddenDistill
from bitray.pipeline.config import Config
from bitray.pipeline.folders import named_checkpoint
from bitray.pipeline.teacher_server import checked
from bitray.settings import UserError, listed
from bitray.training.teacher_settings import Server


def outline(config: Config) -> PreTrainedModel:
    """The dense model without its weights."""
    if config.model.path is not None:
        return _outline_at(config, config.model.path)
    assert config.model.config is not None
    with torch.device("meta"):
        return build_model(config.model.config)


def teacher_outline(config: Config) -> PreTrainedModel | None:
    """The same of a teacher that was named; None: it is the dense model itself."""
    path = getattr(config.model.teacher, "path", None)
    return _outline_at(config, path) if path else None


def _outline_at(config: Config, path: str) -> PreTrainedModel:
    with local_model(path) as folder, torch.device("meta"):
        model = skeleton(folder or path, config.model.revision_of(path))
        check_weights(path)
        return model


def check_model(config: Config, model: PreTrainedModel, tokenizer: str | None) -> None:
    """`UserError` for what would only show after hours: a tokenizer or rows that do not fit the
    model, a teacher that speaks another language, an export that cannot be. `tokenizer` is None
    where one is still to be trained, to the model's own size."""
    _check_starts(config)
    most = model.config.max_position_embeddings
    found = [text for name in config.stages for text in config.too_long(name, most)]
    found += _pretrained_again(config)
    mine = None
    if tokenizer is not None:
        mine = load_tokenizer(tokenizer, config.model.revision_of(tokenizer))
        check_vocabulary(mine, model.config.vocab_size)
        check_teacher(config, mine)
        if any(stage.needs_mask_token for stage in config.stages.values()):
            set_mask_token(mine, config.model.mask_token)
    begins = 1.0 if is_bitnet(model) else 0.0
    converted = to_bitnet(model, config.model.quantization.subln)
    teacher = teacher_outline(config) or converted  # which is as wide and as deep
    found += [text for name in config.stages for text in _misfits(config, name, converted, teacher)]
    found += _not_exported(config, converted, mine, begins)
    if found:
        raise UserError(listed(found))


def _pretrained_again(config: Config) -> list[str]:
    """Dense stages of a model that is trained already: they are for random weights, and would undo
    what it has learnt."""
    if config.model.path is None:
        return []
    return [
        f"stages.{name}: pretrains a model that is built here, but {config.model.name} is "
        f"pretrained (model.path); take pipeline=standard, or stages.{name}.max_steps=0"
        for name, stage in config.stages.items()
        if stage.dense and stage.total_steps
    ]


def _not_exported(
    config: Config,
    converted: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    strength: float,
) -> list[str]:
    """Why what the stages make of a model that begins at `strength` could not be written as what
    was asked for; a tokenizer of ours always can."""
    wanted, last = config.export, list(config.stages)[-1]
    if config.stages[last].dense or not (wanted.gguf or wanted.huggingface):
        return []
    reasons: dict[str, list[str]] = {}
    for kind in wanted.gguf:
        if reason := can_export(converted, kind):
            reasons.setdefault(reason, []).append(kind)
    found = [f"export.gguf: {', '.join(kinds)}: {why}" for why, kinds in reasons.items()]
    try:
        if wanted.gguf and tokenizer is not None:
            tokenizer_fields(tokenizer, converted.config.vocab_size)
        if wanted.huggingface:
            form_of(converted)
    except UserError as error:
        found.append(str(error))
    strength = _last_strength(config, strength)
    if strength < 1 and not _starts_elsewhere(config):
        found.append(
            f"export: stage {last} ends at quantisation strength {strength:.3g}, and only a model "
            "at 1 has ternary weights; let its lambda_warmup end before the stage does, or add a "
            "stage that trains at 1"
        )
    return found


def _starts_elsewhere(config: Config) -> bool:
    """Whether a stage begins with a checkpoint whose strength is not known here."""
    return any(s.start_from or named_checkpoint(config, n) for n, s in config.stages.items())


def _last_strength(config: Config, strength: float) -> float:
    """Strength at the last step of the stages of a model that begins at `strength`."""
    for stage in config.stages.values():
        if stage.total_steps and not stage.dense:
            strength = stage.strength(stage.total_steps - 1, strength)
    return strength


def _misfits(
    config: Config, name: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> list[str]:
    """What a stage names and its models do not have: a decoder layer, a rank, a number of heads."""
    stage = config.stages[name]
    try:
        for objective in stage.learnt.values():
            if isinstance(objective, HiddenDistill):
                _check_layers(objective, len(decoder_layers(student)), len(decoder_layers(teacher)))
            if isinstance(objective, AttentionDistill):
                widths = [_widths(model, objective.layer) for model in (student, teacher)]
                objective.heads_for(student.config.num_key_value_heads, *widths)
        for layer in bit_linears(student) if stage.lrc else ():
            assert stage.lrc is not None
            rank_of(stage.lrc.rank, layer.in_features, layer.out_features)
    except UserError as error:
        return [f"stages.{name}: {error}"]
    return []


def _check_layers(objective: HiddenDistill, student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"hidden_distill compares layer by layer, but the student has {student} decoder layers "
            f"and the teacher {teacher}; take a teacher of {student}, or logits_distill"
        )
    objective.shares(student)


def _widths(model: PreTrainedModel, layer: int) -> list[int]:
    """Numbers that the query, key and value projections of a layer put out."""
    return [each.get_parameter("weight").shape[0] for each in attention_projections(model, layer)]


def _check_starts(config: Config) -> None:
    """A checkpoint that was named and is not there would show in the workers, or not at all where
    a stage before has one."""
    for name, stage in config.stages.items():
        for path in filter(None, (stage.start_from, named_checkpoint(config, name))):
            try:
                with local_model(path):
                    pass
            except UserError as error:
                raise UserError(f"stages.{name} is to start from {error}") from None


def check_teacher(config: Config, mine: PreTrainedTokenizerBase) -> None:
    """`UserError` for a teacher whose tokenizer is not the student's, `mine`."""
    teacher = config.model.teacher
    if isinstance(teacher, Server):
        if any(s.total_steps and s.needs_teacher for s in config.stages.values()):
            checked(teacher, mine)
        return
    name = teacher.path
    if name is None:
        return
    theirs = load_tokenizer(name, config.model.revision_of(name))
    if tokenizer_identity(theirs) == tokenizer_identity(mine):
        return
    ids, others = mine.get_vocab(), theirs.get_vocab()
    differing = sorted(number for token, number in ids.items() if others.get(token) != number)
    what = "they split text differently"
    if differing:
        token = mine.convert_ids_to_tokens(differing[0])
        what = f"the first id that differs is {differing[0]}, the student's {token!r}"
    raise UserError(f"model.teacher.path: {name} has another tokenizer than the student: {what}")
