"""Runs the manager: the decision loop, and its connections to operators and nodes. Decides nothing itself."""
