"""Kubernetes label selectors: equality and sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Labels = Mapping[str, str]

_TERM = re.compile(
    r"""
    \s*(?:
        (?P<set_key>[^\s,=!()]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)
      | (?P<key>[^\s,=!()]+)\s*(?P<eq>==|=|!=)\s*(?P<value>[^\s,=!()]*)
      | (?P<absent>!)?(?P<exists>[^\s,=!()]+)
    )\s*(?:,|$)
    """,
    re.VERBOSE,
)


def parse(selector: str) -> Callable[[Labels], bool]:
    """A predicate on labels; raises ValueError for what the API server would refuse."""
    terms: list[Callable[[Labels], bool]] = []
    at = 0
    while at < len(selector):
        match = _TERM.match(selector, at)
        if match is None:
            raise ValueError(f"unable to parse requirement: {selector[at:]!r}")
        at = match.end()
        terms.append(_term(match))
    return lambda labels: all(term(labels) for term in terms)


def _term(match: re.Match[str]) -> Callable[[Labels], bool]:
    if key := match["set_key"]:
        values = {value.strip() for value in match["values"].split(",")}
        wanted = match["op"] == "in"
        # As in Kubernetes, `notin` and `!=` also select objects without the key.
        return lambda labels: (labels[key] in values) == wanted if key in labels else not wanted
    if key := match["key"]:
        value = match["value"]
        if match["eq"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    key = match["exists"]
    absent = bool(match["absent"])
    return lambda labels: (key in labels) != absent


def phase_fits(run: Mapping[str, Any], fields: str) -> bool:
    """Whether a run fits a field selector on `status.phase`; raises ValueError for any other."""
    phase = run.get("status", {}).get("phase", "")
    for term in filter(None, fields.split(",")):
        match = re.fullmatch(r"status\.phase(=|!=)(\w*)", term)
        if match is None:
            raise ValueError(f"field label not supported: {term}")
        if (phase == match[2]) != (match[1] == "="):
            return False
    return True
