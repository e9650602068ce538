"""One self-contained HTML page of frames, crops, curves and tables."""
