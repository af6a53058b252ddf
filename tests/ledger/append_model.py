"""An exhaustive model of the append protocol: writers, readers and faults in every order, for small programs.

The model visits every state that can be reached. It contains the server (an operation log that a failover truncates
to what a majority has), the steps of `store.appender`, the retries of `store.command_handler`, and a reader that voids
gaps (`store.gap_filler`). Methods for steps name the functions of the code.

A command is written as the streams to which it appends: `s` appends one event to the stream s, `st` one event to each
of s and t in one transaction. `+` after it means that its caller decides again after a version conflict, and looks for
the outcome after an unknown one, as `handle_command_with_retries`; without it, the command ends. `>` after it means
that another event of its stream follows it in the same insert, as in `append_with_next`. A writer executes writes one
after the other. A write is a group of commands with one event each, which go into one insert, or one
command.

Checked in every state:
    - The versions of a stream are 1, 2, 3 … in the order of the positions.
    - A command is in the log at most once, and completely.
    - The next event of a command (`>`) is in the log at most once, and only with the command's event.
    - The events of a successful command stay. A rejected command is not in the log, and another event has its version.
    - What readers have read stays, and no event appears before it.
From every state, steps without further faults lead to a state in which all live writers have finished and the reader
has read everything.

Each `Defect` removes one rule of the protocol, and the model finds what it breaks. Rules that only save time or
positions have no defect: that unused positions are voided, and that the counter is raised.

Where several commands to the server are one step here, what may happen between them is covered by another order:
    - A majority read may be stale. Steps that decide on it do so at once, and write later.
    - A reservation that is too low is voided, and the counter raised, in one step. A crash between them leaves a gap,
      as after any reservation.
    - The reader voids one position at a time. A void never replaces an event.
    - An append that was already resolved may be inserted again with its group. Its version is taken, as for a late
      request.
    - An insert with next events stops at the first duplicate key, and the rest is sent again. Its appends are
      independent, so it makes no difference when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

VOID_STREAM = "void"
_NEXT_EVENT_ID_LENGTH = 5


class Violation(Exception):
    """A state breaks a guarantee. The message names it."""


class Defect(Enum):
    """A rule of the protocol that is left out."""

    NONE = "none"
    POSITION_BELOW_BASIS = "a position may be smaller than one that the decision was based on"
    NO_UNIQUE_VERSION = "there is no unique index on (stream, version)"
    DECIDE_ON_LOCAL_READ = "decisions read events that a majority may not have"
    ACKNOWLEDGE_EARLY = "an insert succeeds before a majority has it"
    RESOLVE_ON_LOCAL_READ = "duplicate keys are resolved with events that a majority may not have"
    DUPLICATE_IS_CONFLICT = "each duplicate key is a version conflict"
    IGNORE_EVENT_ID = "an event at the version is a conflict, also the own one"
    GROUP_FAILS_TOGETHER = "a conflict of one command rejects its group"
    TRANSACTION_NOT_ATOMIC = "a failure in a transaction keeps its other events"
    RETRY_WITHOUT_LOOK = (
        "after a duplicate key, the events are written at new positions without a look at stored events"
    )
    NEXT_WITHOUT_FIRST = "the server inserts the next event although it could not insert the one before"
    SKIP_GAPS = "readers continue after a gap without voiding it"
    READ_LOCALLY = "readers read events that a majority may not have"
    DECIDE_AGAIN_BLINDLY = "after an unknown outcome, the command is decided again without a look"
    FORGET_UNKNOWN_OUTCOME = "after an unknown outcome and a conflict, the command is decided again without a look"


class Document(NamedTuple):
    """An event. `event_id` is (writer, write, command, try), empty for a void, and one longer for a next event."""

    position: int
    stream: str
    version: int
    event_id: tuple[int, ...]

    @property
    def is_next(self) -> bool:
        return len(self.event_id) == _NEXT_EVENT_ID_LENGTH


Operation = int | tuple[Document, ...]
"""An entry of the operation log: the counter's new value, or the documents of a transaction or single insert."""


class Command(NamedTuple):
    """The state of a command.

    `status` is `deciding`, `writing`, or final: `succeeded`, `rejected`, `unknown`. `base` has the version of each of
    its streams when it was decided, and `based_on` is the largest position that was read. `may_have_effect`: an earlier
    try ended with an unknown outcome. `has_next`: its next event was not tried yet.
    """

    status: str = "deciding"
    base: tuple[int, ...] = ()
    based_on: int = 0
    tries: int = 0
    may_have_effect: bool = False
    positions: tuple[int, ...] = ()
    has_next: bool = False


class Writer(NamedTuple):
    """A process.

    `phase` is its next step: `decide`, `reserve`, `insert`, `wait`, `resolve`, `void`, or the state `ended`, `crashed`.
    `failed` has the commands of the last insert with a duplicate key, `needed` the number of pending operations that a
    majority must get before the insert is acknowledged. `unused` has the positions to void, and `resolved` the commands
    afterwards. `results` has the commands of earlier writes.
    """

    phase: str
    write: int
    commands: tuple[Command, ...]
    results: tuple[tuple[Command, ...], ...] = ()
    failed: tuple[int, ...] = ()
    needed: int = 0
    unused: tuple[int, ...] = ()
    resolved: tuple[Command, ...] = ()


class Faults(NamedTuple):
    """How many faults may still happen.

    Failovers, crashes of a writer, responses that are lost (or appends that time out), and requests that the server
    executes only after the writer has given up on them.
    """

    failovers: int = 0
    crashes: int = 0
    lost_responses: int = 0
    late_requests: int = 0


class State(NamedTuple):
    """The state of the system.

    `durable` and `counter` are what a majority has: the documents, sorted, and the value of the counter. `pending` has
    the later entries of the primary's operation log, which a failover may remove. `late` has the inserts that the
    server may still execute.
    """

    durable: tuple[Document, ...]
    counter: int
    pending: tuple[Operation, ...]
    writers: tuple[Writer, ...]
    late: tuple[tuple[tuple[Document, ...], ...], ...]
    read: tuple[Document, ...]
    faults: Faults

    @property
    def stored(self) -> list[Document]:
        """All documents that the primary has."""
        return [*self.durable, *documents_of(self.pending)]

    @property
    def current_counter(self) -> int:
        return next((operation for operation in reversed(self.pending) if isinstance(operation, int)), self.counter)


Step = tuple[str, State, bool]
"""Its name, the next state, and whether it is a fault."""


def documents_of(operations: Sequence[Operation]) -> list[Document]:
    return [document for operation in operations if not isinstance(operation, int) for document in operation]


@dataclass
class AppendModel:
    """The model with its programs: for each writer its writes, each a text of commands separated by spaces."""

    programs: tuple[tuple[str, ...], ...]
    faults: Faults
    defect: Defect = Defect.NONE
    max_position: int = 6
    """Larger positions are not reserved. They only repeat what happens at smaller ones."""
    max_states: int = 20_000_000
    trace: list[str] = field(default_factory=list)
    """After a violation: the shortest sequence of steps to it."""

    # The search -----------------------------------------------------------------------------------------------------

    def check(self) -> int:
        """Visit every state, breadth first. Return their number.

        Raises:
            Violation: A state breaks a guarantee. `trace` leads to it.
        """
        first = self._start()
        numbers = {first: 0}
        parents: list[tuple[int, str]] = [(0, "")]
        predecessors: list[list[int]] = [[]]
        goals: list[int] = []
        waiting = deque([first])
        while waiting:
            state = waiting.popleft()
            number = numbers[state]
            try:
                self._check_state(state)
                if self._is_goal(state):
                    goals.append(number)
                for name, following, is_fault in self._steps(state):
                    reached = self._read(self._acknowledge_all(_replicate_counter(following)))
                    reached_number = numbers.setdefault(reached, len(parents))
                    if reached_number == len(parents):
                        parents.append((number, name))
                        predecessors.append([])
                        waiting.append(reached)
                        if reached_number > self.max_states:
                            raise Violation(f"more than {self.max_states} states")
                    if not is_fault:
                        predecessors[reached_number].append(number)
            except Violation:
                self._describe(number, parents)
                raise
        self._check_progress(numbers, predecessors, goals, parents)
        return len(parents)

    def _check_progress(
        self,
        numbers: dict[State, int],
        predecessors: list[list[int]],
        goals: list[int],
        parents: list[tuple[int, str]],
    ) -> None:
        reached = set(goals)
        while goals:
            for number in predecessors[goals.pop()]:
                if number not in reached:
                    reached.add(number)
                    goals.append(number)
        stuck = next(
            (
                it
                for state, it in numbers.items()
                if it not in reached and self._count_needed(state) <= self.max_position
            ),
            None,
        )
        if stuck is not None:
            self._describe(stuck, parents)
            raise Violation("from a state, no step leads to the end")

    def _count_needed(self, state: State) -> int:
        """Return a position up to which all commands can finish if nothing else goes wrong. The model may have fewer.

        A command that is retried may have to reserve twice: its version may be taken by now.
        """
        needed = max([state.current_counter, *(document.position for document in state.stored)])
        for writer in state.writers:  # a void at a reserved position raises the head
            needed = max([needed, *writer.unused, *(it for command in writer.commands for it in command.positions)])
        for index, writer in enumerate(state.writers):
            if writer.phase in ("ended", "crashed"):
                continue
            for write in range(writer.write, len(self.programs[index])):
                for number in range(len(self.programs[index][write].split())):
                    if write > writer.write or writer.commands[number].status in ("deciding", "writing"):
                        reservations = 2 if self._is_retried(index, write, number) else 1
                        needed += reservations * len(self._list_streams(index, write, number))
                        needed += self._has_next(index, write, number)
        return needed

    def _describe(self, number: int, parents: list[tuple[int, str]]) -> None:
        self.trace = []
        while number:
            number, name = parents[number]
            self.trace.insert(0, name)

    def _start(self) -> State:
        writers = tuple(Writer("decide", 0, self._new_commands(writer, 0)) for writer in range(len(self.programs)))
        return State((), 0, (), writers, (), (), self.faults)

    def _new_commands(self, writer: int, write: int) -> tuple[Command, ...]:
        return tuple(Command() for _ in self.programs[writer][write].split())

    def _list_streams(self, writer: int, write: int, command: int) -> str:
        return self.programs[writer][write].split()[command].rstrip("+>")

    def _is_retried(self, writer: int, write: int, command: int) -> bool:
        return self.programs[writer][write].split()[command].endswith("+")

    def _has_next(self, writer: int, write: int, command: int) -> bool:
        return self.programs[writer][write].split()[command].endswith(">")

    # Guarantees -----------------------------------------------------------------------------------------------------

    def _check_state(self, state: State) -> None:
        stored = sorted(state.stored)
        versions: dict[str, int] = {}
        for document in stored:
            if document.stream != VOID_STREAM:
                versions[document.stream] = versions.get(document.stream, 0) + 1
                if document.version != versions[document.stream]:
                    raise Violation(f"{document} has not the version that follows in its stream")
        if state.read and list(state.read) != [it for it in stored if it.position <= state.read[-1].position]:
            raise Violation(f"readers have read {state.read}, which is not the log up to there")
        for index, writer in enumerate(state.writers):
            for write, commands in enumerate([*writer.results, writer.commands]):
                for number, command in enumerate(commands):
                    self._check_command((index, write, number), command, stored)

    def _check_command(self, key: tuple[int, int, int], command: Command, stored: list[Document]) -> None:
        streams = self._list_streams(*key)
        found = [document for document in stored if document.event_id[:3] == key and not document.is_next]
        followers = [document for document in stored if document.event_id[:3] == key and document.is_next]
        if followers and (len(followers) > 1 or [it.event_id for it in found] != [followers[0].event_id[:-1]]):
            raise Violation(f"command {key} has the next events {followers} and the events {found}")
        if found and sorted(document.stream for document in found) != sorted(streams):
            raise Violation(f"command {key} has the events {found}")
        if command.status == "succeeded" and not found:
            raise Violation(f"command {key} succeeded, and has no event")
        if command.status == "rejected":
            if found:
                raise Violation(f"command {key} was rejected, and has an event")
            wanted = {(stream, version + 1) for stream, version in zip(streams, command.base, strict=True)}
            if not any((document.stream, document.version) in wanted for document in stored):
                raise Violation(f"command {key} was rejected, and no event has its version")

    def _is_goal(self, state: State) -> bool:
        is_finished = all(writer.phase in ("ended", "crashed") for writer in state.writers)
        return is_finished and not state.pending and len(state.read) == len(state.durable)

    @property
    def _phases(self) -> dict[str, Callable[[State, int, Writer], Iterator[Step]]]:
        return {
            "decide": self._decide,
            "reserve": self._reserve,
            "insert": self._insert,
            "wait": self._wait,
            "resolve": self._resolve,
            "void": self._void_unused,
        }

    # The server -----------------------------------------------------------------------------------------------------

    def _execute_insert(self, state: State, inserts: Sequence[tuple[Document, ...]]) -> tuple[State, tuple[int, ...]]:
        """Execute an insert. Each item is a document, or those of a transaction. Next events are separate items.

        Returns the state and the indexes of the items with a duplicate key.
        """
        if self.defect is Defect.TRANSACTION_NOT_ATOMIC and any(len(documents) > 1 for documents in inserts):
            executed, failed = self._execute_insert(
                state, [(document,) for documents in inserts for document in documents]
            )
            return executed, (0,) if failed else ()
        stored = state.stored
        positions = {document.position for document in stored}
        versions = {(document.stream, document.version) for document in stored}
        pending, indexes = state.pending, list[int]()
        for index, documents in enumerate(inserts):
            if documents[0].is_next and index - 1 in indexes and self.defect is not Defect.NEXT_WITHOUT_FIRST:
                continue
            has_duplicate_version = any((document.stream, document.version) in versions for document in documents)
            if any(document.position in positions for document in documents) or (
                has_duplicate_version and self.defect is not Defect.NO_UNIQUE_VERSION
            ):
                indexes.append(index)
                continue
            pending = (*pending, documents)
            positions |= {document.position for document in documents}
            versions |= {(document.stream, document.version) for document in documents}
        return state._replace(pending=pending), tuple(indexes)

    def _void(self, state: State, positions: Iterable[int]) -> State:
        voids = [(Document(position, VOID_STREAM, position, ()),) for position in positions]
        return self._execute_insert(state, voids)[0]

    def _raise_counter(self, state: State) -> State:
        head = max((document.position for document in state.durable), default=0)
        return state._replace(pending=(*state.pending, head)) if head > state.current_counter else state

    def _visible(self, state: State, defect: Defect) -> Sequence[Document]:
        """Return what a majority read returns. With the defect, it is a local read."""
        return state.stored if self.defect is defect else state.durable

    # Steps ----------------------------------------------------------------------------------------------------------

    def _steps(self, state: State) -> Iterator[Step]:
        yield from self._server_steps(state)
        yield from self._reader_steps(state)
        for index, writer in enumerate(state.writers):
            if writer.phase in self._phases:
                yield from self._phases[writer.phase](state, index, writer)
            if writer.phase not in ("ended", "crashed"):
                yield from self._fault_steps(state, index, writer)

    def _server_steps(self, state: State) -> Iterator[Step]:
        if state.pending:
            yield "replicate", _replicate(state), False
        faults = state.faults
        if faults.failovers:
            # Who waits for a majority gets an error, also if its documents survive. It repeats the insert.
            writers = tuple(
                writer._replace(phase="insert", failed=(), needed=0) if writer.phase == "wait" else writer
                for writer in state.writers
            )
            fewer = state._replace(writers=writers, faults=faults._replace(failovers=faults.failovers - 1))
            for length in range(len(state.pending) + 1):
                lost = len(state.pending) - length
                yield f"fail over, {lost} lost", fewer._replace(pending=state.pending[:length]), True
        for request in set(state.late):
            remaining = list(state.late)
            remaining.remove(request)
            executed, _ = self._execute_insert(state._replace(late=tuple(remaining)), request)
            yield "execute late request", executed, False

    def _reader_steps(self, state: State) -> Iterator[Step]:
        following = state.read[-1].position + 1 if state.read else 1
        later = [document for document in state.durable if document.position > following]
        if later and self.defect is Defect.SKIP_GAPS:
            yield "skip gap", state._replace(read=(*state.read, later[0])), False
        elif later and not any(document.position == following for document in state.stored):
            yield "void gap", self._void(state, [following]), False

    def _read(self, state: State) -> State:
        """Read all events that follow without a gap. When that happens makes no difference, because events stay."""
        read = state.read
        following = read[-1].position + 1 if read else 1
        for document in sorted(self._visible(state, Defect.READ_LOCALLY)):
            if document.position == following:
                read = (*read, document)
                following += 1
        return state._replace(read=read)

    def _acknowledge_all(self, state: State) -> State:
        """Tell writers that their insert is durable. If no failover can happen, it is not visible when."""
        if state.faults.failovers:
            return state
        for index, writer in enumerate(state.writers):
            if writer.phase == "wait" and self._is_acknowledged(writer):
                state = self._acknowledge(state, index, writer)
        return state

    def _is_acknowledged(self, writer: Writer) -> bool:
        return not writer.needed or self.defect is Defect.ACKNOWLEDGE_EARLY

    def _acknowledge(self, state: State, index: int, writer: Writer) -> State:
        """Commands without a duplicate key have succeeded."""
        commands = tuple(
            Command("succeeded") if command.status == "writing" and number not in writer.failed else command
            for number, command in enumerate(writer.commands)
        )
        acknowledged = writer._replace(commands=commands, needed=0)
        if writer.failed:
            return _put(state, index, acknowledged._replace(phase="resolve"))
        return self._continue(state, index, acknowledged)

    def _fault_steps(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        faults = state.faults
        if faults.crashes:
            fewer = state._replace(faults=faults._replace(crashes=faults.crashes - 1))
            yield f"{index} crashes", _put(fewer, index, writer._replace(phase="crashed")), True
        if faults.lost_responses and writer.phase != "decide":
            fewer = state._replace(faults=faults._replace(lost_responses=faults.lost_responses - 1))
            commands = tuple(
                self._time_out(index, writer, number) if command.status == "writing" else command
                for number, command in enumerate(writer.commands)
            )
            timed_out = writer._replace(commands=commands, unused=(), resolved=())
            yield f"{index} times out", self._continue(fewer, index, timed_out), True

    def _time_out(self, index: int, writer: Writer, number: int) -> Command:
        if self._is_retried(index, writer.write, number):
            return Command("deciding", tries=writer.commands[number].tries, may_have_effect=True)
        return Command("unknown")

    def _decide(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        """`handle_command`: decide a command. After an unknown outcome, `_find_outcome` looks for it before."""
        number = next(number for number, command in enumerate(writer.commands) if command.status == "deciding")
        command = writer.commands[number]
        visible = self._visible(state, Defect.DECIDE_ON_LOCAL_READ)
        if command.may_have_effect and self.defect is not Defect.DECIDE_AGAIN_BLINDLY:
            key = (index, writer.write, number)
            if any(document.event_id[:3] == key for document in visible):
                yield f"{index} finds outcome", self._set(state, index, writer, number, Command("succeeded")), False
                return
        streams = self._list_streams(index, writer.write, number)
        events = [[document for document in visible if document.stream == stream] for stream in streams]
        base = tuple(max((document.version for document in its), default=0) for its in events)
        based_on = max((document.position for its in events for document in its), default=0)
        has_next = self._has_next(index, writer.write, number)
        decided = Command("writing", base, based_on, command.tries + 1, command.may_have_effect, has_next=has_next)
        yield f"{index} decides", self._set(state, index, writer, number, decided), False

    def _reserve(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        """`_assign_positions`"""
        commands = [command for command in writer.commands if command.status == "writing"]
        counts = [len(command.base) + command.has_next for command in commands]
        first = state.current_counter + 1
        last = state.current_counter + sum(counts)
        if last > self.max_position:
            return
        reserved = state._replace(pending=(*state.pending, last))
        if state.faults.lost_responses:
            fewer = state.faults._replace(lost_responses=state.faults.lost_responses - 1)
            yield f"{index} loses reserved positions", reserved._replace(faults=fewer), True
        based_on = max(command.based_on for command in commands)
        if first <= based_on and self.defect is not Defect.POSITION_BELOW_BASIS:
            voided = self._void(reserved, range(first, last + 1))
            yield f"{index} reserves old positions", self._raise_counter(voided), False
            return
        assigned = []
        for command in writer.commands:
            if command.status == "writing":
                count = len(command.base) + command.has_next
                assigned.append(command._replace(positions=tuple(range(first, first + count))))
                first += count
            else:
                assigned.append(command)
        yield (
            f"{index} reserves positions",
            _put(reserved, index, writer._replace(phase="insert", commands=tuple(assigned))),
            False,
        )

    def _build_inserts(self, index: int, writer: Writer) -> tuple[list[int], tuple[tuple[Document, ...], ...]]:
        numbers: list[int] = []
        inserts = []
        for number, command in enumerate(writer.commands):
            if command.status != "writing":
                continue
            numbers.append(number)
            streams = self._list_streams(index, writer.write, number)
            event_id = (index, writer.write, number, command.tries)
            inserts.append(
                tuple(
                    Document(position, stream, version + 1, event_id)
                    for position, stream, version in zip(command.positions, streams, command.base, strict=False)
                )
            )
            if command.has_next:
                numbers.append(number)
                inserts.append((Document(command.positions[-1], streams, command.base[0] + 2, (*event_id, 1)),))
        return numbers, tuple(inserts)

    def _execute_own_insert(self, state: State, index: int, writer: Writer) -> State:
        numbers, inserts = self._build_inserts(index, writer)
        executed, all_failed = self._execute_insert(state, inserts)
        failed = tuple(numbers[it] for it in all_failed if not inserts[it][0].is_next)
        needed = len(executed.pending) if len(failed) < len(set(numbers)) else 0
        waiting = _drop_next(writer)._replace(phase="wait", failed=failed, needed=needed)
        return _put(executed, index, waiting)

    def _insert(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        """`_insert`"""
        yield f"{index} inserts", self._execute_own_insert(state, index, writer), False
        faults = state.faults
        if faults.lost_responses:
            fewer = faults._replace(lost_responses=faults.lost_responses - 1)
            inserted = self._execute_own_insert(state, index, writer)._replace(faults=fewer)
            yield f"{index} inserts, response lost", _put(inserted, index, _drop_next(writer)), True
        if faults.late_requests:
            _, inserts = self._build_inserts(index, writer)
            fewer = faults._replace(late_requests=faults.late_requests - 1)
            late = tuple(sorted((*state.late, inserts)))
            sent = _put(state._replace(late=late, faults=fewer), index, _drop_next(writer))
            yield f"{index} sends a request that is late", sent, True

    def _wait(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        if self._is_acknowledged(writer):
            yield f"{index} hears of the majority", self._acknowledge(state, index, writer), False

    def _resolve(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        """`_resolve_duplicates`, up to its read of the stored events"""
        visible = self._visible(state, Defect.RESOLVE_ON_LOCAL_READ)
        yield f"{index} resolves duplicates", self._resolve_with(visible, state, index, writer), False
        if state.faults.lost_responses:
            fewer = state._replace(faults=state.faults._replace(lost_responses=state.faults.lost_responses - 1))
            yield f"{index} reads stale events", self._resolve_with([], fewer, index, writer), True

    def _resolve_with(self, visible: Sequence[Document], state: State, index: int, writer: Writer) -> State:
        stored = {(document.stream, document.version): document for document in visible}
        if self.defect is Defect.RETRY_WITHOUT_LOOK:
            stored = {}
        commands = list(writer.commands)
        unused: set[int] = set()
        numbers, inserts = self._build_inserts(index, writer)
        for number, documents in zip(numbers, inserts, strict=True):
            found = [it for document in documents if (it := stored.get((document.stream, document.version)))]
            is_own = any(it.event_id == documents[0].event_id for it in found)
            unused |= {document.position for document in documents} - {it.position for it in found if is_own}
            if is_own and self.defect is not Defect.IGNORE_EVENT_ID:
                commands[number] = Command("succeeded")
            elif found or self.defect is Defect.DUPLICATE_IS_CONFLICT:
                commands[number] = self._reject(index, writer, number)
                if self.defect is Defect.GROUP_FAILS_TOGETHER:
                    commands = [self._reject(index, writer, other) for other in range(len(commands))]
            else:
                commands[number] = commands[number]._replace(positions=())
        following = writer._replace(phase="void", unused=tuple(sorted(unused)), resolved=tuple(commands), failed=())
        return _put(state, index, following)

    def _void_unused(self, state: State, index: int, writer: Writer) -> Iterator[Step]:
        """The rest of `_resolve_duplicates`. If it fails, the appender inserts the same documents again."""
        voided = self._void(state, writer.unused)
        if state.faults.lost_responses:
            fewer = voided._replace(faults=state.faults._replace(lost_responses=state.faults.lost_responses - 1))
            again = writer._replace(phase="insert", unused=(), resolved=())
            yield f"{index} voids, response lost", _put(fewer, index, again), True
        if any(command.status == "writing" for command in writer.resolved):
            voided = self._raise_counter(voided)
        resolved = writer._replace(commands=writer.resolved, unused=(), resolved=())
        yield f"{index} voids unused positions", self._continue(voided, index, resolved), False

    def _reject(self, index: int, writer: Writer, number: int) -> Command:
        command = writer.commands[number]
        if not self._is_retried(index, writer.write, number):
            return Command("rejected", command.base)
        may_have_effect = command.may_have_effect and self.defect is not Defect.FORGET_UNKNOWN_OUTCOME
        return Command("deciding", tries=command.tries, may_have_effect=may_have_effect)

    def _continue(self, state: State, index: int, writer: Writer) -> State:
        """Set the next phase: the rest of this write, the commands to decide again, the next write, or the end."""
        statuses = {command.status for command in writer.commands}
        writer = writer._replace(failed=(), needed=0)
        if "writing" in statuses:
            return _put(state, index, writer._replace(phase="reserve"))
        if "deciding" in statuses:
            return _put(state, index, writer._replace(phase="decide"))
        following = writer.write + 1
        if following == len(self.programs[index]):
            return _put(state, index, writer._replace(phase="ended"))
        results = (*writer.results, writer.commands)
        return _put(state, index, Writer("decide", following, self._new_commands(index, following), results))

    def _set(self, state: State, index: int, writer: Writer, number: int, command: Command) -> State:
        """Replace a command that was being decided. The write begins when all its commands are decided."""
        commands = (*writer.commands[:number], command, *writer.commands[number + 1 :])
        writer = writer._replace(commands=commands)
        if any(command.status == "deciding" for command in commands):
            return _put(state, index, writer)
        return self._continue(state, index, writer)


def _drop_next(writer: Writer) -> Writer:
    """Next events are tried once. Readers void a position that stays empty."""
    commands = tuple(
        command._replace(has_next=False, positions=command.positions[:-1]) if command.has_next else command
        for command in writer.commands
    )
    return writer._replace(commands=commands)


def _put(state: State, index: int, writer: Writer) -> State:
    return state._replace(writers=(*state.writers[:index], writer, *state.writers[index + 1 :]))


def _replicate(state: State) -> State:
    """Give the first pending operation to a majority."""
    first, *pending = state.pending
    writers = tuple(writer._replace(needed=writer.needed - 1) if writer.needed else writer for writer in state.writers)
    following = state._replace(pending=tuple(pending), writers=writers)
    if isinstance(first, int):
        return following._replace(counter=first)
    return following._replace(durable=tuple(sorted((*state.durable, *first))))


def _replicate_counter(state: State) -> State:
    """Give the counter to a majority at once if no failover can happen. The difference is not visible then."""
    if state.faults.failovers or not any(isinstance(operation, int) for operation in state.pending):
        return state
    writers = tuple(
        writer._replace(needed=sum(not isinstance(operation, int) for operation in state.pending[: writer.needed]))
        for writer in state.writers
    )
    pending = tuple(operation for operation in state.pending if not isinstance(operation, int))
    return state._replace(counter=state.current_counter, pending=pending, writers=writers)
