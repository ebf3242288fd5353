"""What manager and nodes share: the vocabulary, messages and their encoding, errors, timeouts and wishes."""
