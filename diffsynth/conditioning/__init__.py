"""How prompts, pictures, clips, masks and audio become tokens, positions and masks."""
