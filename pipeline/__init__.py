"""The model and how it is run: flow matching, DiT, VAE, text, sampling, video in and out."""
