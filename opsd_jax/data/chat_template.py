# SPDX-License-Identifier: Apache-2.0
"""Chat templates rendered in a process of their own, because a template is a stranger's program.

    tokenizer --(template, messages, switches)--> child process: Jinja's sandbox --text--> tokenizer

The text is what `transformers` renders, with the same sandbox, filters and functions; but a
template that loops, recurses or allocates without end costs one sentence, and not the run. One
child serves all templates of a process.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import json
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_jax.data.worker import Worker
from opsd_jax.errors import UserError

TIME_LIMIT_S = 10.0  # for one prompt; they take a millisecond
MEMORY_BYTES = 2**30
MAX_CHARACTERS = 2**22  # of a rendered prompt

_MAX_REPLY_BYTES = 6 * MAX_CHARACTERS + 2**12  # JSON writes a character in up to six


class _Child:
    """The process that renders, started when first needed and again after it was killed."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._endless: dict[str, dict[str, Any]] = {}  # templates that are not tried again

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply; `{"error": ...}` also if there is none."""
        if self._pid != os.getpid():  # A fork must not talk on its parent's pipe.
            self.__init__()  # type: ignore[misc]
        with self._lock:
            if request["template"] in self._endless:
                return self._endless[request["template"]]
            if self._worker is None:
                worker = Worker(TIME_LIMIT_S, MEMORY_BYTES, _MAX_REPLY_BYTES)
                worker.load(pickle.dumps(answer))
                self._worker = worker
            reply = self._worker.ask(json.dumps(request).encode(), TIME_LIMIT_S)
            if reply is not None:
                return json.loads(reply)
            timed_out, self._worker = self._worker.timed_out, None
        limit = (
            f"takes more than {TIME_LIMIT_S:g} s" if timed_out else "ends the process it runs in"
        )
        return self._endless.setdefault(request["template"], {"error": limit})

    def close(self) -> None:
        if self._worker is not None and self._pid == os.getpid():
            self._worker.kill()


_child = _Child()
atexit.register(_child.close)


def render_template(
    template: str, messages: Sequence[Mapping[str, Any]], now: datetime.datetime, **values: Any
) -> str:
    """The text that a chat template makes of messages.

    Args:
      template: Jinja source.
      messages: {"role", "content"} each.
      now: what `strftime_now` tells.
      **values: further variables: special tokens, `add_generation_prompt`, switches.

    Raises:
      UserError: the template raises, or needs more than `TIME_LIMIT_S`, `MEMORY_BYTES` or
        `MAX_CHARACTERS`.
    """
    request = {
        "template": template,
        "now": now.isoformat(),
        "values": {"tools": None, "documents": None, "messages": list(messages), **values},
    }
    reply = _child.ask(request)
    if "error" in reply:
        raise UserError(
            f"the chat template {reply['error']}; correct it in the tokenizer's files "
            "(chat_template.jinja or tokenizer_config.json)"
        )
    return reply["text"]


def answer(message: bytes) -> bytes:
    """In the child: renders one request, both as JSON."""
    try:
        return json.dumps({"text": _render(**json.loads(message))}).encode()
    except MemoryError:
        fault = f"needs more than {MEMORY_BYTES >> 30} GiB of memory"
    except RecursionError:
        fault = "calls itself without end"
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        fault = f"cannot render a prompt ({said[:300]})"
    return json.dumps({"error": fault}).encode()


def _render(template: str, now: str, values: dict[str, Any]) -> str:
    compiled = _compiled(template)
    compiled.environment.globals["strftime_now"] = datetime.datetime.fromisoformat(now).strftime
    pieces, length = [], 0
    for piece in compiled.generate(**values):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise ValueError(f"it writes more than {MAX_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template in the environment that `transformers` gives chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant says; here it is text like any other."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

        def said(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": Namespace}
    return environment.from_string(template)
