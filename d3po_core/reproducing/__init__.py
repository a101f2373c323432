"""Images and rounds made again, and what their numbers depend on."""
