"""Properties of plans that are worked out once."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class lazy(Generic[_T]):
    """A property that is worked out when it is first asked for, and kept.

    As `functools.cached_property`, but for the lock that it has in Python 3.11: all plans share that, and a child that
    is forked while a thread has it would wait for ever. Two threads may both work it out, and find the same.
    """

    def __init__(self, function: Callable[[Any], _T]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Any]) -> _T:
        value = instance.__dict__[self._name] = self._function(instance)
        return value
