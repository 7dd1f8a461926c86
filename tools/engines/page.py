"""The page `docs/engines.md`, made from the stored result alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from causes import Cause, cause_of
from cells import CELLS, LONG, SHORT, TOLERANCE
from comparing import ABSENT, AGREES, LETTERS, NONE, REFUSED, WRONG, Outcome
from environments import BY_ADAPTER, ENGINES
from results import Results

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
HEADINGS = {AGREES: "agrees", REFUSED: "refused", WRONG: "silent error", ABSENT: "not offered"}
SHOWN = 3

OPENING = """\
# Other engines

Which numbers do nnterp, TransformerLens, interp-engine and plain hooks give, on which architectures, and are they
right?

Each engine was given the same {count} tiny random models and was asked for the same eight things. What it gave was
compared with plain HuggingFace models and plain torch hooks. The models are {which},
in alphabetical order, of transformers' causal model types that can be saved and loaded.

* **agrees**: all numbers are those of the reference, within {tolerance:g} of the reference's largest number.
* **refused**: the engine raised an error, when it loaded the model or when it was asked.
* **silent error**: it gave a number that differs, and raised nothing.
* **not offered**: the engine has no call for it.

A refusal is an honest answer, so the columns that matter are the first and the third.
"""

FALCON = """\
* Not among the models above, but known: output_attentions changes the logits of `falcon`, with the default attention,
  because the causal mask is left out.\
"""

MADE = """\
## How it was made

```bash
uv run python tools/engines setup
uv run python tools/engines run{sample}
uv run python tools/engines page
```

* **Models.** `nnterp.testing.tiny_checkpoint`: the architecture's own code and features at a small size, in float32,
  with random weights that are loud enough for softcaps, logit scales and wrong positions to show. Trained weights would
  be quieter: a number that is off by a factor of two here may be off by a percent there, and is as wrong.
* **Engines.** Each in an environment of its own, with the same torch and transformers, from a local folder, on the CPU,
  with eager attention: `tools/engines/adapters`. Engines are used as their documentation says, with nothing set by hand
  for a model type; what an error message recommends is not tried.
* **Prompts.** Token ids, {long} and {short} of them. The batch of the two is left-padded and goes in as the engine's
  documentation says, with its attention mask.
* **Reference.** `tools/engines/reference.py`: HuggingFace's model and torch hooks, no code of any engine. Layers are
  the modules whose outputs are the hidden states that the model returns. Attention probabilities are the softmax that
  ran inside a layer. Of the output of an attention or a feed-forward, what the module or its last projection returns
  counts, and so does what norms and multipliers make of it, because engines define it in either way. The logits without
  a head have to be the same whether its pattern or its columns before the output projection are set to zero. Where the
  reference cannot tell, nothing is compared, and the cell counts for no engine.
* **Who made it.** The makers of the first engine. Mistakes in the other adapters would count against the other engines,
  so their silent errors were looked into by hand, kind by kind; the list above says what was seen.
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def counted(results: Results, cell: str | None = None) -> list[str]:
    """One row for each engine with its counts, in one cell or in all."""
    rows = []
    for engine in ENGINES:
        counts = results.counts(engine.adapter, cell)
        compared = sum(counts[kind] for kind in HEADINGS)
        rows.append([engine.title, *(counts[kind] for kind in HEADINGS), compared])
    return table(["engine", *HEADINGS.values(), "of"], rows)


def page(results: Results) -> str:
    """The page's text."""
    count = len(next(iter(results.outcomes.values())))
    every = results.about["every"]
    which = "all" if every == 1 else f"one in {every}"
    opening = OPENING.format(count=count, which=which, tolerance=TOLERANCE)
    parts = [opening, *counted(results), ""]
    parts += [line for engine in ENGINES if (line := _not_loaded(results, engine.adapter))]
    parts += ["", "## One thing at a time", ""]
    for cell, meaning in CELLS.items():
        parts += [f"### {cell}: {meaning}", "", *counted(results, cell), ""]
        loudest = [line for engine in ENGINES if (line := _most_refused(results, engine.adapter, cell))]
        parts += [*loudest, ""] if loudest else []
    parts += ["## Silent errors", ""]
    for engine in ENGINES:
        parts += [f"### {engine.title}", "", *_silent(results, engine.adapter), ""]
    parts += _huggingface(results)
    parts += [MADE.format(long=LONG, short=SHORT, sample="" if every == 1 else f" --every {every}")]
    parts += _versions(results)
    parts += _every_type(results)
    return "\n".join(parts).rstrip() + "\n"


def _not_loaded(results: Results, engine: str) -> str:
    """How many models an engine refuses altogether, and its most frequent reason."""
    texts: Counter[str] = Counter()
    for by_cell in results.outcomes[engine].values():
        compared = [o for o in by_cell.values() if o.kind not in (NONE, ABSENT)]
        if {o.kind for o in compared} == {REFUSED} and len({o.detail for o in compared}) == 1:
            texts[compared[0].detail.partition(" ... ")[0][:60]] += 1
    if not texts:
        return ""
    text, times = texts.most_common(1)[0]
    title = BY_ADAPTER[engine].title
    return f"* {title} does not load {sum(texts.values())} of the models; most often ({times}): {_plain(text)}"


def _most_refused(results: Results, engine: str, cell: str) -> str:
    """The most frequent refusal of a cell, of models that the engine loads."""
    texts: Counter[str] = Counter()
    for by_cell in results.outcomes[engine].values():
        outcome = by_cell[cell]
        if outcome.kind == REFUSED and {o.kind for o in by_cell.values()} - {NONE, ABSENT, REFUSED}:
            texts[outcome.detail] += 1
    if not texts:
        return ""
    text, times = texts.most_common(1)[0]
    title = BY_ADAPTER[engine].title
    return f"* {title} refuses {sum(texts.values())} that it loads; most often ({times}): {_plain(text)}"


def _plain(text: str) -> str:
    """A message of an engine as code, on one line."""
    short = text if len(text) <= 140 else text[:137] + "..."
    return "`" + short.replace("`", "'").replace("|", "/") + "`"


def _silent(results: Results, engine: str) -> list[str]:
    """The silent errors of an engine, by cause."""
    wrong, lines = results.wrong(engine), []
    if not wrong:
        return ["None."]
    rows: dict[Cause | None, dict[str, dict[str, str]]] = {}
    for cell, by_type in wrong.items():
        for model_type, detail in by_type.items():
            rows.setdefault(cause_of(engine, cell, model_type), {}).setdefault(cell, {})[model_type] = detail
    for cause, cells in sorted(rows.items(), key=lambda item: item[0] is None):
        types = sorted({t for by_type in cells.values() for t in by_type})
        numbers = sum(map(len, cells.values()))
        cell, by_type = next(iter(cells.items()))
        model_type, detail = next(iter(by_type.items()))
        lines.append(
            f"* **{', '.join(cells)}** ({numbers}): {cause.why if cause else 'not looked into.'} "
            f"Types: {', '.join(f'`{t}`' for t in types)}. For example {cell} of `{model_type}`: {detail}."
            + (f" Seen: {cause.seen}" if cause and cause.seen else "")
        )
    return lines


def _huggingface(results: Results) -> list[str]:
    """What HuggingFace's own outputs are not."""
    by_kind: dict[str, list[str]] = {}
    for model_type, notes in results.huggingface.items():
        for note in notes:
            kind = "attentions are not the softmax that ran in their layers" if note.startswith("attentions") else note
            by_kind.setdefault(kind, []).append(model_type)
    lines = ["## HuggingFace's own outputs", ""]
    lines += ["Where what a model returns is not what its name says. The reference uses none of these.", ""]
    for kind, types in by_kind.items():
        named = f"{len(types)} types, such as " if len(types) > 20 else ""
        lines.append(f"* {kind}: {named}{', '.join(f'`{t}`' for t in types[: SHOWN if named else None])}.")
    if "falcon" not in results.outcomes[ENGINES[0].adapter]:
        lines.append(FALCON)
    return [*lines, ""]


def _versions(results: Results) -> list[str]:
    """Versions, date and cost."""
    about = results.about
    lines = [f"Made on {about['date']}, with:", ""]
    rows = []
    for engine in ENGINES:
        versions = ", ".join(f"{name} {number}" for name, number in about["versions"][engine.adapter].items())
        rows.append([engine.title, engine.how, versions, about["median seconds a type"][engine.adapter]])
    lines += table(["engine", "how it is called", "versions", "seconds of CPU a type (median)"], rows)
    if results.unreferenced:
        lines += ["", "Without a reference, and so not compared:", ""]
        lines += [f"* `{model_type}`: {_plain(reason)}" for model_type, reason in results.unreferenced.items()]
    return [*lines, ""]


def _letters(by_cell: Mapping[str, Outcome]) -> str:
    """All cells of a model type, one letter each."""
    return "`" + "".join(LETTERS[outcome.kind] for outcome in by_cell.values()) + "`"


def _every_type(results: Results) -> list[str]:
    """One row for each model type."""
    letters = ", ".join(f"`{letter}` {kind}" for kind, letter in LETTERS.items())
    lines = ["## Every model type", "", f"In the order {', '.join(CELLS)}: {letters}.", ""]
    types = next(iter(results.outcomes.values()))
    rows = [[f"`{t}`", *(_letters(results.outcomes[engine.adapter][t]) for engine in ENGINES)] for t in types]
    return [*lines, *table(["model type", *(engine.title for engine in ENGINES)], rows), ""]
