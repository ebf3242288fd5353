"""One module a verb, by the verb's name."""
