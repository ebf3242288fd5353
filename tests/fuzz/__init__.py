"""
Fuzzing what natd and cpmd read from others: damaged copies of real input must be understood or refused, nothing else.

``python -m tests.fuzz`` (``make fuzz``) runs many; ``tests/unit/test_fuzz.py`` runs some thousands of each kind.
"""
