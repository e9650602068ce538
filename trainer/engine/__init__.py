"""One DeepSpeed engine per network: ranks, ZeRO, EMA, LoRA."""
