"""What held-out images say: comparisons, the guard, win rates by people."""
