"""The reference page of the table, as Markdown."""

from __future__ import annotations

from nnterp.table import VALUES, Value

_HEAD = """# Values

Everything that can be read and written in a forward pass. Inside a `trace`, `generate` or `session`:

```python
with model.trace("The Eiffel Tower is in"):
    z = model.attention_head_outputs[3].save()      # read: [batch, seq, heads, head_dim]
    model.mlp_neurons[5] = model.mlp_neurons[5] * 0  # write
    logits = model.logits.save()
```

Values are read in forward order, which is the order of the tables below: layer by layer, and from top to bottom
inside a layer. `model.collect` and `model.gradients` take them in any order. A value that is written must have the
shape of what it replaces. What is read is the model's own tensor: an edit in place edits the run, unless the note says
that the value is a new tensor; and a model may itself go on to change a tensor in place, so `.clone()` what has to stay
as it was.

Shapes have the batch first and positions second, whatever the model does inside; patterns are `[batch, heads, query,
key]`. Rows are padded on the tokenizer's side; `model.collect` counts positions over each prompt's own tokens instead.

In LongCat-Flash, whose layers hold two attentions one after the other, values of attention are indexed with the layer
and the attention's number in it, in a trace: `model.attention_head_outputs[3, 1]`.

`model.support()` says which of them a model has on which layers, and why not on the others. `model.explain(name,
layer=3)` prints where one is read: the native module or operation, its source lines, its layout.
"""

_TAIL = """
## Where they are read

A value that is a module's input or output is read there. The others are found by running the model once on a short
probe with every operation of its layers watched: the probabilities are what leaves the softmax and still holds its
numbers when it meets the values; queries and keys are the two tensors whose product is observed among the scores; the
heads' outputs are the input of the projection whose output is attention's, and where they are not simply the
probabilities times the values, moving one head must move one block of them; the stream between the sublayers is the
operation that moves both the feed-forward's input and the residual path when it is moved. What cannot be told this way
is unavailable, with the reason.

## Gradients in a trace

Gradients come backwards, so `.grad` is read from the last value to the first, inside the `with` of `backward`:

```python
with model.trace("The Eiffel Tower is in"):
    early, late = model.layers_output[1], model.layers_output[3]
    score = model.logits[:, -1].max()
    with score.backward():
        late_grad = late.grad.save()
        early_grad = early.grad.save()
```

`model.gradients(prompts, metric, values)` takes care of the order and gives plain tensors; see [collect](collect.md).
"""


def page() -> str:
    """The reference page."""
    per_layer = [value for value in VALUES.values() if value.per_layer]
    whole = [value for value in VALUES.values() if not value.per_layer]
    logits = "| `logits` | `[batch, seq, vocab]` | The model's output. | |"
    parts = [
        _HEAD,
        "## Per layer: `model.NAME[layer]`\n",
        *_table(sorted(per_layer, key=lambda value: value.rank)),
        "\n## Once per model: `model.NAME`\n",
        *_table(sorted(whole, key=lambda value: value.rank)),
        logits,
        _TAIL,
    ]
    return "\n".join(parts)


def _table(values: list[Value]) -> list[str]:
    rows = ["| name | shape | what it is | TransformerLens |", "|---|---|---|---|"]
    for value in values:
        words = " ".join(text for text in (value.description, value.note) if text)
        aliases = ", ".join(f"`{alias.replace('{}', 'i')}`" for alias in value.aliases)
        rows.append(f"| `{value.name}` | `{value.shape}` | {words} | {aliases} |")
    return rows
