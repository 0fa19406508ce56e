"""Labels to codes: integers through a table, strings of a fixed width through a hash table; the rows are never sorted.

Either way one pass over the labels. What is sorted afterwards are the distinct labels, of which there are few.
"""

import numpy as np
from numba import prange

from fastloss._kernels._jit import Kernel, subroutine
from fastloss._kernels._simd import load_integer

# 2**64 divided by the golden ratio: Fibonacci hashing (Knuth, The Art of Computer Programming 3, section 6.4).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SMALLEST_TABLE_BITS = 8


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


def _string_codes(n_workers, data, origin, stride, n_bytes, codes):
    """Number the distinct strings in the order in which they appear; the row where each appears first.

    ``data`` is the memory as bytes, a string ``n_bytes`` of it, 4 to a character. Linear probing in a table that is
    doubled when it is half full.
    """
    bits = np.int64(_SMALLEST_TABLE_BITS)
    table = np.full(np.int64(1) << bits, -1, np.int32)
    first = np.empty(len(table) // 2, np.int64)
    n_found = 0
    for i in range(len(codes)):
        slot = _find(data, origin, stride, n_bytes, i, table, bits, first)
        if table[slot] < 0:
            if n_found == len(first):
                bits += 1
                table = np.full(np.int64(1) << bits, -1, np.int32)
                grown = np.empty(len(table) // 2, np.int64)
                grown[:n_found] = first
                first = grown
                for code in range(n_found):
                    table[_find(data, origin, stride, n_bytes, first[code], table, bits, first)] = code
                slot = _find(data, origin, stride, n_bytes, i, table, bits, first)
            first[n_found] = i
            table[slot] = n_found
            n_found += 1
        codes[i] = table[slot]
    return first[:n_found].copy()


integer_codes = Kernel("integer_codes", _integer_codes)
string_codes = Kernel("string_codes", _string_codes)
