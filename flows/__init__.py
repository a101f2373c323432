"""Flows that compose tasks, the command line, and the servers that flows run on."""
