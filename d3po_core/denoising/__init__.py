"""Denoising chains with exact log_probs: DDIM, and the SDE of a flow."""
