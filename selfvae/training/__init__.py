"""Training: settings, the loop, checkpoints, optimizers."""
