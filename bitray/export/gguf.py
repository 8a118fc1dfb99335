"""Writes GGUF files: ternary models in all types, dense ones in the float types.

The codes and scales are the ones of training (`BitLinear.quantized()`); nothing is quantised here.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray.export.entries import Entry, entries
from bitray.export.packing import nbytes
from bitray.export.plan import Plan, check_ternary, dims_of, eps_of, plan, rope_of
from bitray.export.publish import published_file
from bitray.export.report import Checked, Report
from bitray.export.tokenizer import TokenizerFields, tokenizer_fields
from bitray.export.verify import check_gguf
from bitray.models.convert import is_bitnet


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    type: str = "i2_s",
) -> Report:
    """Write `model` to `path` (local, s3://, gs://) as `i2_s|tq1_0|tq2_0|f16|bf16|f32`.

    The file is unpacked again and compared with the model before it gets its name: what stands
    under `path` is whole and proved (`ExportError` otherwise). A dense model can be written in the
    float types.

    Raises `UserError` with the reason when the model has no such form: quantisation strength below
    1, an architecture that llama.cpp lacks, widths that fit no block, an unknown tokenizer.
    """
    planned = plan(model, type)
    if planned.kind.ternary or is_bitnet(model):
        check_ternary(model)
    fields = tokenizer_fields(tokenizer, model.config.vocab_size)
    tensors = entries(model, planned)
    with published_file(os.fspath(path)) as temporary:
        _write(model, planned, fields, tensors, temporary)
        checked = check_gguf(temporary, tensors, planned)
        size = temporary.stat().st_size
    return _report(os.fspath(path), planned, checked, size)


def _report(path: str, plan: Plan, checked: Checked, size: int) -> Report:
    layout = plan.layout
    return Report(
        path=path,
        type=plan.kind.name,
        architecture=plan.architecture.name,
        bytes=size,
        ternary_tensors=checked.tensors,
        ternary_weights=checked.weights,
        zeros=checked.zeros / max(checked.weights, 1),
        padding=f"{layout.dims} -> {layout.padded}" if layout.changed else None,
    )


def _write(
    model: PreTrainedModel,
    plan: Plan,
    fields: TokenizerFields,
    tensors: Sequence[Entry],
    path: Path,
) -> None:
    writer = GGUFWriter(path, plan.architecture.name)
    _add_model(writer, model, plan)
    _add_rope(writer, model)
    _add_tokenizer(writer, fields)
    for entry in tensors:
        # int8 keeps the library from deriving a shape; I2_S is a type id that it does not know
        size = nbytes(entry.shape, entry.kind)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.int8), size, entry.kind.ggml)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in tensors:
        writer.write_tensor_data(entry.data())
    writer.close()


def _add_model(writer: GGUFWriter, model: PreTrainedModel, plan: Plan) -> None:
    config, padded = model.config, plan.layout.padded
    writer.add_name(Path(config.name_or_path or config.model_type).name)
    writer.add_file_type(plan.kind.file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(padded.hidden)
    writer.add_feed_forward_length(padded.ffn)
    writer.add_head_count(padded.heads)
    writer.add_head_count_kv(padded.kv_heads)
    writer.add_key_length(padded.head_dim)
    writer.add_value_length(padded.head_dim)
    writer.add_layer_norm_rms_eps(eps_of(model, plan.layout))
    if plan.experts:
        writer.add_expert_count(plan.experts.num_experts)
        writer.add_expert_used_count(plan.experts.top_k)
        writer.add_expert_feed_forward_length(padded.ffn)
    if plan.kind.ternary:
        writer.add_quantization_version(2)


def _add_rope(writer: GGUFWriter, model: PreTrainedModel) -> None:
    rope = rope_of(model.config)
    writer.add_rope_dimension_count(dims_of(model.config).head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_tokenizer(writer: GGUFWriter, fields: TokenizerFields) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    writer.add_token_merges(fields.merges)
    for name, number in fields.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_add_bos_token(fields.add_bos)
    writer.add_add_eos_token(fields.add_eos)
    if fields.chat_template:
        writer.add_chat_template(fields.chat_template)
