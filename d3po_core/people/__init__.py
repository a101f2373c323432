"""The questions that a round asks people, and the journal of their answers."""
