"""Writes docs/output.schema.json, the JSON schema of what ``--json`` writes.

python -m tests.output_schema
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from layersmith.outputs import RESULTS, ErrorOutput
from layersmith.screen import SCHEMA

SCHEMA_FILE = Path(__file__).parents[1] / "docs" / "output.schema.json"


def schema_text() -> str:
    """The JSON schema: for every command its result, or an error."""
    inputs: Any = [(name, "serialization", TypeAdapter(type_)) for name, type_ in RESULTS.items()]
    inputs.append(("error", "serialization", TypeAdapter(ErrorOutput)))
    schemas, definitions = TypeAdapter.json_schemas(inputs)
    head = {"schema": {"const": SCHEMA}, "layersmith": {"type": "string", "description": "The version."}}
    answers = [
        {
            "type": "object",
            "properties": head | {"command": {"const": name}, "result": schemas[name, "serialization"]},
            "required": ["schema", "layersmith", "command", "result"],
        }
        for name in RESULTS
    ]
    failed = {
        "type": "object",
        "properties": head | {"command": {"enum": [*RESULTS, None]}, "error": schemas["error", "serialization"]},
        "required": ["schema", "layersmith", "command", "error"],
    }
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What a command of layersmith with --json writes",
        "oneOf": [*answers, failed],
        **definitions,
    }
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
