"""Errors that are for the user: one line that says what is wrong and what to do."""

import difflib
import functools


class UserError(Exception):
    """Its text is one line. Scripts print it without a traceback and exit with code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


def refuse(applies: object, text: str) -> None:
    """UserError with this text if the first argument is true."""
    if applies:
        raise UserError(text)


@functools.cache
def warn(text: str) -> None:  # once per process
    print(f"warning: {text}", flush=True)


def one_line(error: BaseException) -> str:
    """A library's error in one short line that can stand within another."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def did_you_mean(word, known) -> str:
    """The known word that is nearest to a misspelt one, or all of them."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(str, known))}"


def one_of(key: str, value, known) -> None:
    """UserError unless `value` is one of the `known` ones."""
    refuse(value not in known, f"unknown {key}={value!r}; {did_you_mean(value, known)}")
