"""The blocks of the documents as `make test-docs` finds them; and that the samples can stand side by side."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tests.docs.blocks import PAGES, ROOT, blocks

SAMPLES = ROOT / "manifests" / "samples"


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def test_blocks_have_their_place_language_text_and_directives(tmp_path: Path) -> None:
    text = """# Head

<!-- docs-test: not run, a reason -->
```yaml
a: 1
```

- list

  <!-- docs-test: first
  kubectl one
  kubectl two
  -->
  <!-- docs-test: dry run -->

  ```
  kubectl three
  ```

<!-- docs-test: not run, of no block -->
prose

```
$ kubectl four; kubectl five   # six
out
  put
$ kubectl seven
```
"""
    one, two, three = blocks(page(tmp_path, text))
    assert (one.line, one.language, one.text, one.reason) == (4, "yaml", "a: 1\n", "a reason")
    assert (two.text, two.dry_run, two.reason) == ("kubectl three\n", True, None)
    assert [script.split() for script in two.first] == [["kubectl", "one", "kubectl", "two"]]
    assert two.steps == [("kubectl three\n", "")]
    assert (three.reason, three.first) == (None, [])
    assert three.steps == [("kubectl four; kubectl five   # six", "out\n  put\n"), ("kubectl seven", "")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_command_stands_outside_of_a_block(path: Path) -> None:
    """Indented code is not run, so no command is in it."""
    assert re.findall(r"^(?: {4,}|\t)\$? ?(?:kubectl|make|curl|jq|docker|podman) .*$", unfenced(path), re.M) == []


def unfenced(path: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.M | re.S)


def test_no_two_samples_are_the_same_object() -> None:
    """`kubectl apply -f manifests/samples/`: the second of a name would change the first."""
    bodies = [body for path in SAMPLES.glob("*.yaml") for body in yaml.safe_load_all(path.read_text())]
    found = [(body["kind"], body["metadata"]["name"]) for body in bodies]
    assert sorted(found) == sorted(set(found))
