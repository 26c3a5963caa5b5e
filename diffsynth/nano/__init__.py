"""The nano family: a tiny trained LTX-2, the world of its clips, and checks of what a clip shows."""
