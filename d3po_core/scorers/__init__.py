"""Image scorers: built in, learned, your own functions, servers."""
