# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of a run, its tokens, a comparison and the report: html, all text escaped.

Nothing here needs a script or an address, but for the report in its frame: a notebook's outputs
are read on pages that run none.
"""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd_jax.errors import UserError
from opsd_jax.evaluation.compare import LEVEL, Difference, compare
from opsd_jax.evaluation.plot import Workdir, grouped, plot
from opsd_jax.evaluation.report import environment, page
from opsd_jax.evaluation.runs import ACCURACY, Run, read_token_samples, unit_of
from opsd_jax.evaluation.summary import summary
from opsd_jax.host.files import write_whole


@functools.cache
def _macros() -> Any:
    text = (Path(__file__).parent / "inline.html").read_text(encoding="utf-8")
    return environment().from_string(text).module


def filled(name: str, **values: Any) -> str:
    """A macro of inline.html with its values, every text of them escaped."""
    return str(getattr(_macros(), name)(**values))


def figure_png(figure: Any) -> str:
    """A matplotlib figure as base64 of its png."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=72)
    return base64.b64encode(file.getvalue()).decode()


def run_html(run: Run) -> str:
    """Before and after as `opsd train` prints it, and with matplotlib the held-out accuracy."""
    png = ""
    if len(run.series(ACCURACY)) > 1:
        try:
            png = figure_png(plot(run))
        except UserError:  # without matplotlib
            pass
    return filled("run", told=repr(run), table=summary(run.workdir), png=png)


class Comparison(dict[str, Difference]):
    """`<role>/<metric>` -> B minus A; in bold where the interval leaves out 0."""

    def _repr_html_(self) -> str:
        return filled("comparison", rows=list(self.items()), level=f"{LEVEL:.0%}")


def compare_evaluations(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Comparison:
    """Is B better than A on the same problems? As `opsd eval --compare A B` has it.

    Args:
      a, b: folders of `evaluate`, or workdirs with one evaluation.

    Raises:
      UserError: no evaluation there, an unfinished one, or other problems.
    """
    return Comparison(compare(os.fspath(a), os.fspath(b)))


class TokenView:
    """Rollouts of a run, each token shaded by how far student and teacher are apart.

    samples: what `opsd tokens` wrote of each: question, tokens with divergence and both sides'
    alternatives, …
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]]):
        self.samples = samples

    def __repr__(self) -> str:
        numbers = [len(sample["tokens"]) for sample in self.samples]
        return f"TokenView({len(numbers)} rollouts, {sum(numbers)} tokens)"

    def _repr_html_(self) -> str:
        every = [token["divergence"] or 0.0 for s in self.samples for token in s["tokens"]]
        top = sorted(every)[int(0.98 * (len(every) - 1))] if every else 0.0
        unit = unit_of(self.samples)
        rows = [
            {**sample, "tokens": [_token(token, top or 1.0, unit) for token in sample["tokens"]]}
            for sample in self.samples
        ]
        step = self.samples[0]["step"] if self.samples else "–"
        return filled("tokens", step=step, top=top, unit=unit, samples=rows)


def token_view(path: Path) -> TokenView:
    """The view of a file of `opsd tokens`."""
    return TokenView(read_token_samples(path))


def _token(token: Mapping[str, Any], top: float, unit: str) -> dict[str, Any]:
    """What is shown of a token: its text, how dark, and what stands beside it when pointed at."""
    text = token["text"].replace("\n", "⏎\n") + ("■" if token["stop"] else "")
    told = [f"divergence {token['divergence']}{unit}"]
    for side in ("teacher", "student"):
        likely = (f"{text or f'id {id}'!r} {prob}" for id, text, prob in token[f"{side}_top"])
        told.append(f"{side}: {', '.join(likely)}")
    return {
        "shown": text or "·",
        "shade": 0.85 * min(1.0, max(0.0, (token["divergence"] or 0.0) / top)),
        "differs": token["teacher_top"][0][0] != token["student_top"][0][0],
        "told": "\n".join(told),
    }


class Report:
    """The page of `opsd report`; a notebook shows it in a frame of its own, cut off from the rest.

    Attributes:
      html: the whole page.
      height: of the frame, in pixels.
    """

    def __init__(self, html: str, height: int = 700):
        self.html, self.height = html, height

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file."""
        write_whole(Path(path), self.html)

    def __repr__(self) -> str:
        return f"Report({len(self.html):,} characters; save(path) writes it)"

    def _repr_html_(self) -> str:
        return filled("frame", page=self.html, height=self.height)


def report(
    runs: Workdir | Sequence[Workdir] | Mapping[str, Workdir | Sequence[Workdir]],
    name: str = "",
    levels: Sequence[float] = (0.7, 0.8, 0.9),
) -> Report:
    """Many runs on one page, as `opsd report` writes it; a notebook displays what this returns.

    Args:
      runs: a workdir, several, or label -> one or several.
      name: title of the page.
      levels: accuracies whose cost in tokens is tabulated.

    Raises:
      UserError: no such workdir, or a level that is no accuracy.
    """
    return Report(page(grouped(runs), name, levels))
