"""Who uses the app: each page has a secret of its own, and what belongs to it is freed when the page is gone."""

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from samoe_hf.errors import InputError

from .comparison import Comparison
from .experts_view import ExpertsView
from .limits import Limits
from .memory import give_back_memory
from .session import TrackingSession

SECRET_BYTES = 32


@dataclass(eq=False)
class Person:
    """What one page has on the server.

    Attributes:
        secret: known to this page alone.
        folder: for its files.
        session: its video, once there is one.
        corner: of a box of which one corner was clicked: object, frame, x and y in pixels of the video.
        used_at: when it did something last; of `clock`.
        left_at: when its page was closed, None while it is open.
    """

    secret: str
    folder: Path
    used_at: float
    left_at: float | None = None
    session: TrackingSession | None = None
    corner: tuple[int, int, float, float] | None = None
    comparison: Comparison | None = None
    experts: ExpertsView | None = None
    pages: set[str] = field(default_factory=set)
    _folders: dict[str, Path] = field(default_factory=dict)

    def the_session(self) -> TrackingSession:
        """Its video; ValueError where there is none yet."""
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

    def fresh_folder(self, purpose: str) -> Path:
        """An empty folder; the one that was made for this purpose before is removed."""
        if purpose in self._folders:
            shutil.rmtree(self._folders[purpose], ignore_errors=True)
        self._folders[purpose] = Path(tempfile.mkdtemp(dir=self.folder))
        return self._folders[purpose]

    def take(self, session: TrackingSession) -> None:
        """Puts a new video in the place of the one before, whose files are removed."""
        before = self.session
        self.session, self.corner, self.comparison, self.experts = session, None, None, None
        if before is not None:
            before.stop()
            shutil.rmtree(before.folder, ignore_errors=True)


class People:
    """All who use the app, by their secrets.

    Args:
        folder: for the files of all of them.
        clock: seconds that only grow; another one for tests.
    """

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.folder, self.limits, self._clock = folder, limits, clock
        self._people: dict[str, Person] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._people)

    def enter(self, secret: object, page: str) -> Person:
        """The person of a page that was loaded: the one of its secret, such as after a refresh, or else a new one.

        Args:
            secret: what the page has kept, of any type; anything but a secret that is known counts as none.
            page: the page's own id, of which one person may have several one after another.

        Raises:
            ValueError: there are as many as the limits allow.
        """
        self.free_unused()
        with self._lock:
            person = self._people.get(secret) if isinstance(secret, str) else None
            if person is None:
                if len(self._people) >= self.limits.sessions:
                    raise InputError(
                        f"{len(self._people)} people use this app now, which is the most. Try again later."
                    )
                secret = secrets.token_urlsafe(SECRET_BYTES)
                self.folder.mkdir(parents=True, exist_ok=True)
                person = Person(secret, Path(tempfile.mkdtemp(dir=self.folder)), self._clock())
                self._people[secret] = person
            person.used_at, person.left_at = self._clock(), None
            person.pages.add(page)
            return person

    def __getitem__(self, secret: object) -> Person:
        """The person of a secret.

        Raises:
            ValueError: there is none, or none any more.
        """
        with self._lock:
            person = self._people.get(secret) if isinstance(secret, str) else None
            if person is None:
                raise InputError("This page was not used for a long time, and what it had was freed. Load it anew.")
            person.used_at = self._clock()
            return person

    def leave(self, page: str) -> None:
        """A page was closed or refreshed. Its person is freed if no page of it comes back in time."""
        with self._lock:
            for person in self._people.values():
                person.pages.discard(page)
                if not person.pages and person.left_at is None:
                    person.left_at = self._clock()
                    if person.session is not None:
                        person.session.stop()

    def free_unused(self) -> int:
        """Frees all whose pages are gone, or were not used for long; returns how many."""
        now, limits = self._clock(), self.limits
        with self._lock:
            gone = [
                person
                for person in self._people.values()
                if (person.left_at is not None and now - person.left_at >= limits.grace_seconds)
                or now - person.used_at >= limits.idle_seconds
            ]
            for person in gone:
                del self._people[person.secret]
        for person in gone:
            self._free(person)
        if gone:
            give_back_memory()
        return len(gone)

    def close(self) -> None:
        """Frees all."""
        with self._lock:
            gone, self._people = list(self._people.values()), {}
        for person in gone:
            self._free(person)

    @staticmethod
    def _free(person: Person) -> None:
        if person.session is not None:
            person.session.stop()
        if person.comparison is not None:
            person.comparison.stop()
        person.session = person.comparison = person.experts = None
        shutil.rmtree(person.folder, ignore_errors=True)


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
        people.close()
