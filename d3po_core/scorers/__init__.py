"""Scorers of images: built in, learned, functions of your own, servers."""
