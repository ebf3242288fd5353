"""
virt-ports, the operator's command line, to be used beside virsh. One module a verb, in :mod:`cpm.cli.verbs`.

Just another client of the API. Nothing here is imported before it is needed: a command that lists must not pay for
what another one uses.
"""
