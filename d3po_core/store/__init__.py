"""A campaign's folder: tables, stages, digests, images, databases."""
