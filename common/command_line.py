"""What the command lines share: `--config`, `--set`, `--print-config`, and the exit on signals.

parser = argparse.ArgumentParser(...)
add_config_options(parser)
arguments = parser.parse_args()
model, datagen = load_sections(arguments, model=ModelConfig, datagen=DatagenConfig)
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from common.config import Section, load_section, resolved_yaml

#: exit status of a command that ended because of SIGTERM
EXIT_SIGTERM = 128 + signal.SIGTERM


def add_config_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--config FILE`, `--set SECTION.FIELD=VALUE` (repeatable) and `--print-config`."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", type=Path, required=required, help="preset, for instance configs/tiny.yaml")
    group.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a value of the preset; repeatable",
    )
    group.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and exit")


def load_sections(arguments: argparse.Namespace, **schemas: type[Section]) -> list[Any]:
    """The sections named by keyword, validated, in the order given; with `--print-config`, print them and exit 0.

    Raises:
        UserError: naming file, field, value and remedy.
    """
    sections = {
        name: load_section(arguments.config, name, schema, arguments.overrides) for name, schema in schemas.items()
    }
    if arguments.print_config:
        print(resolved_yaml(**sections), end="")
        sys.stdout.flush()
        raise SystemExit(0)
    return list(sections.values())


#: the signal that this process was to end by
_received: int | None = None


def exit_on_signals() -> None:
    """SIGTERM raises SystemExit and Ctrl-C KeyboardInterrupt in the main thread: `finally` blocks run, temporary files
    are removed. Python drops an exception that comes within a destructor or a callback of C; a loop that asks
    `raise_if_signalled` ends nevertheless."""
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, _end)


def raise_if_signalled() -> None:
    """Raise once more what `exit_on_signals` raised."""
    if _received is not None:
        _end(_received)


def _end(number: int, *_: object) -> None:
    global _received
    _received = number
    if number == signal.SIGTERM:
        sys.exit(EXIT_SIGTERM)
    raise KeyboardInterrupt
