"""
Operators' changes: each function changes the manager and returns the query whose answer is sent once that is durable.

Its counterpart is :mod:`cpm.queries`, which changes nothing. The consequences are decided in :mod:`cpm.core`.
"""
