"""What a run reports while it trains: metrics.jsonl, wandb, validation, throughput."""
