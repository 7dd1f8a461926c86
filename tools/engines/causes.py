"""What was found out by hand about numbers that differ: one row for each kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """Why some numbers of an engine differ: in which cells, of which model types, and how that was seen."""

    engine: str
    cells: tuple[str, ...]
    types: tuple[str, ...]
    why: str
    seen: str = ""


NO_POSITIONS = (
    "transformers counts positions from the start of the padded row, and the forward takes no `position_ids`."
)
MASK_ALONE = (
    "the batch runs with its mask but without `position_ids`, so positions count from the start of the padded row."
)
TEMPERATURE = "in transformers the attention's temperature follows the index in the padded row, not the position."
BLOCKS = "in transformers blocks of keys are cut from the start of the padded row."
EQUALS = "the numbers equal those of the plain HuggingFace model on the padded batch"
BART = ("bart", "blenderbot", "marian", "pegasus")
MENDED = ("big_bird", "electra", "gpt-sw3", "hunyuan_v1_dense", "roc_bert")
SCALED = ("cohere2_moe", "granite", "hyperclovax")

CAUSES: tuple[Cause, ...] = (
    Cause(
        "hooks",
        ("readout",),
        (*SCALED, "granitemoehybrid"),
        "final norm and head alone: final softcaps and logit scales are left out.",
    ),
    Cause("hooks", ("readout",), ("gemma3n_text",), "the four copies of the stream are not merged."),
    Cause(
        "hooks",
        ("pattern",),
        ("granitemoehybrid", "lfm2_moe", "zamba2"),
        "`attentions` has one entry for each layer with attention, not one for each layer.",
        "entry 1 is the pattern of a later layer.",
    ),
    Cause(
        "hooks",
        ("padded",),
        (*BART, *MENDED, "llama4_text", "minimax_m3_vl_text", "trocr", "xlm", "xlstm"),
        "the plain model, given the mask alone, does not give a padded row its own numbers: positions count from "
        "the start of the padded row, or a state or blocks of keys run through the padding.",
        f"this is the plain model; in {', '.join(MENDED)} `position_ids` mend it.",
    ),
    Cause(
        "nnterp_1",
        ("readout",),
        SCALED,
        "`project_on_vocab` is final norm and head: final softcaps and logit scales are left out.",
        "with the softcap or scale of the config put behind it, the logits are the model's, bit for bit.",
    ),
    Cause("nnterp_1", ("padded",), ("gpt-sw3", "hunyuan_v1_dense"), MASK_ALONE, f"{EQUALS} and mask, bit for bit."),
    Cause("nnterp_1", ("padded",), ("minimax_m3_vl_text",), BLOCKS, f"{EQUALS}, bit for bit."),
    Cause(
        "transformerlens",
        ("padded",),
        ("bart",),
        "a checkpoint of `BartForCausalLM` is loaded as `BartForConditionalGeneration`; it does not hold the encoder.",
        "`type(bridge.original_model)`. Streams are refused, logits are not.",
    ),
    Cause("transformerlens", ("padded",), ("llama4_text",), TEMPERATURE, f"{EQUALS} with `position_ids`, bit for bit."),
    Cause(
        "interp_engine_eager",
        ("readout",),
        BART,
        "the model has no final norm, or one of another name; the norm `final_layer_norm` of layer 0 is taken for it.",
        "`model.arch.final_norm` is `model.decoder.layers.0.final_layer_norm`.",
    ),
    Cause(
        "interp_engine_eager",
        ("readout",),
        ("hyperclovax",),
        "the logits are divided by `logits_scaling`, as in Granite; this model multiplies.",
        "`model.arch.quirks.logit_multiplier` is 1/1.7, and `modeling_hyperclovax.py` multiplies by 1.7.",
    ),
    Cause(
        "interp_engine_eager",
        ("readout",),
        ("gemma3n_text",),
        "the stream of four copies goes through the final norm one by one; the model merges them first.",
    ),
    Cause("interp_engine_eager", ("padded",), BART, NO_POSITIONS, f"{EQUALS} and mask, bit for bit (bart, pegasus)."),
    Cause(
        "interp_engine_eager",
        ("padded",),
        ("llama4_text",),
        TEMPERATURE,
        f"{EQUALS} with `position_ids`, bit for bit.",
    ),
    Cause(
        "interp_engine_eager",
        ("padded",),
        ("minimax_m3_vl_text",),
        BLOCKS,
        f"{EQUALS} with `position_ids`, bit for bit.",
    ),
)


def cause_of(engine: str, cell: str, model_type: str) -> Cause | None:
    """The cause of one number that differs, if it was looked into."""
    for cause in CAUSES:
        if cause.engine == engine and cell in cause.cells and model_type in cause.types:
            return cause
    return None
