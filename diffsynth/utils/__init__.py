"""Pictures, clips, sounds and the metadata of files."""
