"""The camera moves away from its subject: LTX-2 in two stages with the LoRA Camera-Control-Dolly-Out."""

from camera_control import film

film(
    "Dolly-Out",
    prompt=(
        "A lantern glows on a picnic blanket where two friends laugh. The camera dollies out and shows "
        "the meadow, the dark wood around it and the first stars. Crickets chirp."
    ),
)
