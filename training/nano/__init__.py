"""The recipe of the nano family: ``python -m training.nano all --folder FOLDER``."""
