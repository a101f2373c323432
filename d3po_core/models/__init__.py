"""Models and their families: loaded, checked, and wrapped as a policy with checkpoints."""
