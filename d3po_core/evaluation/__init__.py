"""Evaluate on held-out images: comparisons, the guard, win rates by people."""
