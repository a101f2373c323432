"""What leaves the project: LoRAs, preference data sets, and their cards."""
