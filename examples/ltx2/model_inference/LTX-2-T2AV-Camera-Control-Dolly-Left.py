"""The camera moves to the left: LTX-2 in two stages with the LoRA Camera-Control-Dolly-Left."""

from camera_control import film

film(
    "Dolly-Left",
    prompt=(
        "A baker sets fresh loaves on a wooden counter. The camera dollies left along the shelves to "
        "the oven, where the fire crackles, and a bell rings at the door."
    ),
)
