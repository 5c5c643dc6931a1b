"""Ray's interface in one process and on a clock of its own, for tests of the engine's logic.

Actors are objects of this process. A call takes the seconds that it passes to `FakeRay.work`; no
time passes for anything else. A call that raises `Killed` kills its actor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


class Killed(BaseException):
    """Raised within an actor: its process dies."""


class RayError(Exception):
    """Base of Ray's errors."""


class RayActorError(RayError):
    """An actor died."""


class RayTaskError(RayError):
    """A call raised an exception."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"ray::Replica\n{type(cause).__name__}: {cause}")
        self.cause = cause

    def as_instanceof_cause(self) -> BaseException:
        return self.cause


@dataclass(eq=False)
class Reference:
    """The result of a call, which is there from a time on."""

    actor: Actor
    at: float
    value: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class Actor:
    """An actor, once there is room for it."""

    make: Callable[[], Any]
    cpus: float
    gpus: float
    node: Node | None = None
    instance: Any = None
    busy: float = 0.0
    alive: bool = True
    why: str = ""
    waiting: list[tuple[Reference, str, tuple[Any, ...]]] = field(default_factory=list)
    calls: list[Reference] = field(default_factory=list)
    ray: Any = None

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.ray.submit(self, name, arguments))


@dataclass(eq=False)
class Node:
    """A node, and what is free of it."""

    cpus: float
    gpus: float = 0.0
    alive: bool = True
    total: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.total = {name: n for name, n in (("CPU", self.cpus), ("GPU", self.gpus)) if n}


class FakeRay(ModuleType):
    """What the engine uses of Ray.

    Parameters
    ----------
    cluster
        CPUs of each node, or a pair: CPUs and GPUs.
    """

    def __init__(self, *cluster: Any) -> None:
        super().__init__("ray")
        given = (node if isinstance(node, tuple) else (node,) for node in cluster)
        self.cluster = [Node(*node) for node in given]
        self.exceptions = SimpleNamespace(
            RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError
        )
        self.now = 0.0
        self.joined: list[Any] = []
        self.actors: list[Actor] = []
        self._current: Actor | None = None

    # ---- for tests ---------------------------------------------------------------------------

    def work(self, seconds: float) -> None:
        """Let time pass in the actor that calls it."""
        assert self._current is not None
        self._current.busy += seconds

    def remove_node(self, node: Node) -> None:
        """Take a node away, with its actors and their unfinished calls."""
        node.alive = False
        for actor in self.actors:
            if actor.node is node and actor.alive:
                self._die(actor, self.now, "its node left")

    # ---- Ray's own ---------------------------------------------------------------------------

    def is_initialized(self) -> bool:
        return bool(self.joined)

    def init(self, address: str, **options: Any) -> None:
        self.joined.append(address)

    def shutdown(self) -> None:
        self.joined.clear()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": node.alive, "Resources": node.total} for node in self.cluster]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": sum(node.cpus for node in self.cluster if node.alive)}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, cls: type) -> Any:
        def make(options: dict[str, Any], arguments: tuple[Any, ...]) -> Actor:
            cpus, gpus = options["num_cpus"], options["num_gpus"]
            actor = Actor(lambda: cls(*arguments), cpus, gpus, ray=self)
            self.actors.append(actor)
            return actor

        def chosen(**options: Any) -> Any:
            return SimpleNamespace(remote=lambda *arguments: make(options, arguments))

        return SimpleNamespace(options=chosen)

    def submit(self, actor: Actor, name: str, arguments: tuple[Any, ...]) -> Reference:
        reference = Reference(actor, float("inf"))
        actor.busy = max(actor.busy, self.now)
        actor.waiting.append((reference, name, arguments))
        actor.calls.append(reference)
        return reference

    def wait(
        self, references: Sequence[Reference], timeout: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        self._run()
        first = min(references, key=lambda one: one.at)
        if timeout is not None and first.at > self.now + timeout:
            self.now += timeout
            return [], list(references)
        assert first.at < float("inf"), "Ray would wait forever"
        self.now = max(self.now, first.at)
        return [first], [one for one in references if one is not first]

    def get(self, reference: Reference) -> Any:
        self.wait([reference])
        if reference.error is not None:
            raise reference.error
        return reference.value

    def kill(self, actor: Actor) -> None:
        if actor.alive:
            self._die(actor, self.now, "it was killed")

    # ---- what is behind it -------------------------------------------------------------------

    def _run(self) -> None:
        """Place actors where there is room, and carry out the calls of those that are placed."""
        for actor in self.actors:
            if actor.alive and actor.node is None:
                self._place(actor)
            while actor.waiting and (actor.node is not None or not actor.alive):
                self._carry_out(actor, *actor.waiting.pop(0))

    def _place(self, actor: Actor) -> None:
        fits = (
            node
            for node in self.cluster
            if node.alive and node.cpus >= actor.cpus and node.gpus >= actor.gpus
        )
        actor.node = next(fits, None)
        if actor.node is None:
            return
        actor.node.cpus -= actor.cpus
        actor.node.gpus -= actor.gpus
        actor.busy = max(actor.busy, self.now)
        self._current = actor
        try:
            actor.instance = actor.make()
        except Exception as error:
            self._die(actor, actor.busy, f"ray::Replica.__init__()\n{error}")

    def _carry_out(
        self, actor: Actor, reference: Reference, name: str, arguments: tuple[Any, ...]
    ) -> None:
        if not actor.alive:
            reference.at, reference.error = self.now, RayActorError(actor.why)
            return
        self._current = actor
        try:
            reference.value = getattr(actor.instance, name)(*arguments)
        except Killed:
            self._die(actor, actor.busy, "killed by signal 9")
            return
        except Exception as error:
            reference.error = RayTaskError(error)
        reference.at = actor.busy

    def _die(self, actor: Actor, at: float, why: str) -> None:
        actor.alive, actor.why = False, f"The actor died: {why}"
        for reference in actor.calls:
            if reference.at > at:
                reference.at, reference.error = at, RayActorError(actor.why)
        if actor.node is not None:
            actor.node.cpus += actor.cpus
            actor.node.gpus += actor.gpus
