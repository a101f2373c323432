"""Load and check models and their families, and wrap them as a policy with checkpoints."""
