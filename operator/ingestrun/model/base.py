"""The base of the models that read and write Kubernetes objects."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class KubeModel(BaseModel):
    """A part of a Kubernetes object: camelCase outside, immutable inside.

    Reading ignores unknown fields by itself; `model.foreign` finds those of a run, because a run that has some is held.
    The API server refuses or prunes the fields that the CRD does not know.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields changed, as `dataclasses.replace` does; the values are not validated.

        Raises:
            TypeError: a name is no field of the model. `model_copy(update=...)` would take it, and lose it.
        """
        unknown = changes.keys() - type(self).model_fields.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        return self.model_copy(update=changes)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that Kubernetes holds of it, as plain values."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def json_bytes(self) -> int:
        """Return how many bytes that JSON has."""
        return len(self.model_dump_json(by_alias=True, exclude_none=True).encode())
