"""What sees examples: sampling, batching, losses and loss differences. Nothing here leaves training."""
