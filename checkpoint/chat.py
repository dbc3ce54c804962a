"""The text of a chat, from the template that a checkpoint has for it.

Knows: jinja2, and how little a stranger's program may be trusted. Does not know: tokens, files. It
imports nothing of this project, because it is also the program that the child process runs. Read
next: inflation.py.
"""

import json
import re
import subprocess
import sys
from contextlib import suppress
from datetime import datetime

MAX_TEMPLATE_CHARS, MAX_CHAT_CHARS, CHAT_BYTES, CHAT_SECONDS = 256 << 10, 8 << 20, 512 << 20, 10


def render_chat(template: str, variables: dict) -> str:
    """The text of a chat, from its jinja2 template. ValueError when the template fails or exceeds a
    limit.

    A template is a stranger's program. jinja2's sandbox keeps it from Python, not from looping for
    ever or asking for 10 GB ({{ 'x' * 10**10 }}): so it runs in a child process with limits (0.1 s,
    once per turn of a chat).
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"the chat template has over {MAX_TEMPLATE_CHARS} characters, the limit: replace it"
        )
    job = json.dumps([template, variables]).encode()
    try:
        child = subprocess.run(
            [sys.executable, __file__], input=job, capture_output=True, timeout=CHAT_SECONDS
        )
        text, error = json.loads(child.stdout or '["", "it died; is jinja2 installed?"]')
    except subprocess.TimeoutExpired:
        text, error = "", f"it was not done after {CHAT_SECONDS} s"
    if error:
        raise ValueError(
            f"the chat template failed ({error}): check the messages, or use a plain prompt"
        )
    return text


def _render_in_child() -> tuple[str, str]:
    """Text and error of the job that render_chat wrote to stdin."""
    # debug is for when a template fails
    from jinja2 import TemplateError, debug, sandbox  # noqa: F401

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    template, variables = json.load(sys.stdin)
    # {% generation %} marks the words of the assistant for those who train on them: a "with" block.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", template)
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False} | options
    )
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": datetime.now().strftime,
    }
    # What jinja2 opens late is opened now: soon no file can be.
    environment.from_string("{{ 'x' }}").render()
    if sys.platform != "win32":  # there, only the time is limited
        import resource

        for name, most in {"AS": CHAT_BYTES, "CPU": CHAT_SECONDS, "FSIZE": 0, "NOFILE": 0}.items():
            with suppress(ValueError):  # macOS knows no limit on memory
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    try:
        text = environment.from_string(template).render(variables)
    except Exception as error:  # whatever a stranger's program may raise is reported, in one line
        return "", " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (text, "") if len(text) <= MAX_CHAT_CHARS else ("", f"it wrote {len(text)} characters")


if __name__ == "__main__":  # the child process of render_chat
    json.dump(_render_in_child(), sys.stdout)
