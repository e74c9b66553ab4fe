"""Hooks of schemathesis: generated requests name served models, are cheap, and fit the models.

The schema cannot know the vocabulary and the context window of a model. A request that fits the schema is changed so
that it fits them too; it must then be accepted. A request that does not fit the schema keeps what makes it invalid.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis

MODELS = json.loads(os.environ["BARDLET_SERVED"])
"""For each path the name of a model; "vocabulary", "channels": of these models."""
SHORT, FEW = 20, 4


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Change a request before it is sent."""
    parameters = case.path_parameters
    if parameters and isinstance(parameters.get("name"), str) and len(parameters["name"]) != 3:
        parameters["name"] = MODELS["/v1/completions"]
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) != 3:  # of 3 characters: a model that is not there
        body["model"] = MODELS.get(case.path, MODELS["/v1/completions"])
    for name, most in (("max_tokens", 12), ("max_completion_tokens", 8)):
        if is_in(body.get(name), 1, 1_000_000):
            body[name] = min(body[name], most)
    if is_in(body.get("n"), 1, 128):
        body["n"] = min(body["n"], FEW)
    if case.meta is not None and case.meta.generation.mode.is_positive:
        fit(body)


def is_in(value: Any, least: int, most: int) -> bool:
    """Return True for an integer from least to most; 1.0 is one."""
    return type(value) in (int, float) and int(value) == value and least <= value <= most


def fit(body: dict[str, Any]) -> None:
    """Change a valid request so that it fits the models."""
    for name in ("prompt", "input", "tokens", "text"):
        if name in body:
            body[name] = fitting(body[name])
    if "messages" in body:
        body["messages"] = body["messages"][:3]  # 3 times 8 characters of at most 4 bytes fit into the window
        for message in body["messages"]:
            if isinstance(message["content"], str):
                message["content"] = message["content"][:8]
            else:
                message["content"] = [{**part, "text": part["text"][:4]} for part in message["content"][:2]]
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(token) % MODELS["vocabulary"]): bias
                              for token, bias in body["logit_bias"].items()}
    if body.get("dimensions") is not None:
        body["dimensions"] = MODELS["channels"]


def fitting(value: Any) -> Any:
    """Return texts and ids as they fit a model."""
    if isinstance(value, int | float):
        return int(value) % MODELS["vocabulary"]
    if isinstance(value, str):
        return value[:SHORT]
    if isinstance(value, list):
        return [fitting(each) for each in value[:SHORT if value and isinstance(value[0], int | float) else FEW]]
    return value


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Write a line about a request that was answered."""
    mode = "negative" if case.meta is not None and case.meta.generation.mode.is_negative else "positive"
    line = json.dumps([f"{case.operation.method.upper()} {case.operation.path}", mode, response.status_code,
                       response.elapsed])
    with open(os.environ["BARDLET_CASES"], "a") as file:  # one write for each line: there are several workers
        file.write(line + "\n")
