"""A real browser for tests of pages: Chromium, driven over a pipe without a package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
                None)
"""Chromium on the path, or None."""

KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), "End": (35, ""), "Home": (36, ""),
        "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}
"""Codes of keys that type no character, and the text of Enter."""

MEASURE = """(() => {
  const wide = [], shown = [], covered = [];
  const inside = (e) => e.closest('.scroll, .sample');
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    const blank = e.tagName === 'CODE';  // deep indentation may overflow; the text itself is in spans
    if (box.width > 1 && box.right > innerWidth + 0.5 && !inside(e) && !blank && !e.closest('.skip'))
      wide.push(e.outerHTML);
  }
  // the boxes of the text itself: no two may overlap
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest('.skip, style')) continue;
    if (!parent.checkVisibility() || getComputedStyle(parent.closest('thead') ?? parent).clipPath !== 'none') continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const lines = parent.closest('pre, code') ? [...range.getClientRects()] : [range.getBoundingClientRect()];
    for (const r of lines) if (r.width > 1 && r.height > 1)
      shown.push({node, text: node.data.trim().slice(0, 40), l: r.left, r: r.right, t: r.top, b: r.bottom});
  }
  for (const img of document.images) {
    const r = img.getBoundingClientRect();
    shown.push({node: img, text: 'image ' + img.alt.slice(0, 30), l: r.left, r: r.right, t: r.top, b: r.bottom});
  }
  shown.sort((a, b) => a.t - b.t);
  for (let i = 0; i < shown.length; i++)
    for (let j = i + 1; j < shown.length && shown[j].t < shown[i].b; j++) {
      const a = shown[i], b = shown[j];
      const across = Math.min(a.r, b.r) - Math.max(a.l, b.l), down = Math.min(a.b, b.b) - Math.max(a.t, b.t);
      const inline = a.node.parentElement.closest('p, td, th, a, li, h2, figcaption, caption')
        === b.node.parentElement.closest('p, td, th, a, li, h2, figcaption, caption');
      if (a.node !== b.node && !inline && across > 1.5 && down > 3) covered.push(a.text + ' | ' + b.text);
    }
  const images = [...document.images].filter((i) => !i.complete || !i.naturalWidth).length;
  return {inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.map((e) => e.slice(0, 120)),
          texts: shown.length, covered: covered.slice(0, 10), broken: images, height: document.body.scrollHeight};
})()"""

CONTRAST = """(() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const weak = new Set();
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const pairs = [getComputedStyle(e).color, getComputedStyle(e.closest('.line') ?? e, '::before').color];
    for (const color of pairs) {
      const [a, b] = [luminance(numbers(color)), luminance(background(e))].sort((x, y) => y - x);
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < 4.5) weak.add(`${e.tagName}.${e.className} ${color} on ${background(e)}: ${ratio.toFixed(2)}`);
    }
  }
  return [...weak];
})()"""


class Browser:
    """Headless Chromium, driven by the DevTools protocol: JSON messages separated by zero bytes.

    loopback: it reaches 127.0.0.1 and no other address; otherwise it has no network.
    """

    def __init__(self, profile: Path, loopback: bool = False) -> None:
        to_read, self.to = os.pipe()
        self.out, from_write = os.pipe()
        script = 'exec "$0" "$@" 3<&$IN 4>&$OUT'.replace("$IN", str(to_read)).replace("$OUT", str(from_write))
        self.process = subprocess.Popen(
            ["bash", "-c", script, str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
             *(("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",) if loopback else ()),
             f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        self.left, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Network.emulateNetworkConditions", offline=not loopback, latency=0, downloadThroughput=-1,
             uploadThroughput=-1)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; keep the events that arrive before it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            data = os.read(self.out, 1 << 20)
            assert data, "Chromium exited"
            self.left += data
        line, _, self.left = self.left.partition(b"\0")
        return json.loads(line)

    def wait_for(self, event: str) -> None:
        """Wait until an event arrives."""
        while not any(e.get("method") == event for e in self.events):
            self.events.append(self._next())

    def open(self, page: Path | str, width: int, scheme: str, scale: float = 1) -> None:
        """Open a file or an address at a viewport width and in a color scheme. scale: pixels of the screen for each."""
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=scale, mobile=False)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self.wait_for("Page.loadEventFired")

    def value(self, script: str) -> Any:
        """Evaluate a script and return its value; None if it has none."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        answer = self("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key and let it go: a character, or the name of a key in KEYS. modifiers: 2 is Ctrl, 8 is Shift."""
        code, text = KEYS[key] if key in KEYS else (ord(key.upper()) if key.isalnum() else 0, key)
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        typed = {"text": text} if text and not modifiers & 2 else {}
        self("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **common, **typed)
        self("Input.dispatchKeyEvent", type="keyUp", **common)

    def close(self) -> None:
        """Close the browser."""
        self.session = ""
        self("Browser.close")
        self.process.wait(20)
        os.close(self.to)
        os.close(self.out)
