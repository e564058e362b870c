"""`make gpu`: builds, tests and measures on a machine with a GPU, within minutes; what it has it keeps."""
