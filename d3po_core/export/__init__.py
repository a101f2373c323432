"""Export LoRAs and preference data sets, with their cards."""
