"""A budget per API key: who may ask, and what each one has left.

A keys file lists them (YAML or JSON):

    keys:
      - name: alice
        key: sha256:9f86d0...        # or the key itself
        budget: {dollars: $5, tokens: 2M, flops: 1e18}
      - name: prometheus
        key: sha256:60303a...
        metrics: true                # may read what all keys spent

Each has an account on the ledger and a purse on what it has left, so that requests at the same time
never overspend together and a restart forgets nothing. Keys are kept as digests alone.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from thrifty.core import typed
from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import BudgetExceeded, Ledger
from thrifty.core.purse import Hold, Purse
from thrifty.core.quantities import FORMATS, Dollars, Flops, Tokens
from thrifty.run_folder import locked
from thrifty.serving.errors import Refused

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})\Z")
_LEAST_CHARACTERS = 16


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """Of everything that a key ever spends; left out: no limit."""

    dollars: Dollars | None = None
    tokens: Tokens | None = None
    flops: Flops | None = None

    def budget(self) -> Budget:
        return Budget(dollars=self.dollars, tokens=self.tokens, flops=self.flops)


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who may ask."""

    name: str
    key: str = field(repr=False)
    """``sha256:`` and its digest, or the key itself; empty: anybody."""
    budget: KeyLimits = field(default_factory=KeyLimits)
    metrics: bool = False
    """Whether it may read what all keys spent."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.@ -]{1,64}", self.name):
            raise ValueError("a name is 1 to 64 letters, digits, spaces, and any of . _ @ -")
        if not self.key or _DIGEST.match(self.key):
            return
        if self.key.startswith("sha256:"):
            raise ValueError(f"the key of {self.name} is no sha256: 64 hexadecimal digits are")
        if len(self.key) < _LEAST_CHARACTERS:
            raise ValueError(
                f"the key of {self.name} has fewer than {_LEAST_CHARACTERS} characters, and could "
                "be guessed\nhint: openssl rand -hex 16"
            )

    @property
    def digest(self) -> bytes:
        stored = _DIGEST.match(self.key)
        return bytes.fromhex(stored[1]) if stored else _digest(self.key)


@dataclass(frozen=True, kw_only=True)
class _KeysFile:
    keys: tuple[Client, ...]


def read_keys(path: Path) -> tuple[Client, ...]:
    """Raises ValueError naming everything that is wrong, and no key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}\nhint: --keys names a YAML or JSON file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):  # what they say may quote a key
        raise ValueError(f"{path} is no YAML and no JSON\nhint: see docs/serving.md") from None
    problems: list[str] = []
    file = typed.read_fields(_KeysFile, values, "", problems)
    if file is not None:
        problems += _twice(file.keys)
    if problems:
        lines = [
            re.sub(r"(\.key must be text), not .*", r"\1; put it in quotes", p) for p in problems
        ]
        raise ValueError(f"{path}: " + "\n".join(lines) + "\nhint: see docs/serving.md")
    return file.keys


def _twice(clients: Sequence[Client]) -> list[str]:
    names = [client.name for client in clients]
    digests = [client.digest for client in clients]
    twice = [
        f"the name {name} stands twice" for name in sorted(set(names)) if names.count(name) > 1
    ]
    twice += [
        f"{client.name} has a key that another one has"
        for place, client in enumerate(clients)
        if client.digest in digests[:place]
    ]
    twice += [f"{client.name} has no key" for client in clients if not client.key]
    return twice if names else ["there are no keys in it"]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Account:
    """What a client has spent and may spend."""

    def __init__(self, client: Client, purse: Purse | None, ledger: Ledger) -> None:
        self.client = client
        self._purse = purse
        self._account = account_name(client)
        self._charged = ledger.spent(account=self._account)
        self._ledger = ledger

    def hold(self, upper: Cost) -> Hold:
        """Set ``upper`` aside. Raises Refused: 402 where what is left is too little, 429 where
        others hold it now."""
        if self._purse is None:
            raise self._refused(f"the budget of {self.client.name} is spent", upper, waits=False)
        try:
            return self._purse.hold(upper)
        except BudgetExceeded as error:
            left = self._purse.left[error.resource]
            needs, spent = upper.of(error.resource), self._purse.spent.of(error.resource)
            known = needs is not None and spent is not None
            waits = known and needs <= left - spent  # type: ignore[operator]
            raise self._refused(str(error).partition("\n")[0], upper, waits=waits) from None

    def left(self) -> dict[str, float]:
        """Of each limited resource, neither spent nor held."""
        limited = self.client.budget.budget().limited
        if self._purse is None:
            return dict.fromkeys(limited, 0.0)
        return {name: max(self._purse.remaining(name) or 0.0, 0.0) for name in limited}

    def spent(self) -> Cost:
        """Ever; what is held is not."""
        return self._charged + (self._purse.spent if self._purse else Cost())

    def renew(self) -> None:
        """Have the ledger show what was spent so far."""
        if self._purse is not None and self._purse.spent != Cost():
            try:
                self._purse.renew()
            except BudgetExceeded:  # more was used than there was: nothing is left to go on with
                return
            self._charged = self._ledger.spent(account=self._account)

    def close(self) -> None:
        if self._purse is not None:
            self._purse.close()

    def _refused(self, message: str, upper: Cost, *, waits: bool) -> Refused:
        left = self.left()
        limited = [name for name in left if upper.of(name)]
        shown = ", ".join(FORMATS[name](left[name]) for name in limited) or "nothing"
        if waits:
            message = f"{message}: requests that are under way hold the rest"
            hint, headers = "try again in a moment", {"retry-after": "1"}
        else:
            message = f"{message}. {shown} of the budget of {self.client.name} is left"
            hint, headers = "lower max_tokens, or have the budget raised", {}
        return Refused(
            429 if waits else 402,
            message,
            hint,
            code="budget_held" if waits else "insufficient_quota",
            headers=headers,
            details={"left": left},
        )


def account_name(client: Client) -> str:
    return f"key {client.name}"


class KeyBudgets:
    """Everybody's accounts."""

    def __init__(self, accounts: Sequence[Account]) -> None:
        self.accounts = list(accounts)

    @property
    def open_to_all(self) -> bool:
        return any(not account.client.key for account in self.accounts)

    def find(self, presented: str | None) -> Account:
        """Whose key was presented. All are compared, each in constant time. Raises Refused."""
        if self.open_to_all:
            return self.accounts[0]
        digest, found = _digest(presented or ""), None
        for account in self.accounts:
            if hmac.compare_digest(account.client.digest, digest):
                found = account
        if found is None or not presented:
            raise Refused(
                401,
                "no key, or one that is not known" if presented else "a key is missing",
                "send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found

    def renew(self) -> Iterator[None]:
        """Bring the ledger up to date, an account at a time."""
        for account in self.accounts:
            account.renew()
            yield


@contextmanager
def key_budgets(clients: Sequence[Client], ledger: Path, policy: str) -> Iterator[KeyBudgets]:
    """The accounts on the ledger at ``ledger``, made where there is none; what a process that died
    held counts as spent. Raises ValueError where another process spends from it."""
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(locked(ledger.parent))
        if not ledger.exists():
            # Seconds cost nothing here: who is paid is paid by the token.
            Ledger.create(ledger, Budget(), Rates(dollars_per_second=0.0)).close()
        journal = stack.enter_context(Ledger(ledger))
        journal.recover()
        accounts = []
        for client in clients:
            limit = client.budget.budget()
            stage = stack.enter_context(
                journal.stage(
                    "serve", policy, account=account_name(client), limit=limit, reopen=True
                )
            )
            purse: Purse | None
            try:
                purse = Purse(stage, "serve", timed=False)
            except BudgetExceeded:  # spent to the last, or lowered since
                purse = None
            accounts.append(Account(client, purse, journal))
        try:
            yield KeyBudgets(accounts)
        finally:
            for account in accounts:
                account.close()
