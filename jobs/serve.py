"""An OpenAI-style server on loopback: /v1/models, /v1/completions, /v1/chat/completions.

examples:
  python jobs/serve.py model=runs/bitray_demo port=8080
      a checkpoint, by bitray's own generation
  python jobs/serve.py model=demo.gguf
      a GGUF file, by llama.cpp (llama-cpp-python)
  BITRAY_SERVE_TOKEN=... python jobs/serve.py model=demo.gguf host=0.0.0.0
      for other machines; clients send the token as their API key
"""

from bitray.pipeline.cli import Arguments, job
from bitray.pipeline.requests import Serving


def main(arguments: Arguments) -> None:
    request = Serving.load(arguments.config, arguments.words)
    from bitray.pipeline.inspect import serve_model

    serve_model(request)


if __name__ == "__main__":
    job(main, __doc__, Serving)
