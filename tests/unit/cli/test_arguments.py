"""The command line: names, selections, flags whose value may be left out, and errors in kubectl's words."""

from __future__ import annotations

import pytest

from ingestrun.cli import main
from ingestrun.cli.arguments import run_name, selection_of
from ingestrun.cli.commands import cancel
from ingestrun.cli.errors import ExitCode, UsageError


def select(words: list[str]) -> None:
    options = cancel.parser().read(words)
    selection_of(options, other=options.stale is not None)


@pytest.mark.parametrize(
    "word", ["flights", "ir/flights", "ingestrun/flights", "ingestruns/flights", "ingestrun.ingestrun.dev/flights"]
)
def test_a_run_is_named_as_kubectl_names_it(word: str) -> None:
    assert run_name(word) == "flights"


@pytest.mark.parametrize("word", ["pod/flights", "Flights", "a/b/c", "", "ir/", "-x", "a" * 254])
def test_other_words_name_no_run(word: str) -> None:
    with pytest.raises(UsageError):
        run_name(word)


def test_a_flag_without_its_value_takes_no_name_for_it() -> None:
    options = cancel.parser().read(["--dry-run", "flights", "--wait", "geo", "--reason", "r", "sales"])
    assert (options.names, options.dry_run, options.wait) == (["flights", "geo", "sales"], "server", "cancelled")
    options = cancel.parser().read(["--dry-run=client", "--wait=drained", "flights"])
    assert (options.dry_run, options.wait) == ("client", "drained")


def test_json_has_the_flag_of_the_seed() -> None:
    assert cancel.parser().read(["flights", "--json"]).output == "json"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["flights", "--foo"], "error: unknown flag: --foo"),
        (["flights", "--foo=3", "--bar"], "error: unknown flag: --foo=3"),
        (["flights", "--reason"], "error: flag needs an argument: --reason"),
        (["flights", "-n"], "error: flag needs an argument: --namespace"),
        (["flights", "--wait=done"], 'error: invalid argument "done" for "--wait" flag'),
        (["flights", "-o", "xml"], 'error: invalid argument "xml" for "--output" flag'),
        (["flights", "--grace-period", "x"], 'error: invalid argument "x" for "--grace-period" flag'),
        (["--stale", "10"], 'error: invalid duration "10"'),
        ([], "error: resource(s) were provided, but no name was specified"),
        (["flights", "-l", "a=b"], "error: name cannot be provided when a selector is specified"),
        (["flights", "--stale", "10m"], "error: name cannot be provided when a selector is specified"),
        (["--all", "-l", "a=b"], "error: cannot set --all and --selector at the same time"),
        (["flights", "-A"], "error: a resource cannot be retrieved by name across all namespaces"),
    ],
    ids=" ".join,
)
def test_a_usage_error_is_in_kubectls_words(words: list[str], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        select(words)
    assert str(raised.value).startswith(text)


def test_stale_selects_alone_and_narrows_a_selector() -> None:
    for words in (["--stale", "10m"], ["--stale", "10m", "-l", "a=b"], ["--stale", "10m", "--all"]):
        assert not selection_of(cancel.parser().read(words), other=True).names


def test_a_name_given_twice_is_one_run() -> None:
    assert selection_of(cancel.parser().read(["flights", "ir/flights"])).names == ("flights",)


@pytest.mark.parametrize("words", [["--help"], ["help"], [], ["--version"]])
def test_help_is_no_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(words) is ExitCode.OK
    assert "ingestrun" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["cancle", "flights"], ["--foo"]])
def test_an_unknown_command_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(words) is ExitCode.USAGE
    assert capsys.readouterr().err.startswith("error: unknown ")


@pytest.mark.parametrize("command", main.COMMANDS)
def test_each_command_has_help_with_its_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.run([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: kubectl ingestrun {command} ")
