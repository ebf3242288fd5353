"""Values that all of natd shares."""
