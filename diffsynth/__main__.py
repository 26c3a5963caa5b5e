"""``python -m diffsynth``: the command where its script is not on the path."""

from diffsynth.cli import main

main()
