"""Stage II, dual-stream distillation."""
