"""Forms with files: reading them, and their documents. Their fields are records, as JSON bodies are."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from engines.errors import InvalidRequest
from server.dialects.base import FORM, Body, encode, invalid

_MAX_FILES, _MAX_FIELDS = 4, 64


@dataclass(frozen=True, slots=True)
class Form(Generic[Body]):
    """The fields of a form as a record, its files by name, and what two forms that say the same have in common."""

    body: Body
    files: Mapping[str, bytes]
    fingerprint: bytes


async def read_form(request: Request, record: type[Body], files: Collection[str]) -> Form[Body]:
    """A form whose fields are those of `record`, written as text, and whose files are at most one of each of `files`.

    `image[]` is `image`: OpenAI's SDKs write it so where several could be meant.

    Raises:
        HTTPException: 415, it is something else.
        InvalidRequest: it cannot be read, or a field is not what the record says; `param` is the field.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM:
        raise HTTPException(415, f"send the body as {FORM}, not {kind or 'without a content-type'}")
    fields: dict[str, str] = {}
    found: dict[str, bytes] = {}
    try:
        async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name in fields or name in found:
                    raise InvalidRequest(f"'{name}' came twice: one is taken", param=name)
                if isinstance(value, str) != (name not in files):
                    raise InvalidRequest(f"'{name}' is {'a file' if name in files else 'no file'} here", param=name)
                if isinstance(value, str):
                    fields[name] = value
                else:
                    found[name] = await value.read()
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequest(f"the form cannot be read: {error.detail}") from None
    try:
        body = msgspec.convert(fields, record, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
    return Form(body, found, encode(sorted([*fields.items(), *digests.items()])))


def form_of(record: type, files: Mapping[str, str], required: Collection[str]) -> dict[str, Any]:
    """The document of a form: a record's fields, and files with what each is."""
    _, components = msgspec.json.schema_components([record], ref_template="#/components/schemas/{name}")
    fields: dict[str, Any] = components[record.__name__]
    binary = {name: {"type": "string", "format": "binary", "description": text} for name, text in files.items()}
    schema = {**fields, "title": f"{fields['title']}Form", "properties": fields["properties"] | binary}
    return {FORM: {"schema": schema | {"required": sorted({*fields.get("required", ()), *required})}}}
