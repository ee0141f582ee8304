"""What is right, and how far from it a result may be; the tests and the benchmarks ask here.

* `arrays`: arrays in extended precision, and the element types.
* `formulas`: exact results, the formulas of Ioffe & Szegedy (2015) in `numpy.longdouble`, which has
  64 bits of significand or more where the library has 53.
* `bounds`: the promises of docs/numerics.md as functions, and errors in units of them. They say
  how wrong a right library may be; no tolerance in the tests was found by trying.
* `hard`: data that is hard to normalize.
"""
