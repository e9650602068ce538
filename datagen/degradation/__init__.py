"""The degradation: HR in, LR out, one file per operation."""
