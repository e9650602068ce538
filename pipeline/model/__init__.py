"""The networks and their weights: DiT, VAE, prompts, attention kernels."""
