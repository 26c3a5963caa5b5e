"""The camera moves towards its subject: LTX-2 in two stages with the LoRA Camera-Control-Dolly-In."""

from camera_control import film

film(
    "Dolly-In",
    prompt=(
        "A watchmaker bends over an open pocket watch in a workshop full of clocks. The camera dollies "
        "in from the doorway until the turning wheels fill the picture. The ticking grows louder."
    ),
)
