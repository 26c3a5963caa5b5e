"""The camera moves to the right: LTX-2 in two stages with the LoRA Camera-Control-Dolly-Right."""

from camera_control import film

film(
    "Dolly-Right",
    prompt=(
        "A street musician plays a slow waltz on the accordion. The camera dollies right past the "
        "flower stall to a couple that dances on the wet cobblestones."
    ),
)
