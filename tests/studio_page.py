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

    def until(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + HANGS
        while not self.value(f"Boolean({script})"):
            assert time.monotonic() < end, (script, self.value("document.body.innerText.slice(0, 1000)"))
            time.sleep(0.05)

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

    def errors(self, refusals: bool = True) -> list[Any]:
        """Return what the browser complained about. refusals: answers of 400 and above, too."""
        def is_error(event: dict[str, Any]) -> bool:
            entry = event["params"].get("entry") or {}
            return event["method"] == "Runtime.exceptionThrown" or (
                event["method"] == "Log.entryAdded" and entry["level"] == "error"
                and (refusals or entry["source"] != "network"))

        return [event["params"] for event in self.browser.events if "method" in event and is_error(event)]
