"""The one place where errors become sentences and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from errno import EDQUOT, ENOSPC
from typing import Any

import typer

from metaoptim.cli.interrupts import INTERRUPTED
from metaoptim.core.callers import where

SMALLER = "make the network, the batch of tasks or the number of steps smaller"


def told(run: Callable[[list[str]], int | None], args: Sequence[str] | None = None) -> int:
    """Runs a command with these arguments (the process's own if not given); returns its exit code."""
    given = sys.argv[1:] if args is None else list(args)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _check_text(given)
            code = run(given)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except typer.TyperException as error:
            return _fail(error, f"error: {error.format_message()}", error.exit_code)
        except (ValueError, OSError) as error:
            return _fail(error, f"error: {_sentence(error)}", 1 if _is_full(error) else 2)
        except Exception as error:
            if _is_out_of_memory(error):
                return _fail(error, f"error: there is not enough memory ({_sentence(error)}); {SMALLER}.", 1)
            hint = "(set METAOPTIM_DEBUG=1 for the traceback)"
            if place := where(error):
                return _fail(error, f"error: {place}: {type(error).__name__}: {_sentence(error)} {hint}", 2)
            return _fail(error, f"internal error: {type(error).__name__}: {_sentence(error)} {hint}", 1)
    if code == INTERRUPTED:
        typer.echo("interrupted", err=True)
    return code or 0


def _check_text(args: Sequence[str]) -> None:
    """Files and folders that are named become part of recipes and results, which are UTF-8."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the argument {arg!a} isn't UTF-8 text; rename that file or folder, or take another.") from None


def _fail(error: Exception, line: str, code: int) -> int:
    if os.environ.get("METAOPTIM_DEBUG"):
        traceback.print_exception(error)
    typer.echo(line, err=True)
    return code


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _is_full(error: Exception) -> bool:
    """Whether a disk is full, which is not the input's fault."""
    return any(isinstance(e, OSError) and e.errno in (ENOSPC, EDQUOT) for e in (error, error.__cause__))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as Python and NumPy say it, or torch."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
