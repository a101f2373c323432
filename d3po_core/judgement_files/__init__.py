"""Read, check and import files of people's judgements, and write sheets to fill in."""
