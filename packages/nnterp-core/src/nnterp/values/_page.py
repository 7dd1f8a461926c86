"""The reference page of the table, as Markdown."""

from __future__ import annotations

from nnterp.table import VALUES, Value

_HEAD = """# Values

What can be read and written in a forward pass? Everything in the tables below, inside a `trace`, `generate` or
`session`:

```python
with model.trace("The Eiffel Tower is in"):
    z = model.attention_head_outputs[3].save()      # read: [batch, seq, heads, head_dim]
    model.mlp_neurons[5] = model.mlp_neurons[5] * 0  # write
    logits = model.logits.save()
```

* **Order.** Read values in forward order: layer by layer, and inside a layer in the order of the table.
  `model.collect` and `model.gradients` take them in any order, and so does a block that
  [only reads](from-1x.md#reading-in-any-order).
* **Writing.** What you write must have the shape of the value it replaces.
* **Editing in place.** What you read is the model's own tensor, so an edit in place changes the run. The exceptions are
  values whose note says that they are a new tensor: assign these. Where the model's own code edits a tensor in place
  later (Falcon adds what attention returns to `mlps_output`, CTRL, BLT and GIT change `token_embeddings`), it goes on
  with a copy, so what you read stays as it was; nnsight's own `.output` of the module does change.
* **Shapes.** The batch is the first axis and the sequence the second, whatever the model's own layout. Patterns are
  `[batch, heads, query, key]`.
* **Padding.** In a trace, prompts are padded on the tokenizer's side, and indices along the sequence count padding.
  `model.collect` counts each prompt's own tokens instead.
* **Several attentions in a layer.** A layer of LongCat-Flash holds two attentions, one after the other. There, index a
  value of attention in a trace with the layer and the attention's number: `model.attention_head_outputs[3, 1]`.
* **Looped models.** Where layers run several times, index a value with the layer and the pass:
  `model.layers_output[3, 1]`. One index counts all runs. See [looped models](looped.md).

Which values does my model have? `model.support()` lists the layers that have each value, and the reason for the others.
Where is one read? `model.explain(name, layer=3)` prints the native module or operation, its source lines and its
layout.
"""

_IMAGES = """
## Of images: `model.NAME[layer]` of the vision tower, and `model.image_features`

They are there in runs with an image, after a first one has proven them; see [images](images.md). The tower runs before
the layers of the language model, so read them first.
"""

_TAIL = """
## Where they are read

A value that is a module's input or output is read at that module. The others are found by running the model on a short
probe and recording every operation in its layers:

* **Probabilities**: the softmax returns them, and they are unchanged when they are multiplied with the values.
* **Queries and keys**: their product is found among the scores.
* **Outputs of heads**: the input of the projection whose output is attention's output. If they are not simply the
  probabilities times the values, changing one head must change one block of them.
* **The stream between mixer and feed-forward**: the operation that, when it is changed, changes both the feed-forward's
  input and the residual path.

What cannot be recognised this way is unavailable, with the reason.

## Gradients in a trace

The backward pass computes gradients from the last value to the first. Read `.grad` in that order, inside the `with` of
`backward`:

```python
with model.trace("The Eiffel Tower is in"):
    early, late = model.layers_output[1], model.layers_output[3]
    score = model.logits[:, -1].max()
    with score.backward():
        late_grad = late.grad.save()
        early_grad = early.grad.save()
```

`model.gradients(prompts, metric, values)` takes care of the order and returns plain tensors; see
[Collecting](collect.md#gradients).
"""


def page() -> str:
    """The reference page."""
    text = [value for value in VALUES.values() if value.stack == "layers"]
    per_layer = [value for value in text if value.per_layer]
    whole = [value for value in text if not value.per_layer]
    across = [value for value in VALUES.values() if value.stack == "cross"]
    encoder = [value for value in VALUES.values() if value.stack == "encoder"]
    images = [value for value in VALUES.values() if value.stack == "vision"]
    logits = "| `logits` | `[batch, seq, vocab]` | The model's output. | |"
    parts = [
        _HEAD,
        "## Per layer: `model.NAME[layer]`\n",
        *_table(sorted(per_layer, key=lambda value: value.rank)),
        "\n## Per layer of an encoder-decoder model\n",
        "The values above are the decoder's. These are its attention to the encoder, and the encoder's own; see "
        "[encoder-decoder models](encoder-decoder.md).\n",
        *_table(sorted(across, key=lambda value: value.rank)),
        "",
        *_table(sorted(encoder, key=lambda value: value.rank)),
        "\n## Once per model: `model.NAME`\n",
        *_table(sorted(whole, key=lambda value: value.rank)),
        logits,
        _IMAGES,
        *_table(images),
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
