"""The workers of a daemon as its one HTTP server sees them: asked for what they do, and handed what is to be done."""

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import hdrs, web
from yarl import URL

from poller.core.model import MappingStatus
from poller.errors import ApiError
from poller.ports import Clock, Overview
from poller.server import api, operate
from poller.server.merge import merged
from poller.telemetry import Metrics, MetricsReport, lasting, summed

REPORT_TIMEOUT = 5.0
"""Seconds that a worker has to say how it does; one that takes longer does not turn."""
FORWARD_TIMEOUT = 60.0
_FRESH = 0.1  # seconds that a report is good for: requests that come together cause one
REQUEST_ID = "x-amzn-RequestId"
IDENTITY, REMOTE = "X-Poller-Identity", "X-Poller-Remote"
_ANSWER_HEADERS = (hdrs.CONTENT_TYPE, hdrs.ALLOW, "x-amzn-ErrorType")


@dataclass(frozen=True, slots=True)
class Private:
    """What a worker's server needs: the path of a Unix socket that the parent alone can reach, and how the worker does.

    Who asks has been looked at by the parent, which says who it was.
    """

    path: str
    overview: Overview
    metrics: Metrics

    async def report(self) -> bytes:
        """For `Remote.refresh`."""
        counted = await self.metrics.report()
        overview = self.overview
        report = _Report(
            tuple(overview.status()), overview.health(), overview.unready(), counted, overview.store_problem()
        )
        return await asyncio.to_thread(pickle.dumps, report)


@dataclass(frozen=True, slots=True)
class _Report:
    """One worker, at one moment."""

    status: Sequence[MappingStatus]
    health: str | None
    unready: Sequence[str]
    metrics: MetricsReport
    store_problem: str = ""


@dataclass(slots=True)
class _Worker:
    """One that is up. `problem`: why its report is old."""

    session: aiohttp.ClientSession
    report: _Report
    problem: str | None = None


class Remote:
    """Implements `Overview` for all workers together, as of the last `refresh`; and the operations, by handing each to
    the first worker that is up. It writes them to the store, where the others see them within seconds.

    What a worker counted outlives it: the sums never go down.
    """

    def __init__(self, count: int, clock: Clock) -> None:
        self._clock = clock
        self._up: dict[int, _Worker] = {}
        self._down = dict.fromkeys(range(count), "it has not started yet")  # why
        self._kept = MetricsReport()  # of workers that have died
        self._is_stopping = False
        self._refreshing = asyncio.Lock()
        self._refreshed_at = 0.0
        self._changed_at = 0.0  # when the last request was forwarded: what it did must show in the next answer

    # --- what the parent says

    async def up(self, number: int, path: str) -> None:
        """The worker listens there."""
        session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path),
            timeout=aiohttp.ClientTimeout(FORWARD_TIMEOUT),
            auto_decompress=False,
            skip_auto_headers=[hdrs.USER_AGENT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE],
        )
        self._up[number] = worker = _Worker(session, _Report((), None, (), MetricsReport()))
        await self._ask(number, worker)
        self._down.pop(number, None)

    async def down(self, number: int, reason: str) -> None:
        """The worker has ended; `reason` for people."""
        self._down[number] = reason
        worker = self._up.pop(number, None)
        if worker is not None:
            self._kept = lasting(summed((self._kept, worker.report.metrics)), self._labels(worker))
            await worker.session.close()

    def stopping(self) -> None:
        """From now on not ready."""
        self._is_stopping = True

    async def close(self) -> None:
        """Ask nobody any more."""
        for worker in self._up.values():
            await worker.session.close()
        self._up.clear()

    # --- how they do

    async def refresh(self) -> None:
        """Ask every worker how it does. One that does not answer is a problem of its own; its last report stays."""
        async with self._refreshing:
            now = self._clock.now()
            if now - self._refreshed_at < _FRESH and self._refreshed_at > self._changed_at:
                return
            async with asyncio.TaskGroup() as tasks:
                for number, worker in self._up.items():
                    tasks.create_task(self._ask(number, worker))
            labels = self._labels()
            if labels or not self._down:  # else nobody knows which mappings are still there
                self._kept = lasting(self._kept, labels)
            self._refreshed_at = now

    async def _ask(self, number: int, worker: _Worker) -> None:
        if worker.session.closed:
            return
        try:
            async with asyncio.timeout(REPORT_TIMEOUT), worker.session.get("http://localhost/report") as answer:
                pickled = await answer.read()
                if answer.status != web.HTTPOk.status_code:
                    worker.problem = f"worker {number} cannot say how it does: see the log"
                    return
            worker.report = await asyncio.to_thread(pickle.loads, pickled)
            worker.problem = None
        except (aiohttp.ClientError, TimeoutError):
            worker.problem = f"worker {number} does not answer"

    def _labels(self, *more: _Worker) -> frozenset[tuple[str, str, str]]:
        return frozenset(
            (mapping.id, mapping.function, str(mapping.source))
            for worker in (*self._up.values(), *more)
            for mapping in worker.report.status
        )

    def status(self) -> Sequence[MappingStatus]:
        """Every mapping, each shard as the worker has it that reads it."""
        return merged(worker.report.status for _, worker in sorted(self._up.items()))

    def health(self) -> str | None:
        """None while all workers are up and well, else the first reason."""
        reasons = [f"worker {number} is down: {reason}" for number, reason in sorted(self._down.items())]
        for _, worker in sorted(self._up.items()):
            reasons += [reason for reason in (worker.problem, worker.report.health) if reason]
        return reasons[0] if reasons and not self._is_stopping else None

    def unready(self) -> Sequence[str]:
        """What any worker has not reached, each once, and workers that are not up."""
        if self._is_stopping:
            return ["the daemon is stopping"]
        reasons = [f"worker {number} is down: {reason}" for number, reason in sorted(self._down.items())]
        for _, worker in sorted(self._up.items()):
            reasons += worker.report.unready
        return list(dict.fromkeys(reasons))

    def store_problem(self) -> str:
        """What the first worker says that has one."""
        return next((problem for worker in self._up.values() if (problem := worker.report.store_problem)), "")

    def counted(self) -> Sequence[MetricsReport]:
        """What the workers have counted, those too that are gone."""
        return [self._kept, *(worker.report.metrics for worker in self._up.values())]

    # --- what is to be done

    def routes(self) -> list[web.RouteDef]:
        """Every path below those of the mapping API and of the operator."""
        return [web.route("*", f"{prefix}{{rest:.*}}", self._forward) for prefix in _PREFIXES]

    async def _forward(self, request: web.Request) -> web.Response:
        body = await api.read_body(request)
        url = URL(f"http://localhost{request.rel_url.raw_path_qs}", encoded=True)
        headers = {
            IDENTITY: request[api.IDENTITY],
            REMOTE: request[api.REMOTE],
            REQUEST_ID: request[api.REQUEST_ID],
            **_picked(request.headers, (hdrs.CONTENT_TYPE,)),
        }
        for _, worker in sorted(self._up.items()):
            if worker.session.closed:
                continue
            try:
                async with worker.session.request(
                    request.method, url, data=body, headers=headers, allow_redirects=False
                ) as answer:
                    content = await answer.read()
                    self._changed_at = self._clock.now()
                    return web.Response(
                        status=answer.status, body=content, headers=_picked(answer.headers, _ANSWER_HEADERS)
                    )
            except aiohttp.ClientConnectorError:  # it has just died: nothing was done
                continue
            except (aiohttp.ClientError, TimeoutError):
                break  # perhaps it was done
        raise ApiError("ServiceException", 500, "The worker that keeps the mappings did not answer. Try again.")


_PREFIXES = (api.PREFIX, api.TAGS_PREFIX, f"{operate.PREFIX}/")


def _picked(headers: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}
