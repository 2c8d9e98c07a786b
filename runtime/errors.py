"""Errors that are for the user: one line that says what is wrong and what to do."""

import contextlib
import difflib
import errno
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

ANYWHERE = {  # error of the operating system -> what to do about it
    errno.ESTALE: "the network disk has lost sight of it: mount it again",
    errno.EIO: "the disk fails: look into the system's log (dmesg)",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.ENAMETOOLONG: "the name is too long: shorten name= or root=",
    errno.ELOOP: "a link there leads back to itself: mend it",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another place (root=)",
    errno.EISDIR: "a folder stands where a file is needed: move it away, or choose another place (root=)",
    errno.EAGAIN: "another program has locked it: end that one",
    errno.EBUSY: "another program uses it: end that one",
    errno.EPIPE: "the program that read the output (behind a `|`) has ended: write into a file instead",
}
ANYWHERE |= dict.fromkeys(
    (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
    "this disk can lock no file: mount it with locks (Lustre: -o flock), or choose another root=",
)
READING = ANYWHERE | {errno.ENOENT: "it is not there: name another place, or make it first"}
READING |= dict.fromkeys((errno.EACCES, errno.EPERM), "let this user read it (chmod, chown)")
WRITING = ANYWHERE | {
    errno.ENOENT: "no folder can be made there: choose another root=",
    errno.EEXIST: "something else has its name: move that away, or choose another root=",
    errno.EROFS: "the disk is mounted read-only: choose another root=",
    errno.EFBIG: "the file is larger than the disk or `ulimit -f` allows: make room for it, raise the limit",
    errno.EINVAL: "the disk does not take such a file or name: choose another root= or name=",
}
WRITING |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose another root=")
WRITING |= dict.fromkeys((errno.EACCES, errno.EPERM), "let this user write there, or choose another root=")
DAMAGE = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError)
DAMAGE += (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile)  # what a reader may raise


class UserError(Exception):
    """Its text is one line. Scripts print it without a traceback and exit with code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


def refuse(applies: object, text: str) -> None:
    """UserError with this text if the first argument is true."""
    if applies:
        raise UserError(text)


def remedy(error: BaseException, remedies: dict[int, str], otherwise: str) -> str:
    """What to do about an error of the operating system, which a library may have put into words."""
    said = re.search(r"(?:os error|errno)[ =]+(\d+)", str(error), re.IGNORECASE)
    number = getattr(error, "errno", None) or int(said[1] if said else 0)
    return remedies.get(number, otherwise)


@contextlib.contextmanager
def reading(path: str | Path, otherwise: str) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into one line. otherwise: what to do about a damaged file."""
    try:
        yield
    except DAMAGE as error:
        what = remedy(error, READING, otherwise)
        why = "is damaged" if what == otherwise else "cannot be read"
        raise UserError(f"{path} {why} ({one_line(error)}); {what}") from error


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one line: errors of the system, h5py's, torch's,
    safetensors'.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        what = f"{remedy(error, WRITING, 'make room, or choose another root=')}; then repeat the command"
        raise UserError(f"{path} cannot be written ({one_line(error)}); {what}") from error


def one_line(error: BaseException) -> str:
    """A library's error in one short line that can stand within another."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def did_you_mean(word, known) -> str:
    """The known word that is nearest to a misspelt one, or all of them."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(str, known))}"


def one_of(key: str, value, known) -> None:
    """UserError unless `value` is one of the `known` ones."""
    if value not in known:
        raise UserError(f"unknown {key}={value!r}; {did_you_mean(value, known)}")


def regex(key: str, text: str) -> re.Pattern:
    """The compiled regular expression of a config key."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{key}={text!r} is no regular expression ({error})") from error
