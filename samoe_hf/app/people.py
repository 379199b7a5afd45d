"""Who uses the app: each page has a secret of its own, and what belongs to it is freed when the page is gone.

Gradio's own state ends with a page's connection, so that a refresh would lose the video; what is kept here does not.
"""

import ctypes
import gc
import hmac
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from samoe_hf.errors import InputError

from .comparison import Comparison
from .experts_view import ExpertsView
from .models import LoadedModel
from .session import TrackingSession
from .uploads import Limits

SECRET_BYTES = 32


@dataclass(eq=False)
class Person:
    """What one page has on the server: files in a folder, and a secret that is known to it alone."""

    secret: str
    folder: Path
    page: str = ""  # the id of the page that was loaded last
    is_open: bool = True  # that page was not closed
    used: float = 0.0  # when it was used last, by `People`'s clock
    kept_until: float = 0.0  # it is freed then
    session: TrackingSession | None = None
    corner: tuple[int, int, float, float] | None = None  # first one of a box: object, frame, x, y in the video's pixels
    comparison: Comparison | None = None
    experts: ExpertsView | None = None
    changed: dict[str, LoadedModel] = field(default_factory=dict)  # in place of the app's models of these names

    def the_session(self) -> TrackingSession:
        """Its video; InputError where there is none yet."""
        if self.session is None:
            raise InputError("There is no video yet: upload one, or take an example.")
        return self.session

    @contextmanager
    def opening(self) -> Iterator[Path]:
        """An empty folder for a video that is being opened, which is removed if that fails."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def take(self, session: TrackingSession | None) -> None:
        """Puts a new video, or none, in the place of the one before."""
        before, self.session, self.corner, self.experts = self.session, session, None, None
        self.compare(None)
        _discard(before)

    def compare(self, comparison: Comparison | None) -> None:
        """Puts a new comparison, or none, in the place of the one before."""
        before, self.comparison = self.comparison, comparison
        _discard(before)

    def free(self) -> None:
        """Removes all that the person has."""
        self.take(None)
        shutil.rmtree(self.folder, ignore_errors=True)


def _discard(work: TrackingSession | Comparison | None) -> None:
    """Stops what runs, and removes its files."""
    if work is not None:
        work.stop()
        shutil.rmtree(work.folder, ignore_errors=True)


class People:
    """All who use the app, by their secrets; `clock` gives seconds that only grow."""

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.folder, self.limits, self._clock = folder, limits, clock
        self._people: dict[str, Person] = {}
        self._lock, self._key = threading.Lock(), secrets.token_bytes(SECRET_BYTES)
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._people)

    def __iter__(self) -> Iterator[Person]:
        return iter(list(self._people.values()))

    def is_away(self, secret: object) -> bool:
        """Whether a secret is of these people, and no page is open with it."""
        if not self._was_given(secret):
            return False
        return secret not in self._people or not self._people[secret].is_open

    def _sign(self, name: str) -> str:
        return f"{name}.{hmac.new(self._key, name.encode(), 'sha256').hexdigest()}"

    def _was_given(self, secret: object) -> TypeGuard[str]:
        return (
            isinstance(secret, str)
            and secret.isascii()
            and hmac.compare_digest(secret, self._sign(secret.partition(".")[0]))
        )

    def enter(self, secret: object, page: str) -> Person:
        """The person of a page that was loaded: the one of its secret, such as after a refresh, or else a new one.

        A secret that was given stays good after its person was freed: who comes back with it is a new person under it.
        Where there are as many people as the limits allow, one without a video makes room if it is idle for as long as
        a closed page is kept; else it raises an InputError. The page takes the place of an earlier page of the person.
        """
        self.free_unused()
        with self._lock:
            if not self._was_given(secret):
                secret = self._sign(secrets.token_urlsafe(SECRET_BYTES))
            if secret not in self._people:
                latest = self._clock() - self.limits.grace_seconds
                idle = [person for person in self if person.session is None and person.used <= latest]
                if len(self) >= self.limits.sessions and not idle:
                    raise InputError(f"{len(self)} people use this app now, which is the most. Try again later.")
                if len(self) >= self.limits.sessions:
                    self._people.pop(min(idle, key=lambda person: person.used).secret).free()
                self._people[secret] = Person(secret, Path(tempfile.mkdtemp(dir=self.folder)))
            person = self._people[secret]
            person.page = page
            return self._used(person)

    def __getitem__(self, key: tuple[str, str]) -> Person:
        """The person of (secret, page), who does something now; InputError if it was freed or has another page."""
        secret, page = key
        with self._lock:
            person = self._people.get(secret)
            if person is None:
                raise InputError("This page was not used for a long time, and what it had was freed. Load it anew.")
            if person.page != page:
                raise InputError("This video was opened in another tab. Go on there, or load this page anew.")
            return self._used(person)

    def _used(self, person: Person) -> Person:
        person.is_open, person.used = True, self._clock()  # an event shows that a lost connection is there again
        person.kept_until = person.used + self.limits.idle_seconds
        return person

    def leave(self, page: str) -> None:
        """A page was closed or refreshed. Its person is freed if no page of it comes back in time."""
        with self._lock:
            for person in self._people.values():
                if person.page == page:
                    person.is_open = False
                    person.kept_until = min(person.kept_until, self._clock() + self.limits.grace_seconds)
                    if person.session is not None:
                        person.session.stop()

    def free_unused(self) -> int:
        """Frees all whose pages are gone, or were not used for long; returns how many."""
        with self._lock:
            gone = [person for person in self if person.kept_until <= self._clock()]
            for person in gone:
                del self._people[person.secret]
        for person in gone:
            person.free()
        if gone:
            gc.collect()
            # Linux' C library keeps freed RAM for each of the server's threads.
            if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
                trim(0)
        return len(gone)


@contextmanager
def freeing_unused(people: People, every_seconds: float = 10) -> Iterator[None]:
    """While the context is open, a thread frees what belongs to nobody any more."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_seconds):
            people.free_unused()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for person in people:
            person.take(None)
