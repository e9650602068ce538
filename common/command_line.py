"""What the command lines share: `--config`, `--set`, `--print-config`, and the exit on SIGTERM.

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


def exit_on_sigterm() -> None:
    """SIGTERM raises SystemExit in the main thread, so that `finally` blocks run and temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))
