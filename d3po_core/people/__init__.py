"""What a round asks of people, and the journal of what they said."""
