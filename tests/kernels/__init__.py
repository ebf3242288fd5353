"""
The tests that are marked ``per_kernel``, under the kernels of other releases of Debian: `make test-kernels`.

A machine that boots in seconds runs them: the release's own kernel, and of its Debian what the tests need, in memory
(docs/design/0036-kernels-in-memory.md).
"""
