"""The form on Prefect's page: first what people change, everything else as JSON.

A form of all fields is 10,000 pixels tall. It would also send every default, so that a value that depends on another
field, such as ``train.beta``, would count as chosen. This form shows few fields and sends only what differs.
"""

from types import SimpleNamespace
from typing import Annotated, Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

from d3po_core.config import CampaignConfig

# In the form's order; a section stands where its first field does.
SHOWN = (
    "campaign", "model.path", "model.memory", "sample.prompts", "sample.groups_per_round", "sample.group_size",
    "judge.labeller", "judge.scorers", "train.learning_rate", "evaluate.prompts", "guard.policy", "store.mirror",
)  # fmt: skip

Schema = dict[str, Any]


def form_schema(core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
    """Return a configuration's JSON schema from which Prefect's page makes a short form.

    The values are still checked against the whole schema: the page does not know ``if`` and ``then``.
    """
    whole = handler(core_schema)["anyOf"][0]
    return _section("config", whole, SHOWN, handler) | {"if": {}, "then": whole}


def _section(title: str, schema: Schema, shown: tuple[str, ...], handler: GetJsonSchemaHandler) -> Schema:
    """The schema of a section with only the shown fields, in their order."""
    known = handler.resolve_ref_schema(schema)
    names = list(dict.fromkeys(name.partition(".")[0] for name in shown))
    fields = {}
    for position, name in enumerate(names):
        inner = tuple(rest for first, _, rest in (field.partition(".") for field in shown) if first == name and rest)
        field = known["properties"][name]
        fields[name] = (_section(name, field, inner, handler) if inner else _described(field)) | {"position": position}
    return {"type": "object", "title": title, "description": known["description"], "properties": fields}


def _described(field: Schema) -> Schema:
    """A field without its default, which the page would send; its description says it instead."""
    default = field.get("default")
    shown = ", ".join(map(str, default)) if isinstance(default, list) else default
    rest = {key: value for key, value in field.items() if key != "default"}
    return rest | {"description": f"{field['description']}. Default: {shown}"}


# Pydantic asks annotations for this method. None is the default because the page would show, and send, a whole
# configuration.
FormConfig = Annotated[CampaignConfig | None, SimpleNamespace(__get_pydantic_json_schema__=form_schema)]
