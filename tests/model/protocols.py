"""The real protocols, as the search sees them: where each can stand, and where an outcome brings it.

A generator cannot be copied. So a :class:`Node` keeps the outcomes that led to it, and the first time that another
outcome is tried there, a new generator is led the same way. What it comes to is the same node as before, if its frames
say so: the same places in the code and the same values in all variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

from atproto_session import ClientAuthMethod, Freshness, Session, TokenSet
from atproto_session import _records as records
from atproto_session import _steps as steps
from atproto_session._terms import Terms, Times, Wanted
from atproto_session.errors import (
    CancelledError,
    LockTimeoutError,
    OAuthResponseError,
    SessionError,
    StoreError,
    TokenRefreshError,
    TransportError,
)
from atproto_session.keys import generate_jwk
from atproto_session.refresh import Refresh
from atproto_session.session import Attempt, Rest

from ..core import DID
from .liveness import live_after

_KEYS = generate_jwk(), generate_jwk()
_METHOD = ClientAuthMethod("none")
#: Nobody rests, and tokens that cannot be stored are tried to be stored twice.
TIMES = Times(first_rest=0.0, longest_rest=0.0, store_for=0.1, longest=1e9)
#: What a clock says before the end of every window, and after.
EARLY, LATE = 0.0, 1e12


class Record:
    """A session in the store or in somebody's hands: of which log-in it is, which of its tokens it has, and the attempt
    in it. There is one object for each."""

    _all: ClassVar[dict[object, Record]] = {}

    def __init__(self, grant: int, token: int, attempt: Attempt | None) -> None:
        self.grant, self.token, self.attempt = grant, token, attempt
        self.session = Session(_KEYS[grant], _METHOD, _tokens(grant, token), attempt)

    @classmethod
    def get(cls, grant: int, token: int, attempt: Attempt | None = None) -> Record:
        key = grant, token, attempt
        return cls._all.get(key) or cls._all.setdefault(key, cls(*key))

    @classmethod
    def of(cls, session: Session) -> Record:
        return cls.get(*_numbers(session.token_set), session.attempt)


@cache
def _tokens(grant: int, token: int) -> TokenSet:
    name = f"{grant}.{token}"
    return TokenSet(f"https://{grant}.example.com", DID, "https://pds.example.com", "atproto", name, name)


def _numbers(tokens: TokenSet) -> tuple[int, int]:
    grant, _, token = tokens.access_token.partition(".")
    return int(grant), int(token)


@cache
def request_to(issuer: str) -> steps.Request:
    """What a refresh that was prepared for this server is sent with. It is only carried about."""
    return lambda session: session


class Fault(Enum):
    """An error that the world throws into a protocol."""

    NOT_WRITTEN = StoreError("the store takes no more writes")
    NOT_READ = StoreError("the store cannot be read")
    LOCKED = LockTimeoutError("somebody else has the lock")
    CANCELLED = CancelledError("cancelled")
    NOT_PREPARED = TransportError("the directory does not answer")
    NEVER_SENT = TransportError("refused")
    LOST = TransportError("reset", sent=True)
    BUSY = OAuthResponseError("come later", status=429)
    GATEWAY = OAuthResponseError("bad gateway", status=502)
    REFUSED = OAuthResponseError("replayed", status=400, error="invalid_grant")


#: The answers of a server: tokens, and tokens that must not be used.
TOKENS, ODD = "tokens", "odd tokens"


#: What a :class:`Report` brings.
REPORTED = "reported"


class Report(NamedTuple):
    """A protocol is over. ``error`` is what it ended with; what it should not have is in plain words."""

    error: str | None


@dataclass(eq=False)
class Node:
    """Where a protocol stands.

    :ivar step: what it does next; ``None`` at its end.
    :ivar functions: the names of those that it stands in.
    :ivar session: what it works on.
    :ivar attempts: the ids that it remembers.
    :ivar faults: what was thrown into it.
    """

    history: tuple[Any, ...] = ()
    step: steps.Step | None = None
    functions: tuple[str, ...] = ()
    session: Record | None = None
    attempts: frozenset[str] = frozenset()
    faults: tuple[Fault, ...] = ()
    next: dict[object, Node] = field(default_factory=dict)
    protocol: steps.Protocol[None] | None = None  # a generator that stands here, for the first outcome that is tried

    @property
    def is_begun(self) -> bool:
        return self.step is None or bool(self.history)

    @property
    def is_announcing(self) -> bool:
        return "_announce" in self.functions

    def is_at_work(self, attempt: Attempt) -> bool:
        """Whether it has signed ``attempt``, and has not released its lock since."""
        earlier = None if self.session is None else self.session.attempt
        is_signed = attempt.id in self.attempts and (earlier is None or earlier.id != attempt.id)
        return is_signed and not {"_announce", "_spend"}.isdisjoint(self.functions)

    def asks_in(self, function: str) -> bool:
        return self.functions[-1] == function


END = Node()


@dataclass(frozen=True)
class Kind:
    """:ivar begin: makes the generator.
    :ivar local: the steps that show nothing of other workers here, and what they bring.
    """

    name: str
    begin: Callable[[], steps.Protocol[None]]
    local: dict[type[steps.Step], object]
    _nodes: dict[object, Node] = field(default_factory=dict)

    def start(self) -> Node:
        protocol = self.begin()
        return self._node_at(protocol, self._pass_local(protocol, next(protocol)), ())

    def nodes(self) -> Iterable[Node]:
        """Those that were found so far."""
        return self._nodes.values()

    def after_all(self, history: tuple[object, ...]) -> Node:
        """Where these outcomes bring it, one after the other."""
        *earlier, outcome = history
        protocol, step = self._lead(tuple(earlier))
        return self._go_on(protocol, step, tuple(earlier), outcome)

    def after(self, node: Node, outcome: object) -> Node:
        """Where ``outcome`` brings it."""
        following = node.next.get(outcome)
        if following is None:
            protocol, node.protocol = node.protocol or self._lead(node.history)[0], None
            following = node.next[outcome] = self._go_on(protocol, node.step, node.history, outcome)
        return following

    def _lead(self, history: tuple[object, ...]) -> tuple[steps.Protocol[None], steps.Step]:
        protocol = self.begin()
        step = self._pass_local(protocol, next(protocol))
        for outcome in history:
            step = self._pass_local(protocol, self._tell(protocol, step, outcome))
        return protocol, step

    def _go_on(self, protocol: steps.Protocol[None], step: Any, history: tuple[object, ...], outcome: object) -> Node:
        try:
            following = self._tell(protocol, step, outcome)
        except StopIteration:
            return END
        return self._node_at(protocol, self._pass_local(protocol, following), (*history, outcome))

    def _node_at(self, protocol: steps.Protocol[None], step: steps.Step, history: tuple[object, ...]) -> Node:
        # The stack of a frame does not show. All that it can hold here is an error that is being handled: one of these.
        last = history[len(history) - history[::-1].index(REPORTED) :] if REPORTED in history else history
        faults = tuple(outcome for outcome in last if isinstance(outcome, Fault))
        # Nor does it show how many calls are over.
        shape = history.count(REPORTED), faults, type(step), frozen(tuple(step)), *_frames_of(protocol)
        node = self._nodes.get(shape)
        if node is None:
            functions = _functions_of(protocol)
            refresh = _refresh_in(protocol)
            session = None if refresh is None else Record.of(refresh.session)
            attempts = frozenset(value.id for value in _flat(shape) if isinstance(value, Attempt))
            node = self._nodes[shape] = Node(history, step, functions, session, attempts, faults, protocol=protocol)
        return node

    def _tell(self, protocol: steps.Protocol[None], step: steps.Step, outcome: object) -> steps.Step:
        if isinstance(outcome, Fault):
            return protocol.throw(_copy_of(outcome.value))
        if isinstance(outcome, Record):
            outcome = outcome.session
        elif isinstance(step, steps.Sign):
            by, _, _ = str(outcome).partition(".")
            outcome = Attempt(str(outcome), by, EARLY, EARLY + step.window, lock=step.lock)
        elif outcome in (TOKENS, ODD):
            spent = cast(Refresh, _refresh_in(protocol)).session
            grant, token = _numbers(spent.token_set)
            tokens = _tokens(grant, token + 1)
            outcome = replace(spent, token_set=replace(tokens, token_type="Bearer") if outcome == ODD else tokens)
        return protocol.send(outcome)

    def _pass_local(self, protocol: steps.Protocol[None], step: steps.Step) -> steps.Step:
        """The next step that has to do with others."""
        while True:
            outcome: object = None
            if isinstance(step, steps.Now):
                function = _functions_of(protocol)[-1]
                if function in ("_outwait", "_check_window"):
                    return step
                outcome = EARLY
                refresh = _refresh_in(protocol)
                if function == "_go_on" and refresh is not None and refresh.record.attempt is not None:
                    outcome = refresh.record.attempt.answer_by - TIMES.window + 1.0
            elif isinstance(step, steps.Prepare):
                outcome = request_to(step.session.token_set.iss)
            elif type(step) in self.local:
                outcome = self.local[type(step)]
            elif not isinstance(step, steps.Tell | steps.HandOut | steps.Wait):
                return step
            step = protocol.send(outcome)


def _copy_of(error: Exception) -> Exception:
    reduced: Any = error.__reduce__()
    return reduced[0](*reduced[1])  # type: ignore[no-any-return]


def _generators(protocol: Any) -> Iterator[Any]:
    while protocol is not None:
        yield protocol
        protocol = protocol.gi_yieldfrom


def _functions_of(protocol: steps.Protocol[None]) -> tuple[str, ...]:
    return tuple(generator.gi_code.co_name for generator in _generators(protocol))


def _refresh_in(protocol: steps.Protocol[None]) -> Refresh | None:
    selves = (generator.gi_frame.f_locals.get("self") for generator in _generators(protocol))
    return next((self for self in selves if isinstance(self, Refresh)), None)


def _frames_of(protocol: steps.Protocol[None]) -> Iterator[object]:
    for generator in _generators(protocol):
        frame = generator.gi_frame
        # How long somebody has waited decides nothing where time is not counted.
        names = live_after(generator.gi_code)[frame.f_lasti] - {"waited"}
        shown = ((name, frozen(value)) for name, value in frame.f_locals.items() if name in names)
        yield generator.gi_code, frame.f_lasti, *shown
    if (refresh := _refresh_in(protocol)) is not None:
        yield frozen(refresh)


def frozen(value: object) -> object:
    """A value that can be compared and hashed, in the place of ``value``."""
    match value:
        case Session():
            return Record.of(value)
        case TokenSet():
            return _numbers(value)
        case Wanted():
            return frozen(value.seen)
        case Refresh():
            return frozen(value.session), frozen(value.record), value.lock, frozen(value.wanted)
        case Exception():
            return type(value), str(value)
        case Rest():
            return value.failures
        case list() | tuple():
            return tuple(map(frozen, value))
    return value


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, Record):
        yield value.attempt
    else:
        yield value


# Who takes part


def worker(refresh: type[Refresh], terms: Terms, freshness: Freshness | None, calls: int) -> steps.Protocol[None]:
    """Asks for a session that was refreshed since; with ``freshness``, for one that is good."""
    for _ in range(calls):
        try:
            error = None
            seen = records.found(DID, (yield steps.Read()))
            wanted = Wanted(seen, freshness or Freshness(), "auto" if freshness else True)
            if freshness is None or not wanted.is_met_by(seen):
                brought = yield from refresh(DID, wanted, terms).run()
                # What a log-in has brought meanwhile is the answer, even if it has to be refreshed soon.
                is_right = wanted.is_met_by(brought) or not brought.is_same_grant(seen)
                error = None if is_right else "a session that it does not want"
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        yield steps.Unlock()
        yield Report(error)  # type: ignore[misc]  # a step of the search alone


def owner(name: str) -> steps.Protocol[None]:
    """Logs out, logs in, or uses tokens that its server refuses."""
    error = None
    try:
        if name == "log_in":
            yield from records.log_in(DID, Record.get(1, 0).session)
        elif name == "log_out":
            yield from records.log_out(DID, SessionError("signed out"), None, revoke=True)
        elif (session := (yield steps.Read())) is not None:
            yield from records.end(DID, session, TokenRefreshError("refused"))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    yield steps.Unlock()
    yield Report(error)  # type: ignore[misc]
