"""Compiled loops that read rows, and convert and multiply them on the way to their places; see `reading.compiled`.

Rows are read to a stage that stays in the cache of the core, and go from there to their places past the caches. A place
that is written through the cache is read from memory first: 768 values took 174 ns that way, and take 63.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saev_torch.format.dtypes import DTYPES, FLOAT32, ValueType
from saev_torch.reading.compiled import find_numba

_Int64s = NDArray[np.int64]

# Addresses are integers here: a pointer of ctypes is none to the compiler.
_preadv = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64)(
    ("preadv", ctypes.CDLL(None))
)

_errno_location = ctypes.CFUNCTYPE(ctypes.c_int64)(("__errno_location", ctypes.CDLL(None)))

# Values that are converted at a time, few enough for the cache that is next to the core.
_N_CONVERTED = 2048
_LINE_NBYTES = 64

_NAN_FLOAT16, _NAN_BFLOAT16 = 0x7E00, 0x7FC0
NAN_BITS = {"float16": _NAN_FLOAT16, "bfloat16": _NAN_BFLOAT16}
"""What is not a number after it was multiplied and rounded, whatever it was before."""


class ConvertKernels(NamedTuple):
    """What `find_convert_kernels` compiles."""

    convert_places: Callable[..., None]
    read_and_convert: Callable[..., None]
    convert_run: Callable[..., None]


class _Words(NamedTuple):
    """What compiled code needs to work on addresses: pointers to three kinds of values, and two instructions.

    `stream(source, target)` copies 64 bytes past the caches, to where a line begins; `fence()` waits for it.
    """

    floats: Any
    words: Any
    halves: Any
    stream: Any
    fence: Any


@functools.cache
def find_convert_kernels(stored: str, loaded: str, is_scaled: bool) -> ConvertKernels | None:
    """Compile `convert_places`, `read_and_convert` and `convert_run` for names of value types; None without numba.

    `convert_places(vectors, trash, by)` converts the stored values at `[n, 2] int64` places, address and size in bytes,
    where they are, and multiplies them by a float32 if `is_scaled`. A type that is wider begins as much before the
    address as it has more bytes: what was read to the back half of some memory fills all of it. Places at the address
    `trash` are left alone, whose values would change without end. Values are multiplied as float32, and rounded once,
    to the nearest, else to the even one.

    `read_and_convert(fds, vectors, firsts, counts, offsets, got, trash, by, stage)` reads extents from the file
    descriptors in `fds`, a part at a time to the `[n] uint8` stage, and converts from there to the places. `got` is set
    to the size of each extent that is done; to minus the number of the error where a read failed; and to 0 where it
    came short. See `reading.Extents` for the others, all of them `[n] int64`.

    `convert_run(source, place, nbytes, by)` converts so many bytes of stored values at an address to another.
    """
    numba = find_numba()
    if numba is None:
        return None
    words = _make_words(numba)
    convert = _make_convert(numba, words, DTYPES[stored], DTYPES[loaded], is_scaled)
    # What begins before the address of a place is so many times the size of the place.
    extra = DTYPES[loaded].nbytes // DTYPES[stored].nbytes - 1
    int64s = "int64[::1]"
    arrays = f"{int64s}, int64[:, ::1], {int64s}, {int64s}, {int64s}, {int64s}"
    return ConvertKernels(
        numba.njit("void(int64[:, ::1], int64, float32)", nogil=True)(_make_convert_places(words, convert, extra)),
        numba.njit(f"void({arrays}, int64, float32, uint8[::1])", nogil=True)(
            _make_read_and_convert(numba, words, convert, extra)
        ),
        numba.njit("void(int64, int64, int64, float32)", nogil=True)(_make_convert_run(words, convert)),
    )


def _make_convert_places(words: _Words, convert: Callable[..., None], extra: int) -> Callable[..., None]:
    fence = words.fence

    def convert_places(vectors: _Int64s, trash: int, by: np.float32) -> None:
        some = np.empty(_N_CONVERTED, dtype=np.float32)
        for i in range(len(vectors)):
            place, n = vectors[i, 0], vectors[i, 1]
            if place != trash:
                convert(place, place - n * extra, n, some.ctypes.data, by)
        fence()

    return convert_places


def _make_convert_run(words: _Words, convert: Callable[..., None]) -> Callable[..., None]:
    fence = words.fence

    def convert_run(source: int, place: int, nbytes: int, by: np.float32) -> None:
        some = np.empty(_N_CONVERTED, dtype=np.float32)
        convert(source, place, nbytes, some.ctypes.data, by)
        fence()

    return convert_run


def _make_read_and_convert(numba: Any, words: _Words, convert: Callable[..., None], extra: int) -> Callable[..., None]:
    fence, wide = words.fence, words.words

    def read_and_convert(
        fds: _Int64s,
        vectors: _Int64s,
        firsts: _Int64s,
        counts: _Int64s,
        offsets: _Int64s,
        got: _Int64s,
        trash: int,
        by: np.float32,
        stage: NDArray[np.uint8],
    ) -> None:
        some, vector = np.empty(_N_CONVERTED, dtype=np.float32), np.empty(2, dtype=np.int64)
        for i in range(len(fds)):
            j, done, last, n_read = firsts[i], 0, firsts[i] + counts[i], 0
            while j < last:
                # Vectors that the stage has room for, or one that it has not, which is read to its place.
                vector[0], vector[1] = stage.ctypes.data, vectors[j, 1]
                if vector[1] > len(stage):
                    vector[0] = vectors[j, 0]
                end = j + 1
                while end < last and vector[1] + vectors[end, 1] <= len(stage):
                    vector[1] += vectors[end, 1]
                    end += 1
                n_read = _preadv(fds[i], vector.ctypes.data, 1, offsets[i] + done)
                if n_read != vector[1]:
                    break
                done += n_read
                source = vector[0]
                for k in range(j, end):
                    place, n = vectors[k, 0], vectors[k, 1]
                    if place != trash:
                        convert(source, place - n * extra, n, some.ctypes.data, by)
                    source += n
                j = end
            if j == last:
                got[i] = done
            else:
                got[i] = -np.int64(numba.carray(wide(_errno_location()), 1)[0]) if n_read < 0 else 0
        fence()

    return read_and_convert


def _make_convert(
    numba: Any, words: _Words, stored: ValueType, loaded: ValueType, is_scaled: bool
) -> Callable[..., None]:
    """Make what converts the values at an address to another, as many bytes of them as it is told.

    The fourth argument is the address of memory for `_N_CONVERTED` float32, the last what to multiply by. The place
    that values go to may overlap them, if it begins before them and ends with them.
    """
    put = numba.njit(inline="always")(_make_put(numba, words))
    floats, wide, halves = words.floats, words.words, words.halves
    n_stored, n_loaded = stored.nbytes, loaded.nbytes
    # Fixed here, so that the compiler drops what is never true.
    is_float32, is_wider = stored == FLOAT32, loaded != stored
    widen, narrow = (numba.njit(inline="always")(function) for function in _CONVERSIONS[stored.name])

    def convert(source: int, place: int, nbytes: int, memory: int, by: np.float32) -> None:
        for start in range(0, nbytes // n_stored, _N_CONVERTED):
            n, at = min(nbytes // n_stored - start, _N_CONVERTED), source + start * n_stored
            scaled = numba.carray(floats(memory), n)
            if is_float32:
                values = numba.carray(floats(at), n)
                for i in range(n):
                    scaled[i] = values[i] * by
            else:
                bits = numba.carray(halves(at), n)
                if is_wider:
                    widened = numba.carray(wide(memory), n)
                    for i in range(n):
                        widened[i] = widen(bits[i])
                    if is_scaled:
                        for i in range(n):
                            scaled[i] *= by
                else:
                    narrowed = numba.carray(halves(memory), n)
                    for i in range(n):
                        narrowed[i] = narrow(widen(bits[i]).view(np.float32) * by)
            put(memory, place + start * n_loaded, n * n_loaded)

    compiled: Callable[..., None] = numba.njit("void(int64, int64, int64, int64, float32)", nogil=True)(convert)
    return compiled


def _make_put(numba: Any, words: _Words) -> Callable[..., None]:
    """Make what copies bytes, an even number, from an address to another, past the caches where it begins a line."""
    stream, halves = words.stream, words.halves

    def put(source: int, target: int, nbytes: int) -> None:
        n_lines = nbytes // _LINE_NBYTES if target % _LINE_NBYTES == 0 else 0
        for i in range(n_lines):
            stream(source + i * _LINE_NBYTES, target + i * _LINE_NBYTES)
        done = n_lines * _LINE_NBYTES
        values, found = (
            numba.carray(halves(source + done), (nbytes - done) // 2),
            numba.carray(halves(target + done), (nbytes - done) // 2),
        )
        for i in range(len(values)):
            found[i] = values[i]

    return put


def _make_words(numba: Any) -> _Words:
    def make_pointer(kind: Any) -> Any:
        def point(context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

            return numba.types.CPointer(kind)(address), generate

        return numba.extending.intrinsic(point)

    def stream(context: Any, source: Any, target: Any) -> Any:
        from llvmlite import ir

        line = ir.VectorType(ir.IntType(8), _LINE_NBYTES)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = builder.load(builder.inttoptr(args[0], line.as_pointer()), align=1)
            put = builder.store(values, builder.inttoptr(args[1], line.as_pointer()), align=_LINE_NBYTES)
            put.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return numba.types.void(source, target), generate

    def fence(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return numba.types.void(), generate

    pointers = (make_pointer(kind) for kind in (numba.types.float32, numba.types.uint32, numba.types.uint16))
    return _Words(*pointers, *map(numba.extending.intrinsic, (stream, fence)))


def _widen_bfloat16(bits: np.uint16) -> np.uint32:
    return np.uint32(np.uint32(bits) << np.uint32(16))


def _widen_float16(bits: np.uint16) -> np.uint32:
    magnitude = np.uint32(bits & np.uint16(0x7FFF))
    # Exponent and mantissa where float32 has them, with another bias of the exponent.
    found = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    if magnitude >= np.uint32(0x7C00):
        # A NaN becomes a quiet one, as processors make it.
        found = np.uint32(found + np.uint32(112 << 23)) | np.uint32(0x400000 if magnitude > np.uint32(0x7C00) else 0)
    elif magnitude < np.uint32(0x0400):
        found = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32(found | np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16)))


def _narrow_bfloat16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16))
    return np.uint16(rounded if value == value else np.uint32(_NAN_BFLOAT16))


def _narrow_float16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    is_odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + is_odd) >> np.uint32(13))
    if magnitude < np.uint32(113 << 23):
        # The last bit of a half is what the last bit of a subnormal number is worth.
        half = np.float32(magnitude.view(np.float32) + np.float32(0.5))
        rounded = np.uint32(half.view(np.uint32) - np.uint32(126 << 23))
    elif magnitude >= np.uint32(143 << 23):
        rounded = np.uint32(0x7C00)
    rounded = np.uint32(rounded | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))
    return np.uint16(rounded if value == value else np.uint32(_NAN_FLOAT16))


_CONVERSIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "bfloat16": (_widen_bfloat16, _narrow_bfloat16),
    "float16": (_widen_float16, _narrow_float16),
    # Only multiplied.
    "float32": (_widen_bfloat16, _narrow_bfloat16),
}
