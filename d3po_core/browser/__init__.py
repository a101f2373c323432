"""Browse the images of all campaigns on a local web page."""
