"""A request, checked: what is not an observation of the run gets a BadRequest that names what was got, what is allowed and what to do. No HTTP, no Ray.

Symbols: B rows (environments of one client), Do size of an observation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from modip_ray.config import nearest

FIELDS = ("observation", "client", "reset", "mode")
LONGEST_CLIENT = 128
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 60                                                              # characters of a wrong value


class BadRequest(Exception):
    """A request that cannot be answered. status: of HTTP, 4xx; fields of the JSON answer: error (what is wrong), got, allowed, do."""

    def __init__(self, status: int, error: str, got: str, allowed: str, do: str):
        super().__init__(f"{error}: got {got}, allowed {allowed}; {do}")
        self.status, self.answer = status, {"error": error, "got": got, "allowed": allowed, "do": do}


@dataclass(frozen=True)
class Query:
    obs: np.ndarray             # (B, Do) float32, raw
    reset: np.ndarray           # (B,) bool: an episode has just begun
    client: str | None          # whose warm starts; None: plan cold
    mode: str
    single: bool = False        # one observation (Do,) was sent: answer with (c, Da)


@dataclass(frozen=True)
class Limits:
    """What a server takes. modes: the default first."""

    obs_dim: int
    max_rows: int
    modes: tuple[str, ...]

    @property
    def max_bytes(self) -> int:
        """A float32 of JSON takes up to 26 characters with its comma and space."""
        return 8192 + 32 * self.obs_dim * self.max_rows

    @property
    def shapes(self) -> str:
        return f"({self.obs_dim},) or (rows, {self.obs_dim}) with 1 to {self.max_rows} rows"


def from_json(body: bytes, limits: Limits) -> Query:
    """{"observation": [...] or [[...], ...], "client": "name", "reset": true or [true, ...], "mode": "policy"}; all but the first may be left out."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:                        # ValueError: also what is not UTF-8, and numbers of thousands of digits
        raise BadRequest(400, "body", f"no JSON ({shown(str(error) or type(error).__name__)})", "a JSON object",
                         'send {"observation": [...]} with Content-Type: application/json') from error
    if not isinstance(tree, dict):
        refuse("body", kind(tree), "a JSON object", 'send {"observation": [...]}')
    for name in tree:
        if name not in FIELDS:
            refuse("unknown field", f"{shown(name)}{nearest(name, list(FIELDS))}", ", ".join(FIELDS), "leave it out")
    if "observation" not in tree:
        refuse("observation", "none", limits.shapes, "send the numbers that the environment returned")
    rows, single = numbers(tree["observation"], limits)
    obs = finite(rows)
    return Query(obs, resets(tree.get("reset", False), len(obs)), client_of(tree.get("client")), mode_of(tree.get("mode"), limits), single)


def from_raw(body: bytes, asked: Mapping[str, str], limits: Limits) -> Query:
    """B x Do float32, little-endian, row by row; the other fields out of the address: ?client=name&reset=1&mode=mpc (reset=010: a digit a row)."""
    for name in asked:
        if name not in FIELDS[1:]:
            refuse("unknown field", f"{shown(name)}{nearest(name, list(FIELDS[1:]))}", ", ".join(FIELDS[1:]), "leave it out of the address")
    size = 4 * limits.obs_dim
    if not body or len(body) % size:
        refuse("observation", f"{len(body)} bytes", f"a multiple of {size}: rows of {limits.obs_dim} float32", "send obs.astype('<f4').tobytes()")
    count(len(body) // size, limits)
    obs = finite(np.frombuffer(body, "<f4").reshape(-1, limits.obs_dim))
    digits = asked.get("reset", "0")
    if set(digits) - set("01") or not digits:
        refuse("reset", shown(digits), "0, 1, or such a digit for each row", "send 1 where an episode has just begun")
    flags = [d == "1" for d in digits]
    return Query(obs, resets(flags if len(flags) > 1 else flags[0], len(obs)), client_of(asked.get("client")), mode_of(asked.get("mode"), limits))


def numbers(value: Any, limits: Limits) -> tuple[np.ndarray, bool]:
    """Nested lists as (B, Do) float64, and whether it was one row."""
    do = "send the numbers that the environment returned"
    if not isinstance(value, list) or not value:
        refuse("observation", kind(value), f"a list of numbers: {limits.shapes}", do)
    single = not isinstance(value[0], list)
    rows = [value] if single else value
    count(len(rows), limits)
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            refuse("observation", f"{kind(row)} as row {i}", limits.shapes, do)
        if wrong := set(map(type, row)) - {int, float}:
            column = next(j for j, x in enumerate(row) if type(x) in wrong)
            refuse("observation", f"{kind(row[column])} in row {i}, column {column}", "numbers", do)
        if len(row) != limits.obs_dim:
            refuse("observation", f"{len(row)} numbers in row {i}", limits.shapes, do)
    try:
        return np.array(rows, np.float64), single
    except OverflowError:                                                # an integer of hundreds of digits
        refuse("observation", "an integer beyond all floats", f"finite numbers within +-{LARGEST:.3g}", do)


def count(rows: int, limits: Limits) -> None:
    if rows > limits.max_rows:
        refuse("observation", f"{rows} rows", limits.shapes, "send them in several requests (or serve with --set planner.max_rows=...)", 413)


def finite(rows: np.ndarray) -> np.ndarray:
    """(B, Do) as float32; refused where a number is not finite in it."""
    wrong = ~(np.abs(rows) <= LARGEST)
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        refuse("observation", f"{rows[i, j]} in row {i}, column {j}", f"finite numbers within +-{LARGEST:.3g}", "look at what the environment returned")
    return rows.astype(np.float32)


def resets(value: Any, rows: int) -> np.ndarray:
    """true or false for all rows, or one for each -> (B,) bool."""
    if isinstance(value, bool):
        return np.full(rows, value)
    if not isinstance(value, list) or any(type(x) is not bool for x in value):
        refuse("reset", kind(value), "true, false, or a list with one for each row", "send true where an episode has just begun")
    if len(value) != rows:
        refuse("reset", f"{len(value)} of them for {rows} rows", "one for all rows, or one for each", "send as many as observations")
    return np.array(value)


def client_of(value: Any) -> str | None:
    if value is None or isinstance(value, str) and 0 < len(value) <= LONGEST_CLIENT:
        return value
    got = f"{len(value)} characters" if isinstance(value, str) else kind(value)
    refuse("client", got, f"a text of 1 to {LONGEST_CLIENT} characters", "send a name of your own, the same in each request of an episode, or none")


def mode_of(value: Any, limits: Limits) -> str:
    if value is None:
        return limits.modes[0]
    if value not in limits.modes:
        refuse("mode", shown(value), " or ".join(limits.modes), "leave it out, or start another server with --mode")
    return value


def refuse(error: str, got: str, allowed: str, do: str, status: int = 422) -> NoReturn:
    raise BadRequest(status, error, got, allowed, do)


def kind(value: Any) -> str:
    """What JSON calls it, with the beginning of a short one."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return f"the text {shown(value)}"
        case int() | float():
            return f"the number {shown(value)}"
        case list():
            return f"a list of {len(value)}"
    return "an object"


def shown(value: object) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError:                                                   # an integer of thousands of digits
        text = type(value).__name__
    text = "".join(c if c.isprintable() else "?" for c in text[:SHOWN + 1])
    return repr(text if len(text) <= SHOWN else text[:SHOWN - 3] + "...") if isinstance(value, str) else text[:SHOWN]
