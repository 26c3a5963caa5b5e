"""The camera sinks: LTX-2 in two stages with the LoRA Camera-Control-Jib-Down."""

from camera_control import film

film(
    "Jib-Down",
    prompt=(
        "Snow falls from grey clouds onto the top of a tall pine. The camera sinks along the branches "
        "down to a fox that shakes the snow off its fur and yelps."
    ),
)
