"""What a run needs before it starts: memory, operations, the dry run."""
