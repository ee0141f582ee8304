"""Fresh arrays whose memory comes from a pool, by NumPy's own interface for that (NEP 49).

An array keeps the handler that made its memory, and gives the memory back to it. The pool's is in
force only while `empty` makes an array, and only in place of NumPy's own: a program that has set
another one gets its arrays from that. The pool itself: pool.h.
"""

import numpy as np

cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New

cnp.import_array()

cdef extern from *:
    PyObject* PyDataMem_DefaultHandler

cdef extern from "pool.h":
    cnp.PyDataMem_Handler pool_handler
    int guard_pool()
    void configure_pool(size_t bound, double seconds) nogil
    void clear_pool() nogil
    void read_pool(size_t* idle_bytes, size_t* hits) nogil

if guard_pool() != 0:
    raise MemoryError("fastbn: no memory for the handlers that make fork safe")

cdef object handler = PyCapsule_New(&pool_handler, "mem_handler", NULL)
cdef bint is_used = False


def configure(size_t bound, double seconds):
    """Keep at most `bound` idle bytes, 0 for no pool at all, and those for at most so long."""
    global is_used
    is_used = bound > 0
    with nogil:
        configure_pool(bound, seconds)


def clear():
    """Give all idle blocks back to the system."""
    with nogil:
        clear_pool()


def usage():
    """Idle bytes, and how many arrays got memory that was idle."""
    cdef size_t idle_bytes, hits
    with nogil:
        read_pool(&idle_bytes, &hits)
    return idle_bytes, hits


def empty(shape, dtype):
    """`numpy.empty`, from the pool."""
    before = cnp.PyDataMem_GetHandler()
    if not is_used or <PyObject*> before != PyDataMem_DefaultHandler:
        return np.empty(shape, dtype)
    cnp.PyDataMem_SetHandler(handler)
    try:
        return np.empty(shape, dtype)
    finally:
        cnp.PyDataMem_SetHandler(before)
