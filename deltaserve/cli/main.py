"""``deltaserve``: the commands, and one place where errors become one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import sys

import typer

from deltaserve import __version__
from deltaserve.errors import DeltaServeError
from deltaserve.openmp import spin_briefly

USER_ERROR = 2
INTERRUPTED = 130

SUMMARY = "Serve many fine-tunes of one base model together, each as a small compressed delta."

# A command's module is imported when it is called: help must not wait for torch.
COMMANDS = {
    "demo": "Train a small family of models, compress, serve and check them: start here.",
    "select": "Choose the best samples of a pool to tune on.",
    "pipeline": "Input pipelines for training: show a plan, run it, see what limits it.",
    "compress": "Compress a fine-tune (or a PEFT LoRA adapter) of a base model into a delta.",
    "verify": "Compare base + delta with the fine-tune: divergence, agreement, perplexity.",
    "diff": "Show what a fine-tune changed: unchanged values, norms, effective ranks.",
    "inspect": "Show what a delta holds: sizes, codecs, errors, base and digest.",
    "export": "Write base + delta as an ordinary Hugging Face checkpoint.",
    "key": "Make an API key for the tenants file, and its digest.",
    "serve": "Serve a base model and its deltas behind an OpenAI-compatible endpoint.",
    "bench": "Load-test a server: serve, sweep, compare.",
}

# typer carries its own copy of click and exports only the leaves of its exceptions.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    spin_briefly()
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> int:
    """Run a command; returns the exit code: 0, 1 for a missed threshold, 2 for the
    user's errors, 130 for Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        return fail(f"no command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
    try:
        code = run_command(argv[0], argv[1:])
        if code == INTERRUPTED:  # typer turns Ctrl-C into a return value
            print("deltaserve: interrupted", file=sys.stderr)
        return code
    except UsageError as error:
        # Not str(): only this names the option.
        message = error.format_message()  # type: ignore[attr-defined]
        return fail(f"{message.rstrip('.')} (see deltaserve {argv[0]} --help)")
    except DeltaServeError as error:
        return fail(str(error))
    except OSError as error:
        return fail(describe_os_error(error))


def run_command(name: str, argv: list[str]) -> int:
    """Call ``deltaserve.cli.<name>.run`` or one of its SUBCOMMANDS, the options parsed by typer."""
    module = importlib.import_module(f"deltaserve.cli.{name}")
    help_too = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(add_completion=False, context_settings=help_too)
    for function in getattr(module, "SUBCOMMANDS", ()) or (module.run,):
        app.command()(function)
    result = typer.main.get_command(app)(
        argv, prog_name=f"deltaserve {name}", standalone_mode=False
    )
    return result if isinstance(result, int) else 0


def overview() -> str:
    lines = ["Usage: deltaserve COMMAND [OPTIONS]", "", SUMMARY, "", "Commands:"]
    lines += [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "deltaserve COMMAND --help explains a command."])


def fail(message: str) -> int:
    print(f"deltaserve: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def describe_os_error(error: OSError) -> str:
    """What went wrong with a file, or the error again when it is not the user's to mend."""
    where = error.filename or "the output"
    if error.errno == errno.ENOSPC:
        return (
            f"no space left on the device while writing {where}; nothing was kept: "
            "free some space or choose another output directory"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{error.strerror}: {where}"
    raise error
