"""The commands that the documentation shows, run as a reader would."""
