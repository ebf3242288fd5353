"""The wire between manager, nodes and operators: definitions, encoding, server and clients."""
