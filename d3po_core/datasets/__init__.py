"""Preferences that already exist: read, encode and store them once; rounds then draw groups from them."""
