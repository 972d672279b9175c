"""The service on a Ray cluster: the dispatcher and the workers are actors.

Ray restarts a dispatcher that died, on the same work folder; workers that died are replaced here,
and their number follows the demand.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from deltaserve.errors import DeltaServeError, ServiceError
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.service.dispatcher import Dispatcher
from deltaserve.pipeline.service.journal import Journal
from deltaserve.pipeline.service.link import WorkerLost, within
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from deltaserve.pipeline.service.worker import Worker

NAMESPACE = "deltaserve-pipelines"
# A worker or dispatcher that has not called for so long did not start, or hangs.
START_S = 60.0
SCALE_EVERY_S = 0.5
# An answer that takes longer is lost, and asked for again; every question may be repeated.
ANSWER_S = 5.0
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
# That a trainer has, after the error that tells it of a cluster that is gone.
AFTERWARDS_S = 600


class DispatcherActor:
    def __init__(self, folder: str, heartbeat_limit_s: float) -> None:
        self._dispatcher = Dispatcher(Path(folder), heartbeat_limit_s=heartbeat_limit_s)

    def ask(self, command: str, *args: Any) -> Any:
        assert not command.startswith("_"), command
        return getattr(self._dispatcher, command)(*args)


class WorkerActor:
    def __init__(self, service: str, name: str, beat_s: float) -> None:
        self._worker = Worker(name, RayLink(service), beat_s)
        threading.Thread(target=self._worker.beat_until_stopped, daemon=True).start()

    def live(self) -> None:
        """Answers if it does."""

    def prepare(self, *args: Any) -> Any:
        return self._worker.prepare(*args)

    def read(self, *args: Any) -> Any:
        return self._worker.read(*args)


# Ranges in the order in which they were asked for; readers of shared streams wait in threads.
GROUPS = {"splits": 1, "shared": 64}
GROUP_OF = {"prepare": "splits", "read": "shared"}


class RayLink:
    """A Link over actors that are found by their names."""

    def __init__(self, service: str, patience_s: float = 30.0) -> None:
        self._ray = import_ray()
        self._service, self.patience_s = service, patience_s
        self.node = self._ray.get_runtime_context().get_node_id()
        self._actors: dict[str, Any] = {}

    def ask(self, command: str, *args: Any, patience_s: float | None = None) -> Any:
        patience = self.patience_s if patience_s is None else patience_s
        limit = time.monotonic() + patience
        while True:
            try:
                answer = self._actor(dispatcher_name(self._service)).ask.remote(command, *args)
                return self._ray.get(answer, timeout=ANSWER_S)
            except self._ray.exceptions.RayTaskError as error:
                raise self._cause(error) from None
            except (self._ray.exceptions.RayError, ValueError, ConnectionError) as error:
                self._actors.clear()
                if time.monotonic() >= limit:
                    raise ServiceError(
                        f"the dispatcher of the pipeline service '{self._service}' did not answer "
                        f"for {patience:g} s ({type(error).__name__}); start the service again on "
                        "its work folder, then restore this consumer's last checkpoint"
                    ) from None
            time.sleep(0.1)

    def call(self, worker: str, method: str, *args: Any) -> Future[Any]:
        result: Future[Any] = Future()
        try:
            actor = self._actor(worker)
            grouped = getattr(actor, method).options(concurrency_group=GROUP_OF[method])
            asked = grouped.remote(*args).future()
        except (self._ray.exceptions.RayError, ValueError, ConnectionError) as error:
            result.set_exception(WorkerLost(f"{worker}: {error}"))
            return result

        def done(asked: Future[Any]) -> None:
            if not result.set_running_or_notify_cancel():
                return  # nobody wants it any more
            error = asked.exception()
            if error is None:
                result.set_result(asked.result())
            else:
                self._actors.pop(worker, None)
                result.set_exception(self._cause(error))

        asked.add_done_callback(done)
        return result

    def share(self, value: Any) -> Any:
        # In a list, so that who has the value already does not fetch it again.
        return [self._ray.put(value)]

    def open(self, shared: Any) -> Any:
        try:
            return self._ray.get(shared[0], timeout=2 * ANSWER_S)
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(str(error).partition("\n")[0]) from None

    def _actor(self, name: str) -> Any:
        if name not in self._actors:
            # A cluster that is gone would not answer before Ray ends the process.
            self._actors[name] = within(
                ANSWER_S, lambda: self._ray.get_actor(name, namespace=NAMESPACE)
            )
        return self._actors[name]

    def _cause(self, error: BaseException) -> BaseException:
        if isinstance(error, self._ray.exceptions.RayTaskError):
            known = isinstance(error.cause, (DeltaServeError, WorkerLost))
            return error.cause if known else error
        if isinstance(error, self._ray.exceptions.RayError):
            return WorkerLost(str(error).partition("\n")[0])
        return error


class Service:
    """A dispatcher with ``folder`` for its journal, and between ``min_workers`` and
    ``max_workers`` workers, as many as are wanted.

    address: of a running cluster; None: the one that this process is connected to, or one that
    is started on this machine and ends with the service. The service ends with this process;
    its jobs go on when it is started again on the same folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "pipeline",
        min_workers: int = 0,
        max_workers: int = 2,
        address: str | None = None,
        heartbeat_limit_s: float = 10.0,
        patience_s: float = 30.0,
    ) -> None:
        if not 0 <= min_workers <= max_workers:
            raise ServiceError(
                f"workers from {min_workers} to {max_workers}: the least must be 0 or more, and "
                "not more than the most"
            )
        _try_folder(folder)
        self._ray = import_ray()
        self.name, self._limits = name, (min_workers, max_workers)
        self._beat_s = heartbeat_limit_s / 5
        self._started = connect_ray(address, cpus=max(max_workers, 1))
        self._workers: dict[str, tuple[Any, float, bool]] = {}
        self._dispatcher = self._start_dispatcher(folder, heartbeat_limit_s)
        self.link = RayLink(name, patience_s)
        try:
            self.link.ask("stats", patience_s=max(patience_s, START_S))
        except ServiceError:
            self.close()
            raise
        self._stopped = threading.Event()
        self._scaler = threading.Thread(target=self._scale_until_stopped, daemon=True)
        self._scaler.start()

    def open(self, plan: Plan, options: JobOptions, cache: str | None = None) -> ServiceStream:
        """A consumer of a job, in this process. cache: a folder on the workers' machines."""
        return ServiceStream(self.link, plan, options, cache)

    def stats(self) -> dict[str, Any]:
        return self.link.ask("stats")

    def close(self) -> None:
        if hasattr(self, "_scaler"):
            self._stopped.set()
            self._scaler.join()
        for handle, _, _ in self._workers.values():
            self._ray.kill(handle)
        self._ray.kill(self._dispatcher)
        if self._started:
            self._ray.shutdown()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- inside

    def _start_dispatcher(self, folder: Path, heartbeat_limit_s: float) -> Any:
        name = dispatcher_name(self.name)
        remote = self._ray.remote(num_cpus=0, max_restarts=-1)(DispatcherActor)
        # Where this process is: the folder is on this machine.
        strategies = self._ray.util.scheduling_strategies
        here = strategies.NodeAffinitySchedulingStrategy(
            self._ray.get_runtime_context().get_node_id(), soft=False
        )
        options = {"name": name, "namespace": NAMESPACE, "scheduling_strategy": here}
        try:
            return remote.options(**options).remote(str(folder.absolute()), heartbeat_limit_s)
        except ValueError:
            raise ServiceError(
                f"a pipeline service '{self.name}' runs on this cluster; give this one another name"
            ) from None

    def _scale_until_stopped(self) -> None:
        while not self._stopped.wait(SCALE_EVERY_S):
            # A dispatcher that is being restarted is asked again.
            with contextlib.suppress(ServiceError):
                self._scale()

    def _scale(self) -> None:
        least, most = self._limits
        alive = set(self.link.ask("workers", patience_s=0))
        self._forget_dead(alive)
        wanted = min(max(self.link.ask("wanted_workers", patience_s=0), least), most)
        nodes = self.link.ask("wanting_nodes", patience_s=0)
        for number in range(wanted - len(self._workers)):
            # The consumers' own machines first.
            self._start_worker(nodes[number % len(nodes)] if nodes else None)
        surplus = len(self._workers) - wanted
        for name in self.link.ask("idlest", max(surplus, 0), patience_s=0):
            if name in self._workers:
                self.link.ask("leave", name, patience_s=0)
                self._ray.kill(self._workers.pop(name)[0])

    def _forget_dead(self, alive: set[str]) -> None:
        now = time.monotonic()
        for name, (handle, since, seen) in list(self._workers.items()):
            if name in alive:
                self._workers[name] = (handle, now, True)
            elif now - since > START_S or (seen and self._is_dead(handle)):
                self._ray.kill(handle)
                del self._workers[name]

    def _is_dead(self, handle: Any) -> bool:
        """Not merely silent, as on a machine that has too much to do."""
        try:
            answer = handle.live.options(concurrency_group="shared").remote()
            self._ray.get(answer, timeout=1.0)
        except self._ray.exceptions.GetTimeoutError:
            return False
        except self._ray.exceptions.RayError:
            return True
        return False

    def _start_worker(self, node: str | None) -> None:
        name = f"{self.name}-worker-{uuid.uuid4().hex[:8]}"
        options: dict[str, Any] = {"name": name, "namespace": NAMESPACE}
        if node is not None:
            strategies = self._ray.util.scheduling_strategies
            options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(
                node, soft=True
            )
        remote = self._ray.remote(num_cpus=1, concurrency_groups=GROUPS)(WorkerActor)
        handle = remote.options(**options).remote(self.name, name, self._beat_s)
        self._workers[name] = (handle, time.monotonic(), False)


def connect(name: str = "pipeline", address: str = "auto", patience_s: float = 30.0) -> RayLink:
    """From another process than the service's: for ``ServiceStream``.

    Raises:
        ServiceError: there is no such cluster, or no such service on it within the patience.
    """
    # Ray ends a process whose cluster is gone (after 60 s), in which a trainer may still have
    # something to save. It is read once, by ray.init, and who set it meant it.
    os.environ.setdefault(RECONNECT, str(int(patience_s) + AFTERWARDS_S))
    connect_ray(address)
    link = RayLink(name, patience_s)
    link.ask("stats")
    return link


def connect_ray(address: str | None, cpus: int | None = None) -> bool:
    """Whether a cluster was started. Raises ServiceError if there is none at the address."""
    ray = import_ray()
    if ray.is_initialized():
        return False
    own: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else own),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ServiceError(f"cannot reach the Ray cluster: {error}") from None
    return address is None


def _try_folder(folder: Path) -> None:
    """Tell here what would kill every dispatcher.

    Raises:
        ServiceError: the folder cannot be written, is used by another dispatcher, or its journal
            is damaged.
    """
    try:
        Journal(folder, lambda record: None).close()
    except OSError as error:
        raise ServiceError(
            f"the work folder {folder} cannot be used ({error.strerror}); name another"
        ) from None


def dispatcher_name(service: str) -> str:
    return f"{service}-dispatcher"


def import_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ServiceError(
            "the pipeline service needs Ray: pip install 'deltaserve[ray,pipeline]'; or run the "
            "plan with threads or processes"
        ) from None
    return ray
