"""The dataset folder: shard format, loader, verification, data card."""
