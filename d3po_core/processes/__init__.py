"""Jobs on one process or several, one a GPU."""
