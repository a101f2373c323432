"""Files of people's judgements: read, checked and imported; sheets to fill in."""
