"""Base classes of the credentials of all stores."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.checks import instance_of
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import TupleVariant, hidden

__all__ = [
    "Credential",
    "FileCredential",
    "RefreshableCredential",
    "SecretCredential",
    "conflicting_arguments",
    "refreshable",
]


T = TypeVar("T")


class Credential(TupleVariant):
    """Base of every member of a credentials union."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, repr=False, match_args=False)
class SecretCredential(Credential):
    """One string that is never shown."""

    __match_args__ = ("_0",)

    secret: str

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("secret", hidden(), None)]


@dataclass(frozen=True, slots=True, repr=False, match_args=False)
class FileCredential(Credential):
    """Path of a file that holds the secret."""

    __match_args__ = ("_0",)

    path: str


@dataclass(frozen=True, slots=True, repr=False)
class RefreshableCredential(Credential):
    """A function that is called for new credentials whenever the current ones have expired."""

    pickled_function: bytes
    """``pickle.dumps`` of a callable without arguments."""
    current: Any = None
    """Its last result; None: the function is called at first use."""

    def __post_init__(self) -> None:
        instance_of(bytes)(f"{type(self).__qualname__}.pickled_function", self.pickled_function)
        if self.current is not None:
            self._check(self.current)

    def _check(self, value: Any) -> Any:
        return value

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [("pickled_function", hidden("function"), None), ("current", self.current, None)]

    def refreshed(self) -> Any:
        """Call the function and return the credentials that it gives. It may block: call it in a thread.

        Raises
        ------
        InvalidInputError
            The function cannot be unpickled, fails, or returns something else than credentials
            (kind ``invalid-credentials``).
        """
        try:
            value = pickle.loads(self.pickled_function)()
        except Exception as error:
            # The cause is chained; its text may hold a secret, so it is not part of this message.
            raise InvalidInputError(
                f"refreshing {type(self).__qualname__} failed with {type(error).__qualname__}{_place_of(error)}: "
                "check the function given",
                ErrorKind.INVALID_CREDENTIALS,
            ) from error
        try:
            return self._check(value)
        except TypeError as error:
            raise InvalidInputError(
                f"the function of {type(self).__qualname__} returned {type(value).__name__}: "
                "let it return the static credentials of the same service",
                ErrorKind.INVALID_CREDENTIALS,
            ) from error


def _place_of(error: Exception) -> str:
    """The place that raised an exception, for messages; empty if it was not raised inside a called function."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    return f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def refreshable(
    cls: Callable[[bytes, Any], T], get_credentials: Callable[[], Any], scatter_initial_credentials: bool
) -> T:
    if not callable(get_credentials):
        raise TypeError(f"get_credentials must be a function without arguments, not {type(get_credentials).__name__}")
    try:
        pickled = pickle.dumps(get_credentials)
    except Exception as error:
        raise InvalidInputError(
            f"get_credentials cannot be pickled ({type(error).__name__}): define it at the top level of a module",
            ErrorKind.INVALID_CREDENTIALS,
        ) from error
    return cls(pickled, get_credentials() if scatter_initial_credentials else None)


def conflicting_arguments(function: str, choices: str) -> InvalidInputError:
    return InvalidInputError(f"conflicting arguments to {function}: give {choices}", ErrorKind.INVALID_CREDENTIALS)
