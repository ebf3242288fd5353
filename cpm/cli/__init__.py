"""
virt-ports, the operator's command line, to be used beside virsh: one file a verb, one renderer.

Just another client of the API. Nothing here is imported before it is needed: a command that lists must not pay for
what another one uses.
"""
