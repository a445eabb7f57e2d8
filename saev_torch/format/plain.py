"""Values that come from elsewhere as plain Python has them, and types of fields as other packages understand them."""

import difflib
import inspect
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

_TEXT = (str, bytes, bytearray, memoryview)

_Class = TypeVar("_Class")
# By the name of a class and of a field: the simple type and the true one.
_simplified: dict[tuple[str, str], tuple[Any, Any]] = {}


def as_plain(value: Any) -> Any:
    """Return a number or a text as exactly `int`, `float`, `bool` or `str`, and a sequence as a list of such.

    Numbers and arrays of numpy, tensors, and subclasses count as what they hold. Any other value is returned as it is.
    """
    plain = _as_scalar(value)
    if isinstance(plain, Sequence) and not isinstance(plain, _TEXT):
        return [_as_scalar(item) for item in plain]
    return plain


def _as_scalar(value: Any) -> Any:
    # What numpy and torch have in common. Looked up in the class, as other objects may answer to any name.
    to_list = getattr(type(value), "tolist", None)
    value = value if to_list is None else to_list(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def as_json(value: Any) -> Any:
    """Return the value of a field with JSON's types only: a path as text, infinity as "inf"."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return "inf" if value == math.inf else value


def name_unknown(key: Any, names: list[str]) -> str:
    """Name a key that is none of these names, and the one that may have been meant."""
    near = difflib.get_close_matches(key, names, 1) if isinstance(key, str) else []
    return f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key)


def told_simply(cls: type[_Class]) -> type[_Class]:
    """Let `typing.get_type_hints` tell simple types of a dataclass, whose module has to import this one as `plain`.

    OmegaConf asks there, and knows neither Literal nor a union with sequences.
    """
    for name, kind in inspect.get_annotations(cls).items():
        simple = _simplify(kind)
        if simple is not kind:
            _simplified[cls.__name__, name] = simple, kind
            # Text is worked out when it is asked for, and by then it is known who may be asking.
            cls.__annotations__[name] = f"plain.told({cls.__name__!r}, {name!r})"
    return cls


def _simplify(kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return str
    if origin is Sequence:
        return types.GenericAlias(list, arguments)
    is_hard = any(get_origin(one) is not None for one in arguments)
    return Any if origin in (Union, types.UnionType) and is_hard else kind


def told(cls: str, field: str) -> Any:
    """Return the simple type of a field; in what it is annotated with, tyro finds the true one for its command line."""
    simple, kind = _simplified[cls, field]
    # Who asks for types without what they are annotated with, as OmegaConf does, never sees it.
    tyro = sys.modules.get("tyro")
    if tyro is None:
        return simple
    is_flag = bool in get_args(kind)
    return Annotated[simple, _as_flag(tyro, kind) if is_flag else tyro.conf.arg(constructor=kind)]


def _as_flag(tyro: types.ModuleType, kind: Any) -> Any:
    """A flag for tyro, as that of a bool, that may be followed by one of the words of a union with bool."""
    words = [word for one in get_args(kind) for word in get_args(one)]
    values = {(): True, ("True",): True, ("False",): False, **{(word,): word for word in words}}

    def parse(args: list[str]) -> Any:
        if (given := tuple(args)) not in values:
            raise ValueError(f"expected nothing, True, False or {' or '.join(words)}, got {' '.join(args)}")
        return values[given]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{{True,False,{','.join(words)}}}]",
        instance_from_str=parse,
        is_instance=lambda value: value in values.values(),
        str_from_instance=lambda value: [str(value)],
    )


if TYPE_CHECKING:
    # To a type checker these are fields that take more than they hold: what `__post_init__` makes of it.
    class GivenPath:
        """A field that takes a path or a string, and holds a path."""

        def __get__(self, obj: object, owner: type) -> Path: ...
        def __set__(self, obj: object, value: Path | str) -> None: ...

    class GivenPathOrNone:
        """A field that takes a path, a string or None, and holds a path or None."""

        def __get__(self, obj: object, owner: type) -> Path | None: ...
        def __set__(self, obj: object, value: Path | str | None) -> None: ...

    class GivenLayer:
        """A field that takes a layer, several or "all", and holds several as a tuple."""

        def __get__(self, obj: object, owner: type) -> int | Literal["all"] | tuple[int, ...]: ...
        def __set__(self, obj: object, value: int | Literal["all"] | Sequence[int]) -> None: ...

else:
    # To all who look at annotations when the program runs, as OmegaConf and tyro do, they are what they hold.
    GivenPath, GivenPathOrNone = Path, Path | None
    GivenLayer = int | Literal["all"] | tuple[int, ...]
