"""Programs one machine's kernel and keeps it as it should be."""
