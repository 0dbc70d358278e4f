"""`python -m kitsune`: the command line; each subcommand lives in its own package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kitsune.demo import cli as demo


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kitsune", description="Kitsune: lazy PyTorch training.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help="train two small models, eager and under Kitsune, and compare"))
    return demo.run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
