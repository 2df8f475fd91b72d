"""Write docs/reference.md from the CRD, so that the two can't differ: `python dev/hack/reference.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CRD: Final = REPOSITORY / "crds" / "ingestruns.yaml"
PAGE: Final = REPOSITORY / "docs" / "reference.md"

HEAD: Final = """\
# Reference: IngestRun

<!-- Made from crds/ingestruns.yaml: change that, then run `python dev/hack/reference.py`. -->

`apiVersion: {group}/{version}`, `kind: {kind}`; for kubectl also `{short}`. Everything that can be set is on this page:
a field that is not here is rejected (by kubectl, which asks the API server to be strict) or dropped.

`[]` stands for each item of a list, `*` for each name of a map. A field in **bold** must be set where its parent is.
"""

CONTAINERS: Final = ("spec.publish", "spec.hooks[].container")
"""Objects with the fields of `spec.fetch`, which the page lists once."""

Schema = dict[str, Any]


def render(document: Schema) -> str:
    """Render the page for a CRD."""
    (version,) = document["spec"]["versions"]
    names = document["spec"]["names"]
    root = version["schema"]["openAPIV3Schema"]
    spec, status = root["properties"]["spec"], root["properties"]["status"]
    parts = [
        HEAD.format(
            group=document["spec"]["group"],
            version=version["name"],
            kind=names["kind"],
            short=", ".join(names["shortNames"]),
        ),
        "## spec\n",
        f"{_one_line(spec['description'])}\n",
        _table(_rows("spec", spec)),
        "## Rules\n",
        "The API server rejects a request that breaks one of these rules, with this message, also with the operator "
        "down.\n",
        "\n".join(_rules(root)) + "\n",
        "## status\n",
        f"{_one_line(status['description'])}\n",
        _table(_rows("status", status)),
        "## Columns and selectors\n",
        _columns(version),
    ]
    return "\n".join(parts)


def _rows(path: str, part: Schema) -> Iterator[tuple[str, str, str, str]]:
    required = part.get("required", ())
    for name, child in part.get("properties", {}).items():
        here = f"{path}.{name}"
        shown = here.partition(".")[2]
        field = f"**`{shown}`**" if name in required else f"`{shown}`"
        text = _one_line(child.get("description", ""))
        if here in CONTAINERS:
            yield field, "object", "", f"{text} The same fields as `fetch`."
            continue
        yield field, _kind(child), _default(child), text
        yield from _below(here, child)


def _below(path: str, part: Schema) -> Iterator[tuple[str, str, str, str]]:
    yield from _rows(path, part)
    for keyword, sign in (("items", "[]"), ("additionalProperties", ".*")):
        if keyword in part:
            yield from _rows(path + sign, part[keyword])


def _kind(part: Schema) -> str:
    if part.get("x-kubernetes-int-or-string"):
        return "quantity"
    kind = str(part["type"])
    if "enum" in part:
        return ", ".join(f"`{value}`" if value else '`""`' for value in part["enum"])
    if kind == "array":
        return f"list of {_plural(part['items'])}{_span(part, 'Items', '')}"
    if "additionalProperties" in part:
        return f"map of {_plural(part['additionalProperties'])}{_span(part, 'Properties', '')}"
    if kind == "string":
        return "time" if part.get("format") == "date-time" else f"string{_span(part, 'Length', ' chars')}"
    if "minimum" in part or "maximum" in part:
        low, high = part.get("minimum"), part.get("maximum")
        return f"{kind}, {low}–{high}" if high is not None else f"{kind}, {low} or more"  # noqa: RUF001
    return kind


def _plural(part: Schema) -> str:
    if part.get("x-kubernetes-int-or-string"):
        return "quantities"
    return f"{part['type']}s"


def _span(part: Schema, of: str, unit: str) -> str:
    high = part.get(f"max{of}")
    if high is None:
        return ""
    return f", {high}{unit}" if part.get(f"min{of}") == high else f", up to {high}{unit}"


def _default(part: Schema) -> str:
    if "default" not in part or part["type"] == "object":
        return ""
    return f"`{yaml.safe_dump(part['default'], default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _rules(part: Schema, path: str = "") -> Iterator[str]:
    if path in CONTAINERS:
        return
    merged: dict[str, list[str]] = {}
    for rule in part.get("x-kubernetes-validations", ()):
        field = f"{path}{rule.get('fieldPath', '')}".removeprefix(".")
        merged.setdefault(_one_line(rule["message"]), []).append(field)
    for message, fields in merged.items():
        yield f"- {', '.join(f'`{field}`' for field in fields)}: {message}"
    for name, child in part.get("properties", {}).items():
        yield from _rules(child, f"{path}.{name}".removeprefix("."))
    for keyword, sign in (("items", "[]"), ("additionalProperties", ".*")):
        if keyword in part:
            yield from _rules(part[keyword], path + sign)


def _columns(version: Schema) -> str:
    rows = [
        f"| {column['name']} | `{column['jsonPath']}` | {'yes' if column.get('priority') else ''} |"
        for column in version["additionalPrinterColumns"]
    ]
    fields = ", ".join(f"`{field['jsonPath'].removeprefix('.')}`" for field in version["selectableFields"])
    head = "| column | from | only with `-o wide` |\n|---|---|---|\n"
    return f"{head}{chr(10).join(rows)}\n\n`kubectl get ir --field-selector` takes {fields}.\n"


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "| field | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(yaml.safe_load(CRD.read_text())))
    sys.stdout.write(f"{PAGE.relative_to(REPOSITORY)} written\n")
