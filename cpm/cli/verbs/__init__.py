"""
One module per verb, with the verb's name.

Tested in tests/unit/cpm/cli: test_verbs.py for most, test_record.py, test_simulate.py, and ../install/test_install.py.
"""
