"""Labels to codes: integers through a table, strings of a fixed width through a hash table; the rows are never sorted.

Either way one pass over the labels. What is sorted afterwards are the distinct labels, of which there are few.
"""

import numpy as np
from numba import prange

from fastloss._kernels._jit import Kernel, subroutine
from fastloss._kernels._simd import load_integer

# 2**64 divided by the golden ratio: Fibonacci hashing (Knuth, The Art of Computer Programming 3, section 6.4).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@subroutine
def _code_integers(labels, origin, stride, low, begin, end, codes, seen):
    span = len(seen)
    for i in range(begin, end):
        code = np.int64(labels[origin + i * stride]) - low
        if code < 0 or code >= span:
            return False
        seen[code] = 1
        codes[i] = code
    return True


def _integer_codes(n_workers, labels, origin, stride, low, codes, seen):
    """Write ``codes[i] = labels[i] - low`` and mark them in ``seen``; whether all lie in ``[0, len(seen))``.

    It stops at a label that does not. A uint64 label from 2**63 on counts as negative.
    """
    n, span = len(codes), len(seen)
    part = np.zeros((n_workers, span), np.uint8)
    fits = np.zeros(n_workers, np.uint8)
    for worker in prange(n_workers):
        begin, end = n * worker // n_workers, n * (worker + 1) // n_workers
        fits[worker] = _code_integers(labels, origin, stride, low, begin, end, codes, part[worker])
    for worker in range(n_workers):
        for code in range(span):
            seen[code] |= part[worker, code]
        if not fits[worker]:
            return False
    return True


@subroutine
def _hash(data, offset, n_bytes):
    """A hash of the characters before the first NUL, which pads a shorter string."""
    value = np.uint64(0)
    for k in range(0, n_bytes, 4):
        character = load_integer(data, offset + k, np.uint32(0))
        if character == 0:
            break
        value = (value ^ np.uint64(character)) * _GOLDEN
    return value


@subroutine
def _is_same(data, offset, other, n_bytes):
    for k in range(0, n_bytes, 4):
        if load_integer(data, offset + k, np.uint32(0)) != load_integer(data, other + k, np.uint32(0)):
            return False
    return True


@subroutine
def _find(data, origin, stride, n_bytes, row, table, bits, first):
    """The slot of a row's string in the table: the one that holds its code, or the free one where it belongs."""
    offset = origin + row * stride
    slot = np.int64(_hash(data, offset, n_bytes) >> np.uint64(64 - bits))
    mask = (np.int64(1) << bits) - 1
    while table[slot] >= 0 and not _is_same(data, offset, origin + first[table[slot]] * stride, n_bytes):
        slot = (slot + 1) & mask
    return slot


def _string_codes(n_workers, data, origin, stride, n_bytes, begin, codes, table, first, n_known, n_found):
    """Number the distinct strings of the rows from ``begin`` on in the order in which they appear.

    ``data`` is the memory as bytes, a string ``n_bytes`` of it, 4 to a character. ``first`` gets the row where each of
    them appears first, and holds those that were found before; the first ``n_known`` of these are put into the table,
    which is empty but for the others. Linear probing; the table is twice as long as ``first``. Returns the row reached,
    which is that of a string for which ``first`` has no room, or the end; and how many strings there are so far.
    """
    bits = np.int64(0)
    while (np.int64(1) << bits) < len(table):
        bits += 1
    for code in range(n_known):
        table[_find(data, origin, stride, n_bytes, first[code], table, bits, first)] = code
    for i in range(begin, len(codes)):
        slot = _find(data, origin, stride, n_bytes, i, table, bits, first)
        if table[slot] < 0:
            if n_found == len(first):
                return i, n_found
            first[n_found] = i
            table[slot] = n_found
            n_found += 1
        codes[i] = table[slot]
    return len(codes), n_found


integer_codes = Kernel("integer_codes", _integer_codes)
string_codes = Kernel("string_codes", _string_codes)
