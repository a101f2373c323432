"""MLflow is told what stages left on disk."""
