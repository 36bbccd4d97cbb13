"""Folders of images as people lay them out, each layout in a file of its own: one row an image, encoded as it stood."""
