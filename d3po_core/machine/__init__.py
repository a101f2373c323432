"""What this machine offers: GPUs and their driver, the hub's cache, installed versions."""
