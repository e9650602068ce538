"""The fast codec of a given VAE: `--stage fast_decoder` and `--stage lr_encoder` (pipeline/model/fast_codec.py)."""
