"""How well a model does what it is asked: choices by likelihood, written text by ROUGE, lm-eval."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray.data.sources import LocalSource
from bitray.data.tokenizer import Encoder, backend_json, end_token_id
from bitray.inference.evaluation import fully_quantised
from bitray.inference.generation import tokens
from bitray.inference.settings import LMEval, Sampling, Task
from bitray.settings import UserError, nearest


class Pair(NamedTuple):
    """A question and its right answer."""

    place: str
    prompt: str
    answer: str


def read_pairs(name: str, task: Task) -> list[Pair]:
    """The first rows of a task. `UserError` for one that is none, and where there is none."""
    source = LocalSource(**task.model_dump(include=set(LocalSource.model_fields)))
    parts = source.parts(source.inputs(), 1 << 62)
    pairs = []
    for found in islice((one for part in parts for one in source.read(part)), task.rows):
        if found.problem:
            raise UserError(f"tasks.{name}: {found.place}: {found.problem}")
        if found.text is not None:
            pairs.append(Pair(found.place, found.prompt, found.text))
    if not pairs:
        raise UserError(f"tasks.{name}.path: {task.path} has no row to ask")
    return pairs


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, task: Task
) -> dict[str, int | float]:
    """Metrics of a task, each in [0, 1], and `rows`, at strength 1.

    With choices: `accuracy`, of the likeliest completion; `accuracy_norm`, of the likeliest per
    character; `majority`, of always giving the commonest answer. Else `rouge1`, `rouge2`, `rougeL`
    of greedy text. A prompt that is too long loses its beginning.
    """
    pairs, choices = read_pairs(name, task), task.choices or task.answers
    encoder = Encoder(backend_json(tokenizer), end_token_id(tokenizer))
    asked = _Asked(model, encoder, tokenizer)
    with fully_quantised(model), torch.no_grad():
        found = asked.chosen(name, pairs, choices) if choices else asked.written(pairs, task)
    return {"rows": len(pairs), **found}


class _Asked:
    """A model and its tokenizer, as training data is tokenised."""

    def __init__(
        self, model: PreTrainedModel, encoder: Encoder, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.model, self.encoder, self.tokenizer = model, encoder, tokenizer
        self.context = model.config.max_position_embeddings
        self.device = next(model.parameters()).device

    def ids(self, text: str, end: bool = False) -> list[int]:
        return self.encoder.encode([text], end=end)[0].tolist()

    def chosen(self, name: str, pairs: Sequence[Pair], choices: Sequence[str]) -> dict[str, float]:
        """Accuracies of choosing."""
        for pair in pairs:
            if pair.answer not in choices:
                listed = ", ".join(map(repr, choices))
                raise UserError(
                    f"tasks.{name}.choices: {pair.place} answers {pair.answer!r}, which is none of "
                    f"{listed}"
                )
        right = [choices.index(pair.answer) for pair in pairs]
        scores = torch.stack([self.likelihoods(pair.prompt, choices) for pair in pairs])
        lengths = torch.tensor([len(choice) for choice in choices])
        answers = torch.tensor(right)
        return {
            "accuracy": (scores.argmax(-1) == answers).double().mean().item(),
            "accuracy_norm": ((scores / lengths).argmax(-1) == answers).double().mean().item(),
            "majority": Counter(right).most_common(1)[0][1] / len(right),
        }

    def likelihoods(self, prompt: str, choices: Sequence[str]) -> torch.Tensor:
        """log p(completion | prompt) of each choice, in nats; one forward for all of them."""
        asked = self.ids(prompt)
        answers = [self.ids(choice) for choice in choices]
        kept = self.context - max(map(len, answers))
        if kept < 1:
            raise UserError(f"choices: they do not fit into the model's {self.context} positions")
        asked = asked[-kept:] or [end_token_id(self.tokenizer)]
        rows = [torch.tensor(asked + answer) for answer in answers]
        batch = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        # what is padded comes last, where nothing before can see it
        hidden = self.model.base_model(input_ids=batch, use_cache=False).last_hidden_state
        head, found = self.model.get_output_embeddings(), []
        for states, answer in zip(hidden, answers, strict=True):
            start = len(asked) - 1
            logp = head(states[start : start + len(answer)]).float().log_softmax(-1)
            wanted = torch.tensor(answer, device=self.device)
            found.append(logp.gather(-1, wanted[:, None]).double().sum().cpu())
        return torch.stack(found)

    def written(self, pairs: Sequence[Pair], task: Task) -> dict[str, float]:
        """ROUGE of writing."""
        sampling = Sampling(temperature=0, max_new_tokens=task.max_new_tokens)
        kept = self.context - task.max_new_tokens
        if kept < 1:
            raise UserError(
                f"max_new_tokens={task.max_new_tokens}: the model has {self.context} positions "
                "for prompt and text together"
            )
        scores: list[dict[str, float]] = []
        for pair in pairs:
            ids = self.ids(pair.prompt)[-kept:] or [end_token_id(self.tokenizer)]
            new = list(tokens(self.model, ids, sampling, self.tokenizer.eos_token_id))
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            scores.append(rouge(text, pair.answer))
        return {metric: fmean(score[metric] for score in scores) for metric in scores[0]}


def rouge(text: str, reference: str) -> dict[str, float]:
    """ROUGE (Lin, 2004), as F1 without stemming: `rouge1` and `rouge2` of the n-grams in common,
    `rougeL` of the longest common subsequence."""
    from rouge_score.rouge_scorer import RougeScorer

    found = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, text)
    return {metric: score.fmeasure for metric, score in found.items()}


# ------------------------------------------------------------------------------------------ lm-eval


def lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: LMEval, batch_size: int
) -> Iterator[tuple[str, str, float]]:
    """Task, metric and value of tasks of the library lm-eval, at strength 1."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "lm_eval.tasks: the library lm-eval is not installed; pip install lm-eval"
        ) from None
    manager = TaskManager(include_path=wanted.include_path)
    known = set(manager.all_tasks)
    for task in wanted.tasks:
        if task not in known:
            raise UserError(f"lm_eval.tasks: there is no task '{task}'{nearest(task, known)}")
    with fully_quantised(model):
        wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found: Mapping[str, Any] = simple_evaluate(
            model=wrapped,
            tasks=list(wanted.tasks),
            task_manager=manager,
            num_fewshot=wanted.num_fewshot,
            limit=wanted.limit,
            bootstrap_iters=0,
        )
    for task, metrics in found["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and not metric.partition(",")[0].endswith("_stderr"):
                yield task, metric.removesuffix(",none"), value
