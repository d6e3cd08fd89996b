"""Fits, published laws, predictions."""
