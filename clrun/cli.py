"""The command `clrun`: runs and sweeps from Hydra overrides, and commands such as list, report, status and merge.

Exit codes: 0 success; 1 failed jobs of a sweep, diverged training or lack of memory (one line), or a bug (traceback);
2 a mistake of the user (one line per problem); 75 stopped by a signal, after a checkpoint; 130 Ctrl-C.
"""

import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from clrun import __version__
from clrun.config.choices import groups, help_page, members
from clrun.config.environment import masked
from clrun.config.plugins import use_working_folder
from clrun.system.errors import ConfigError, DataWarning, did_you_mean, one_line, printable
from clrun.system.failures import failure_lines
from clrun.system.signals import EXIT_CODE, Stopped, caught
from clrun.system.yaml_files import conf_dir, description


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        argv: arguments without the name of the program; by default `sys.argv[1:]`.

    Raises:
        SystemExit: always, with the exit code; the exception itself when HYDRA_FULL_ERROR=1 is set.
    """
    use_working_folder()
    _shown.clear()
    warnings.formatwarning = _warning
    try:
        code = _command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except Stopped as stop:
        print(f"clrun: {stop}; the same command with the folder of the run or sweep continues it", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of the pipe has ended, as in `clrun --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if lines := failure_lines(error):
            print("\n".join(f"clrun: {printable(masked(line))}" for line in lines), file=sys.stderr)
        else:
            traceback.print_exc()
        code = 2 if isinstance(error, ConfigError) else 1
    sys.exit(code)


_shown: set[str] = set()  # warnings about the user's data since the command began


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return the text of a warning: one line for a warning about the user's data, which is shown once."""
    if issubclass(category, DataWarning):
        if str(message) in _shown:
            return ""
        _shown.add(str(message))
        return f"clrun: warning: {printable(masked(str(message)))}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _command(argv: list[str]) -> int:
    """Run the command line and return the exit code."""
    if ended := [word.rstrip("\r") for word in argv if word.endswith("\r")]:
        raise ConfigError(
            f"'{ended[0]}': a carriage return follows, as at the end of lines of Windows files; convert the script "
            "with dos2unix or sed -i 's/\\r$//' FILE"
        )
    commands = {"list": _list, "report": _report, "status": _status, "merge": _merge, "features": _features}
    before = _config_dir_words(argv)
    if len(argv) > before and argv[before] in commands:
        return commands[argv[before]]([*argv[:before], *argv[before + 1 :]])
    if "--version" in argv:
        print(f"clrun {__version__}")
        return 0
    parser = _refusing(get_args_parser())
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        raise ConfigError("--experimental-rerun is not supported; continue a run with hydra.run.dir=FOLDER")
    if args.shell_completion:
        return _hydra(args, parser)
    if args.help and not (args.overrides or args.config_path or args.config_name or args.cfg):
        folders = _folders(args.config_dir and _folder(args.config_dir))
        if not any((folder / "config.yaml").is_file() for folder in folders[:-1]):  # else its help may be another one
            print(help_page(folders))
            return 0
    from clrun.config.compose import Composer
    from clrun.running.jobs import run

    places = {key: getattr(args, key) for key in ("config_path", "config_name", "config_dir")}
    with Composer.of(**places) as composer:
        showing = args.help or args.hydra_help or args.cfg or args.info or args.resolve
        if not showing:
            overrides = [*args.overrides, "hydra.mode=RUN"] if args.run else args.overrides
            with caught():
                failed = run(composer, overrides, sweep=args.multirun).failed
            for line in failed:
                print(f"clrun: failed: {printable(masked(line))}", file=sys.stderr)
            return 1 if failed else 0
        composer.compose(
            args.overrides, sweep=args.multirun
        )  # raises a ConfigError where Hydra would print a traceback
    return _hydra(args, parser)


def _config_dir_words(argv: Sequence[str]) -> int:
    """Return how many of the first words are the option --config-dir with its value, which may precede a command."""
    option, joined, _ = argv[0].partition("=") if argv else ("", "", "")
    return 0 if option not in ("--config-dir", "-cd") else 1 if joined else 2


def _refusing(parser: ArgumentParser) -> ArgumentParser:
    """Return `parser` changed to raise a `ConfigError` where it would print its usage and exit."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; see clrun --help")

    parser.error = refuse  # type: ignore[method-assign]
    return parser


def _folder(text: str) -> Path:
    """Return the path of an existing folder."""
    if not os.path.isdir(text):
        raise ArgumentTypeError(f"no such folder: {text}")
    return Path(text)


def _folders(own: Path | None) -> list[Path]:
    """Return the folders of configurations: the user's, if there is one, before clrun's."""
    return [folder for folder in (own, conf_dir()) if folder]


def _hydra(args: Namespace, parser: ArgumentParser) -> int:
    """Run the features that Hydra has itself: help, shell completion, printing configurations."""
    from clrun.running.jobs import task

    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # otherwise Hydra prints the error and exits
            _run_hydra(args, parser, task, str(conf_dir()), "config")
    except SystemExit as end:
        return 2 if end.code else 0
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    return 0


def _list(words: list[str]) -> int:
    """Print the choices of a group, each with the description in its YAML file."""
    parser = _refusing(ArgumentParser("clrun list", add_help=False))
    parser.add_argument("--config-dir", "-cd", type=_folder)
    parser.add_argument("group", nargs="?", default="")
    args = parser.parse_intermixed_args(words)
    folders = _folders(args.config_dir)
    known = groups(folders)
    group = next((g for g in known if args.group in (g, f"{g}s")), None)
    if group is None:
        close = did_you_mean(args.group, known)
        wrong = f"there is no group '{args.group}'{close}" if args.group else "name a group"
        raise ConfigError(f"list: {wrong} (available: {', '.join(known)})")
    for member, file in members(folders, group).items():
        print(f"{member:24} {description(file)}".rstrip())
    return 0


def _report(words: list[str]) -> int:
    """Rebuild the tables and the report of folders of runs, and print the comparison table."""
    from clrun.reporting import report

    parser = _refusing(ArgumentParser("clrun report", add_help=False))
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", action="store_true")  # draw the figure of every single run, even of more than 50
    args = parser.parse_intermixed_args(words)
    result = report(args.dirs, out=args.out, every_picture=args.pictures)
    page = printable(str(result.page or "no report is written for several folders; pass --out FOLDER"))
    print(f"{result.text}\n\nreport: {page}")
    return 0


def _status(words: list[str]) -> int:
    """Print how far the runs in a folder are."""
    from clrun.reporting.status import Watched, page, watch

    parser = _refusing(ArgumentParser("clrun status", add_help=False))
    parser.add_argument("dir", type=_folder, metavar="DIR")
    parser.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS")
    args = parser.parse_intermixed_args(words)
    if args.watch is None:
        print(page(args.dir, Watched(args.dir).look()))
        return 0
    if not 0.1 <= args.watch <= 86400:
        raise ConfigError(f"status: --watch must be a number of seconds from 0.1 to 86400, got {args.watch:g}")
    for text in watch(args.dir, seconds=args.watch):
        print(f"\x1b[H\x1b[J{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
    return 0


def _merge(words: list[str]) -> int:
    """Merge the networks of finished runs into one, and write it as a run."""
    from clrun.running.merge_runs import merge_runs

    parser = _refusing(ArgumentParser("clrun merge", add_help=False))
    parser.add_argument("--config-dir", "-cd", type=_folder)
    parser.add_argument("words", nargs="*")
    args = parser.parse_intermixed_args(words)
    merge_runs(args.words, config_dir=None if args.config_dir is None else str(args.config_dir))
    return 0


def _features(words: list[str]) -> int:
    """List the cached features of frozen backbones, or remove those that no running process uses."""
    from clrun.data.feature_cache import FeatureCache, default_folder, listing

    parser = _refusing(ArgumentParser("clrun features", add_help=False))
    parser.add_argument("action", nargs="?", choices=("list", "prune"), default="list")
    parser.add_argument("--dir", type=_folder, default=default_folder())
    parser.add_argument("--keep", type=float, default=0.0, metavar="GB")
    args = parser.parse_args(words)
    if not 0 <= args.keep < 1e9:
        raise ConfigError(f"features: --keep must be a number of gigabytes of at least 0, got {args.keep:g}")
    if args.action == "prune":
        FeatureCache(args.dir, limit=int(args.keep * 1e9)).make_room()
    print("\n".join(map(printable, listing(args.dir).split("\n"))))
    return 0
