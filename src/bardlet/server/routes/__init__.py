"""The routes of the API."""

from __future__ import annotations

from fastapi import APIRouter

from bardlet.server.routes import alignment, generation, inside, models, studio, tokens

ROUTERS: tuple[APIRouter, ...] = (models.router, generation.router, tokens.router, studio.router, inside.router,
                                  alignment.router)
