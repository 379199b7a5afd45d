"""How much one person may ask of the app."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of uploads and sessions.

    Attributes:
        upload_bytes: of one file that is uploaded, and of all files in a zip together when they are unpacked.
        frames: of a video.
        pixels: of a frame.
        objects: of a video.
        prompts: clicks and boxes of a video.
        sessions: kept at once; another page is refused until one is free.
        idle_seconds: after which a session that nobody uses is freed.
        grace_seconds: after which a closed page's session is freed; a page that is loaded again within takes it up.
        waiting: requests that may wait for the device.
    """

    upload_bytes: int = 512 * 2**20
    frames: int = 30_000
    pixels: int = 4096 * 2304
    objects: int = 32
    prompts: int = 2000
    sessions: int = 32
    idle_seconds: float = 3600
    grace_seconds: float = 60
    waiting: int = 64
