"""The model card: what a ternary model came from, how it was trained, and how well it does."""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import Field

from bitray.settings import Settings

Losses = dict[str, float | dict[str, float]]


class ModelCard(Settings):
    """What people need to know of an exported model.

    `losses` maps a domain to its held-out loss in nats per token, or to several of them by name
    (`{"books": {"teacher": 3.1, "ternary": 3.2}}`). `recipe`, `stages`, `data`: shown as given.
    """

    name: str = "Ternary language model"
    base_model: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)
    stages: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str | None = None
    losses: Losses = Field(default_factory=dict)
    notes: str = ""

    def markdown(self, usage: str) -> str:
        """The README.md of a model folder; `usage` is the section on loading it."""
        sections = [
            f"---\n{yaml.safe_dump(self._front_matter(), sort_keys=False)}---",
            f"# {self.name}",
            self._introduction(),
            self.notes,
            f"## Use\n\n{usage}",
            _section("Recipe", self.recipe),
            _section("Stages", self.stages),
            _section("Data", self.data),
            self._loss_table(),
            f"Run fingerprint: `{self.fingerprint}`" if self.fingerprint else "",
        ]
        return "\n\n".join(part.strip("\n") for part in sections if part) + "\n"

    def _front_matter(self) -> dict[str, Any]:
        known = {
            "base_model": self.base_model,
            "license": self.license,
            "language": list(self.language),
        }
        fixed = {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["bitnet", "ternary", "1.58-bit"],
        }
        return {**{key: value for key, value in known.items() if value}, **fixed}

    def _introduction(self) -> str:
        origin = f" It was made from `{self.base_model}`." if self.base_model else ""
        return (
            "The projections of every decoder layer have ternary weights (-1, 0 or 1 times one "
            "scale per matrix) and 8-bit activations, as in BitNet b1.58 (arXiv 2402.17764). "
            f"Embeddings, output head and norms are in floating point.{origin}"
        )

    def _loss_table(self) -> str:
        if not self.losses:
            return ""
        rows = {
            domain: value if isinstance(value, dict) else {"loss": value}
            for domain, value in self.losses.items()
        }
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines = [_row(["domain", *columns]), _row(["---"] * (len(columns) + 1))]
        for domain, row in rows.items():
            cells = [f"{row[name]:.4f}" if name in row else "" for name in columns]
            lines.append(_row([domain, *cells]))
        return "## Held-out loss\n\nNats per token.\n\n" + "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _section(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    return f"## {title}\n\n```yaml\n{yaml.safe_dump(dict(values), sort_keys=False)}```"
