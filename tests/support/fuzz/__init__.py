"""Random calls of the public functions and layers, held against the oracle.

* `runner`: runs many, and tells what failed; the command.
* `cases`: calls of functions, and what surrounds every call: memory, bits, refusals.
* `layers`: calls of layers and of `Moments`.
* `bad`: calls with an illegal argument.
* `right`: what is right about results.
"""
