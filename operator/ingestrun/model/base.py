"""How our models read what Kubernetes holds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class KubeModel(BaseModel):
    """A part of a Kubernetes object: camelCase outside, immutable inside.

    Unknown fields are ignored when reading, so that an older operator survives a newer CRD; it is the API
    server that refuses or prunes what the CRD does not know.
    """

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)
