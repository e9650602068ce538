"""What `python -m metrics.compare` is made of: the clips, the kept scores, their summary, the tables."""
