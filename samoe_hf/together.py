"""Several videos at once: a model tracks frames of all of them in one batch, while one thread reads frames ahead, and
another writes what came of them.

A video is a generator of the steps that are to be run (see [`SamoeModel.frame_steps`]). In the threads nothing of
PyTorch runs, whose own threads would fight with the model's over the cores.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import BoundedSemaphore
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from samoe_hf.data.containers import keep_decoders
from samoe_hf.data.frames import FrameSequence
from samoe_hf.errors import InputError
from samoe_hf.model.kept import keep_between
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.tracking import SMALL_IMAGE_SIZE, TrackingStep, run_timed

T = TypeVar("T")
# The steps of a video, and then what it gives when that is written.
Work = Generator[TrackingStep, None, Future[T]]

AUTO_VIDEOS = 8
GPU_MEMORY = 2e9  # bytes beside the weights that a video of a few objects may take at 1024 x 1024
FRAMES_READ, JOBS_WAITING = 4, 4


def choose_videos_at_once(model: SamoeModel, wanted: int | None) -> int:
    """How many videos a model tracks at once: `wanted`, or None for as many as pay, 8 at most.

    On a CPU that is one where images are large, which fill it alone; on a GPU, what its free memory holds of videos
    with a few objects.
    """
    if wanted is not None:
        if wanted < 1:
            raise InputError(f"`videos_at_once` must be at least 1, got {wanted}.")
        return wanted
    size = model.config.image_size
    if model.device.type != "cuda":
        return AUTO_VIDEOS if size <= SMALL_IMAGE_SIZE else 1
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(AUTO_VIDEOS, int(free / (GPU_MEMORY * (size / 1024) ** 2))))


class Together:
    """A context in which a model tracks videos, up to `at_once` at the same time. At its end the threads have ended.

    If it is left by an error, videos that are not tracked to their end are dropped, and others are written.
    """

    def __init__(self, model: SamoeModel, at_once: int = 1):
        self.model, self.at_once = model, at_once
        self._active: list[Work[Any]] = []
        self._ending: deque[Future[Any]] = deque()
        self._failure: Exception | None = None

    def __enter__(self) -> "Together":
        self._failure = None
        self._reading, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._room = BoundedSemaphore(JOBS_WAITING)
        keep_decoders(self.at_once)
        return self

    def __exit__(self, *_: object) -> None:
        for work in self._active:
            work.close()
        self._reading.shutdown(cancel_futures=True)
        self._writing.shutdown()
        keep_decoders(0)

    def read_ahead(self, frames: FrameSequence) -> FrameSequence:
        """A video's frames, of which a thread reads the next ones."""
        return _FramesAhead(frames, self._reading)

    def writer(self) -> "Writer":
        """What writes a video."""
        return Writer(self._submit)

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        self._room.acquire()  # waits while much is to be written
        future = self._writing.submit(job)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def run(self, works: Iterable[Work[T]]) -> Iterator[T]:
        """Tracks videos, and yields what each gives as they end. Where one ends, the next begins.

        The first error of a video is raised when those that had begun are finished.
        """
        return keep_between(self._run(iter(works)))

    def _run(self, waiting: Iterator[Work[T]]) -> Iterator[T]:
        while True:
            running: dict[Work[T], TrackingStep] = {}
            resumed = list(self._active)
            while len(running) < self.at_once:
                work = resumed.pop(0) if resumed else None if self._failure else next(waiting, None)
                if work is None:
                    break
                if work not in self._active:
                    self._active.append(work)
                if (step := self._attempt(work, partial(_next_step, work))) is not None:
                    running[work] = step
            if running:
                self._run_steps(running)
            while self._ending and (self._ending[0].done() or not running):
                result = self._ending.popleft()
                if (error := result.exception()) is None:
                    yield result.result()
                else:
                    self._fail(error)
            if not running and not self._ending:
                break
        if self._failure is not None:
            raise self._failure

    def _run_steps(self, running: dict[Work[Any], TrackingStep]) -> None:
        """Runs steps together; if that fails, one by one, to see whose fault it is."""
        try:
            run_timed(self.model, list(running.values()))
        except Exception as error:
            for work, step in running.items():
                if len(running) > 1:
                    self._run_steps({work: step})
                else:
                    self._attempt(work, partial(work.throw, error))

    def _attempt(self, work: Work[Any], action: Callable[[], TrackingStep]) -> TrackingStep | None:
        """What a video does next; None if it ends."""
        try:
            return action()
        except StopIteration as end:
            self._ending.append(end.value)
        except Exception as error:
            self._fail(error)
        self._active.remove(work)
        return None

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error
        if self._failure is None and (len(self._active) > 1 or self._ending):
            tqdm.write(f"{error}\nNo more videos are begun; those that have begun are finished.", file=sys.stderr)
        self._failure = self._failure or error


class Writer:
    """Does something for a video in the thread that writes, one after another; after an error nothing more.

    The error is raised by the next call, and by the result of each job that was not done.
    """

    def __init__(self, submit: Callable[[Callable[[], Any]], Future[Any]]):
        self._submit, self._error = submit, None

    def __call__(self, job: Callable[..., T], *args: Any) -> Future[T]:
        if self._error is not None:
            raise self._error
        return self._submit(partial(self._do, job, *args))

    def always(self, job: Callable[..., T], *args: Any) -> Future[T]:
        """Does something even if there was an error."""
        return self._submit(partial(job, *args))

    def _do(self, job: Callable[..., T], *args: Any) -> T:
        if self._error is not None:
            raise self._error
        try:
            return job(*args)
        except BaseException as error:
            self._error = error
            raise


def _next_step(work: Work[Any]) -> TrackingStep:
    """The next step in which anything is to be segmented."""
    while not (step := next(work)).tasks:
        pass
    return step


def through(steps: Iterator[Any], take: Callable[[Any], object]) -> Generator[TrackingStep, None, float]:
    """Goes through the steps of a video, and gives `take` what comes of them.

    Returns how many seconds they took, with the video's share of the time of steps that ran with those of others.
    """
    seconds, start = 0.0, time.perf_counter()
    for one in steps:
        seconds += time.perf_counter() - start
        if isinstance(one, TrackingStep):
            yield one
            seconds += one.seconds
        else:
            take(one)
        start = time.perf_counter()
    return seconds + time.perf_counter() - start


class _FramesAhead(FrameSequence):
    """Frames that are read in a thread: the one that is asked for, and those that follow in the direction of the last
    two."""

    def __init__(self, frames: FrameSequence, thread: ThreadPoolExecutor):
        self.names, self.size, self.fps = frames.names, frames.size, frames.fps
        self._frames, self._thread, self._step, self._index = frames, thread, 1, 0
        self._read_frames: dict[int, Future[np.ndarray]] = {}

    def time(self, index: int) -> float | None:
        return self._frames.time(index)

    def _read(self, index: int) -> np.ndarray:
        if index != self._index:
            self._step, self._index = 1 if index > self._index else -1, index
        wanted = range(index, index + self._step * (FRAMES_READ + 1), self._step)
        known, self._read_frames = self._read_frames, {}
        for t in wanted:
            if 0 <= t < len(self):
                self._read_frames[t] = known.pop(t, None) or self._thread.submit(self._frames.__getitem__, t)
        for skipped in known.values():
            skipped.cancel()
        return self._read_frames[index].result()
