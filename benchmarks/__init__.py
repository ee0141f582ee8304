"""Batch normalization measured: fastbn, its peers and the memory's limit, in turn.

Run it with ``python -m benchmarks`` in a checkout; it is no part of the installed package.
`benchmarks/README.md` says what is measured and how to read it.
"""
