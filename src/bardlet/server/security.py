"""Checks of a request before anything else reads it: its host, its query, its origin, and who sends it.

Every check answers alike for every path, so that a client without the key does not learn which paths or models exist.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from bardlet.server.errors import INVALID, Refusal
from bardlet.server.settings import ServerSettings

Scope = MutableMapping[str, Any]

TOKEN_SECONDS = 600
"""Seconds for which the printed link is valid."""
SESSION_SECONDS = 86_400
"""Seconds without a request after which a browser is signed out."""
MOST_SESSIONS = 64

SECRET_NAMES = {"apikey", "key", "token", "accesstoken", "authtoken", "authorization", "bearer", "bardletapikey"}
"""Names of query parameters in which other tools send a key, without - and _."""
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every response, unless the response has its own value."""


def header(scope: Scope, name: bytes) -> str | None:
    """Return a header's value; None if it is missing. Refuse a request that has it twice."""
    values = [value for key, value in scope["headers"] if key.lower() == name]
    if len(values) > 1:
        raise Refusal(400, f"The header {name.decode()} occurs twice; send it once.")
    return values[0].decode("latin-1") if values else None


def split_host(host: str) -> tuple[str, str]:
    """Return the name and the port of a Host header; ("", "") if it is not valid."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port
    except ValueError:
        return "", ""
    if parts.netloc != host or "@" in host or not parts.hostname:
        return "", ""
    return parts.hostname.rstrip("."), "" if port is None else str(port)


def is_loopback(host: str) -> bool:
    """Return True for a name or an address of this machine that no other machine can reach."""
    if host.lower() == "localhost":
        return True
    address = as_address(host)
    return address is not None and address.is_loopback


def as_address(host: str) -> Any:
    """Return an IP address as an object; None for a name."""
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


class Hosts:
    """The names under which this server answers. A page of another site that points its own name here is refused."""

    def __init__(self, settings: ServerSettings) -> None:
        self.public = not is_loopback(settings.host)
        self.behind_proxy = frozenset(split_host(name)[0] or name.lower() for name in settings.allow_host)
        self.names = {"localhost", settings.host.lower().strip("[]"), *self.behind_proxy}
        if self.public:
            self.names.add(socket.gethostname().lower())

    def check(self, scope: Scope) -> str:
        """Return the Host header of a request. Refuse a name that is not ours."""
        host = header(scope, b"host")
        name = split_host(host or "")[0].lower()
        address = as_address(name) if name else None
        # an address cannot be pointed elsewhere, as a name can (DNS rebinding)
        known = name in self.names or (address is not None and (self.public or address.is_loopback))
        if not name or not known:
            raise Refusal(421, "This server does not answer under the name in the Host header. If it is the name of a "
                               "reverse proxy, start the server with --allow-host NAME.", code="unknown_host")
        return str(host).lower()


class Origins:
    """The pages whose scripts may send requests: ours, and those of --allow-origin."""

    def __init__(self, settings: ServerSettings, hosts: Hosts) -> None:
        self.hosts, self.allowed = hosts, frozenset(origin.rstrip("/").lower() for origin in settings.allow_origin)

    def is_ours(self, origin: str, scope: Scope, host: str) -> bool:
        """Return True for the origin of our own pages."""
        scheme, _, place = origin.lower().partition("://")
        name, port = split_host(place)
        own_name, own_port = split_host(host)
        schemes = ("http", "https") if own_name in self.hosts.behind_proxy else (scope.get("scheme", "http"),)
        default = {"http": "80", "https": "443"}.get(scheme, "")
        return scheme in schemes and bool(name) and (name, port or default) == (own_name, own_port or default)

    def check(self, scope: Scope, host: str) -> str | None:
        """Return the origin if it is of --allow-origin, None for ours or none. Refuse another one."""
        origin = header(scope, b"origin")
        if origin is None or self.is_ours(origin, scope, host):
            return None
        if origin.lower() in self.allowed:
            return origin
        raise Refusal(403, "Scripts of other sites may not use this server. For an application that you trust, start "
                           "the server with --allow-origin ORIGIN.", code="foreign_origin")


def check_query(scope: Scope, sessions: Sessions) -> None:
    """Refuse a key in the address, where histories and logs keep it."""
    query = scope.get("query_string", b"").decode("latin-1").replace(";", "&")
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name.lower().replace("-", "").replace("_", "").strip() in SECRET_NAMES or sessions.is_key(value):
            raise Refusal(400, "A key does not belong in an address, where logs keep it. Send it as the header "
                               "`Authorization: Bearer KEY`, and make a new key if this one was real.",
                          code="key_in_query")


def unauthorized() -> Refusal:
    """Return the refusal of a request without the key; it is the same for every path."""
    refusal = Refusal(401, "The key is missing or wrong. Send it as the header `Authorization: Bearer KEY`; "
                           "`bardlet serve` prints it.", type="authentication_error", code="invalid_api_key")
    refusal.headers["www-authenticate"] = "Bearer"
    return refusal


def digest(secret: str) -> bytes:
    """Return the hash under which a secret is stored."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


@dataclass
class Sessions:
    """The key, one-time tokens of printed links, and the browsers that are signed in. All are in memory only."""

    key: str
    clock: Callable[[], float] = time.monotonic
    tokens: dict[bytes, float] = field(default_factory=dict)
    sessions: dict[bytes, float] = field(default_factory=dict)

    def new_token(self) -> str:
        """Return a token for a link: it is valid once, for TOKEN_SECONDS."""
        token = secrets.token_urlsafe(32)
        self.tokens[digest(token)] = self.clock() + TOKEN_SECONDS
        return token

    def redeem(self, token: str) -> str | None:
        """Return a new session for a link's token; None if the token is not valid any more."""
        expires = self.tokens.pop(digest(token), None)
        return self._new_session() if expires is not None and self.clock() < expires else None

    def sign_in(self, key: str) -> str | None:
        """Return a new session for the key; None if it is wrong."""
        return self._new_session() if self.is_key(key) else None

    def is_key(self, key: str) -> bool:
        """Return True for the key, in a time that does not depend on the first wrong character."""
        return hmac.compare_digest(digest(key), digest(self.key))

    def is_valid(self, session: str) -> bool:
        """Return True for a session that has not expired, and prolong it."""
        name, now = digest(session), self.clock()
        if self.sessions.get(name, now) <= now:
            self.sessions.pop(name, None)
            return False
        self.sessions[name] = now + SESSION_SECONDS
        return True

    def end(self, session: str) -> None:
        """Sign a browser out."""
        self.sessions.pop(digest(session), None)

    def _new_session(self) -> str:
        while len(self.sessions) >= MOST_SESSIONS:
            del self.sessions[min(self.sessions, key=lambda name: self.sessions[name])]
        session = secrets.token_urlsafe(32)
        self.sessions[digest(session)] = self.clock() + SESSION_SECONDS
        return session


def cookie_name(scope: Scope) -> str:
    """Return the name of the session cookie: with the port, since browsers send a cookie to every port of a host."""
    return f"bardlet_{split_host(header(scope, b'host') or '')[1] or 'session'}"


def cookie(scope: Scope) -> str | None:
    """Return the session of a request's cookie."""
    wanted = cookie_name(scope)
    for key, value in scope["headers"]:
        if key.lower() == b"cookie":
            for part in value.decode("latin-1").split(";"):
                name, _, session = part.strip().partition("=")
                if name == wanted:
                    return str(session)
    return None


def set_cookie(scope: Scope, session: str | None) -> str:
    """Return the Set-Cookie header that signs a browser in, or out for None."""
    end = "; Max-Age=0" if session is None else ""
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    return f"{cookie_name(scope)}={session or ''}; Path=/; HttpOnly; SameSite=Strict{secure}{end}"


def check_key(scope: Scope, sessions: Sessions, foreign: bool) -> None:
    """Refuse a request without the key or a session.

    A session counts only in requests of our own pages: browsers send its cookie with those of other ports, too.

    foreign: a page of --allow-origin sends the request.
    """
    authorization = header(scope, b"authorization")
    if authorization is not None:
        kind, _, key = authorization.partition(" ")
        if kind.lower() != "bearer" or not sessions.is_key(key.strip()):
            raise unauthorized()
        return
    site = header(scope, b"sec-fetch-site")
    session = cookie(scope)
    if foreign or session is None or site not in (None, "same-origin", "none") or not sessions.is_valid(session):
        raise unauthorized()
    if scope["method"] not in SAFE and header(scope, b"origin") is None and site != "same-origin":
        raise Refusal(403, "A browser that is signed in may change something only from a page of this server. "
                           "Programs send the key as the header `Authorization: Bearer KEY`.", type=INVALID,
                      code="foreign_origin")
