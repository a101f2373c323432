"""Regenerate images, replay rounds, and watch the files that a campaign's numbers depend on."""
