"""What the command line's parsers share: a parser that says what was probably meant, and the usual arguments."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

Handler = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser that says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong is not None:
            choices = re.findall(r"[\w-]+", wrong.group(2))
            close = difflib.get_close_matches(wrong.group(1), choices, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"choose from: {', '.join(choices)}."
            message = f"unknown command or value {wrong.group(1)!r}: {hint}"
        print(f"error: {message}\nsee: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


class ShowVersion(argparse.Action):
    """Print versions and leave. They are read from the packages' metadata: torch is not imported for it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import mvit

        print(f"mvit {mvit.__version__}\npython {platform.python_version()}")
        for name in ("torch", "deepspeed", "submitit"):
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name}: not installed")
        parser.exit()


def add_command(group: "argparse._SubParsersAction", name: str, handler: Handler, text: str, example: str) -> Parser:
    parser = group.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # SUPPRESS: the default must not undo a --debug given before the command
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(handler=handler, parser=parser)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file of configs/, or a run's config.yaml")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="settings that replace the recipe's")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object for scripts")


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder: output_dir/name of its recipe")


def add_cluster(parser: argparse.ArgumentParser, required: bool) -> None:
    text = "a file of configs/cluster/; cluster.KEY=VALUE replaces its settings"
    parser.add_argument("--cluster", required=required, metavar="FILE", help=text)
    parser.add_argument("--nodes", type=int, metavar="N", help="short for cluster.nodes=N")


def add_follow(parser: "argparse.ArgumentParser | argparse._MutuallyExclusiveGroup") -> None:
    text = "stay, show progress; exit code 0 finished, 85 stopped on request, 1 failed"
    parser.add_argument("--follow", "--wait", action="store_true", help=text)
