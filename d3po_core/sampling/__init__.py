"""Draw images from prompts and seeds, with trajectories and exact log_probs."""
