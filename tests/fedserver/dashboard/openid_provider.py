"""A small OpenID provider for tests: discovery, keys, a page that always agrees, RSA-signed tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT, SECRET = "dashboard", "the client's secret"
Change = Callable[[dict[str, Any]], dict[str, Any]]


class Issuer:
    """``change`` and ``sign`` make its tokens wrong; ``problems``: what a request lacked."""

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "one"})
        self.groups: Any = ["lab", "admins"]
        self.change: Change = lambda claims: claims
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.asked: dict[str, dict[str, str]] = {}
        self.problems: list[str] = []
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path == "/.well-known/openid-configuration":
                    self.reply(issuer.discovery())
                elif parts.path == "/keys":
                    self.reply({"keys": [issuer.key.as_dict(private=False)]})
                else:
                    asked = {k: v[0] for k, v in parse_qs(parts.query).items()}
                    code = f"code-{len(issuer.asked)}"
                    issuer.asked[code] = asked
                    back = urlencode({"code": code, "state": asked["state"]})
                    self.send_response(302)
                    self.send_header("location", f"{asked['redirect_uri']}?{back}")
                    self.end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                form = {k: v[0] for k, v in parse_qs(body).items()}
                self.reply(issuer.token(form, self.headers.get("authorization", "")))

            def reply(self, value: object) -> None:
                text = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def discovery(self) -> dict[str, str]:
        return {
            "issuer": self.address,
            "authorization_endpoint": f"{self.address}/authorise",
            "token_endpoint": f"{self.address}/token",
            "jwks_uri": f"{self.address}/keys",
        }

    def token(self, form: dict[str, str], authorization: str) -> dict[str, str]:
        asked = self.asked[form["code"]]
        challenge = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        expected = {
            "code_challenge": base64.urlsafe_b64encode(challenge).decode().rstrip("="),
            "code_challenge_method": "S256",
            "redirect_uri": form["redirect_uri"],
            "response_type": "code",
            "client_id": CLIENT,
        }
        self.problems += [key for key, value in expected.items() if asked.get(key) != value]
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if authorization != f"Basic {basic}":
            self.problems.append("secret")
        now = int(time.time())
        claims = {
            "iss": self.address, "sub": "u-17", "aud": CLIENT, "exp": now + 300, "iat": now,
            "nonce": asked["nonce"], "preferred_username": "olga", "groups": self.groups,
        }  # fmt: skip
        return {
            "token_type": "Bearer",
            "access_token": "x",
            "id_token": self.sign(self.change(claims)),
        }

    def signed(self, claims: dict[str, Any]) -> str:
        return jwt.encode({"alg": "RS256", "kid": "one"}, claims, self.key)
