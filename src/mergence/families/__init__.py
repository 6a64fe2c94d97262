"""One file a library: what its models and blocks look like."""
