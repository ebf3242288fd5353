"""
What operators can change: each function changes the manager and returns the query that answers it once that is durable.

Its counterpart is :mod:`cpm.queries`, which changes nothing. What a change means is decided in :mod:`cpm.core`.
"""
