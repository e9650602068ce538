"""datagen: raw videos become shards of degraded and encoded clips, and shards become batches."""
