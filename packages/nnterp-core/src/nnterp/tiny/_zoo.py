"""Tiny random models of every causal language model architecture that transformers knows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.versions import version_of

from ._facts import NOT_RELOADABLE
from ._loud import make_loud
from ._shrink import tiny_config
from ._special_cases import ENCODER_DECODERS, FAIL_IN, NEEDS_TIMM, UNAVAILABLE, WITHOUT_IMAGES
from ._tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _class_names() -> Mapping[str, str]:
    """transformers' causal-LM mapping, model type → class name. Imported when it is asked for, because that is slow."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def model_types() -> tuple[str, ...]:
    """The model types `tiny_model` builds: transformers' causal-LM mapping without `unavailable_model_types()`.

    Example:
        print("llama" in testing.model_types())  # → True
    """
    return tuple(t for t in _class_names() if t not in UNAVAILABLE)


def unavailable_model_types() -> dict[str, str]:
    """The model types of transformers' causal-LM mapping that `tiny_model` does not build, each with the reason.

    Example:
        reasons = testing.unavailable_model_types()  # model type → reason
    """
    return {t: reason for t, reason in UNAVAILABLE.items() if t in _class_names()}


def multimodal_model_types() -> tuple[str, ...]:
    """Model types with images in and text out that `tiny_model` builds besides `model_types()`.

    They are the classes of `AutoModelForImageTextToText` and run on text alone.

    Example:
        print("llava" in testing.multimodal_model_types())  # → True
    """
    with_text = _class_names()
    return tuple(t for t in image_model_types() if t not in with_text)


def image_model_types() -> tuple[str, ...]:
    """The model types that `tiny_model(model_type, images=True)` builds, and `tiny_image_inputs` makes prompts for.

    They are transformers' image-text-to-text mapping without `model_types_without_images()`.

    Example:
        print("llava" in testing.image_model_types())  # → True
    """
    unbuilt = model_types_without_images()
    return tuple(t for t in _image_class_names() if t not in unbuilt)


def model_types_without_images() -> dict[str, str]:
    """The model types of transformers' image-text-to-text mapping that are not built with images, each with the reason.

    Those that need packages of the extra `llms` are left out of it where these are installed. Types whose code fails in
    one release of transformers are in it where that release is installed.

    Example:
        reasons = testing.model_types_without_images()  # model type → reason
    """
    have = all(find_spec(name) is not None for name in ("timm", "torchvision", "PIL"))
    unbuilt = {t: reason for t, reason in WITHOUT_IMAGES.items() if not (have and reason == NEEDS_TIMM)}
    installed = version_of("transformers")
    unbuilt |= {t: reason for t, (release, reason) in FAIL_IN.items() if release == installed}
    return {t: unbuilt[t] for t in _image_class_names() if t in unbuilt}


def _image_class_names() -> Mapping[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def tiny_model(
    model_type: str,
    *,
    seed: int = 0,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    loud: bool = True,
    images: bool = False,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A tiny random model of `model_type`, in eval mode on the CPU, with the architecture's own features on.

    The hidden size is 64 and the vocabulary that of `tiny_tokenizer()`; heads, windows, experts, caps and scales are
    small enough to show on a prompt of a dozen tokens. The same arguments give the same weights, bit for bit, whatever
    the global random state, which is left as it was.

    Args:
        model_type: one of `model_types()`, `multimodal_model_types()` or `image_model_types()`.
        seed: of the weights.
        num_layers: depth of the stack; by default 4, or as many as it takes for every kind of layer to occur. A smaller
            number keeps the first layers; where none of them has attention, the model runs with `use_cache=False`
            only.
        dtype: of the parameters.
        loud: redraw the weights so that activations and logits are of order one and every part shows in the logits;
            otherwise keep the model's own initialisation.
        images: build the class of `AutoModelForImageTextToText`, which takes images (`tiny_image_inputs`), also where
            the causal-LM mapping has another class for the type.
        **config_overrides: fields of the configuration, set last and passed to its class as they are. A field that only
            the text part of a composite configuration has is set there; `vision_config={...}` and the like set fields
            of the other parts. `attn_implementation` works as in `from_pretrained`.

    Raises:
        KeyError: `model_type` is not a causal LM of the installed transformers, or cannot be built; the message
            says why.

    Example:
        gemma = StandardizedTransformer(testing.tiny_model("gemma2"), tokenizer=testing.tiny_tokenizer())
        print(gemma.certificate.ok)  # → True
    """
    with_images = images or model_type not in _class_names()
    reasons = model_types_without_images() if with_images else UNAVAILABLE
    if model_type in reasons:
        raise KeyError(f"No tiny model of {model_type!r}: {reasons[model_type]}.")
    if model_type not in (_image_class_names() if with_images else _class_names()):
        raise KeyError(
            f"{model_type!r} is not a causal LM of the installed transformers: "
            "take one of model_types(), multimodal_model_types() or, with images=True, image_model_types()."
        )
    config = tiny_config(model_type, num_layers=num_layers, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(with_images).from_config(config, dtype=dtype)
    if loud:
        make_loud(model, seed)
    return model.eval()


def encoder_decoder_types() -> tuple[str, ...]:
    """The model types `tiny_encoder_decoder` builds: types with text in both inputs, and Whisper.

    Example:
        print("t5" in testing.encoder_decoder_types())  # → True
    """
    return ENCODER_DECODERS


def tiny_encoder_decoder(model_type: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A tiny random encoder-decoder model with loud weights, in eval mode on the CPU; see `tiny_model`.

    Args:
        model_type: One of `encoder_decoder_types()`.
        seed: Of the weights.
        **config_overrides: Fields of the configuration; `attn_implementation` works as in `from_pretrained`.

    Raises:
        KeyError: `model_type` is none of these.

    Example:
        t5 = testing.tiny_encoder_decoder("t5")
    """
    if model_type not in ENCODER_DECODERS:
        raise KeyError(f"{model_type!r} is none of encoder_decoder_types(): {', '.join(ENCODER_DECODERS)}.")
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    kind = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    config = tiny_config(
        model_type, **({"max_source_positions": 24} if model_type == "whisper" else {}), **config_overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config)
    make_loud(model, seed)
    return model.eval()


def tiny_checkpoint(model_type: str, folder: str | Path, **kwargs: Any) -> Path:
    """Save `tiny_model(model_type, **kwargs)` and its tokenizer to `folder`, as `from_pretrained` reads them.

    `AutoTokenizer` and `AutoModelForCausalLM` (`AutoModelForImageTextToText` for `multimodal_model_types()`) load them
    back.

    Returns:
        The folder as a `Path`; it is created where missing.

    Raises:
        KeyError: as `tiny_model`.
        ValueError: transformers cannot load what it saves for this type (`NOT_RELOADABLE`).

    Example:
        folder = testing.tiny_checkpoint("gpt2", "tiny-gpt2")
        tiny = StandardizedTransformer(str(folder))
    """
    if model_type in NOT_RELOADABLE:
        raise ValueError(f"No checkpoint of {model_type!r}: {NOT_RELOADABLE[model_type]}.")
    folder = Path(folder)
    tiny_model(model_type, **kwargs).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _auto_class(with_images: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM
