"""The chains of denoising steps whose log_probs are exact: DDIM, and the SDE of a flow."""
