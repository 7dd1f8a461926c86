"""The rows of images: the vision tower, and the projector that makes features of what it returns."""

from nnterp.table._value import Value

PATCHES = "[patches, vision_hidden]"
AN_IMAGE = "Only in runs with an image. Where the tower has an axis for images (or tiles), it stands in front."

IMAGE_ROWS = (
    Value(
        "vision_layers_input",
        PATCHES,
        0,
        "What a layer of the vision tower is given.",
        role="layer",
        side="input",
        finder="vision",
        stack="vision",
        note=AN_IMAGE,
    ),
    Value(
        "vision_attentions_output",
        PATCHES,
        2,
        "What the attention of a layer of the vision tower returns.",
        role="self_attn",
        side="output",
        finder="vision",
        stack="vision",
        note=AN_IMAGE,
    ),
    Value(
        "vision_layers_output",
        PATCHES,
        5,
        "What a layer of the vision tower returns.",
        role="layer",
        side="output",
        finder="vision",
        stack="vision",
        note=AN_IMAGE,
    ),
    Value(
        "image_features",
        "[image tokens, hidden]",
        0.5,
        "What the projector makes of an image: what stands at the image's tokens in the stream that enters layer 0.",
        role="projector",
        side="output",
        finder="vision",
        per_layer=False,
        stack="vision",
        note="Only in runs with an image. Where the projector has an axis for images (or tiles), it stands in front.",
    ),
)
