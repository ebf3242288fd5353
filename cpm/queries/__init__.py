"""Answers for operators; nothing here changes anything."""
