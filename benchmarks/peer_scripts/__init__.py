"""Scripts that measure other programs, each run by an interpreter that has that program."""
