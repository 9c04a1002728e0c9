"""AdapterDesk: where requests with an adapter wait until it lies in the host's memory, beside the loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from octavo.protocol.lora import LoRARequest
from octavo.protocol.request import Request
from octavo.scheduler.adapter_cache import AdapterCache
from octavo.scheduler.audit import require

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.01
_NUM_THREADS = 4  # a second holds some three adapters of 80 MB: they are hashed, checked and laid out


class AdapterDesk:
    """Keeps up to `max_adapters` loaded. A request pins its adapter from `ready` to `release`; of those that nobody
    pins, the least recently used is dropped for another. Its owner is the engine's thread.

    An adapter is known by its number. Once loaded, the number stands for one name, one path, and the weights that were
    found there: cached KV blocks and running requests rely on it.
    """

    def __init__(self, load: Callable[[LoRARequest], bytes], drop: Callable[[int], None], max_adapters: int) -> None:
        """load: reads an adapter, on one of the desk's threads, and returns the digest of its weights, or raises
        ValueError in words. drop: forgets what was loaded under a number."""
        self._load, self._drop = load, drop
        self._cache = AdapterCache(max_adapters)
        self._by_place: dict[int, int] = {}  # the adapter id in each place that was ever taken
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="adapters")
        self._known: dict[int, tuple[LoRARequest, bytes]] = {}  # what each number stands for, and its digest
        self._loading: dict[int, tuple[LoRARequest, Future[bytes]]] = {}  # each is a user of its place
        self._waiting: dict[str, Request] = {}  # by request id, first come first
        self._pins: dict[str, int] = {}  # adapter ids, by request id

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def take(self, request: Request) -> None:
        """Queue a request that has an adapter. It comes back from `ready`. Raises ValueError for one that contradicts
        what its adapter's number stands for, or for an id that is here already."""
        name, lora = request.request_id, request.lora
        assert lora is not None
        if name in self._waiting or name in self._pins:
            raise ValueError(f"request_id={name!r} is in use by an unfinished request")
        number = lora.lora_int_id
        known = self._known.get(number) or self._loading.get(number)
        if known is not None and known[0] != lora:
            raise ValueError(
                f"lora_int_id={number} of adapter {lora.lora_name!r} from {lora.lora_path} stands for "
                f"{known[0].lora_name!r} from {known[0].lora_path} already; allowed: another number"
            )
        self._waiting[name] = request

    def ready(self, *, idle: bool) -> list[tuple[Request, bytes | Exception]]:
        """Requests whose adapter lies there now, with its digest, or with why it does not. idle: wait a little for
        one."""
        found = self._round()
        if not found and idle and self._loading:
            wait([future for _, future in self._loading.values()], _WAIT_SECONDS, FIRST_COMPLETED)
            found = self._round()
        return found

    def drop(self, request_ids: Iterable[str]) -> list[str]:
        """Forget requests that wait here. Returns which of them did."""
        return [name for name in dict.fromkeys(request_ids) if self._waiting.pop(name, None) is not None]

    def release(self, request_id: str) -> None:
        """The request has ended; one that pins nothing is fine."""
        adapter_id = self._pins.pop(request_id, None)
        if adapter_id is not None:
            self._cache.release(adapter_id)

    def audit(self) -> None:
        """I27: pins and users agree, and every loaded adapter has a place."""
        self._cache.audit()
        users = Counter([*self._pins.values(), *self._loading])
        counted = {number: count for number, count in self._cache.users().items() if count}
        require(users == counted, "I27: those who pin adapters in host memory are miscounted")

    def shutdown(self) -> None:
        """What is being loaded is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _round(self) -> list[tuple[Request, bytes | Exception]]:
        self._cache.begin_round()
        found: list[tuple[Request, bytes | Exception]] = []
        for number, (lora, future) in list(self._loading.items()):
            if future.done():
                del self._loading[number]
                found += self._loaded(lora, future)
        for name, request in list(self._waiting.items()):
            assert request.lora is not None
            number = request.lora.lora_int_id
            if number in self._loading or not self._cache.can_take(number):
                continue
            if number in self._cache:
                found.append((request, self._pin(name, number)))
            else:
                self._start(request.lora)
        return found

    def _start(self, lora: LoRARequest) -> None:
        number = lora.lora_int_id
        place = self._cache.take(number)
        assert place is not None
        evicted = self._by_place.get(place)
        if evicted is not None:
            self._drop(evicted)
        self._by_place[place] = number
        self._loading[number] = lora, self._pool.submit(self._load, lora)

    def _loaded(self, lora: LoRARequest, future: Future[bytes]) -> list[tuple[Request, bytes | Exception]]:
        """Those who waited for it, before anybody else can take its place."""
        number = lora.lora_int_id
        names = [name for name, r in self._waiting.items() if r.lora is not None and r.lora.lora_int_id == number]
        error = future.exception()
        _, digest = self._known.get(number, (lora, None))
        if error is None and digest not in (None, future.result()):
            self._drop(number)
            error = ValueError(
                f"adapter {lora.lora_name!r}: the weights at {lora.lora_path} have changed since they were loaded as "
                f"lora_int_id={number}; allowed: another number for the new ones"
            )
        if error is None:
            self._known[number] = lora, future.result()
            pinned = [(self._waiting[name], self._pin(name, number)) for name in names]
            self._cache.release(number)
            return [*pinned]
        self._cache.release(number)
        place = self._cache.place(number)
        self._cache.evict(number)
        del self._by_place[place]
        if not isinstance(error, ValueError):
            _log.error("adapter %s could not be loaded", lora.lora_name, exc_info=error)
        failure = error if isinstance(error, Exception) else RuntimeError(str(error))
        return [(self._waiting.pop(name), failure) for name in names]

    def _pin(self, name: str, number: int) -> bytes:
        self._cache.take(number)
        self._pins[name] = number
        del self._waiting[name]
        return self._known[number][1]
