"""Data sets of images and captions, and the loader that feeds them in an order that can be resumed."""
