"""
virt-ports, the operator's command line, for use beside virsh. One module per verb, in :mod:`cpm.cli.verbs`.

It is a client of the API. Imports are deferred until they are needed, so that a command does not load what only others
use.
"""
