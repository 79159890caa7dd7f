"""Chat templates: the Jinja text that a checkpoint brings to turn messages into one prompt, run in a sandbox."""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class ChatTemplateError(ValueError):
    """A missing or broken chat template, or messages that it refuses."""


def find_chat_template(folder: pathlib.Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template of an HF folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several under names, as some HF folders have them
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


# Whatever a template's own code may raise: it divides, recurses and looks things up as any other program.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
# Names that `render` sets, or that Jinja keeps for itself.
_RESERVED = ("messages", "add_generation_prompt", "self", "loop", "caller", "varargs", "kwargs")


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; a prompt has the text alone."""

    tags = {"generation"}  # noqa: RUF012 - what Jinja declares

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template, with the names that templates written for HF transformers expect."""

    def __init__(self, source: str) -> None:
        """Raises ChatTemplateError where `source` is not Jinja."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        names = {"raise_exception": _refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source, globals=names)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"The chat template cannot be read: line {error.lineno}: {error.message}."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the prompt for `messages`, each with `role` and `content`, open for the assistant's answer.

        Raises ChatTemplateError where the template refuses the messages or fails on them, with the reason, or where
        `variables` has a name that the template or Jinja sets itself.
        """
        variables = variables or {}
        if taken := [name for name in _RESERVED if name in variables]:
            raise ChatTemplateError(f"The chat template's variables may not set `{taken[0]}`; leave it out.")
        context = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(context)
        except _RENDER_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ChatTemplateError(f"The chat template refused the messages: {reason}.") from error
