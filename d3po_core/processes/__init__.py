"""Run jobs in one process or several, one process per GPU."""
