"""Find out about this machine: GPUs and their driver, the hub's cache, installed versions."""
