"""One file a method. The files of this folder are found by walking it."""
