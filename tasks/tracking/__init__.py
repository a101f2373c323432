"""Send to MLflow what stages left on disk."""
