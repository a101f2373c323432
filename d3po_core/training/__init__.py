"""Preferences become updates: packing, the loss, the optimizer."""
