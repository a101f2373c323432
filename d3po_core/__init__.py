"""D3PO without orchestration: sampling with exact log-probs, preferences, training, tables.

Nothing in this package imports prefect or mlflow.
"""
