"""The camera stands still: LTX-2 in two stages with the LoRA Camera-Control-Static."""

from camera_control import film

film(
    "Static",
    prompt=(
        "A grey cat sleeps on the window sill of a kitchen while soup simmers on the stove. The camera "
        "stands still. The cat yawns, turns round and purrs."
    ),
)
