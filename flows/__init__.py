"""Flows compose tasks; beside them stand the command line and the servers that flows run on."""
