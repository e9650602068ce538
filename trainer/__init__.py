"""Training: DeepSpeed engines, the losses, the stages of the method, checkpoints and export."""
