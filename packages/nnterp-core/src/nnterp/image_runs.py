"""Runs of prompts with images, which are proven before the first of them."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.certificate import Certificate, certify_images
from nnterp.inputs import Row, is_pair, pad, read_each, without_places
from nnterp.named_transformer import NamedTransformer
from nnterp.standing import unsteered


class ImageTransformer(NamedTransformer):
    """The methods of a model that run prompts with images."""

    check_renaming: bool

    def validate_images(self, prompt: Any) -> Certificate:
        """Prove runs with images, on a prompt with an image, and return the certificate.

        nnterp calls this once, before the first prompt with an image runs. The certificate has lines about the stream,
        the readout, writes, the vision tower and the projector; `docs/images.md` lists them. If all hold, values of
        images such as `vision_layers_output` can be read.

        Args:
            prompt: The output of the model's processor for one prompt with an image, or a pair (text, image) if the
                model was loaded with `processor=`.

        Returns:
            The certificate. A failed line is not raised: `.raise_if_failed()` does.

        Raises:
            ValueError: The prompt has no image.
            InsideTraceError: Called inside a trace of this model.

        Example:
            tiny = testing.tiny_model("llava", images=True)
            llava = StandardizedTransformer(tiny, tokenizer=testing.tiny_tokenizer())
            print(llava.validate_images(testing.tiny_image_inputs(tiny)).ok)  # → True
        """
        self.require_no_trace("validate_images()")
        self.prepare()
        (row,) = read_each(self, [prompt])
        if row.images is None:
            raise ValueError("validate_images(prompt): give one prompt with an image, as the model's processor does.")
        return self._certify_images(row)

    def require_images(self, row: Row) -> None:
        """Prove runs with images on this prompt, unless that is done; nothing with `check_renaming=False`.

        Raises:
            CertificateError: A line of that proof fails.
            RemoteModelError: The weights are not here.
        """
        if not self.check_renaming or self.facts.vision is not None:
            return
        self.prepare()
        self._certify_images(row).raise_if_failed()

    def _certify_images(self, row: Row) -> Certificate:
        with unsteered(self):
            certificate, facts = certify_images(self, row)
        if certificate.ok:
            self.adopt(facts)
        return certificate

    def _with_images(self, prompt: Any) -> Any:
        """The encoding to trace: of one prompt with an image, or of several of the same length.

        Proves runs with images first, if one prompt is given and nothing has proven them yet.

        Raises:
            ValueError: It is a list; several prompts are padded, or nothing has proven that rows with images may share
                a batch.
            CertificateError: The proof fails.
        """
        if isinstance(prompt, list):
            raise ValueError("model.trace runs one prompt with an image, and was given a list: trace them one by one.")
        ids = torch.as_tensor(() if is_pair(prompt) else prompt.get("input_ids", ()))
        rows = len(ids) if ids.dim() > 1 else 1
        if rows > 1:
            mask = prompt.get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            if padded or self.facts.vision is None or not self.facts.vision.copies:
                why = "they are padded" if padded else "nothing has proven that rows with images may share a batch"
                raise ValueError(f"{rows} prompts with images in one encoding, and {why}: trace them one by one.")
            return prompt
        given = {} if is_pair(prompt) else dict(prompt)
        (row,) = read_each(self, [without_places(given) if given else prompt])
        self.require_images(row)
        return {**given, **pad(self, [row]).encoding}  # position_ids, labels, ... go along
