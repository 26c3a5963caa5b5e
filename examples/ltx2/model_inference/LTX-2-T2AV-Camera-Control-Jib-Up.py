"""The camera rises: LTX-2 in two stages with the LoRA Camera-Control-Jib-Up."""

from camera_control import film

film(
    "Jib-Up",
    prompt=(
        "A child in yellow boots jumps into a puddle. The camera rises from the splashing water past "
        "her smile up to the rooftops, where rain drums on the tiles."
    ),
)
