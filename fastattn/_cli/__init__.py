"""The commands of `python -m fastattn`."""
