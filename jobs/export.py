"""A ternary checkpoint as GGUF or as a folder that stock transformers loads.

examples:
  python jobs/export.py checkpoint=runs/bitray_demo format=gguf output=demo.gguf
      type i2_s, for bitnet.cpp; type=tq1_0 or tq2_0 for llama.cpp, f16, bf16 or f32 for any engine
  python jobs/export.py checkpoint=runs/bitray_demo format=huggingface output=demo
"""

from bitray.pipeline.cli import Arguments, job
from bitray.pipeline.requests import Export


def main(arguments: Arguments) -> None:
    request = Export.load(arguments.config, arguments.words)
    from bitray.pipeline.inspect import export_checkpoint

    print(export_checkpoint(request))


if __name__ == "__main__":
    job(main, __doc__, Export)
