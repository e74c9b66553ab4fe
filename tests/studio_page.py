"""The studio in a browser, for tests: wait for what a script says, and click what people click."""

from __future__ import annotations

import json
import time
from typing import Any

from browser import Browser

TEXT = "The bards of a village sang about rivers and kings, while small birds sat on old gates. " * 60
HANGS = 300
"""Seconds after which something counts as hanging: no machine is that slow."""


class Page:
    """A browser that is signed in."""

    def __init__(self, browser: Browser, link: str) -> None:
        self.browser = browser
        browser.open(link, 1280, "light")
        self.until("document.getElementById('tabs') && !document.getElementById('tabs').hidden")

    def value(self, script: str) -> Any:
        """Return the value of an expression."""
        return self.browser.value(f"(() => {{ const tab = globalThis.studio?.tabs ?? {{}}; return {script}; }})()")

    def do(self, script: str) -> None:
        """Run statements."""
        self.browser.value(f"(() => {{ {script}; return true; }})()")

    def until(self, script: str) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + HANGS
        while not (value := self.value(script)):
            assert time.monotonic() < end, (script, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def go(self, name: str) -> None:
        """Choose a tab by its button."""
        self.do(f"document.getElementById('tab-{name}').click()")
        self.until(f"tab.{name} && !document.getElementById('panel-{name}').hidden")

    def click(self, text: str, inside: str = "main") -> None:
        """Click the button with a text, as soon as it is there."""
        found = (f"[...document.querySelectorAll('{inside} button')].find((b) => b.textContent === {json.dumps(text)} "
                 "&& b.checkVisibility() && !b.disabled)")
        self.until(f"Boolean({found})")
        self.do(f"{found}.click()")

    def errors(self) -> list[Any]:
        """Return what the browser complained about."""
        return [event["params"] for event in self.browser.events if event.get("method") == "Runtime.exceptionThrown"
                or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")]
