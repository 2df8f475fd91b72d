"""A mypy plugin that gives `KubeModel.replace` the fields of the model it is called on as keyword parameters.

So `status.replace(compeltion_time=now)` and a value of the wrong type are errors. mypy looks into
`dataclasses.replace` in the same way, but offers models nothing like it.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import ARG_NAMED_OPT, TypeInfo
from mypy.plugin import MethodSigContext, Plugin
from mypy.types import AnyType, FunctionLike, Instance, Type, TypeOfAny, get_proper_type
from pydantic.mypy import METADATA_KEY

MODEL = "ingestrun.model.base.KubeModel"


class ReplacePlugin(Plugin):
    """The plugin: one hook, at one method."""

    def get_method_signature_hook(self, fullname: str) -> Callable[[MethodSigContext], FunctionLike] | None:
        """Return the hook for every method of that name: it is named after its object's class, not KubeModel."""
        return _with_fields if fullname.endswith(".replace") else None


def _with_fields(ctx: MethodSigContext) -> FunctionLike:
    owner = get_proper_type(ctx.type)
    if not isinstance(owner, Instance) or not owner.type.has_base(MODEL):
        return ctx.default_signature
    types = _field_types(owner.type)
    return ctx.default_signature.copy_modified(
        arg_types=list(types.values()), arg_kinds=[ARG_NAMED_OPT] * len(types), arg_names=list(types)
    )


def _field_types(model: TypeInfo) -> dict[str, Type]:
    """Return the type of each field, as pydantic's own plugin has found them."""
    types: dict[str, Type] = {}
    for name in model.metadata.get(METADATA_KEY, {}).get("fields", {}):
        symbol = model.get(name)
        types[name] = (symbol.type if symbol is not None else None) or AnyType(TypeOfAny.special_form)
    return types


def plugin(version: str) -> type[Plugin]:
    """Return the plugin, as mypy asks for it."""
    return ReplacePlugin
