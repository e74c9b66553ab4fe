"""Call a server with the package openai, and write what it returned or raised as JSON.

The request on standard input: {"url", "key", "asynchronous", "retries", "calls": [{"to", "fields", "extra", "take"}]}.
extra: fields that the package has no names for. take: leave a stream after that many chunks.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import openai


def methods(client: Any) -> dict[str, Any]:
    """Return the methods by name."""
    return {"completions": client.completions.create, "chat": client.chat.completions.create,
            "embeddings": client.embeddings.create, "models": client.models.list, "model": client.models.retrieve}


def failure(error: openai.OpenAIError) -> dict[str, Any]:
    """Return an error of the package as JSON."""
    facts = {name: getattr(error, name, None) for name in ("message", "code", "param", "type", "status_code")}
    response = getattr(error, "response", None)
    return {"error": type(error).__name__, **facts,
            "retry_after": None if response is None else response.headers.get("retry-after")}


def call_one(client: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Do a call and return its result."""
    started, chunks = time.monotonic(), []
    extra = {"extra_body": call["extra"]} if "extra" in call else {}
    try:
        answer = methods(client)[call["to"]](**call["fields"], **extra)
        if not call["fields"].get("stream"):
            return {"value": answer.model_dump(), "seconds": time.monotonic() - started}
        for chunk in answer:
            chunks.append(chunk.model_dump())
            if len(chunks) == call.get("take"):
                answer.close()
                break
        return {"chunks": chunks}
    except openai.OpenAIError as error:
        return {**failure(error), "chunks": chunks}


async def call_one_async(client: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Do a call with the asynchronous client."""
    started, chunks = time.monotonic(), []
    extra = {"extra_body": call["extra"]} if "extra" in call else {}
    try:
        answer = await methods(client)[call["to"]](**call["fields"], **extra)
        if not call["fields"].get("stream"):
            return {"value": answer.model_dump(), "seconds": time.monotonic() - started}
        async for chunk in answer:
            chunks.append(chunk.model_dump())
            if len(chunks) == call.get("take"):
                await answer.close()
                break
        return {"chunks": chunks}
    except openai.OpenAIError as error:
        return {**failure(error), "chunks": chunks}


async def all_at_once(options: dict[str, Any], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do all calls at the same time."""
    async with openai.AsyncOpenAI(**options) as client:
        return await asyncio.gather(*(call_one_async(client, call) for call in calls))


def main() -> None:
    """Read the request, and write the results in the order of the calls."""
    request = json.load(sys.stdin)
    options = {"base_url": f"{request['url']}/v1", "api_key": request["key"], "timeout": 60,
               "max_retries": request["retries"]}
    if request["asynchronous"]:
        results = asyncio.run(all_at_once(options, request["calls"]))
    else:
        with openai.OpenAI(**options) as client:
            results = [call_one(client, call) for call in request["calls"]]
    print(json.dumps({"results": results}))


main()
