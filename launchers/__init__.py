"""SLURM scripts and the demo: they start the commands of the other packages and import none of them."""
